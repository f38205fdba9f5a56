"""What `run` does while its command is stopped at a limit: it says why, and waits with the user.

The metering worker stops and continues; this is the other end, in the user's terminal. Ctrl-C, or
any signal that asks the run to end, ends the command then: a stopped process could not hear it.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from typing import Any

from halton_meter import untrusted
from halton_meter.budget import END
from halton_meter.live.terminal import Terminal

TEXT_CHARACTERS_MAX = 500
END_S = 5.0  # between SIGTERM and SIGKILL
_ENDING = frozenset((signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP))


class HeldCommand:
    """The command as a run sees it. `ask` tells the worker to "continue" or to "end" it.

    `last` is what was said when it was held last, None when it never was: "text", "limit_usd",
    "spent_usd", "at_least", "holds" and "times".
    """

    def __init__(self, ask: Callable[[str], None] = lambda what: None) -> None:
        self.ask = ask
        self.last: dict[str, Any] | None = None
        self._is_held = False
        self._terminal: Terminal | None = None

    def begin(self) -> None:
        """Before the command has the terminal: see what it is like."""
        self._terminal = Terminal()

    def take(self, message: dict[str, Any]) -> bool:
        """A message of the worker's; whether it was about this."""
        name = untrusted.text(message, "limit_reached")
        if name is not None:
            if not self._is_said(name, message):
                self._hold(name, message)
            return True
        if "limit_lifted" in message:
            self._let_go()
            return True
        return False

    def _is_said(self, name: str, message: dict[str, Any]) -> bool:
        """Whether a worker says what the one before it had said of the same stop."""
        last = self.last if self._is_held else None
        return last is not None and (last["name"], last["spent_usd"]) == (
            name,
            untrusted.text(message, "spent_usd", TEXT_CHARACTERS_MAX),
        )

    def note(self, message: dict[str, Any]) -> None:
        """Keep what a message says of a limit."""
        times = self.last["times"] if self.last else 0
        name = untrusted.text(message, "limit_reached") or ""
        facts = {
            key: untrusted.text(message, key, TEXT_CHARACTERS_MAX)
            for key in ("text", "holds", "limit_usd", "spent_usd", "in_flight_usd")
        }
        flying = untrusted.whole_number(message, "in_flight") or 0
        more = {"at_least": message.get("at_least") is True, "in_flight": flying}
        self.last = {"name": name, **facts, **more, "times": times + 1}

    def _hold(self, name: str, message: dict[str, Any]) -> None:
        self.note(message)
        assert self.last is not None
        ends = self.last["holds"] == END
        if self._terminal is not None:
            self._terminal.take()
        self._is_held = not ends
        _say(f"halton-meter: {self.last['text']}; the command is {'ended' if ends else 'stopped'}")
        if not ends:
            _say(f"  go on: halton-meter budget resume {name}   (in another terminal)")
            _say("  end it: Ctrl-C")

    def _let_go(self) -> None:
        if self._is_held:
            self._is_held = False
            _say("halton-meter: the command goes on")
            if self._terminal is not None:
                self._terminal.give_back()
        self.ask("continue")

    def lost(self, limit_usd: str | None) -> None:
        """Who holds it is gone, and there is no other yet."""
        if self._is_held:
            name = (self.last or {}).get("name")
            _say("halton-meter: the service is gone; the command stays stopped")
            _say(f"  go on: halton-meter budget resume {name}   (in another terminal)")
            _say("  end it: Ctrl-C")
        elif limit_usd is not None:
            _say(
                f"halton-meter: the service is gone; until it is back "
                f"the limit of ${limit_usd} does not hold"
            )

    def found(self, limit_usd: str | None) -> None:
        """There is another."""
        if limit_usd is not None:
            _say(f"halton-meter: the service is back; the limit of ${limit_usd} holds")

    def on_signal(self, number: int) -> bool:
        """A signal came for the run; whether it was dealt with here."""
        if not self._is_held or number not in _ENDING:
            return False
        self._is_held = False
        _say("halton-meter: ending the command")
        self.ask("end")
        return True

    def end(self) -> None:
        """The command has ended."""
        if self.last is not None and self._terminal is not None:
            self._terminal.restore()


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode(errors="replace"))
