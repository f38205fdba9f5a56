"""Files that a user names: no empty name, and what is written to where the name is no file's.

An empty name is what a script makes of a variable that it forgot to set, and would mean the current
folder. A pipe, a device, a terminal and standard output are written into and stay what they are; a
link stays one, and what it leads to is written. This file reads and writes nothing.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from pathlib import Path
from typing import Any, BinaryIO

import click

from halton_meter.cli.output import fail
from halton_meter.cli.streams import names_stdout
from halton_meter.problem import Problem

_DESCRIPTOR = re.compile(r"(?:/dev/fd|/proc/self/fd)/\d+")

_EMPTY = "an empty name names no file"


class FilePath(click.Path):
    """As click's, without the empty name."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; an empty one is wrong usage."""
        if not os.fspath(value):
            self.fail(_EMPTY, param, ctx)
        return super().convert(value, param, ctx)


def file_name(text: str) -> str:
    """The same for what may be something else than a file. A `type` of click's."""
    if not text:
        raise click.BadParameter(_EMPTY)
    return text


def stream_of(path: str) -> BinaryIO | None:
    """What to write into where no file is asked for: standard output, a pipe, a device.

    None for a file, and for a name of which nothing is there yet. Ends the command for what can be
    neither replaced nor written into.
    """
    if names_stdout(path):
        return sys.stdout.buffer
    try:
        if _DESCRIPTOR.fullmatch(path):
            return os.fdopen(os.dup(int(Path(path).name)), "wb")
        kind = os.stat(path).st_mode
        if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):
            return open(path, "wb")
    except FileNotFoundError:
        return None
    except OSError as error:
        fail(Problem(f"cannot write into {path}: {error.strerror}", "name another file"))
    if not stat.S_ISREG(kind):
        fail(Problem(f"{path} is not a regular file", "name another file"))
    return None


def file_of(path: str | Path) -> Path:
    """The file itself, behind links: so that a link stays one when the file is replaced."""
    return Path(os.path.realpath(path))
