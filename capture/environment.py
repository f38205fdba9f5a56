"""Checks whether uprobes can work here: what is missing, each with the command that fixes it.

Reads the system and changes nothing: no program is loaded, so a kernel that refuses the program
itself is found only when the helper starts. `run` then falls back to the proxy.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys

from capture import loader
from halton_meter.problem import Problem

KERNEL_MIN = (5, 15)
LOCKDOWN_FILE = "/sys/kernel/security/lockdown"
TRACEPOINTS = ("inet_sock_set_state", "tcp_destroy_sock", "sock_send_length", "sock_recv_length")
USE_PROXY = "use the proxy: halton-meter run --via proxy -- CMD"
NEEDS_ROOT = "attaching probes needs root"
_CAPABILITIES = {"SYS_PTRACE": 19, "SYS_ADMIN": 21}


def check_environment() -> list[Problem]:
    """List what keeps uprobes from working here for this user; empty when nothing does.

    Changes nothing and loads nothing, so a kernel that refuses the program itself is found only
    by `UprobeSource.start`.
    """
    if sys.platform != "linux":
        return [Problem(f"uprobes need Linux, this is {sys.platform}", USE_PROXY)]
    problems: list[Problem] = []
    release = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
    if release < KERNEL_MIN:
        what = f"Linux {platform.release()} is older than {KERNEL_MIN[0]}.{KERNEL_MIN[1]}"
        problems.append(Problem(what, USE_PROXY))
    if os.geteuid() != 0:
        problems.append(Problem(NEEDS_ROOT, "sudo halton-meter start"))
    elif missing := _missing_capabilities():
        grant = " ".join(f"--cap-add {name}" for name in missing)
        what = f"this root lacks {', '.join(missing)} (a container?)"
        problems.append(Problem(what, f"docker run --pid=host {grant} …"))
    if not os.path.exists("/sys/bus/event_source/devices/uprobe/type"):
        what = "the kernel has no uprobes (CONFIG_UPROBE_EVENTS)"
        problems.append(Problem(what, USE_PROXY))
    with contextlib.suppress(OSError), open(LOCKDOWN_FILE) as file:
        if "[confidentiality]" in file.read():
            what = "kernel lockdown is in confidentiality mode: BPF may not read user memory"
            command = "boot with lockdown=integrity, or disable Secure Boot; or " + USE_PROXY
            problems.append(Problem(what, command))
    return problems + _missing_loaders()


def missing_tracepoints() -> tuple[str, ...]:
    """The tracepoints that this kernel lacks to count connections at their sockets.

    The kernel's own type information names those that it has. Raises OSError where there is none.
    """
    with open("/sys/kernel/btf/vmlinux", "rb") as file:
        known = file.read()
    return tuple(name for name in TRACEPOINTS if b"\0btf_trace_%s\0" % name.encode() not in known)


def _missing_capabilities() -> list[str]:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("CapEff:"):
                mask = int(line.split()[1], 16)
                return [name for name, bit in _CAPABILITIES.items() if not mask >> bit & 1]
    return []


def _missing_loaders() -> list[Problem]:
    try:
        loader.libbpf_library()
        if loader.built_object() or loader.clang():
            return []
        fix = "apt install clang   # or install the wheel: it contains the compiled program"
        libbpf = Problem("the BPF program is not compiled and there is no clang", fix)
    except loader.LoadFailed as error:
        libbpf = Problem(str(error), "apt install libbpf1   # Fedora, Arch: libbpf")
    try:
        loader.import_bcc()
    except loader.LoadFailed:
        return [libbpf]
    return []
