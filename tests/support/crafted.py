"""Files that somebody made to keep whoever looks into them busy, or to take his memory."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

_BIG = 512 << 20


def _header(*, sections_at: int = 0, sections: int = 0, segments: int = 1) -> bytes:
    return (
        b"\x7fELF\2\1\1".ljust(16, b"\0")
        + struct.pack("<HHIQQQI", 3, 62, 1, 0, 64, sections_at, 0)
        + struct.pack("<HHHHHH", 64, 56, segments, 64, sections, 0)
    )


def _segment(size: int, kind: int = 1, offset: int = 0) -> bytes:
    return struct.pack("<IIQQQQQQ", kind, 5, offset, offset, offset, size, size, 4096)


def _section(kind: int, offset: int, size: int, link: int = 0) -> bytes:
    return struct.pack("<IIQQQQIIQQ", 0, kind, 0, 0, offset, size, link, 0, 8, 24)


def _write(path: Path, *parts: tuple[int, bytes], size: int = 0) -> None:
    with path.open("wb") as file:
        for at, data in parts:
            file.seek(at)
            file.write(data)
        file.truncate(max(size, file.tell()))
    path.chmod(0o755)


def _tables(path: Path, count: int, kind: int, strings: bytes = b"") -> None:
    """Symbol tables of 512 MB each, all the same hole of a sparse file."""
    rows = _section(3, 1 << 20, _BIG) + _section(kind, 1 << 20, _BIG) * (count - 1)
    head = _header(sections_at=4096, sections=count) + _segment(4096)
    _write(path, (0, head), (4096, rows), (1 << 20, strings), size=_BIG + (2 << 20))


def _strings(path: Path) -> None:
    rows = _section(3, 1 << 20, 12 << 20) + _section(11, 4096, 24)
    head = _header(sections_at=4096, sections=2) + _segment(4096)
    _write(path, (0, head), (4096, rows), (1 << 20, b"SSL_" * (3 << 20)))


def _notes(path: Path) -> None:
    head = _header(segments=256) + _segment(4096)
    _write(path, (0, head + _segment(64 << 10, 4, 1 << 16) * 255), size=2 << 20)


def _addresses(path: Path) -> None:
    """Each name sixteen times, and a symbol table that is full of their offsets."""
    names = (b"SSL_read", b"SSL_write", b"SSL_read_ex", b"SSL_write_ex", b"SSL_ctrl", b"SSL_free")
    strings, at = b"\0", []
    for name in names * 16:
        at.append(len(strings))
        strings += name + b"\0"
    table = b"\0" + b"".join(struct.pack("<I", each) * 100_001 for each in at)
    rows = _section(3, 8192, len(strings)) + _section(11, 1 << 20, len(table))
    head = _header(sections_at=4096, sections=2) + _segment(4096)
    _write(path, (0, head), (4096, rows), (8192, strings), (1 << 20, table))


def _chains(path: Path) -> None:
    """A hash table in which every name's chain is as long as it may be."""
    hashes = struct.pack("<4I", 1, 1, 0, 0) + struct.pack("<I", 1) + bytes(4 << 20)
    rows = _section(3, 1 << 20, 4096) + _section(11, 1 << 20, _BIG, 0)
    rows += _section(0x6FFFFFF6, 8192, len(hashes), 1)
    head = _header(sections_at=4096, sections=3) + _segment(4096)
    _write(path, (0, head), (4096, rows), (8192, hashes), size=_BIG + (2 << 20))


def _unwind(path: Path) -> None:
    """An unwind table of four million rows, and the mark of a stack to look for."""
    rows = b"\x01\x1b\x03\x3b" + bytes(4) + struct.pack("<I", 4 << 20)
    head = _header(segments=2) + _segment(40 << 20) + _segment(40 << 20, 0x6474E550, 1 << 20)
    mark = b"/ssl/ssl_lib.cc\0ssl/ssl_lib.c\0"
    _write(path, (0, head), (4096, mark), (1 << 20, rows), size=40 << 20)


def _references(path: Path) -> None:
    """Code in which everything may refer to everything."""
    head = _header() + _segment(8 << 20)
    code = b"/x/ssl/ssl_lib.cc\0".ljust(4096, b"\0")
    code += b"\x48\x8d\x0d" + struct.pack("<i", -7 - 4096 + 64)
    _write(path, (0, head), (4096, code + b"\x74\x02\x90\xc3" * (1 << 20)), size=8 << 20)


def _go(path: Path) -> None:
    """A million function tables, each of two million functions."""
    table = struct.pack(
        "<IBBBBQQQQQQQQ", 0xFFFFFFF1, 0, 0, 1, 8, 1 << 20, 1, 64, 64, 65, 66, 67, 68
    )
    head = _header() + _segment(16 << 20)
    body = b"\xff Go buildinf:" + bytes(100) + table * ((8 << 20) // len(table))
    _write(path, (0, head), (4096, body), size=16 << 20)


KINDS: dict[str, Callable[[Path], None]] = {
    "dynamic symbols": lambda path: _tables(path, 4000, 11),
    "static symbols": lambda path: _tables(path, 4000, 2, b"SSL_read\0SSL_write\0"),
    "strings": _strings,
    "notes": _notes,
    "addresses": _addresses,
    "chains": _chains,
    "unwind table": _unwind,
    "references": _references,
    "function tables": _go,
    "a hole": lambda path: _write(path, (0, b"\x7fELF"), size=1 << 40),
}


def make(kind: str, path: Path) -> Path:
    """Write a file of that kind."""
    KINDS[kind](path)
    assert os.path.getsize(path) >= 4
    return path
