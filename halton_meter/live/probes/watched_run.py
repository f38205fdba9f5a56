"""A command that the service meters anyway: it is watched there, and asked about at the end.

The service's metering worker may be killed. Who watches a run has what it said of it last, finds
the next worker, and tells it: so neither the run's sum nor its limit is lost. What a worker says of
a run comes before it stores that, with the names of these events: the next one may meet them again,
and does not count them twice. It stands to `probes/worker.py` as `probes/supervisor.py` does for a
run of its own; who stops and continues is `probes/holding.py`, in the worker.
"""

from __future__ import annotations

import contextlib
import selectors
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from halton_meter import untrusted
from halton_meter.accounts import Account
from halton_meter.contract import usd_text
from halton_meter.coverage import Coverage
from halton_meter.live.control import Control, ServiceAbsent
from halton_meter.live.held import HeldCommand
from halton_meter.live.probes.command import Signals, attend, prepared
from halton_meter.live.probes.job import SEEN_CHARACTERS_MAX, SEEN_MAX
from halton_meter.live.probes.programs import programs_ahead
from halton_meter.live.result import NO_LIMIT, RunLimit, RunResult
from halton_meter.live.stopping import Stopper, identity
from halton_meter.live.totals import Totals

SEARCH_S_MAX, SEARCH_PAUSE_S = 3.0, 0.02
AGAIN_S, AGAIN_LATER_S = 0.02, 1.0  # between two looks for the next worker, at first and later
SAY_AFTER_S = 5.0  # without one: usually it is there within 0.5 s
FINISH_S_MAX = 5.0  # how long the end of a run waits for one

Connect = Callable[[], Control]


class Watching:
    """One run at the service, by whichever worker it has at the moment."""

    def __init__(
        self, pid: int, limit: RunLimit, connect: Connect, control: Control, held: HeldCommand
    ) -> None:
        self._pid, self._limit, self._connect, self._held = pid, limit, connect, held
        self._control: Control | None = control
        self._before = Totals()
        self._connections_before = Coverage()
        self._current = Totals()
        self._connections = Coverage()
        self._seen: list[str] = []
        self._lost_at = self._again_at = 0.0
        self._is_said = False
        self.selector = selectors.DefaultSelector()
        held.ask = self._tell
        self._take_over(control, {})

    def _take_over(self, control: Control, before: dict[str, Any]) -> None:
        """Have this worker watch the run. Raises ServiceAbsent."""
        control.on_news = self._on_news
        limit = self._limit
        watched = {"max_usd": limit.max_usd, "at_limit": limit.at_limit} if limit.max_usd else {}
        control.ask("watch", pid=self._pid, **watched, **before)
        self.selector.register(control, selectors.EVENT_READ, self._listen)
        self._control = control

    def _on_news(self, message: dict[str, Any]) -> None:
        if "metered" not in message:
            self._held.take(message)
            return
        with contextlib.suppress(ValueError):
            totals = Totals.of_json(message["metered"])
            self._connections = Coverage.of_json(message.get("connections"))
            self._current = totals
        self._seen = untrusted.texts(message, "events", SEEN_MAX, SEEN_CHARACTERS_MAX)

    def _listen(self) -> None:
        assert self._control is not None
        if not self._control.take_news():
            self._lose()

    def _lose(self) -> None:
        """The worker is gone; what it stopped stays so."""
        assert self._control is not None
        self.selector.unregister(self._control)
        self._control.close()
        self._control = None
        self._before.merge(self._current)
        self._connections_before.merge(self._connections)
        self._current, self._connections = Totals(), Coverage()
        self._lost_at = self._again_at = time.monotonic()
        self._is_said = False

    def _tell(self, what: str) -> None:
        if self._control is not None:
            self._control.tell(what)
        elif what == "end":
            end_alone(self._pid)

    @property
    def wait_s(self) -> float | None:
        """How long until `tick` has something to do."""
        return None if self._control is not None else max(0.0, self._again_at - time.monotonic())

    def tick(self) -> None:
        """Look for the next worker."""
        now = time.monotonic()
        if self._control is not None or now < self._again_at:
            return
        late = now >= self._lost_at + SAY_AFTER_S
        self._again_at = now + (AGAIN_LATER_S if late else AGAIN_S)
        if self._find():
            if self._is_said:
                self._held.found(self._limit.max_usd)
        elif late and not self._is_said:
            self._is_said = True
            self._held.lost(self._limit.max_usd)

    def _find(self) -> bool:
        line = self._before.total
        spent = {
            "usd": usd_text(line.list_usd),
            "requests": line.requests,
            "unpriced": line.unpriced + line.implausible,
        }
        try:
            control = self._connect()
        except ServiceAbsent:
            return False
        try:
            self._take_over(control, {"spent": spent, "seen": self._seen})
        except ServiceAbsent:
            control.close()
            return False
        return True

    def finish(self, result: RunResult) -> None:
        """Ask what the run came to. Raises ServiceAbsent, with what is known in the result."""
        result.totals, result.connections = self._before, self._connections_before
        deadline = time.monotonic() + FINISH_S_MAX
        while True:
            if self._control is not None or self._find():
                try:
                    self._ask(result)
                    return
                except ServiceAbsent:
                    self._lose()
            if time.monotonic() >= deadline:
                raise ServiceAbsent("the service is gone")
            time.sleep(AGAIN_S)

    def _ask(self, result: RunResult) -> None:
        assert self._control is not None
        reply = self._control.ask("finish")
        try:
            totals = Totals.of_json(reply.get("totals"))
            connections = Coverage.of_json(reply.get("connections"))
        except ValueError as error:
            raise ServiceAbsent(str(error)) from None
        result.totals.merge(totals)
        result.connections = connections.merge(self._connections_before)
        result.coverage = list(reply.get("coverage", ()))
        result.store_error = reply.get("store_error")
        result.price_error = reply.get("price_error")


def run_watched(
    argv: Sequence[str],
    environment: Mapping[str, str],
    account: Account,
    control: Control,
    connect: Connect,
    limit: RunLimit = NO_LIMIT,
) -> RunResult:
    """Run one command that the service meters anyway, and ask the service about it at the end.

    `connect` finds the service again.
    """
    held = HeldCommand()
    held.begin()
    with prepared(argv, account, environment) as command:
        watching = Watching(command.pid, limit, connect, control, held)
        _search(programs_ahead(argv, environment, account), control)
        signals = Signals()
    started_ns = time.time_ns()
    result = RunResult()
    result.exit_code = attend(
        command, signals, watching.selector, watching.tick, lambda: watching.wait_s, held
    )
    try:
        watching.finish(result)
    except ServiceAbsent:
        result.outages.append((started_ns, time.time_ns(), "the service stopped during the run"))
    result.held = held.last
    return result


def end_alone(pid: int) -> None:
    """End a command that is stopped, and what descends from it, where nobody else does."""
    stopper = Stopper()
    stopper.stop([identity(pid)])  # for its descendants
    stopper.end()
    stopper.close()


def _search(programs: Sequence[str], control: Control) -> None:
    """Wait a little while the service searches what the command may run."""
    waiting = list(programs)
    deadline = time.monotonic() + SEARCH_S_MAX
    while waiting and time.monotonic() < deadline:
        # One a request: they are short.
        waiting = [
            each for each in waiting if control.ask("search", programs=[each]).get("searching")
        ]
        if waiting:
            time.sleep(SEARCH_PAUSE_S)
