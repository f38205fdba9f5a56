"""Which TLS stacks left a marker in a file without symbols: a pass over the file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from capture.functions.finder.scanning import Buffer
from capture.functions.stacks import STACKS, Stack

CHUNK_BYTES = 1 << 20
_PROBED = {m: stack for stack, row in STACKS.items() if row.finder for m in row.markers}
_OTHERS = {m: stack for stack, row in STACKS.items() if not row.finder for m in row.markers}
PROBED = frozenset(_PROBED.values())
"""The stacks that a finder looks for."""


def stacks_in(fd: int) -> Iterator[Stack]:
    """The stacks whose markers are in the file; those that can be probed come first."""
    yield from _marked(fd, _PROBED)
    yield from unprobed_in(fd)


def unprobed_in(fd: int) -> Iterator[Stack]:
    """The stacks in the file that cannot be probed; what is of no kind that we know comes last."""
    found = set()
    for stack in _marked(fd, _OTHERS):
        if stack is not Stack.OTHER and stack not in found:
            yield stack
        found.add(stack)
    if Stack.OTHER in found:
        yield Stack.OTHER


def _marked(fd: int, markers: Mapping[bytes, Stack]) -> Iterator[Stack]:
    missing = dict(markers)
    keep, size = max(map(len, missing)) - 1, os.fstat(fd).st_size
    chunk = Buffer(CHUNK_BYTES + keep)
    for at in range(0, size, CHUNK_BYTES):
        chunk.length = os.preadv(fd, [chunk.room(CHUNK_BYTES + keep)], at)
        for marker in [marker for marker in missing if chunk.find(marker) >= 0]:
            yield missing.pop(marker)
