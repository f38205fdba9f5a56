"""The composition root: processes, privileges and signals of live metering.

Three processes. This one, the supervisor, is root and does little: it starts the other two, passes
signals on and restarts what died. The capture helper (`capture/helper.py`, root) attaches probes
and forwards plaintext. The metering process (`metering.py`) reads it as the user, prices and
stores; all that parses hostile bytes is there. `run` has a fourth, the command itself, as the
user, held until the probes are in place. When any of ours dies the command never notices.

Read `serve` for the service and `run_command` for one command.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halton_meter import metering
from halton_meter.config import Account, Config, ConfigError, is_host
from halton_meter.control import Control, ServiceAbsent
from halton_meter.metering import Job, Totals

if TYPE_CHECKING:
    from capture.uprobe import Scope

# Waits before the n-th restart in a row; a process that held out HEALTHY_S begins anew.
BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
HEALTHY_S = 60.0
START_S_MAX = 60.0
FINISH_S_MAX = 20.0
LINE_BYTES_MAX = 4 << 20
ENVIRONMENT_BYTES_MAX = 4 << 20

NOT_FOUND, NOT_RUNNABLE = 127, 126


class Unavailable(Exception):
    """Live metering cannot start; `problems` are pairs of what is missing and what mends it."""

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        super().__init__("; ".join(what for what, _ in problems))
        self.problems = tuple(problems)


# --- who and what -------------------------------------------------------------------------------


def user_environment(
    account: Account, environ: Mapping[str, str], parent: bytes | None
) -> dict[str, str]:
    """The environment that the person's command would have had without sudo.

    `parent` is the raw environment of the sudo process (it was started with the person's own), or
    None when there is none to read: then ours is used, with the identity put right.
    """
    base = _parsed_environment(parent) if parent else None
    given = {name: value for name, value in environ.items() if not name.startswith("SUDO_")}
    if "SUDO_UID" not in environ:
        return given
    identity = {
        "HOME": str(account.home),
        "USER": account.name,
        "LOGNAME": account.name,
        "SHELL": account.shell,
    }
    if base is None:
        given.pop("MAIL", None)
        return {**given, **identity}
    # What sudo's own command line added ("sudo NAME=value halton-meter …") is kept.
    added = {name: value for name, value in given.items() if name not in base and name != "MAIL"}
    return {**added, **identity, **base}


def _parsed_environment(raw: bytes) -> dict[str, str]:
    pairs = (entry.partition(b"=") for entry in raw.split(b"\0") if b"=" in entry)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs if name}


def sudo_environment() -> bytes | None:
    """The environment of the sudo process that started us, or None."""
    pid = os.getppid()
    try:
        if os.path.basename(os.readlink(f"/proc/{pid}/exe")) != "sudo":
            return None
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read(ENVIRONMENT_BYTES_MAX)
    except OSError:
        return None


def as_account(account: Account, function: Callable[[], Any]) -> Any:
    """The result of `function`, run in a child with the account's rights; it must be JSON-able.

    Raises ConfigError with the child's message when it raised one.
    """
    if os.geteuid() != 0 or account.uid == 0:
        return function()
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            become(account)
            try:
                answer = json.dumps([function(), None])
            except ConfigError as error:
                answer = json.dumps([None, str(error)])
            except (ImportError, OSError) as error:
                reason = f"cannot act as {account.name} (uid {account.uid}): {error}"
                answer = json.dumps([None, reason])
            with os.fdopen(write_fd, "w") as file:
                file.write(answer)
            code = 0
        finally:
            os._exit(code)
    os.close(write_fd)
    with os.fdopen(read_fd, "rb") as file:
        raw = file.read(LINE_BYTES_MAX)
    os.waitpid(pid, 0)
    if not raw:
        raise ConfigError(f"cannot act as {account.name} (uid {account.uid})")
    result, problem = json.loads(raw)
    if problem is not None:
        raise ConfigError(str(problem))
    return result


def become(account: Account) -> None:
    """Give up root for good: groups first, then all three group and user ids."""
    try:
        os.initgroups(account.name, account.gid)
    except OSError:
        os.setgroups([account.gid])
    os.setresgid(account.gid, account.gid, account.gid)
    os.setresuid(account.uid, account.uid, account.uid)


def configured(account: Account, home: Path) -> tuple[Config, tuple[str, ...]]:
    """The person's configuration, read with the person's rights, and the hosts to be watched.

    Raises ConfigError.
    """

    def read() -> Any:
        from halton_meter import config
        from halton_meter.providers import Registry, UnknownFamily

        found = config.load(home)
        try:
            hosts = Registry(found.extra_hosts).hosts()
        except UnknownFamily as error:
            raise ConfigError(f"{home / 'config.toml'}: {error}") from None
        return [dataclasses.asdict(found), hosts]

    table, hosts = as_account(account, read)
    for name in ("openai_compatible_hosts", "users"):
        table[name] = tuple(table[name])
    return Config(**table), tuple(str(host) for host in hosts if is_host(str(host)))


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

    def __init__(self, plan: Plan, job: Job) -> None:
        from capture.uprobe import spawn_helper

        self.started = time.monotonic()
        self._heard = bytearray()
        link = spawn_helper(
            plan.scope(), plan.hosts, loader=plan.config.loader, program=plan.program
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
            data = os.read(self.fileno(), 1 << 20)
        except BlockingIOError:
            return []
        if not data:
            return None
        self._heard += data
        if len(self._heard) > LINE_BYTES_MAX:
            self._process.kill()
        *lines, rest = bytes(self._heard).split(b"\n")
        self._heard[:] = rest
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, dict):
                    found.append(message)
        return found

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
        self._restarts = 0
        self._in_a_row = 0
        self._restart_at: float | None = None
        self._died_ns: int | None = None
        self._cause: str | None = None
        self._before = Totals()
        self._current = Totals()
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
            if not self.selector.select(max(0.0, deadline - time.monotonic())):
                self._pair.wait(0)
                raise Unavailable([("the capture did not start in time", "try again")])
            messages = self._pair.messages()
            if messages is None:
                self._pair.wait(1)
                raise Unavailable([("the metering process ended at once", "its message is above")])
            for message in messages:
                self._take(message)
                if "unavailable" in message or "refused" in message:
                    self._pair.wait(FINISH_S_MAX)
                    raise Unavailable(_problems(message))

    def _launch(self) -> None:
        job = self._plan.job(died_at_ns=self._died_ns, cause=self._cause, restarts=self._restarts)
        self._pair, self._ended = Pair(self._plan, job), False
        self.selector.register(self._pair, selectors.EVENT_READ, self.attend)

    def attend(self) -> None:
        """Take what the metering process told, or its death."""
        if self._pair is None:
            return
        messages = self._pair.messages()
        for message in messages or ():
            self._take(message)
        if messages is None:
            self._bury()

    def _take(self, message: dict[str, Any]) -> None:
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
        if message.get("final"):
            self._ended = True
            self._take_final(message)

    def _take_final(self, message: dict[str, Any]) -> None:
        for cause, count in message.get("losses", {}).items():
            self.result.losses[cause] = self.result.losses.get(cause, 0) + int(count)
        self.result.coverage = list(message.get("coverage", ()))
        self.result.store_error = message.get("store_error")

    def _bury(self) -> None:
        """The pair died: note when and why, and when the next one is to be started."""
        assert self._pair is not None
        self.selector.unregister(self._pair)
        code = self._pair.wait(1.0)
        lasted = time.monotonic() - self._pair.started
        self._pair, self._ready = None, False
        self._before.merge(self._current)
        self._current = Totals()
        self._died_ns = self._died_ns or time.time_ns()
        self._cause = _cause(code)
        self._in_a_row = 0 if lasted > HEALTHY_S else self._in_a_row
        wait_s = BACKOFF_S[min(self._in_a_row, len(BACKOFF_S) - 1)]
        self._in_a_row += 1
        self._restart_at = time.monotonic() + wait_s

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
        self.result.totals = self._before
        return self.result


def _cause(code: int) -> str:
    if code == metering.HELPER_DIED:
        return "the capture helper died"
    if code < 0:
        return f"the metering process was killed by {signal.Signals(-code).name}"
    return f"the metering process ended with code {code}"


def _problems(message: dict[str, Any]) -> list[tuple[str, str]]:
    if "refused" in message:
        return [(str(message["refused"]), "halton-meter status")]
    return [(str(what), str(command)) for what, command in message["unavailable"]]


# --- signals ------------------------------------------------------------------------------------

_SIGINFO_BYTES = 128
_SI_KERNEL = 0x80
_SFD_CLOEXEC = 0o2000000
_FORWARDED = (
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


class Signals:
    """Signals as data: (number, whether the terminal sent it), read from a descriptor.

    Block them first (`block`), fork what must have them unblocked with `unblock` in the child.
    """

    def __init__(self) -> None:
        mask = sum(1 << (number - 1) for number in _FORWARDED)
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = libc.signalfd(-1, struct.pack("Q", mask).ljust(128, b"\0"), _SFD_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "signalfd")

    @staticmethod
    def block() -> None:
        """Keep the signals for the descriptor."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)

    @staticmethod
    def unblock() -> None:
        """Have them delivered again."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)

    def fileno(self) -> int:
        """Readable when a signal came."""
        return self._fd

    def read(self) -> tuple[int, bool]:
        """The next signal, and whether the terminal sent it to our whole group."""
        raw = os.read(self._fd, _SIGINFO_BYTES)
        number, _, code = struct.unpack_from("=IiI", raw)
        return number, code == _SI_KERNEL

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)


# --- one command --------------------------------------------------------------------------------


class Command:
    """The command of `run`: forked at once, so that it has a pid; executed when `release`d."""

    def __init__(
        self, argv: Sequence[str], account: Account, environment: Mapping[str, str]
    ) -> None:
        hold_read, self._hold = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._hold)
            _execute(hold_read, argv, account, environment)
        os.close(hold_read)
        self.pidfd = os.pidfd_open(self.pid)

    def release(self) -> None:
        """Let it begin."""
        os.write(self._hold, b"x")
        os.close(self._hold)

    def abandon(self) -> None:
        """End it before it has begun."""
        os.close(self._hold)
        os.waitpid(self.pid, 0)
        os.close(self.pidfd)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def reap(self) -> int:
        """Its exit code as a shell gives it: 128 + the signal that ended it."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        code = os.waitstatus_to_exitcode(status)
        return 128 - code if code < 0 else code


def _execute(
    hold: int, argv: Sequence[str], account: Account, environment: Mapping[str, str]
) -> None:
    """In the child: wait to be released, become the person, be the command."""
    code = NOT_RUNNABLE
    try:
        if os.read(hold, 1) and argv:
            os.close(hold)
            if os.geteuid() == 0 and account.uid != 0:
                become(account)
            # Python ignores these two; what it starts must not.
            for number in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            Signals.unblock()
            os.execvpe(argv[0], list(argv), dict(environment))  # noqa: S606 (what `run` is for)
    except FileNotFoundError:
        code = NOT_FOUND
        os.write(2, f"halton-meter: {argv[0]}: command not found\n".encode())
    except OSError as error:
        os.write(2, f"halton-meter: cannot run {argv[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(code)


def _attend_command(
    command: Command,
    signals: Signals,
    selector: selectors.BaseSelector,
    tick: Callable[[], None],
    wait_s: Callable[[], float | None],
) -> int:
    """Wait for the command's end; meanwhile pass signals on and do what else is ready."""
    ended = False

    def on_end() -> None:
        nonlocal ended
        ended = True

    def on_signal() -> None:
        number, by_terminal = signals.read()
        if not by_terminal:  # the terminal's went to the command, too: it is in our group
            command.signal(number)

    selector.register(command.pidfd, selectors.EVENT_READ, on_end)
    selector.register(signals, selectors.EVENT_READ, on_signal)
    while not ended:
        for key, _ in selector.select(wait_s()):
            key.data()
        tick()
    selector.unregister(command.pidfd)
    selector.unregister(signals)
    return command.reap()


def run_command(
    argv: Sequence[str], environment: Mapping[str, str], plan: Plan
) -> tuple[int, Metered]:
    """Run one command as the person, metered by probes of its own. Raises Unavailable."""
    Signals.block()
    command = Command(argv, plan.account, environment)
    program = shutil.which(argv[0], path=environment.get("PATH"))
    supervisor = Supervisor(dataclasses.replace(plan, roots=(command.pid,), program=program))
    try:
        supervisor.start()
        signals = Signals()
    except BaseException:
        command.abandon()
        Signals.unblock()
        raise
    command.release()
    code = _attend_command(
        command, signals, supervisor.selector, supervisor.tick, lambda: supervisor.wait_s
    )
    return code, supervisor.finish()


def run_watched(
    argv: Sequence[str], environment: Mapping[str, str], account: Account, control: Control
) -> tuple[int, Metered]:
    """Run one command that the service meters anyway, and ask the service about it at the end."""
    Signals.block()
    command = Command(argv, account, environment)
    try:
        control.ask("watch", pid=command.pid)
        signals = Signals()
    except BaseException:
        command.abandon()
        Signals.unblock()
        raise
    command.release()
    started_ns = time.time_ns()
    selector = selectors.DefaultSelector()
    code = _attend_command(command, signals, selector, lambda: None, lambda: None)
    result = Metered()
    try:
        reply = control.ask("finish")
        result.totals = Totals.of_json(reply.get("totals"))
        result.coverage = list(reply.get("coverage", ()))
    except (ServiceAbsent, ValueError):
        result.gaps.append((started_ns, time.time_ns(), "the service stopped during the run"))
    return code, result


def covers(status: Mapping[str, Any], uid: int) -> bool:
    """Whether the service that gave this status meters all processes of that user."""
    scope = status.get("scope") or {}
    return not scope.get("cgroup") and (bool(scope.get("everyone")) or uid in scope.get("uids", ()))


# --- the service --------------------------------------------------------------------------------


def serve(plan: Plan, say: Callable[[str], None]) -> None:
    """Meter until SIGTERM, SIGINT or `stop`; restart what dies. Raises Unavailable at first."""
    Signals.block()
    signals = Signals()
    supervisor = Supervisor(plan)
    supervisor.start()
    say(f"metering into {plan.home}")
    ending = False

    def on_signal() -> None:
        nonlocal ending
        number, _ = signals.read()
        ending = ending or number in (signal.SIGTERM, signal.SIGINT)

    supervisor.selector.register(signals, selectors.EVENT_READ, on_signal)
    while not ending and not supervisor.stop_asked:
        was_ready = supervisor.ready
        for key, _ in supervisor.selector.select(supervisor.wait_s):
            key.data()
        supervisor.tick()
        if was_ready != supervisor.ready:
            say("metering again" if supervisor.ready else "the metering stopped; restarting it")
    supervisor.selector.unregister(signals)
    supervisor.finish()
    say("stopped")


def wanted_uids(account: Account, config: Config, names: Iterable[str]) -> Iterator[int]:
    """The users whom the service meters. Raises ConfigError for a name that is nobody's."""
    from halton_meter.config import account_named

    chosen = tuple(names)
    if not chosen:
        yield account.uid
    for name in (*chosen, *config.users):
        yield account_named(name).uid
