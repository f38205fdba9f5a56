"""Writes `config.toml`: only what would be read again without a fault, whole or not at all.

A file that is a link, into a folder of dotfiles perhaps, stays one: what it leads to is written.
Reading and judging are `config.py`'s.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from halton_meter.config import CONFIG_BYTES_MAX, CONFIG_NAME, ConfigError, read_text

_BOM = "\ufeff"


def change(home: Path, edit: Callable[[str], str]) -> None:
    """Change the file's text by `edit`. Raises ConfigError, OSError, and what `edit` raises.

    Nothing is written where the result would be refused; the error says why.
    """
    path = home / CONFIG_NAME
    text = ""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        text = file.read(CONFIG_BYTES_MAX + 1).decode().removeprefix(_BOM)
    fresh = edit(text)
    if fresh == text:
        return
    raw = fresh.encode()
    if len(raw) > CONFIG_BYTES_MAX:
        raise ConfigError(
            f"{path} would be larger than {CONFIG_BYTES_MAX:,} bytes", f"ls -l {path}"
        )
    if wrong := read_text(raw, str(path)).wrong:
        raise ConfigError("\n".join(wrong))
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    _replace(Path(os.path.realpath(path)), raw)


def _replace(path: Path, raw: bytes) -> None:
    mode = 0o600
    with contextlib.suppress(OSError):
        mode = stat.S_IMODE(path.stat().st_mode)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(fresh, flags, 0o600), "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), mode)
        os.replace(fresh, path)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise
