"""Standard output and error of every command: any encoding, closed, full, or left by its reader.

A terminal or a locale may lack characters that names hold: they are replaced, drawing characters by
ASCII ones of the same meaning, and nothing fails. What standard output refuses (a full disk) ends
the command with one line; a reader that has seen enough (`| head`) ends it without a word; what
standard error refuses is dropped, so that a message can never break what it is about.
Standard library only, and little of it: every command imports this file.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import select
import sys
from typing import Any, TextIO

ERRORS = "halton_meter.replaced"
# Python's own "ascii" under another name: click writes UTF-8 to a stream that calls itself "ascii".
PLAIN_ASCII = "halton_meter_ascii"
_OTHERWISE = {
    **dict.fromkeys("▉▊▋█", "#"),
    **dict(zip("▁▂▃▄▅▆▇", "_.-=+*%", strict=True)),
    **dict.fromkeys("▌▍▎▏", "-"),
    **dict(zip("▓▒░▪", "=+:.", strict=True)),  # beside "#" for "█"
    **{"·": ".", "✓": "+", "✗": "x", "…": "...", "→": "->", "×": "x", "–": "-", "—": "-"},
    **{"≥": ">=", "≠": "!="},
    **{"‘": "'", "’": "'", "“": '"', "”": '"', "\u00a0": " ", "\u202f": " "},
}


class OutputRefused(Exception):
    """Standard output takes nothing more: `errno` and `strerror` say why.

    No OSError: whoever reads a store or a file means another place by that.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror or str(error))
        self.errno, self.strerror = error.errno, error.strerror or str(error)


class _Descriptor(io.FileIO):
    """A standard stream's file. After its first refusal it drops what comes."""

    def __init__(self, fd: int, *, raises: bool) -> None:
        super().__init__(fd, "w", closefd=False)
        self._raises, self._refused = raises, False

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        while not self._refused:
            try:
                written = super().write(data)
            except OSError as error:
                self._refused = True
                if self._raises:
                    raise OutputRefused(error) from None
                break
            if written is not None:
                return written
            # A program that shares the terminal or pipe has made it non-blocking.
            _wait_until_writable(self.fileno())
        return size


def _wait_until_writable(fd: int) -> None:
    ready = select.poll()  # select() takes no descriptor above 1,023
    ready.register(fd, select.POLLOUT)
    ready.poll()


def prepare() -> None:
    """Make both streams take any text. Does no harm when it is done again."""
    try:
        codecs.lookup_error(ERRORS)
    except LookupError:
        codecs.register_error(ERRORS, _replaced)
        codecs.register(_plain_ascii)
    sys.stdout = _prepared(sys.stdout, 1, raises=True)
    sys.stderr = _prepared(sys.stderr, 2, raises=False)


def _prepared(stream: TextIO | None, fd: int, *, raises: bool) -> TextIO:
    if stream is None:  # closed before we began, as `>&-` does
        return open(os.devnull, "w", encoding="utf-8", errors=ERRORS)
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    encoding = PLAIN_ASCII if _is_ascii(stream.encoding) else stream.encoding
    raw = getattr(stream.buffer, "raw", stream.buffer)  # itself where Python does not buffer
    if type(raw) is not io.FileIO or raw.fileno() != fd:
        stream.reconfigure(encoding=encoding, errors=ERRORS)
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Descriptor(fd, raises=raises)),
        encoding,
        ERRORS,
        line_buffering=stream.line_buffering or stream.write_through,
    )


def _is_ascii(encoding: str) -> bool:
    return codecs.lookup(encoding).name == "ascii"


def names_stdout(path: str) -> bool:
    """Whether a path that a user gives means standard output; "./-" is a file of that name."""
    return path in ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


def takes_all(stream: TextIO) -> bool:
    """Whether a stream's encoding has every character."""
    return codecs.lookup(stream.encoding).name.startswith("utf")


def finish() -> None:
    """Write out what is held. Raises OutputRefused."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError):  # closed meanwhile
            stream.flush()


def reader_left(refused: OutputRefused) -> bool:
    """Whether it is a reader that has seen enough, which is no failure."""
    return refused.errno == errno.EPIPE


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """What is written instead of characters that an encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_OTHERWISE.get(each, "?") for each in lost), error.end


def _plain_ascii(name: str) -> codecs.CodecInfo | None:
    if name != PLAIN_ASCII:
        return None
    found = codecs.lookup("ascii")
    return codecs.CodecInfo(
        found.encode,
        found.decode,
        found.streamreader,
        found.streamwriter,
        found.incrementalencoder,
        found.incrementaldecoder,
        PLAIN_ASCII,
    )
