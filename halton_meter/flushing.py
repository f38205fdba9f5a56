"""Moves the journal into the database, in a process of its own.

`python -m halton_meter.flushing HOME` takes half a second of CPU. Where plaintext is metered the
loop would stand still meanwhile, and the kernel's ring overflow or the proxy's clients wait. Prints
why, when something has to stay in the journal. When that is done is here, too, for all who meter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from halton_meter import own_code

if TYPE_CHECKING:
    from halton_meter.store import Flushed

# Segments of the journal are closed no more often than this, and at once if it is that long ago:
# from then on any command that reads the store takes their events over by itself …
SEAL_AFTER_S = 0.7
# … and they are in the database after this time, or when so many have come. The process costs some
# 0.4 s of CPU, mostly its start: every half minute that would be as much as all else.
FLUSH_AFTER_S = 300.0
FLUSH_EVENTS = 20_000
PRIORITY = 10


class Flushable(Protocol):
    """What is needed of the store: `halton_meter.store.Store` has it."""

    def flush(self) -> Flushed:
        """Move the journal into the database, as far as its lock allows."""


def flush(store: Flushable) -> str | None:
    """Move the journal into the database here and now; the trouble when events have to wait."""
    done = store.flush()
    return done.reason if done.waiting else None


def begin(home: Path, stdout: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    """Start the process; to `stdout` goes what it has to say."""
    return subprocess.Popen(
        own_code.python("halton_meter.flushing", str(home)),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        cwd="/",
    )


def main(home: Path) -> int:
    """The process's whole life."""
    from halton_meter.store import Store, StoreError

    os.nice(PRIORITY)
    try:
        with Store(home) as store:
            reason = flush(store)
    except StoreError as error:
        reason = str(error)
    if reason:
        print(reason)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
