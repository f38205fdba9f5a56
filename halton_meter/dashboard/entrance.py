"""Who may see the local page: the browser that opens its address first.

Others can see an address: it is in the browser's arguments, its history, a terminal's scrollback.
So it holds a code that works once, for some minutes, and gives the visitor a cookie that is nowhere
else. A browser sends cookies to every port of 127.0.0.1, and another user's server may listen on
one: this cookie is limited to a folder with a random name. Code, cookie and folder are new in every
run.

On Linux only a socket of the user who runs this (or of root) may use the code: another user who
reads it in the process list could be faster than the browser.
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
# Wrong codes after which the right one stops working: more than typing errors explain.
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
        """A code for one visit; earlier codes stop working."""
        with self._lock:
            self._code = secrets.token_urlsafe(24)
            self._expires_at = self._clock() + CODE_SECONDS
            self._guesses = 0
            return self._code

    def spend(self, given: str) -> bool:
        """Whether this is the code, which then stops working."""
        with self._lock:
            if self._code is None or self._clock() >= self._expires_at:
                self._code = None
                return False
            is_right = _same(given, self._code)
            self._guesses += not is_right
            if is_right or self._guesses >= GUESSES_MAX:
                self._code = None
            return is_right

    def cookie(self) -> str:
        """The value of Set-Cookie that lets a browser in from now on."""
        return f"{COOKIE}={self._secret}; HttpOnly; SameSite=Strict; Path={self.folder}"

    def lets_in(self, cookies: str) -> bool:
        """Whether a request with this Cookie header comes from a browser that used a code."""
        try:
            found = SimpleCookie(cookies).get(COOKIE)
        except CookieError:
            return False
        return found is not None and _same(found.value, self._secret)


def _same(given: str, right: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), right.encode())


def is_ours(client_port: int, port: int, proc: Path = Path("/proc")) -> bool:
    """Whether a loopback connection belongs to our user or root; True where that is unknown."""
    uid = _uid_of(client_port, port, proc)
    return uid is None or str(uid) in ("0", str(os.geteuid()), os.environ.get("SUDO_UID"))


def _uid_of(client_port: int, port: int, proc: Path) -> int | None:
    """The user of the socket in /proc/net/tcp{,6}."""
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
