"""The programs that refused the proxy's certificate, kept between runs: one small file.

Without it a program that trusts nobody but its own roots would fail once in every run. An entry is
forgotten after KEPT_S, of runs after KEPT_OF_RUNS_S, by `init`, and when the certificate authority
is another one. The service and runs keep files of their own, as they tell programs different
things. Host names are providers', programs are paths, with names of options and variables; nothing
else is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

from halton_meter import untrusted
from halton_meter.whole_file import replacing

SERVICE_NAME, RUN_NAME = "proxy-refusals.json", "proxy-refusals-of-runs.json"
KEPT_S, KEPT_OF_RUNS_S = 7 * 86400, 86400
FILE_BYTES_MAX = 1 << 20
ROWS_MAX = 512
_CHARACTERS_MAX = 1000

Refusal = tuple[str, str | None]


class RefusalsFile:
    """The file in a data folder, for one certificate authority.

    `stacks` are the TLS libraries of programs, as far as they are known.
    """

    def __init__(self, path: Path, certificate: Path) -> None:
        self._path = path
        self._certificate = certificate
        self._since: dict[Refusal, int] = {}  # in seconds since 1970
        self.stacks: dict[str | None, str] = {}

    def read(self) -> list[Refusal]:
        """The refusals that are kept."""
        told = None
        with contextlib.suppress(OSError), open(self._path, "rb", opener=_regular) as file:
            told = untrusted.parsed(file.read(FILE_BYTES_MAX))
        if told is None or told.get("authority") != self._authority():
            return []
        now = time.time()
        kept_s = KEPT_OF_RUNS_S if self._path.name == RUN_NAME else KEPT_S
        for each in untrusted.tables(told, "refusals", ROWS_MAX):
            host = untrusted.text(each, "host", 255)
            program = untrusted.text(each, "program", _CHARACTERS_MAX)
            since = untrusted.whole_number(each, "since")
            if host and program and since is not None and now - kept_s < since <= now:
                self._since[host, program] = since
                if stack := untrusted.text(each, "stack"):
                    self.stacks[program] = stack
        return list(self._since)

    def write(self, refusals: Iterable[Refusal]) -> None:
        """Keep these, and no others; what the disk refuses is not kept."""
        now = int(time.time())
        self._since = {each: self._since.get(each, now) for each in refusals if each[1]}
        rows = [
            {"host": host, "program": program, "stack": self.stacks.get(program), "since": since}
            for (host, program), since in self._since.items()
        ]
        content = {"authority": self._authority(), "refusals": rows}
        with contextlib.suppress(OSError), replacing(self._path) as file:
            file.write(json.dumps(content).encode())

    def _authority(self) -> str | None:
        with contextlib.suppress(OSError):
            return hashlib.sha256(self._certificate.read_bytes()).hexdigest()
        return None


def forget(home: Path) -> None:
    """Let every program be tried again from the next start on."""
    for name in (SERVICE_NAME, RUN_NAME):
        with contextlib.suppress(OSError):
            (home / name).unlink()


def _regular(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
