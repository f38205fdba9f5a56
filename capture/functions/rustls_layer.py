"""Where rustls' record layer passes plaintext: what the search finds and what probes must be told.

rustls encrypts and decrypts each TLS record by a virtual call (`MessageEncrypter::encrypt`,
`MessageDecrypter::decrypt`) through two boxes that one struct holds, its `RecordLayer`:

    sending:    encrypt(&mut result, encrypter, &message, write_seq)
    receiving:  decrypt(&mut result, decrypter, &message, read_seq)

Probes belong at instructions in the middle of functions, a little before such a call and behind
it, where registers are known to hold what is wanted. `finder/rustls.py` finds them,
`helper/files/placement.py` checks them as root. Data only: nothing here reads a file.

What lies at the addresses, in rustls 0.23.16 to 0.23.46 (rustc 1.81 to 1.100), 64-bit:

- At layer + `encrypter` and + `decrypter` is a `Box<dyn …>`: the object's address, then its vtable.
  The object stays where it is when the connection moves: it is what identifies a connection.
- At layer + `write_seq` and + `read_seq` is the number (u64) of the next record.
- At `Send.message` is an OutboundPlainMessage. Word 0 is zero: one piece, its address at 8, its
  length at 0x10. Else several: word 0 points to (address, length) pairs, their count is at 8, and
  the record is bytes `start`, at 0x10, to `end`, at 0x18, of all pieces together. Type (u8) at
  0x20: 20, 21, 22, 23 of TLS are 0, 1, 2 and 3.
- At `Received.result` is a Result<InboundPlainMessage, Error>: byte 0 is `ok_tag` where it is Ok;
  then the plaintext's address is at 8, its length at 0x10, its type (as above) at 0x18.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

SITES_MAX = 32
"""Of each kind, of one rustls: 4 in the builds seen."""
DISPLACEMENT_MAX = 0x7FFF
"""Of a pointer, either way: 16 bits with the sign."""


class Kind(Enum):
    """The instruction that a probe is put on: what it costs, and what root's check looks for.

    The kernel emulates a branch; it single-steps the others, which takes ten times as long.
    """

    BRANCH = "branch"  # a conditional jump, of two bytes or of six
    LOAD = "load"  # loads a box's address or vtable from the layer
    CALL = "call"  # the virtual call itself
    AFTER = "after"  # the instruction that the virtual call returns to


class Pointer(NamedTuple):
    """An address: what a register holds at the probe, plus a constant.

    Registers are numbered as the machine's instructions do. x86-64: rax 0, rcx 1, rdx 2, rbx 3,
    rsp 4, rbp 5, rsi 6, rdi 7, r8 to r15. aarch64: x0 to x30, sp 31.
    """

    register: int
    displacement: int = 0


class Send(NamedTuple):
    """A probe before `encrypt`: it sees each record that is sent through that call.

    `offset` is the file offset of the instruction, `function` that of its function's start.
    `counted`: the layer's `write_seq` has been raised already, so the record's own number is one
    less.
    """

    offset: int
    kind: Kind
    function: int
    layer: Pointer
    message: Pointer
    counted: bool


class Receive(NamedTuple):
    """A probe before `decrypt`; the thread then comes by a `Received` of the same function.

    `read_seq` is still the record's own number there.
    """

    offset: int
    kind: Kind
    function: int
    layer: Pointer


class Received(NamedTuple):
    """A probe behind `decrypt`: the result is there, and no field of the layer has changed.

    `receive` is the file offset of the `Receive` that belongs to it.
    """

    offset: int
    kind: Kind
    function: int
    result: Pointer
    receive: int


class ServerName(NamedTuple):
    """Where a client connection (TLS 1.3) keeps the name that it was asked to connect to.

    At layer + `state` is a Box<dyn State>: object and vtable. At object + `name` is the name's
    address, behind it its length. While records are received the box may be gone.
    """

    state: int
    name: int


@dataclass(frozen=True, slots=True)
class RecordLayer:
    """One rustls in a file: offsets in its `RecordLayer`, and the probes on its code.

    `version` is that of the source path, such as "0.23.46"; None for a fork or a checkout.
    `server_name` is None where it is not known for the version: the kernel may learn it.
    """

    version: str | None
    encrypter: int
    decrypter: int
    write_seq: int
    read_seq: int
    ok_tag: int
    server_name: ServerName | None
    sends: tuple[Send, ...]
    receives: tuple[Receive, ...]
    received: tuple[Received, ...]
