"""Stops who has spent all that a limit allows, where uprobes meter.

The worker tells it of requests and events as they come out of the pipeline. When an answer crosses
a limit, or a request begins though the limit is spent, the process is stopped with its children:
within a run all of the run, else the terminal's job that it belongs to. A request that was sent
cannot be taken back: what is under way at that moment is still answered and billed. `budget resume`
lets it go on; who watches a run is asked first, as the terminal has to be given back.

A process whose answers under way may reach a limit is `asking`: the kernel pauses it as it begins a
request, until what it has read by then is counted here (`goes_on`). So one that asks for one thing
after another has sent nothing behind the answer that crosses the limit. Of a run with a limit of
its own each process is asked from its first request on, until one tells that the limit is far away.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from capture.processes.proc import descendants, read_process
from halton_meter.budget import END, STOP
from halton_meter.contract import usd_text
from halton_meter.live.caps import NOTHING, Cap, Flight, Flights, Over
from halton_meter.live.guard import Guard
from halton_meter.live.held import END_S
from halton_meter.live.stopping import (
    Stopper,
    began_before,
    identity,
    is_alive,
    is_stopped,
    job_of,
    may_pause,
    resume_all,
    say_on_terminal,
)
from halton_meter.model import Exchange, PricedEvent, Process
from halton_meter.spending.spent import amount, of_event
from halton_meter.spending.stops import STOPPED, ProcessId, Stop
from halton_meter.spending.sums import Amount
from halton_meter.wire.so_far import ExchangeSoFar

SETTLES_S = 0.05  # until it is known what else was under way when it was stopped
SAY_AFTER_S = 0.3  # a shell takes its terminal back first, and sets its modes
TELL_AGAIN_S = 2.0
HURRY_MS, LEISURE_MS = 1, 1000  # how long plaintext may gather, near a limit and else
ASKING_MAX = 64  # as many as the helper pauses

Tell = Callable[[dict[str, Any]], None]
Preview = Callable[[Exchange], PricedEvent | None]


@dataclass(slots=True)
class Run:
    """A run's tree, its limit if it has one, and how to tell who watches it."""

    root: ProcessId
    tell: Tell
    cap: Cap | None = None
    # Whether the limit may be reached by what is under way: until it is known, it may.
    is_near: bool = True

    def has(self, process: Process | None) -> bool:
        """Whether a process is of its tree."""
        if process is None:
            return False
        parents = (pid for pid, _ in process.parents)
        return process.pid == self.root[0] or self.root[0] in parents

    def flies(self, flight: Flight) -> bool:
        """Whether a request under way is of its tree."""
        return self.has(flight.process)


@dataclass(slots=True)
class _Stopped:
    """What was stopped for one limit."""

    over: Over
    stopper: Stopper
    run: Run | None = None
    kill_at: float | None = None
    told_at: float = float("-inf")
    say: list[tuple[float, str, int]] = field(default_factory=list)  # when, of which program
    asked: bool = False  # who watches the run was told that it may go on


class Holding:
    """See the file's head. `preview` and `refresh` are the worker's, set once there is one."""

    def __init__(self, home: Path, *, is_run: bool) -> None:
        self.flights = Flights()
        self.refresh: Callable[[], None] = lambda: None
        self.guard = Guard(home, identity(os.getpid()), self._refresh, self.flights)
        self.preview: Preview = lambda _: None
        self.at_most: Callable[[PricedEvent, Exchange], PricedEvent] = lambda preview, _: preview
        self.asking: dict[int, Process] = {}  # by pid
        self._is_run = is_run
        self._runs: dict[Hashable, Run] = {}
        self._fresh: list[Flight] = []
        self._stopped: dict[str, _Stopped] = {}
        self._near = False
        self._refused: str | None = None

    def _refresh(self) -> None:
        self.refresh()

    @property
    def trouble(self) -> str | None:
        """Why a budget is not kept, or does not hold; None where all do."""
        return self.guard.trouble or self._refused

    # --- runs

    def watch(self, key: Hashable, pid: int, tell: Tell, cap: Cap | None = None) -> None:
        """A run begins: what its tree spends counts for its limit."""
        root = identity(pid)
        if cap is not None:
            cap.key = f"run {root[0]} {root[1]}"
            cap.more_usd = self.guard.allowed(cap.key)
        self._runs[key] = Run(root, tell, cap)

    def inherit(self) -> None:
        """Hold on to what the worker before us had stopped when it died.

        What it had stopped of a run that the service watched is nobody's until who watches it is
        here again; `budget resume` lets it go on as well.
        """
        roots = {str(run.root[0]): run for run in self._runs.values()}
        for stop in self.guard.inherit(lambda each: _root_of(each) in (roots or (None,))):
            stopper = Stopper()
            stopper.adopt(stop.processes)
            stopper.stop_again()
            run = roots.get(_root_of(stop) or "")
            over = Over(stop.id, stop.limit_usd, stop.spent_usd, stop.usd, key=stop.key)
            budget = next((x for x in self.guard.budgets if x.name == stop.budget), None)
            holds = budget.holds if budget is not None else run and run.cap and run.cap.holds
            over = replace(over, budget=budget, holds=holds or STOP, at_least=stop.at_least)
            stopped = self._stopped[stop.id] = _Stopped(over, stopper, run)
            if run is not None:  # the worker before us may have died before it said so
                stopped.told_at = time.monotonic()
                stopped.say.append((stopped.told_at, stop.program, stop.processes[0][0]))
            if holds == END:
                stopped.stopper.end()
                stopped.kill_at = time.monotonic() + END_S

    def count(self, key: Hashable, events: Sequence[PricedEvent]) -> None:
        """Events of a run that were metered before it was watched; stop it if they go over."""
        run = self._runs[key]
        mine = [event for event in events if run.cap is not None and run.has(event.usage.process)]
        for event in mine:
            assert run.cap is not None
            run.cap.add(event)
        if mine and (over := self._over_run(mine[-1].usage.process, None)) is not None:
            self._stop(over, mine[-1].usage.process, mine[-1].usage.at_ns)

    def forget(self, key: Hashable) -> None:
        """Who watched a run is gone. What is stopped of it stays so, for `budget resume`."""
        run = self._runs.pop(key, None)
        for stopped in self._stopped.values():
            if run is not None and stopped.run is run:
                stopped.run = None

    def cap_of(self, key: Hashable) -> Cap | None:
        """The limit of a run."""
        run = self._runs.get(key)
        return None if run is None else run.cap

    @property
    def is_active(self) -> bool:
        """Whether anything is held at any limit, so that requests under way count."""
        return self.guard.holds or any(run.cap for run in self._runs.values())

    @property
    def asking_runs(self) -> set[int]:
        """Runs of which each process is asked before each request, by the pid of their first."""
        return {run.root[0] for run in self._runs.values() if run.cap is not None and run.is_near}

    @property
    def pause_ms(self) -> int:
        """How long plaintext may gather: near a limit every answer counts at once."""
        capped = any(run.cap for run in self._runs.values())
        return HURRY_MS if capped or self._near else LEISURE_MS

    # --- what the pipeline tells

    def on_request(self, so_far: ExchangeSoFar) -> None:
        """A request was sent whole."""
        if not self.is_active:
            return
        exchange, _ = so_far.exchange(so_far.started_ns)
        priced = self.preview(exchange)
        if priced is not None:
            most_usd = self.at_most(priced, exchange).list_usd
            flight = self.flights.begin(exchange, priced, most_usd)
            self._fresh.append(flight)
            self._let_ask(flight)

    def _let_ask(self, flight: Flight) -> None:
        """Have the process asked before its next request, if the answer to this may be too much."""
        process = flight.process
        if process is None:
            return
        self.asking.pop(process.pid, None)
        run = next((each for each in self._runs.values() if each.has(process)), None)
        flights = [each for each in self.flights if run is not None and run.flies(each)]
        near = run is not None and run.cap is not None and run.cap.may_be_crossed(flights)
        if run is not None:
            run.is_near = near
        if not near and not self.guard.may_be_crossed(flight):
            return
        if may_pause(process.pid, None if run is None else run.root[0]):
            while len(self.asking) >= ASKING_MAX:
                del self.asking[next(iter(self.asking))]
            self.asking[process.pid] = process

    def goes_on(self, pid: int) -> bool:
        """Whether a process may send the request that it waits with: all that it has read before
        is counted by now."""
        process = self.asking.get(pid)
        if process is None and self.asking_runs:  # its first request
            process = read_process(pid)
        if process is not None and (over := self._over_run(process, None)) is not None:
            self._stop(over, process, time.time_ns())
        held = (each for stopped in self._stopped.values() for each in stopped.stopper.processes)
        return all(each[0] != pid for each in held)

    def on_answer(self, exchange: Exchange) -> None:
        """It was answered, or never will be."""
        self.flights.end(exchange)

    def keep(self, events: Sequence[PricedEvent]) -> None:
        """Count events; stop who went over a limit by them, or asks on beyond it."""
        for event in events:
            process = event.usage.process
            for run in self._runs.values():
                if run.cap is not None and run.has(process):
                    run.cap.add(event)
            # First of all: the client may ask again within a millisecond.
            if (over := self._over_run(process, None)) is not None:
                self._stop(over, process, event.usage.at_ns)
        if events:
            self.guard.keep(events)
        if not self.is_active:
            self._fresh.clear()
            return
        for event in events:
            if (over := self.guard.over(of_event(event), under_way=False)) is not None:
                self._stop(over, event.usage.process, event.usage.at_ns)
        flying = {id(each) for each in self.flights}
        fresh, self._fresh = self._fresh, []
        for flight in fresh:
            if id(flight) in flying:
                over = self._over_run(flight.process, flight) or self.guard.over(
                    flight.spent, but=flight
                )
                if over is not None:
                    self._stop(over, flight.process, flight.started_ns)
        self._near = self.guard.is_near()

    def _over_run(self, process: Process | None, but: Flight | None) -> Over | None:
        for run in self._runs.values():
            if run.cap is None or not run.has(process):
                continue
            more = NOTHING if but is None else self.flights.flying(run.flies, but)
            if (over := run.cap.over(more)) is not None:
                return over
        return None

    # --- stopping

    def _stop(self, over: Over, process: Process | None, at_ns: int) -> None:
        if process is None:
            return
        spender = began_before(process.pid, at_ns)
        run = next((each for each in self._runs.values() if each.has(process)), None)
        name = over.id if run is None or over.budget is None else f"{over.id}/{run.root[0]}"
        stopped = self._stopped.get(name)
        if stopped is None:
            stopped = _Stopped(over, Stopper(), run)
        roots = [] if spender is None else [spender]
        if run is not None:
            roots[:0] = [run.root, *_between(process, run.root[0], at_ns)]
        elif spender is not None:
            roots = job_of(spender)
        is_new = name not in self._stopped
        fresh = stopped.stopper.stop(roots)
        program = os.path.basename(process.exe or "") or str(process.pid)
        if stopped.stopper.refused:
            whose = process.user or f"uid {process.uid}"
            why = f"{program} (pid {process.pid}) belongs to {whose} and could not be stopped"
            self._refused = f"{over.text}, and {why}"
        if not stopped.stopper.processes:
            stopped.stopper.close()
            return
        held = self.guard.hold(name, over, STOPPED, program, stopped.stopper.processes)
        if is_new and not held:
            stopped.stopper.resume()
            return
        self._stopped[name] = stopped
        now = time.monotonic()
        if fresh or now >= stopped.told_at + TELL_AGAIN_S:  # somebody had continued it
            stopped.told_at, after_s = now, SETTLES_S if run is not None else SAY_AFTER_S
            stopped.say.append((now + after_s, program, process.pid))
        if over.holds == END and stopped.kill_at is None:
            stopped.stopper.end()
            stopped.kill_at = time.monotonic() + END_S

    def _tell(self, name: str, stopped: _Stopped, program: str, pid: int) -> None:
        run = stopped.run
        flying = self.guard.flying(stopped.over) if run is None else self.flights.flying(run.flies)
        over = stopped.over
        if flying.requests or over.spent_usd >= over.limit_usd:  # else what was under way is why
            over = replace(over, in_flight=flying.requests, in_flight_usd=flying.usd)
        if run is not None:
            stopped.asked = False
            run.tell(
                {
                    "limit_reached": name,
                    "text": over.text,
                    "holds": over.holds,
                    "limit_usd": usd_text(over.limit_usd),
                    "spent_usd": usd_text(over.spent_usd),
                    "at_least": over.at_least,
                    "in_flight": over.in_flight,
                    "in_flight_usd": usd_text(over.in_flight_usd),
                }
            )
            return
        did = "is ended" if over.holds == END else "is stopped"
        text = f"halton-meter: {over.text}. {program} (pid {pid}) {did}."
        if over.holds == STOP:
            text += f"\r\n  go on: halton-meter budget resume {name}   (then: fg)"
        say_on_terminal(pid, text)

    def go_on(self, key: Hashable) -> None:
        """Who watches a run has given its terminal back: let it continue."""
        run = self._runs.get(key)
        for name, stopped in list(self._stopped.items()):
            if run is not None and stopped.run is run and stopped.asked:
                self._resume(name, stopped)

    def end(self, key: Hashable) -> None:
        """End what is stopped of a run."""
        run = self._runs.get(key)
        for stopped in self._stopped.values():
            if run is not None and stopped.run is run and stopped.kill_at is None:
                stopped.stopper.end()
                stopped.kill_at = time.monotonic() + END_S

    def _resume(self, name: str, stopped: _Stopped) -> None:
        stopped.stopper.resume()
        del self._stopped[name]
        self.guard.let_go(name)

    # --- time

    @property
    def due_at(self) -> float | None:
        """When `tick` has something to do."""
        dues = [self.guard.due_at]
        for stopped in self._stopped.values():
            dues.append(stopped.kill_at)
            dues += [each[0] for each in stopped.say]
        return min((due for due in dues if due is not None), default=None)

    def tick(self, now: float) -> None:
        """Let go on what `budget resume` has allowed, end what did not end, say what is due."""
        self.guard.tick(now)
        for stop in self.guard.resumed():
            for name, stopped in list(self._stopped.items()):
                if name != stop.id or stopped.asked:
                    continue
                if stopped.run is None:
                    self._resume(name, stopped)
                    continue
                if stopped.run.cap is not None and stopped.over.budget is None:
                    stopped.run.cap.allow(stop.more_usd or Decimal(0))
                stopped.asked = True
                stopped.say.clear()
                stopped.run.tell({"limit_lifted": stop.id})
        self.say(now)
        for name, stopped in list(self._stopped.items()):
            if stopped.kill_at is not None and now >= stopped.kill_at:
                stopped.stopper.kill()
                del self._stopped[name]
                self.guard.let_go(name)

    def say(self, until: float = math.inf) -> None:
        """Tell what is due by then; a run that ends is told all of it."""
        for name, stopped in self._stopped.items():
            for each in [each for each in stopped.say if each[0] <= until]:
                stopped.say.remove(each)
                self._tell(name, stopped, *each[1:])

    def close(self) -> None:
        """The end of the metering: a run's command has ended; what a service has stopped stays."""
        held = {pid for each in self._stopped.values() for pid, _ in each.stopper.processes}
        if self._is_run:
            self._end_run()
        for stopped in self._stopped.values():
            stopped.stopper.close()
        self.guard.close(let_go=self._is_run and not self._stopped)
        self._let_waiting_go(held)

    def _end_run(self) -> None:
        """Kill what outlives a command that is ended, once END_S is over. What is stopped and lives
        stays noted: who watches the run may have been killed, and left it to `budget resume`.
        """
        for name, stopped in list(self._stopped.items()):
            if stopped.kill_at is not None:
                while _has_alive(stopped) and time.monotonic() < stopped.kill_at:
                    time.sleep(0.02)
                stopped.stopper.kill()
            elif _has_alive(stopped):
                continue
            else:
                stopped.stopper.close()
            del self._stopped[name]
            self.guard.let_go(name)

    def _let_waiting_go(self, held: Collection[int]) -> None:
        """Let go on who the kernel has paused, but for who is held: the helper and the supervisor
        may have been killed together, and then nobody else does.
        """
        pids = set(self.asking)
        for root in self.asking_runs:
            pids |= {root, *descendants(root)}
        resume_all([identity(pid) for pid in pids.difference(held) if is_stopped(pid)])


def _has_alive(stopped: _Stopped) -> bool:
    return any(map(is_alive, stopped.stopper.processes))


def _between(process: Process, root: int, at_ns: int) -> list[ProcessId]:
    """Its parents within a run: one that has left its own parent descends from nothing there."""
    pids = [pid for pid, _ in process.parents]
    if root not in pids:
        return []
    found = (began_before(pid, at_ns) for pid in pids[: pids.index(root)])
    return [each for each in found if each is not None]


def _root_of(stop: Stop) -> str | None:
    """The process of the run that a stop is of, by its name; None where it is of none."""
    if stop.id == stop.budget:
        return None
    return stop.id.rpartition("-" if stop.budget is None else "/")[2]


def cap_of(
    name: str, usd: Any, holds: Any, before: dict[str, Any], seen: Collection[str] = ()
) -> Cap | None:
    """A run's limit as the worker is told of it; None where it is told of none.

    `before` is what was spent already, `seen` the events of that which may come again.
    """
    try:
        limit_usd = amount(usd)
        spent = Amount(
            amount(before.get("usd")) or Decimal(0),
            int(before.get("requests", 0)),
            int(before.get("unpriced", 0)),
        )
    except (TypeError, ValueError):
        return None
    if limit_usd is None or limit_usd <= 0:
        return None
    return Cap(limit_usd, name, END if holds == END else STOP, spent, seen)
