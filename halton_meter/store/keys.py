"""The key of the hashes by which accounts are known: this data folder's own, which leaves it never.

It is 32 random bytes in `account.key`, readable by its owner only. With it a hash cannot be made
again elsewhere, nor an account be guessed from an export. It changes no event's id: a capture that
two machines replay gives the same events, with an account of each machine's own. Who moves the
folder moves the key with it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from halton_meter.store.home import Home, private_file

NAME = "account.key"
KEY_BYTES = 32


def known_account_key(home: Path) -> bytes | None:
    """The key, None where there is none that can be read."""
    with contextlib.suppress(OSError):
        fd = os.open(home / NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.read(fd, KEY_BYTES + 1) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
        finally:
            os.close(fd)
        if len(found) == KEY_BYTES:
            return found
    return None


def account_key(home: Path, owner: tuple[int, int] | None = None) -> bytes | None:
    """The key, made where there is none; None where it can be neither read nor made.

    `owner` is as for `Store`. Accounts are then unknown; metering goes on.
    """
    key = known_account_key(home)
    if key is not None:
        return key
    with contextlib.suppress(OSError):
        return _made(Home(home, owner))
    return None


def _made(home: Home) -> bytes | None:
    home.make_directories()
    path = home.path / NAME
    if os.path.lexists(path) and known_account_key(home.path) is None:
        path.unlink()  # half a key, by a full disk: no hash was made with it
    part = home.path / f".{NAME}.{os.getpid()}-{os.urandom(4).hex()}"
    try:
        with private_file(part) as file:
            file.write(os.urandom(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
            if (whose := home.file_owner()) is not None:
                os.fchown(file.fileno(), *whose)
        try:
            os.link(part, path)
        except FileExistsError:
            pass  # of two that make one at once, the first wins
        except OSError:  # a file system without links
            part.rename(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return known_account_key(home.path)
