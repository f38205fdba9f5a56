"""Keeps the two halves of live metering alive: the root helper and the metering worker.

The supervisor is root and does little: it starts both, hands the helper's socket to the worker,
takes the worker's messages, and restarts what died. It holds the helper's kernel objects
(`capture/helper/handover.py`), so that a death of either stops neither the probes nor the other
half, and nothing that was captured is lost. It reads no plaintext. `probes/service.py` decides what
is metered and for whom; `probes/worker.py` and `capture/helper/main.py` are the halves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halton_meter import untrusted
from halton_meter.accounts import Account
from halton_meter.contract import usd_text
from halton_meter.coverage import Coverage
from halton_meter.live import own_code
from halton_meter.live.held import HeldCommand
from halton_meter.live.limits import limit_this_process
from halton_meter.live.losses import MESSAGES_REFUSED, Losses
from halton_meter.live.outages import Downtime
from halton_meter.live.probes.job import COVERAGE_SHOWN_MAX, Job
from halton_meter.live.restarts import Restarts, cause_of_death
from halton_meter.live.result import NO_LIMIT, RunLimit, RunResult
from halton_meter.live.totals import Totals
from halton_meter.privileges import as_account
from halton_meter.problem import Problem, Unavailable
from halton_meter.settings.config import Config, ConfigError

if TYPE_CHECKING:
    from capture.helper.handover import Keeper
    from capture.helper_process import Scope

START_S_MAX = 150.0  # with bcc it took 9 to 18 s under a load of 5 on two cores, more than 30 of 25
FINISH_S_MAX = 20.0
COMMAND_S_MAX = 1.0
PROMPT_NICE = -10
COVERAGE_TEXTS = ("process", "user", "host", "stack", "library", "state", "advice")
LINE_BYTES_MAX = 4 << 20
# Read at a time, so that a worker that never stops writing does not keep us from other events.
MESSAGES_BYTES_MAX = 16 << 10
STORING_MAX = 100_000  # events of one batch, or looked up in the store at the end
COUNTED_MAX = 256  # events that the next worker may meet again: of the last batch, as a rule
SAID_CHARACTERS_MAX = 1000


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
    programs: tuple[str, ...] = ()  # what a run is about to start
    limit: RunLimit = NO_LIMIT  # of a run
    record_fd: int | None = None  # what a run's plaintext is kept in (`live/kept_plaintext.py`)
    config_error: str | None = None  # lines about values that are not used
    own_hosts: Mapping[str, str] = field(default_factory=dict)  # those of the user's own file

    def scope(self) -> Scope:
        """Whose plaintext the kernel may copy."""
        from capture.helper_process import Scope

        # Our own processes run as the user, too; attaching to them would only cost.
        excluded = (os.getpid(),) if self.service else ()
        # What a user's command does as another user must stay hidden from the first.
        owner = None if self.service or self.account.uid == 0 else self.account.uid
        return Scope(
            self.uids,
            self.roots,
            self.everyone,
            self.cgroup,
            excluded,
            owner,
            reader=self.account.uid,
        )

    def job(self, **fields: Any) -> Job:
        """The worker's job."""
        scope = {"uids": sorted(self.uids), "everyone": self.everyone, "cgroup": self.cgroup}
        return Job(
            home=str(self.home),
            service=self.service,
            extra_hosts=self.config.extra_hosts,
            scope=scope,
            supervisor_pid=os.getpid(),
            config_error=self.config_error,
            own_hosts=dict(self.own_hosts),
            run_pid=self.roots[0] if self.roots else None,
            max_usd=self.limit.max_usd,
            at_limit=self.limit.at_limit,
            record_fd=self.record_fd,
            **fields,
        )


# --- the metering worker, from outside ----------------------------------------------------------


class Worker:
    """One metering worker."""

    def __init__(self, account: Account, job: Job, link: socket.socket) -> None:
        self._lines = untrusted.Lines(LINE_BYTES_MAX)
        self._commands, theirs = socket.socketpair()
        self._commands.settimeout(COMMAND_S_MAX)
        with theirs:
            self._process = self._start(account, job, link, theirs)
        assert self._process.stdout is not None
        self._send(json.dumps(dataclasses.asdict(job)).encode() + b"\n")
        if job.max_usd is not None:  # who is over a limit is stopped within milliseconds
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, self._process.pid, PROMPT_NICE)
        os.set_blocking(self._process.stdout.fileno(), False)

    @staticmethod
    def _start(
        account: Account, job: Job, link: socket.socket, commands: socket.socket
    ) -> subprocess.Popen[bytes]:
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
            own_code.python("halton_meter.live.probes.worker", str(link.fileno())),
            stdin=commands.fileno(),
            stdout=subprocess.PIPE,
            pass_fds=[each for each in (link.fileno(), job.record_fd) if each is not None],
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
        """Its new messages; None once it has ended."""
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

    def _send(self, line: bytes, fds: Sequence[int] = ()) -> None:
        with contextlib.suppress(OSError):  # it is dead, or hangs and will be killed
            socket.send_fds(self._commands, [line], fds)

    def resume(self, link: socket.socket) -> None:
        """Let it continue at another helper."""
        self._send(b"link\n", [link.fileno()])

    def reload(self, job: Job) -> None:
        """Let it use the hosts of this job, and read again what the user may have changed."""
        hosts = {"extra_hosts": job.extra_hosts, "own_hosts": job.own_hosts}
        told = {**hosts, "config_error": job.config_error}
        self._send(b"reload " + json.dumps(told).encode() + b"\n")

    def tell(self, what: str) -> None:
        """Ask it to "continue", or to "end", what it has stopped of a run."""
        self._send(what.encode() + b"\n")

    def finish(self) -> None:
        """Ask it to drain, store and end."""
        self._send(b"finish\n")

    def wait(self, timeout_s: float) -> int:
        """Its exit code; killed when it takes longer."""
        self._commands.close()
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


class Supervisor:
    """Keeps both halves alive; its owner waits on a selector and calls what is ready."""

    def __init__(self, plan: Plan, held: HeldCommand | None = None) -> None:
        from capture.helper.handover import Keeper

        self._plan = plan
        self._held = held or HeldCommand()
        self._held.ask = self._tell_worker
        self._keeper: Keeper = Keeper()
        self._helper_restarts = Restarts()
        self._helper_runs = False
        self._worker: Worker | None = None
        self._worker_restarts = Restarts()
        self._restarts = 0
        self._downtime = Downtime()  # in which plaintext is neither copied nor metered
        self._started_ns = time.time_ns()
        self._losses = Losses()
        self._before = Totals()
        self._current = Totals()
        # Events that a worker was about to store, and has not yet reported as stored: if it died,
        # nobody knows without asking the store.
        self._storing: list[str] = []
        self._uncertain: list[str] = []
        self._counted: list[str] = []  # the last ones that a worker has counted
        self._ready = False
        self._ended = False
        self.result = RunResult()
        self.selector = selectors.DefaultSelector()
        self.stop_asked = False

    @property
    def ready(self) -> bool:
        """Whether plaintext is being metered at this moment."""
        return self._ready and self._helper_runs

    def start(self) -> None:
        """Return once probes are in place. Raises Unavailable.

        A command that is to be run has been forked by now: it keeps the limits that it was given.
        """
        limit_this_process()
        with self._start_helper() as link:
            self._start_worker(link)
        deadline = time.monotonic() + START_S_MAX
        while not self._ready:
            assert self._worker is not None
            left_s = deadline - time.monotonic()
            ready = self.selector.select(left_s) if left_s > 0 else []
            if not ready:
                self._worker.wait(0)
                raise Unavailable([_LATE])
            for key, _ in ready:
                if key.data == self._attend_helper:
                    key.data()
                    continue
                messages = self._worker.messages()
                if messages is None:
                    self._worker.wait(1)
                    raise Unavailable([_ENDED_AT_ONCE])
                for message in messages:
                    self.take(message)
                    if "unavailable" in message or "refused" in message:
                        self._worker.wait(FINISH_S_MAX)
                        raise Unavailable(_problems(message))

    # --- the helper -----------------------------------------------------------------------------

    def _start_helper(self) -> socket.socket:
        """Start it; the link from which a worker reads."""
        from capture.helper_process import spawn_helper

        plan = self._plan
        link = spawn_helper(
            plan.scope(),
            plan.hosts,
            loader=plan.config.loader,
            programs=plan.programs,
            keeper=self._keeper,
        )
        self._helper_restarts.begun()
        self._helper_runs = True
        self.selector.register(self._keeper, selectors.EVENT_READ, self._attend_helper)
        return link

    def _attend_helper(self) -> None:
        """Take the kernel objects that the helper hands over, or note its death."""
        from capture.helper_process import let_paused_go_on

        if self._keeper.attend():
            return
        self.selector.unregister(self._keeper)
        self._keeper.close_channel()
        self._helper_runs = False
        let_paused_go_on(self._keeper)
        self._helper_restarts.died()
        self._note_death("the capture helper died")

    def _restart_helper(self) -> None:
        with self._start_helper() as link:
            if self._worker is not None:
                self._worker.resume(link)
        self._restarts += 1

    # --- the metering worker --------------------------------------------------------------------

    def _start_worker(self, link: socket.socket) -> None:
        job = self._plan.job(
            died_at_ns=self._downtime.since_ns,
            cause=self._downtime.cause,
            restarts=self._restarts,
            continued=self._restarts > 0 and self._keeper.holds_probes,
            lost_before=self._losses.before,
            owed=self._losses.owed,
            outages=self._losses.outages,
            spent_before=self._spent(),
            counted_before=self._counted,
        )
        self._worker, self._ended = Worker(self._plan.account, job, link), False
        self._worker_restarts.begun()
        self.selector.register(self._worker, selectors.EVENT_READ, self.attend)

    def _spent(self) -> dict[str, Any]:
        """What workers before this one have counted, for a run's limit."""
        line = self._before.total
        unpriced = line.unpriced + line.implausible
        return {"usd": usd_text(line.list_usd), "requests": line.requests, "unpriced": unpriced}

    def _tell_worker(self, what: str) -> None:
        if self._worker is not None:
            self._worker.tell(what)

    def _restart_worker(self) -> None:
        from capture.helper_process import link_to

        self._restarts += 1
        with link_to(self._keeper) as link:
            self._start_worker(link)

    def attend(self) -> None:
        """Take the worker's messages, or note its end."""
        if self._worker is None:
            return
        messages = self._worker.messages()
        for message in messages or ():
            self.take(message)
        if refused := self._worker.refused():
            self._losses.count(MESSAGES_REFUSED, refused)
        if messages is None:
            self._on_worker_exit()

    def take(self, message: dict[str, Any]) -> None:
        """Take one message. Its sender reads hostile bytes: no message may end us."""
        try:
            self._take(message)
        except Exception:
            self._losses.count(MESSAGES_REFUSED, 1)

    def _take(self, message: dict[str, Any]) -> None:
        self._losses.take(message)
        if not self._plan.service:
            self._held.take(message)
        if message.get("ready"):
            self._ready = True
            self._end_downtime()
        if message.get("stop"):
            self.stop_asked = True
        if "totals" in message:
            with contextlib.suppress(ValueError):
                self._current = Totals.of_json(message["totals"])
                # What a worker before this one may have stored, this one has met again and counted.
                known = frozenset(self._storing)
                self._uncertain = [each for each in self._uncertain if each not in known]
                self._counted = (self._counted + self._storing)[-COUNTED_MAX:]
                self._storing = []
        if "storing" in message:
            self._storing = untrusted.texts(message, "storing", STORING_MAX)
        if message.get("final"):
            self._ended = True
            self._take_final(message)

    def _take_final(self, message: dict[str, Any]) -> None:
        lines = untrusted.tables(message, "coverage", COVERAGE_SHOWN_MAX)
        self.result.coverage = [
            {name: untrusted.text(line, name, SAID_CHARACTERS_MAX) for name in COVERAGE_TEXTS}
            | {"pid": untrusted.whole_number(line, "pid")}
            for line in lines
        ]
        with contextlib.suppress(ValueError):
            self.result.connections = Coverage.of_json(message.get("connections"))
        self.result.store_error = untrusted.text(message, "store_error", SAID_CHARACTERS_MAX)
        self.result.price_error = untrusted.text(message, "price_error", SAID_CHARACTERS_MAX)
        self.result.waited_ms = untrusted.whole_number(message, "waited_ms") or 0

    def _on_worker_exit(self) -> None:
        """The worker ended: note when and why, and when to start the next one."""
        assert self._worker is not None
        self.selector.unregister(self._worker)
        code = self._worker.wait(1.0)
        self._worker, self._ready = None, False
        self._before.merge(self._current)
        self._current = Totals()
        self._losses.ended()
        self._uncertain = (self._uncertain + self._storing)[-STORING_MAX:]
        self._storing = []
        self._worker_restarts.died()
        self._note_death(cause_of_death("the metering worker", code))

    def _note_death(self, cause: str) -> None:
        """An outage begins, unless the kernel goes on copying for the next one to read."""
        if not self._keeper.holds_probes:
            self._downtime.begin(cause)

    def _end_downtime(self) -> None:
        if (outage := self._downtime.end()) is not None:
            self.result.outages.append(outage)

    @property
    def wait_s(self) -> float | None:
        """How long the owner may wait before it calls `tick`."""
        dues = [self._helper_restarts.due_at, self._worker_restarts.due_at]
        if not self._helper_runs:
            dues.pop()  # a worker needs a helper to read from
        due = min((each for each in dues if each is not None), default=None)
        return None if due is None else max(0.0, due - time.monotonic())

    def tick(self) -> None:
        """Restart what is due."""
        if self._helper_restarts.is_due():
            self._try(self._restart_helper, self._helper_restarts)
        if self._worker_restarts.is_due() and self._helper_runs:
            self._try(self._restart_worker, self._worker_restarts)

    def _try(self, start: Callable[[], None], restarts: Restarts) -> None:
        try:
            start()
        except OSError as error:
            self._note_death(f"it could not be started: {error.strerror}")
            restarts.died()

    def reload(self, plan: Plan) -> None:
        """Meter by another configuration from now on; whose processes are metered stays the same.

        Nothing is restarted, and no request is missed.
        """
        self._plan = dataclasses.replace(
            self._plan,
            config=plan.config,
            hosts=plan.hosts,
            own_hosts=plan.own_hosts,
            config_error=plan.config_error,
        )
        if self._helper_runs:
            with contextlib.suppress(OSError):  # it is about to be found dead: the next one knows
                self._keeper.set_hosts(self._plan.hosts)
        if self._worker is not None:
            self._worker.reload(self._plan.job())

    def finish(self) -> RunResult:
        """Let the worker drain and store the rest, end both processes; returns what was metered."""
        deadline = time.monotonic() + FINISH_S_MAX
        if self._worker is not None:
            self._worker.finish()
        while self._worker is not None and not self._ended and time.monotonic() < deadline:
            for key, _ in self.selector.select(max(0.0, deadline - time.monotonic())):
                if key.data in (self.attend, self._attend_helper):
                    key.data()
        if not self._plan.service:
            self.result.still_running = self._still_running()
        # The helper has all of it still: to let go of it costs us nothing now, and the kernel
        # removes the probes behind us.
        self._keeper.let_go()
        self._keeper.close_channel()
        if self._worker is not None:
            self._worker.wait(1.0)
        self._end_downtime()
        self._before.merge(self._current)
        self._losses.ended()
        self.result.losses = self._losses.total()
        if self._uncertain:
            self._before.merge(self._found_in_store())
        self.result.totals = self._before
        return self.result

    def _still_running(self) -> list[str]:
        """What of the command outlives it and its metering, by program."""
        from capture.helper_process import still_running

        names = still_running(self._keeper)
        return [untrusted.printable(name, SAID_CHARACTERS_MAX) for name in names]

    def _found_in_store(self) -> Totals:
        """The uncertain events that are in the store, read with the user's rights."""

        def read() -> Any:
            from halton_meter.store import StoreError

            home, ids = self._plan.home, self._uncertain
            try:
                return _stored_totals(home, ids, self._started_ns).as_json()
            except StoreError as error:
                raise ConfigError(str(error)) from None

        try:
            return Totals.of_json(as_account(self._plan.account, read))
        except (ConfigError, ValueError) as error:
            self.result.store_error = self.result.store_error or str(error)
            return Totals()


_LATE = Problem("the capture did not start in time", "halton-meter doctor")
_ENDED_AT_ONCE = Problem("the metering worker ended at once, see above", "halton-meter doctor")
_UNKNOWN = Problem("the metering worker did not say what is missing", "halton-meter doctor")


def _problems(message: dict[str, Any]) -> list[Problem]:
    refused = untrusted.text(message, "refused", SAID_CHARACTERS_MAX)
    if refused is not None:
        return [Problem(refused, "halton-meter status")]
    found = message.get("unavailable")
    pairs = [each for each in found if isinstance(each, list)] if isinstance(found, list) else []
    texts = [untrusted.texts({"pair": pair}, "pair", 2, SAID_CHARACTERS_MAX) for pair in pairs]
    return [Problem(*pair) for pair in texts if len(pair) == 2] or [_UNKNOWN]


def _stored_totals(home: Path, ids: Iterable[str], from_ns: int) -> Totals:
    """What is in the store of these events, which are no older than `from_ns`."""
    from halton_meter.store import NothingStored, Selection, Store

    wanted, totals = frozenset(ids), Totals()
    with contextlib.suppress(NothingStored), Store(home).reading() as reader:
        for event in reader.events(Selection(from_ns=from_ns)):
            if event.usage.id in wanted:
                totals.add(event)
    return totals
