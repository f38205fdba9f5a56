"""The system's own TLS libraries and dynamic linkers: probed before any process maps them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_DIRECTORIES = ("/lib64", "/usr/lib64", "/usr/lib", "/usr/local/lib", "/lib")
_LIBRARIES = (
    b"libssl.so",
    b"libgnutls.so",
    b"libnspr4.so",
    b"libssl3.so",  # NSS
    b"libmbedtls.so",
    b"libwolfssl.so",
    b"libs2n.so",
)


def standard_linkers() -> list[str]:
    """The dynamic linkers that programs of this machine name as their interpreter."""
    found = [*Path("/lib64").glob("ld-linux-*.so.*"), *Path("/lib").glob("ld-*.so.*")]
    return sorted({os.path.realpath(path) for path in found})


def standard_files() -> list[str]:
    """Shared TLS libraries that a short-lived process may load: attached before any does."""
    found: dict[tuple[int, int], str] = {}
    paths: list[str] = []
    with contextlib.suppress(OSError):
        cache = Path("/etc/ld.so.cache").read_bytes()
        for name in _LIBRARIES:
            paths += _named(cache, b"/" + name)
    for directory in _DIRECTORIES:
        for name in _LIBRARIES:
            paths += map(str, Path(directory).glob(f"{name.decode()}*"))
    for path in paths:
        with contextlib.suppress(OSError):
            real = os.path.realpath(path)
            stat = os.stat(real)
            found.setdefault((stat.st_dev, stat.st_ino), real)
    return list(found.values())


def _named(cache: bytes, name: bytes) -> Iterator[str]:
    """The paths in the linker's cache that have this in them."""
    at = cache.find(name)
    while at >= 0:
        start, end = cache.rfind(b"\0", 0, at) + 1, cache.find(b"\0", at)
        yield os.fsdecode(cache[start:end])
        at = cache.find(name, end)
