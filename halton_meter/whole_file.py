"""Files of ours that are there whole or not at all, and leave nothing behind where a disk is full.

What a user names is `cli/named.py`'s, and what belongs to other programs `proxy_fallback/setup`'s.
Standard library only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that only its owner may read; it takes the place of `path` at the end.

    Where that fails it is removed, and `path` is what it was. Raises OSError.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):  # by one of our number that was killed
        fresh.unlink()
    try:
        with os.fdopen(os.open(fresh, _FLAGS, 0o600), "wb") as file:
            yield file
        os.replace(fresh, path)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise
