"""Which TLS stacks left a marker in a file without symbols: one pass over the file."""

from __future__ import annotations

import os
from collections.abc import Iterator

from capture.functions.finder.scanning import Buffer
from capture.functions.stacks import STACKS, Stack

CHUNK_BYTES = 1 << 20
_MARKERS = {row.marker: stack for stack, row in STACKS.items() if row.marker is not None}


def stacks_in(fd: int) -> Iterator[Stack]:
    """The stacks whose markers are in the file; those that can be probed come first."""
    last, missing = [], dict(_MARKERS)
    keep, size = max(map(len, missing)) - 1, os.fstat(fd).st_size
    chunk = Buffer(CHUNK_BYTES + keep)
    for at in range(0, size, CHUNK_BYTES):
        chunk.length = os.preadv(fd, [chunk.room(CHUNK_BYTES + keep)], at)
        for marker in [marker for marker in missing if chunk.find(marker) >= 0]:
            stack = missing.pop(marker)
            if STACKS[stack].finder is None:
                last.append(stack)
            else:
                yield stack
    yield from last


def unprobed_in(fd: int) -> Stack | None:
    """A stack in the file that cannot be probed; None when there is none."""
    return next((stack for stack in stacks_in(fd) if STACKS[stack].finder is None), None)
