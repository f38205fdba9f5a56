"""The process: reads what the client pipes in, prints one line, ends with exit code 0.

Claude Code blanks its status line at any other exit code, and waits for none: so whatever is wrong
(no input, broken input, no snapshot, no service, a bug of ours) gives a line, never an error.
"""

from __future__ import annotations

import os
import select
import sys
import time

from halton_meter.statusline import line, snapshot

INPUT_BYTES_MAX = 1 << 20
# A client that opens a pipe and says nothing is not waited for.
SILENCE_S = 0.1
TRY = "halton-meter: the status line failed; run: halton-meter status"


# Under these, root is to become the user who called it, which `privileges.py` knows to do.
CALLERS = ("SUDO_UID", "PKEXEC_UID", "DOAS_USER")


def is_quick(words: list[str]) -> bool:
    """Whether this command line is answered here; what has options goes the ordinary way."""
    if words not in (["statusline"], ["prompt"]):
        return False
    return os.geteuid() != 0 or not any(name in os.environ for name in CALLERS)


def main(what: str) -> None:
    """Print the line of `statusline` or `prompt`."""
    try:
        said = answer(what, piped() if what == "statusline" else b"", time.time())
    except Exception:
        said = TRY if what == "statusline" else ""
    try:  # noqa: SIM105 (importing contextlib takes a millisecond of the thirty)
        os.write(1, said.encode("utf-8", "replace") + b"\n")
    except OSError:
        pass


def answer(what: str, piped: bytes, now: float) -> str:
    """One line; never more, whatever was piped in."""
    home = snapshot.folder()
    found = snapshot.snapshot(home) if home else {}
    budgets = snapshot.read(os.path.join(home, snapshot.BUDGETS_NAME)) if home else {}
    is_metering = snapshot.is_alive(found)
    if what == "prompt":
        return line.prompt_text(found, budgets, now, is_metering=is_metering)
    said = snapshot.parsed(piped)
    return line.session_line(
        said, found, budgets, now, is_metering=is_metering, colours=line.wants_colours()
    )


def piped() -> bytes:
    """Standard input to its end, but no longer than it has something to say."""
    try:
        if os.isatty(0):
            return b""
        data = b""
        while len(data) <= INPUT_BYTES_MAX and select.select([0], [], [], SILENCE_S)[0]:
            more = os.read(0, 65536)
            if not more:
                break
            data += more
    except (OSError, ValueError):
        return b""
    return data


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "statusline")
