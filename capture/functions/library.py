"""What a search finds in a file: a TLS library, its probes and the functions they are in.

Root acts on this, after its own check (`helper/files/placement.py`): each function comes with what
in the file proves its start. Data only; `finder_protocol.py` carries it between processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from capture.functions.rustls_layer import RecordLayer
from capture.functions.stacks import Stack


class Probe(NamedTuple):
    """A BPF program, and the file offset that it belongs at."""

    program: str
    offset: int
    at_return: bool = False


class Proof(Enum):
    """What in a file proves that a function starts at an offset."""

    SYMBOL = "symbol"  # `Function.at` is the file offset of its row in a symbol table
    UNWIND = "unwind"  # the unwind table has it
    CALL = "call"  # at `at` is an instruction that calls it
    GO = "go"  # `at` is its row in Go's function table


class Function(NamedTuple):
    """A probed function: the file offset of its start, and what in this very file proves it.

    `size_bytes` is 0 where only its start is probed.
    """

    offset: int
    proof: Proof
    at: int = 0
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Library:
    """A file with a TLS stack in it.

    With no probes it cannot be metered; `reason` is why. `cookie` is given to the programs.
    When it is `unproved`, its functions were found by what the code does: bytes must prove them.
    `beside` is another stack in the same file, which is not probed. Each probe is in one of the
    `functions`. `layer` is what rustls' probes must be told. `others` are more libraries in the
    same file, each with probes or a reason of its own, and with no others: another stack, or rustls
    once more.
    """

    stack: Stack
    probes: tuple[Probe, ...]
    build_id: str | None
    reason: str | None = None
    cookie: int = 0
    unproved: bool = False
    beside: Stack | None = None
    functions: tuple[Function, ...] = ()
    layer: RecordLayer | None = None
    others: tuple[Library, ...] = ()

    @property
    def is_linker(self) -> bool:
        """Whether it is no TLS stack, but reports the libraries that it maps."""
        return self.stack is Stack.LINKER


def probe_offset(code: bytes, machine: str = "x86_64") -> int:
    """How far into a function to attach: past `endbr64` when a `push` follows it, else 0.

    The kernel emulates a push but single-steps endbr64, which costs twice as much; the stack
    pointer and the arguments are the same at both.
    """
    if machine != "x86_64" or len(code) < 6 or code[:4] != b"\xf3\x0f\x1e\xfa":
        return 0
    pushes = 0x50 <= code[4] <= 0x57 or (code[4] == 0x41 and 0x50 <= code[5] <= 0x57)
    return 4 if pushes else 0
