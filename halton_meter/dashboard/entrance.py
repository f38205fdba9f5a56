"""Who may see the local page: whoever opens its address first.

An address is seen by others: it stands in the browser's arguments, its history, a terminal's
scrollback. So it holds a code that is spent at the first visit, and good for some minutes. What the
visitor gets for it is a cookie that stands nowhere else. A cookie goes to every port of 127.0.0.1,
and another user's server may listen at one: this one goes only to a folder of a name that nobody
can guess. Both are of this run alone.

On Linux the code is taken only from a socket of the person who runs this (or root's): another user
who reads it in a list of processes could be faster than the browser.
"""

from __future__ import annotations

import hmac
import os
import secrets
import struct
import threading
import time
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from pathlib import Path

CODE_SECONDS = 600.0
# Wrong codes after which the right one is withdrawn; nobody mistypes so often.
GUESSES_MAX = 100
COOKIE = "halton_meter"
_LOOPBACK = struct.unpack("=I", b"\x7f\x00\x00\x01")[0]


class Entrance:
    """Codes and the cookie of one run. Safe to use from several threads.

    `clock` is monotonic, in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder = f"/{secrets.token_urlsafe(16)}"
        self._secret = secrets.token_urlsafe(24)
        self._clock = clock
        self._lock = threading.Lock()
        self._code: str | None = None
        self._expires_at = 0.0
        self._guesses = 0

    def new_code(self) -> str:
        """A code for one visit; one that was given before is good no longer."""
        with self._lock:
            self._code = secrets.token_urlsafe(24)
            self._expires_at = self._clock() + CODE_SECONDS
            self._guesses = 0
            return self._code

    def spend(self, said: str) -> bool:
        """Whether this is the code; it never is again."""
        with self._lock:
            if self._code is None or self._clock() >= self._expires_at:
                self._code = None
                return False
            is_right = _same(said, self._code)
            self._guesses += not is_right
            if is_right or self._guesses >= GUESSES_MAX:
                self._code = None
            return is_right

    def cookie(self) -> str:
        """What lets a browser in from now on, as the value of Set-Cookie."""
        return f"{COOKIE}={self._secret}; HttpOnly; SameSite=Strict; Path={self.folder}"

    def lets_in(self, cookies: str) -> bool:
        """Whether a request with this Cookie header comes from who spent a code."""
        try:
            found = SimpleCookie(cookies).get(COOKIE)
        except CookieError:
            return False
        return found is not None and _same(found.value, self._secret)


def _same(said: str, right: str) -> bool:
    return hmac.compare_digest(said.encode("utf-8", "replace"), right.encode())


def is_ours(client_port: int, port: int, proc: Path = Path("/proc")) -> bool:
    """Whether a connection over loopback is of our own user or root; also where nobody can tell."""
    uid = _uid_of(client_port, port, proc)
    return uid is None or str(uid) in ("0", str(os.geteuid()), os.environ.get("SUDO_UID"))


def _uid_of(client_port: int, port: int, proc: Path) -> int | None:
    """Whose socket it is, as /proc/net/tcp{,6} list it."""
    ends = [f"{_LOOPBACK:08X}:{each:04X}" for each in (client_port, port)]
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if len(fields) > 7 and all(
                f.endswith(e) for f, e in zip(fields[1:3], ends, strict=True)
            ):
                return int(fields[7])
    return None
