"""How a function of a Go program begins: the finder looks for it, root's check holds it to that."""

from __future__ import annotations

import re

# How a function that may need more stack begins: comparing the stack pointer to the goroutine's
# limit. x86-64: cmp rsp,[r14+0x10], or lea r12,[rsp-n]; cmp r12,[r14+0x10].
# aarch64: ldr x16,[x28,#16].
BEGINS = {
    "x86_64": re.compile(
        rb"(?s)(?:\x4c\x8d(?:\x64\x24.|\xa4\x24....)\x4d\x3b\x66\x10|\x49\x3b\x66\x10)"
    ),
    "aarch64": re.compile(rb"\x90\x0b\x40\xf9"),
}
