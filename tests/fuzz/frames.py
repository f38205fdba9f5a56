"""Frames from the root helper, and commands to it, of any bytes.

Whoever reads them meets `ProtocolViolation` and nothing else, keeps a bounded rest, and gives out
every whole frame that came before.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
from typing import Any

from capture import protocol
from capture.helper.relay.spool import Receipt
from capture.helper_process import Scope
from capture.protocol import FrameBuffer, ProtocolViolation
from capture.uprobes import UprobeSource
from halton_meter.model import TlsChunk
from halton_meter.untrusted import Lines
from tests.fuzz import attack as driver
from tests.fuzz.mutate import ODD_VALUES, cut, mutated, wrong_types

KINDS = (
    protocol.OPEN, protocol.CHUNK, protocol.CLOSE, protocol.EXIT, protocol.EXEC, protocol.SHUTDOWN,
    protocol.MAPPED, protocol.NOT_HTTP, protocol.LOOKUP, protocol.UNNAMED, protocol.LEARNED, 0, 99,
)  # fmt: skip
COMMANDS: tuple[dict[str, Any], ...] = (
    {"do": "root", "pid": 1, "id": 1},
    {"do": "hosts", "hosts": ["api.openai.com"], "id": 2},
    {"do": "report", "id": 3},
    {"do": "barrier", "id": 4},
    {"do": "stop", "id": -1},
)


def run(seed: int, seconds: float | None = None, cases: int | None = None, only: int | None = None
        ) -> driver.Findings:  # fmt: skip
    """Attack both ends of the helper's socket."""
    return driver.attack("frames", _case, seed, seconds=seconds, cases=cases, only=only)


def _case(dice: random.Random) -> None:
    way = dice.random()
    if way < 0.3:
        _commands(dice)
    elif way < 0.6:
        _buffers(dice)
    else:
        _source(dice)


# --- commands -------------------------------------------------------------------------------------


def _commands(dice: random.Random) -> None:
    """Whole commands before the damage are given out."""
    honest = [dice.choice(COMMANDS) for _ in range(dice.randint(0, 4))]
    data = b"".join(map(protocol.encode_command, honest))
    hostile = dice.choice((
        b"[" * dice.choice((10, 5_000, 60_000)) + b"\n",
        b'{"a":' * 60_000 + b"\n",
        b"1" * dice.choice((5, 5_000)) + b"\n",
        json.dumps(dice.choice(ODD_VALUES)).encode() + b"\n",
        mutated(dice, protocol.encode_command(wrong_types(dice, dict(COMMANDS[1]), 0.3))),
        b"\xff\xfe\n",
        b"\n",
    ))  # fmt: skip
    lines, got = Lines(protocol.COMMAND_BYTES_MAX), []
    for piece in cut(dice, data):
        lines.feed(piece)
        got += lines.messages()
    assert got == honest
    for piece in cut(dice, hostile):
        lines.feed(piece)
        for command in lines.messages():
            assert isinstance(command, dict)


# --- frames ---------------------------------------------------------------------------------------


def _record(dice: random.Random, kind: int) -> bytes:
    body = dice.randbytes(dice.choice((0, 8, 16, 144, 600)))
    head = (protocol.RECORD.size + len(body), kind, dice.randrange(2), 0, dice.randint(1, 3), 1000)
    times = (dice.randint(1, 3), 5, dice.choice((6, 2**63, 2**64 - 1)), dice.choice((0, 2**64 - 1)))
    length = dice.choice((len(body), 2**32 - 1, 0))
    return protocol.RECORD.pack(*head, *times, length, dice.choice((len(body), 0))) + body


def _message(dice: random.Random, chance: float) -> bytes:
    """A frame of the helper's own; of what is no JSON, or of the wrong types, with that chance."""
    kind, content = dice.choice((
        (protocol.REPLY, {"id": 1}),
        (protocol.REPLY, {"id": 3, "from": 5, "until": 9}),
        (protocol.REPORT, {"statistics": {}, "coverage": []}),
        (protocol.PROBLEM, {"what": "x", "missing": [["a", "b"]]}),
    ))  # fmt: skip
    if dice.random() >= chance:
        return protocol.encode_message(kind, content)
    if dice.random() < 0.5:
        return protocol.encode_message(kind, wrong_types(dice, content, 0.3))
    body = dice.choice((b"[", b'{"a":')) * dice.choice((9, 60_000))
    return protocol.PREFIX.pack(protocol.PREFIX.size + len(body), kind, 0, 0) + body


def _frame(dice: random.Random, chance: float) -> bytes:
    if dice.random() < 0.3:
        return _message(dice, chance)
    frame = _record(dice, dice.choice(KINDS))
    return mutated(dice, frame, 2) if dice.random() < 0.2 else frame


def _buffers(dice: random.Random) -> None:
    whole = [_record(dice, dice.choice(KINDS)) for _ in range(dice.randint(0, 6))]
    frames, got = FrameBuffer(), []
    for piece in cut(dice, b"".join(whole)):
        got += [frame for _, frame in frames.feed(piece)]
    assert got == whole
    assert frames.pending_bytes == 0
    with contextlib.suppress(ProtocolViolation):
        for piece in cut(dice, _frame(dice, 0.5)):
            for _, frame in frames.feed(piece):
                with contextlib.suppress(ProtocolViolation):
                    protocol.decode_record(frame)
                with contextlib.suppress(ProtocolViolation):
                    protocol.decode_message(frame)
    assert frames.pending_bytes <= protocol.FRAME_BYTES_MAX


def _source(dice: random.Random) -> None:
    """A source reads on to the end of what a helper sends, or refuses the rest by name.

    The helper's own messages are root's, and well formed; records hold what any process says.
    """
    near, far = socket.socketpair()
    source = UprobeSource([], Scope(), link=far)
    with near:
        receipt = Receipt.new()
        socket.send_fds(near, [protocol.encode_message(protocol.HELLO, {})], [receipt.fd])
        receipt.close()
        begins = {"id": 1, "from": 0, "until": 0}
        near.sendall(protocol.encode_message(protocol.REPLY, begins))
        near.sendall(protocol.encode_message(protocol.REPORT, {"loader": "fuzz"}))
        near.sendall(protocol.encode_message(protocol.REPLY, {"id": 2}))
        source.start()
        honest = struct.pack("=Q", 0) + b"0123456789"
        chunk = protocol.RECORD.pack(
            protocol.RECORD.size + len(honest), protocol.CHUNK, 0, 0, 777, 1000, 9, 5, 6, 0,
            len(honest), len(honest)
        ) + honest  # fmt: skip
        near.sendall(chunk + b"".join(_frame(dice, 0.0) for _ in range(dice.randint(0, 8))))
    events = []
    try:
        with contextlib.suppress(ProtocolViolation):
            while not source.ended:
                events += source.read(1.0)
        events += source._progress.events
    finally:
        source.stop(wait=False)
    first = next(event for event in events if isinstance(event, TlsChunk))
    assert first.data == honest
