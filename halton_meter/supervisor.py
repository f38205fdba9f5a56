"""Keeps the two halves of live metering alive: the root helper and the metering process.

The supervisor is root and does little: it starts both, hands the one's socket to the other, hears
what was metered, and starts again what died. It reads no plaintext. `daemon.py` decides what is
metered and for whom; `metering.py` and `capture/helper.py` are the halves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halton_meter import metering, untrusted
from halton_meter.config import Account, Config, ConfigError
from halton_meter.losses import MESSAGES_REFUSED, Losses
from halton_meter.metering import Job
from halton_meter.privileges import as_account
from halton_meter.totals import Totals

if TYPE_CHECKING:
    from capture.remains import Keeper, Remains
    from capture.uprobe import Scope

# Waits before the n-th restart in a row; a process that held out HEALTHY_S begins anew.
BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
HEALTHY_S = 60.0
START_S_MAX = 60.0
FINISH_S_MAX = 20.0
COVERAGE_TEXTS = ("process", "user", "host", "stack", "library", "state", "advice")
LINE_BYTES_MAX = 4 << 20
# Read at a time: whatever comes, and however fast, signals and children are attended to in between.
MESSAGES_BYTES_MAX = 16 << 10
STORING_MAX = 100_000  # the events of one batch, and those whose fate is looked up at the end
SAID_CHARACTERS_MAX = 1000


class Unavailable(Exception):
    """Live metering cannot start; `problems` are pairs of what is missing and what mends it."""

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(what for what, _ in problems))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a supervisor needs to know."""

    account: Account
    home: Path
    config: Config
    hosts: tuple[str, ...]
    service: bool
    uids: frozenset[int] = frozenset()
    roots: tuple[int, ...] = ()
    everyone: bool = False
    cgroup: str | None = None
    program: str | None = None  # what a run is about to start

    def scope(self) -> Scope:
        """Whose plaintext the kernel may copy."""
        from capture.uprobe import Scope

        # Our own processes are the person's too; looking into them would only cost.
        excluded = (os.getpid(),) if self.service else ()
        return Scope(self.uids, self.roots, self.everyone, self.cgroup, excluded)

    def job(self, **fields: Any) -> Job:
        """What the metering process is told."""
        scope = {"uids": sorted(self.uids), "everyone": self.everyone, "cgroup": self.cgroup}
        return Job(
            home=str(self.home),
            service=self.service,
            extra_hosts=self.config.extra_hosts,
            scope=scope,
            supervisor_pid=os.getpid(),
            **fields,
        )


# --- the metering process and its helper, from outside ------------------------------------------


class Pair:
    """One metering process and the helper that it reads from; they live and die together."""

    def __init__(self, plan: Plan, job: Job, remains: Remains | None = None) -> None:
        from capture.remains import Keeper
        from capture.uprobe import spawn_helper

        self.started = time.monotonic()
        self._lines = untrusted.Lines(LINE_BYTES_MAX)
        self.keeper = Keeper()
        link = spawn_helper(
            plan.scope(),
            plan.hosts,
            loader=plan.config.loader,
            program=plan.program,
            keeper=self.keeper,
            remains=remains,
        )
        with link:
            self._process = self._start(plan.account, job, link)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(dataclasses.asdict(job)).encode() + b"\n")
        self._process.stdin.flush()
        os.set_blocking(self._process.stdout.fileno(), False)

    @staticmethod
    def _start(account: Account, job: Job, link: socket.socket) -> subprocess.Popen[bytes]:
        identity: dict[str, Any] = {}
        if os.geteuid() == 0 and account.uid != 0:
            groups = os.getgrouplist(account.name, account.gid)
            identity = {"user": account.uid, "group": account.gid, "extra_groups": groups}
        environment = {
            "HOME": str(account.home),
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": "C.UTF-8",
            "HALTON_METER_HOME": job.home,
        }
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "halton_meter.metering", str(link.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(link.fileno(),),
            cwd="/",
            env=environment,
            start_new_session=True,  # a Ctrl-C meant for the command must not end the metering
            **identity,
        )

    @property
    def pid(self) -> int:
        """The metering process."""
        return self._process.pid

    def fileno(self) -> int:
        """Readable when `messages` has some; at its end, when the process died."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def messages(self) -> list[dict[str, Any]] | None:
        """What it has told since; None once it has ended."""
        try:
            data = os.read(self.fileno(), MESSAGES_BYTES_MAX)
        except BlockingIOError:
            return []
        if not data:
            return None
        self._lines.feed(data)
        return list(self._lines.messages())

    def refused(self) -> int:
        """How many lines that were no messages it has sent since the last call."""
        count, self._lines.refused = self._lines.refused, 0
        return count

    def finish(self) -> None:
        """Ask it to drain, store and end."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.write(b"finish\n")
            self._process.stdin.flush()

    def wait(self, timeout_s: float) -> int:
        """Its exit code; killed when it takes longer."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


@dataclass(slots=True)
class Metered:
    """What a supervisor knows at the end of a run."""

    totals: Totals = field(default_factory=Totals)
    losses: dict[str, int] = field(default_factory=dict)
    coverage: list[dict[str, Any]] = field(default_factory=list)
    gaps: list[tuple[int, int, str]] = field(default_factory=list)
    store_error: str | None = None


class Supervisor:
    """Keeps a Pair alive; its owner waits on a selector and hands over what is ready."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._pair: Pair | None = None
        self._keeper: Keeper | None = None  # of a dead pair
        self._restarts = 0
        self._in_a_row = 0
        self._restart_at: float | None = None
        self._died_ns: int | None = None
        self._cause: str | None = None
        self._started_ns = time.time_ns()
        self._losses = Losses()
        self._before = Totals()
        self._current = Totals()
        # Of these a metering process said that it stores them, and not yet that it has: it may
        # have died before, within or after.
        self._storing: list[str] = []
        self._uncertain: list[str] = []
        self._ready = False
        self._ended = False
        self.result = Metered()
        self.selector = selectors.DefaultSelector()
        self.stop_asked = False

    @property
    def ready(self) -> bool:
        """Whether plaintext is being metered at this moment."""
        return self._ready

    def start(self) -> None:
        """Return once probes are in place. Raises Unavailable."""
        self._launch()
        deadline = time.monotonic() + START_S_MAX
        while not self._ready:
            assert self._pair is not None
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not self.selector.select(left_s):
                self._pair.wait(0)
                raise Unavailable([("the capture did not start in time", "try again")])
            messages = self._pair.messages()
            if messages is None:
                self._pair.wait(1)
                raise Unavailable([("the metering process ended at once", "its message is above")])
            for message in messages:
                self.take(message)
                if "unavailable" in message or "refused" in message:
                    self._pair.wait(FINISH_S_MAX)
                    raise Unavailable(_problems(message))

    def _launch(self) -> None:
        job = self._plan.job(
            died_at_ns=self._died_ns,
            cause=self._cause,
            restarts=self._restarts,
            lost_before=self._losses.before,
            owed=self._losses.owed,
            gaps=self._losses.gaps,
        )
        remains = self._keeper.take() if self._keeper is not None else None
        try:
            self._pair, self._ended = Pair(self._plan, job, remains), False
        finally:
            if remains is not None:
                remains.close()
        self._keep(None)
        self.selector.register(self._pair, selectors.EVENT_READ, self.attend)

    def attend(self) -> None:
        """Take what the metering process told, or its death."""
        if self._pair is None:
            return
        messages = self._pair.messages()
        for message in messages or ():
            self.take(message)
        if refused := self._pair.refused():
            self._losses.count(MESSAGES_REFUSED, refused)
        if messages is None:
            self._bury()

    def take(self, message: dict[str, Any]) -> None:
        """Hear one message. It comes from who read hostile bytes: it must not end us, whatever."""
        try:
            self._take(message)
        except Exception:
            self._losses.count(MESSAGES_REFUSED, 1)

    def _take(self, message: dict[str, Any]) -> None:
        self._losses.take(message)
        if message.get("ready"):
            self._ready = True
            if self._died_ns is not None:
                gap = (self._died_ns, time.time_ns(), self._cause or "unknown")
                self.result.gaps.append(gap)
                self._died_ns = None
        if message.get("stop"):
            self.stop_asked = True
        if "totals" in message:
            with contextlib.suppress(ValueError):
                self._current = Totals.of_json(message["totals"])
                self._storing = []
        if "storing" in message:
            self._storing = untrusted.texts(message, "storing", STORING_MAX)
        if message.get("final"):
            self._ended = True
            self._take_final(message)

    def _take_final(self, message: dict[str, Any]) -> None:
        lines = untrusted.tables(message, "coverage", metering.COVERAGE_SHOWN_MAX)
        self.result.coverage = [
            {name: untrusted.text(line, name, SAID_CHARACTERS_MAX) for name in COVERAGE_TEXTS}
            | {"pid": untrusted.whole_number(line, "pid")}
            for line in lines
        ]
        self.result.store_error = untrusted.text(message, "store_error", SAID_CHARACTERS_MAX)

    def _bury(self) -> None:
        """The pair died: note when and why, and when the next one is to be started."""
        assert self._pair is not None
        self.selector.unregister(self._pair)
        code = self._pair.wait(1.0)
        lasted = time.monotonic() - self._pair.started
        # A metering process whose helper died has read all that was left.
        self._keep(self._pair.keeper if code != metering.HELPER_DIED else None)
        self._pair, self._ready = None, False
        self._before.merge(self._current)
        self._current = Totals()
        self._losses.ended()
        self._uncertain = (self._uncertain + self._storing)[-STORING_MAX:]
        self._storing = []
        self._died_ns = self._died_ns or time.time_ns()
        self._cause = _cause(code)
        self._in_a_row = 0 if lasted > HEALTHY_S else self._in_a_row
        wait_s = BACKOFF_S[min(self._in_a_row, len(BACKOFF_S) - 1)]
        self._in_a_row += 1
        self._restart_at = time.monotonic() + wait_s

    def _keep(self, keeper: Keeper | None) -> None:
        """Hold what the dead pair left, or nothing any more."""
        if self._keeper is not None:
            self._keeper.close()
        self._keeper = keeper

    @property
    def wait_s(self) -> float | None:
        """How long the owner may wait before it calls `tick`."""
        if self._restart_at is None:
            return None
        return max(0.0, self._restart_at - time.monotonic())

    def tick(self) -> None:
        """Restart what is due."""
        if self._restart_at is not None and time.monotonic() >= self._restart_at:
            self._restart_at = None
            self._restarts += 1
            try:
                self._launch()
            except OSError as error:
                self._cause = f"it could not be started: {error.strerror}"
                self._restart_at = time.monotonic() + BACKOFF_S[-1]

    def finish(self) -> Metered:
        """Have the rest drained and stored, end both processes, and tell what was metered."""
        deadline = time.monotonic() + FINISH_S_MAX
        if self._pair is not None:
            self._pair.finish()
        while self._pair is not None and not self._ended and time.monotonic() < deadline:
            if self.selector.select(max(0.0, deadline - time.monotonic())):
                self.attend()
        if self._pair is not None:
            self._pair.wait(1.0)
        if self._died_ns is not None:
            self.result.gaps.append((self._died_ns, time.time_ns(), self._cause or "unknown"))
        self._before.merge(self._current)
        self._losses.ended()
        self.result.losses = self._losses.before
        if self._uncertain:
            self._before.merge(self._found_in_store())
        self.result.totals = self._before
        return self.result

    def _found_in_store(self) -> Totals:
        """What became of the uncertain ones, read with the person's rights."""

        def read() -> Any:
            from halton_meter.store import StoreError

            home, ids = self._plan.home, self._uncertain
            try:
                return metering.stored_totals(home, ids, self._started_ns).as_json()
            except StoreError as error:
                raise ConfigError(str(error)) from None

        try:
            return Totals.of_json(as_account(self._plan.account, read))
        except (ConfigError, ValueError) as error:
            self.result.store_error = self.result.store_error or str(error)
            return Totals()


def _cause(code: int) -> str:
    if code == metering.HELPER_DIED:
        return "the capture helper died"
    if code < 0:
        return f"the metering process was killed by {signal.Signals(-code).name}"
    return f"the metering process ended with code {code}"


def _problems(message: dict[str, Any]) -> list[tuple[str, str]]:
    refused = untrusted.text(message, "refused", SAID_CHARACTERS_MAX)
    if refused is not None:
        return [(refused, "halton-meter status")]
    found = message.get("unavailable")
    pairs = [each for each in found if isinstance(each, list)] if isinstance(found, list) else []
    said = [untrusted.texts({"pair": pair}, "pair", 2, SAID_CHARACTERS_MAX) for pair in pairs]
    problems = [(what, mend) for what, mend in (pair for pair in said if len(pair) == 2)]
    return problems or [("the metering process did not say what is missing", "halton-meter doctor")]
