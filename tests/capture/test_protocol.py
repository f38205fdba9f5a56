"""Frames between helper and source: whole, byte by byte, split at random, and hostile."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture import loader, protocol
from capture.functions import stacks
from capture.helper.scope import host_key
from capture.protocol import FrameBuffer, ProtocolViolation, decode_record
from halton_meter.untrusted import Lines


def chunk(data: bytes = b"plain", length: int | None = None, offset: int = 7) -> bytes:
    size = protocol.RECORD.size + len(data)
    true = len(data) if length is None else length
    head = (size, protocol.CHUNK, 1, 0, 42, 1000, 0xABC, 5, 6, offset, true, len(data))
    return protocol.RECORD.pack(*head) + data


FRAMES = [
    chunk(),
    protocol.encode_message(protocol.REPORT, {"probes": 3}),
    chunk(b"", 900),
    protocol.encode_message(protocol.REPLY, {"id": 1}),
]
STREAM = b"".join(FRAMES)


def cut(*pieces: bytes) -> list[bytes]:
    buffer = FrameBuffer()
    frames = [frame for piece in pieces for _, frame in buffer.feed(piece)]
    assert buffer.pending_bytes == 0
    return frames


def test_frames_whole_and_byte_by_byte() -> None:
    assert cut(STREAM) == FRAMES
    assert cut(*(STREAM[i : i + 1] for i in range(len(STREAM)))) == FRAMES


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
@settings(max_examples=60, deadline=None)
def test_frames_split_anywhere(points: list[int]) -> None:
    edges = [0, *sorted(points), len(STREAM)]
    assert cut(*(STREAM[a:b] for a, b in pairwise(edges))) == FRAMES


def test_frames_before_a_bad_one_still_count() -> None:
    frames = FrameBuffer().feed(FRAMES[0] + b"\xff" * 8)
    assert next(frames)[1] == FRAMES[0]
    with pytest.raises(ProtocolViolation, match="4294967295 bytes"):
        next(frames)


@pytest.mark.parametrize("size", [0, 7, protocol.FRAME_BYTES_MAX + 1])
def test_a_frame_of_an_impossible_size(size: int) -> None:
    with pytest.raises(ProtocolViolation):
        list(FrameBuffer().feed(protocol.PREFIX.pack(size, 2, 0, 0)))


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_bytes_give_frames_or_the_one_named_error(data: bytes) -> None:
    try:
        for kind, frame in FrameBuffer().feed(data):
            if kind < protocol.PROCESS:
                decode_record(frame)
            else:
                protocol.decode_message(frame)
    except ProtocolViolation:
        pass


def test_a_chunk_keeps_its_offset_and_true_length() -> None:
    record = decode_record(chunk(b"abc", length=1000, offset=2**40))
    assert (record.data, record.length, record.offset) == (b"abc", 1000, 2**40)
    assert record.key == (42, 0xABC, 5)


def test_a_chunk_that_claims_more_than_it_carries() -> None:
    lying = bytearray(chunk(b"abc"))
    lying[protocol.RECORD.size - 4] = 200
    with pytest.raises(ProtocolViolation, match="200 bytes in 3"):
        decode_record(bytes(lying))


def test_commands_split_anywhere() -> None:
    commands = [{"do": "root", "pid": 3}, {"do": "stop"}]
    stream = b"".join(map(protocol.encode_command, commands))
    lines = Lines()
    found = []
    for i in range(len(stream)):
        lines.feed(stream[i : i + 1])
        found += lines.messages()
    assert found == commands


# --- what the C source says, and what Python thinks it says ---------------------------------------

SOURCE = Path(loader.SOURCE).read_text()


def c_enum(name: str) -> list[str]:
    match = re.search(rf"enum {name} \{{(.*?)\}}", SOURCE, re.S)
    assert match
    body = re.sub(r"/\*.*?\*/", "", match.group(1), flags=re.S)
    return [item.strip() for item in body.split(",") if item.strip()]


@pytest.mark.parametrize("deep", [b"[" * 60_000, b'{"a":' * 60_000], ids=["lists", "objects"])
def test_json_that_is_too_deep_is_refused_by_name(deep: bytes) -> None:
    """Found by the fuzzer: a RecursionError would end whoever reads it."""
    with pytest.raises(ProtocolViolation):
        protocol.decode_message(bytes(protocol.PREFIX.size) + deep)


def test_statistics_are_in_the_kernels_order() -> None:
    names = [name.removeprefix("STAT_").lower() for name in c_enum("statistic")]
    assert (*protocol.STATISTICS, "stats") == tuple(names)
    others = {"files_over_limit"}  # which the helper counts itself
    assert {*protocol.LOSS_CAUSES, *protocol.EVENT_LOSS_CAUSES} - others <= set(names)


def test_kinds_and_flags_are_the_kernels() -> None:
    for name, prefix in (("kind", "KIND_"), ("record_flag", "FLAG_")):
        for item in c_enum(name):
            key, _, value = item.partition(" = ")
            short = key if prefix == "FLAG_" else key.removeprefix(prefix)
            assert getattr(protocol, short) == int(value)


def test_the_flags_of_sockets_are_the_kernels() -> None:
    values = dict(item.split(" = ") for item in c_enum("socket_flag"))
    for flag in protocol.SocketFlag:
        assert values[f"SOCKET_{flag.name}"] == str(flag.value)


def c_size(struct_name: str) -> int:
    match = re.search(rf"struct {struct_name} \{{(.*?)\n\}};", SOURCE, re.S)
    assert match
    sizes = {"u64": 8, "u32": 4, "u16": 2, "u8": 1, "char": 1}
    total = 0
    body = re.sub(r"/\*.*?\*/", "", match.group(1), flags=re.S)
    for kind, count in re.findall(r"^\s*(u64|u32|u16|u8|char) \w+(?:\[(\w+)\])?;", body, re.M):
        number = {"": 1, "HOST_BYTES_MAX": protocol.HOST_BYTES_MAX}.get(count) or int(count)
        total += sizes[kind] * number
    return total


def test_structures_have_the_kernels_size() -> None:
    assert c_size("record") == protocol.RECORD.size
    assert c_size("connection") == protocol.CONNECTION.size
    assert c_size("tcp_socket") == protocol.SOCKET.size


KIND = "ARRAY|PERCPU_ARRAY|PROGRAM_ARRAY|HASH|LRU_HASH|TRIE|RING"
MAPS = re.findall(rf"^(?:{KIND})\((\w+), .*\);$", SOURCE, re.M)


def test_every_map_says_what_it_holds_who_writes_and_who_reads() -> None:
    """One comment before it, or before the two that share one."""
    assert len(MAPS) == 34
    comments = re.findall(rf"/\*((?:(?!\*/).)*)\*/\n((?:(?:{KIND})\(.*\);\n)+)", SOURCE, re.S)
    described = {
        name: comment for comment, lines in comments for name in MAPS if f"({name}," in lines
    }
    for name in MAPS:
        comment = described[name]
        assert "Read by" in comment or "ead at once" in comment or "Key: " in comment, name
        assert "ring" in name or ("Value: " in comment and re.search("read|copied", comment)), name


def test_every_program_and_map_that_is_loaded_exists() -> None:
    for program in (*loader.PROGRAMS, *loader.AT_ONCE, loader.ANY_WRITE):
        assert re.search(rf"int {loader.SAME.get(program, program)}\(", SOURCE)
    for name in (*loader.MAPS, loader.FILE_PROGRAMS):
        assert name in MAPS


def test_the_program_of_all_writes_knows_the_others_numbers() -> None:
    for program in loader.WRITES[1:]:
        name = program.removeprefix("enter_").upper()
        (number,) = re.findall(rf"#define NUMBER_{name} (\d+)\n", SOURCE)
        assert int(number) == stacks.PROGRAMS.index(program)
    assert stacks.PROGRAMS.index(loader.WRITES[0]) == 0


# --- host names -----------------------------------------------------------------------------------


def test_a_whole_name_is_closed_by_nul_so_that_no_suffix_passes_for_it() -> None:
    key = host_key("API.example.com.")
    assert key[4:].startswith(b"moc.elpmaxe.ipa\0")
    assert int.from_bytes(key[:4], "little") == 16 * 8


def test_a_suffix_ends_in_the_dot() -> None:
    key = host_key("*.example.com")
    assert key[4:].startswith(b"moc.elpmaxe.\0")
    assert int.from_bytes(key[:4], "little") == 12 * 8


@pytest.mark.parametrize("host", ["", "x" * 127, "*."])
def test_names_that_cannot_be_hosts(host: str) -> None:
    from capture.helper.scope import Refused

    if host == "*.":
        assert host_key(host)  # "*.": every name below the root; the user asked for it
        return
    with pytest.raises(Refused):
        host_key(host)
