"""What the proxy's worker answers to the service, each answer with its question, within bounds.

The worker reads hostile bytes, so each field is checked here before anybody uses it. What it says
unasked is taken in `service.py`, and its pipe is written to and read there.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from typing import Any

from halton_meter import untrusted
from halton_meter.live.in_flight import rows_of
from halton_meter.live.totals import Totals

ANSWER_S_MAX = 2.0
SAID_CHARACTERS_MAX = 1000
_COUNTS = (
    "events",
    "journal_waiting",
    "journal_repeated",
    "expired",
    "held",
    "refused_at_limit",
)
_TEXTS = ("last_event_at", "store_error", "store_error_since", "price_error", "budget_error")


class WorkerAnswers:
    """Asks the worker; `last_status` is what it said last of itself, empty before it did.

    `send` gives a message to the worker, and says whether there is one to take it.
    """

    def __init__(self, send: Callable[[dict[str, Any]], bool]) -> None:
        self.last_status: dict[str, Any] = {}
        self._send = send
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._serial = itertools.count(1)

    async def ask(self, what: str) -> dict[str, Any] | None:
        """The answer to "status" or "in_flight"; None where none comes within ANSWER_S_MAX."""
        serial = next(self._serial)
        reply: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        if self._send({what: serial}):
            self._replies[serial] = reply
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(reply, ANSWER_S_MAX)
            self._replies.pop(serial, None)
        return None

    def ping(self) -> None:
        """Have it say that it is there; its "pong" says no more, and is not waited for."""
        self._send({"ping": next(self._serial)})

    def take(self, message: dict[str, Any]) -> None:
        """Hand out the answers that a message holds."""
        if "status" in message:
            self.last_status = _status(untrusted.table(message, "status"))
            if (reply := self._reply(message)) is not None:
                reply.set_result(self.last_status)
        if "in_flight" in message and (reply := self._reply(message)) is not None:
            rows, more = rows_of(untrusted.table(message, "in_flight"))
            reply.set_result({"rows": rows, "more": more})

    def take_final(self, message: dict[str, Any]) -> dict[str, Any]:
        """The last status of a worker that has ended."""
        self.last_status = _status(message)
        return self.last_status

    def _reply(self, message: dict[str, Any]) -> asyncio.Future[dict[str, Any]] | None:
        """Who waits for this message."""
        reply = self._replies.pop(untrusted.whole_number(message, "serial") or 0, None)
        return None if reply is None or reply.done() else reply


def _status(told: dict[str, Any]) -> dict[str, Any]:
    """A worker's status, limited to valid fields."""
    found: dict[str, Any] = {name: untrusted.whole_number(told, name) for name in _COUNTS}
    found |= {name: untrusted.text(told, name, SAID_CHARACTERS_MAX) for name in _TEXTS}
    found["damaged_databases"] = untrusted.texts(told, "damaged_databases", 20, SAID_CHARACTERS_MAX)
    for name in ("losses", "turned_away"):
        found[name] = untrusted.counts(told, name)
    try:
        found["totals"] = Totals.of_json(told.get("totals")).as_json()
    except ValueError:
        found["totals"] = None
    return found
