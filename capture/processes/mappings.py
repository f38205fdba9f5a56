"""Which files a process maps executable, by /proc/PID/maps."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

MAPS_BYTES_MAX = 512 << 10
"""Read of one process's mappings: some 5,000 of them, where Chromium has 2,000."""


@dataclass(frozen=True, slots=True)
class FileMapping:
    """An executable file mapping of a process; `link` opens the very file, deleted or not."""

    device: int
    inode: int
    path: str
    link: str


def parse_maps(text: bytes, pid: int) -> Iterator[FileMapping]:
    """The executable file mappings in the text of /proc/PID/maps, each file once."""
    seen: set[tuple[bytes, bytes]] = set()
    for match in re.finditer(rb"[^\n]+", text):
        fields = match[0].split(None, 5)
        if len(fields) < 6 or b"x" not in fields[1] or fields[4] == b"0":
            continue
        if (fields[3], fields[4]) in seen:
            continue
        seen.add((fields[3], fields[4]))
        major, _, minor = fields[3].partition(b":")
        yield FileMapping(
            os.makedev(int(major, 16), int(minor, 16)),
            int(fields[4]),
            os.fsdecode(fields[5]).removesuffix(" (deleted)"),
            f"/proc/{pid}/map_files/{_address_range(fields[0])}",
        )


def _address_range(text: bytes) -> str:
    # map_files names have no leading zeros, maps pads to eight digits.
    start, _, end = text.partition(b"-")
    return f"{int(start, 16):x}-{int(end, 16):x}"


def executable_mappings(pid: int) -> Iterator[FileMapping] | None:
    """The executable file mappings of a process; None when it is gone."""
    try:
        with open(f"/proc/{pid}/maps", "rb", buffering=0) as file:
            text = bytearray()
            while len(text) < MAPS_BYTES_MAX and (more := file.read(1 << 16)):
                text += more
    except OSError:
        return None
    return parse_maps(bytes(text), pid) if text else None


def offset_in_file(address: int) -> tuple[str, int] | None:
    """The file that this process maps at an address of its own, and the offset in it."""
    with open("/proc/self/maps", "rb") as maps:
        for line in maps:
            fields = line.split(None, 5)
            start, _, end = fields[0].partition(b"-")
            if int(start, 16) <= address < int(end, 16) and len(fields) == 6:
                path = os.fsdecode(fields[5].rstrip(b"\n"))
                return path, address - int(start, 16) + int(fields[2], 16)
    return None
