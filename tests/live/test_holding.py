"""What the worker has stopped at a limit: the next one holds it when the first was killed."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from halton_meter.budget import END, STOP
from halton_meter.cli.budget_resume import go_on
from halton_meter.live.caps import Cap
from halton_meter.live.probes.holding import Holding, cap_of
from halton_meter.live.stopping import identity, is_alive
from halton_meter.model import (
    Connection,
    Exchange,
    Outcome,
    Process,
    Protocol,
    Request,
    Response,
    Source,
)
from halton_meter.spending import ledger, standing, stops
from halton_meter.spending.sums import Amount
from tests.support.made import made
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pidfd and /proc")

BUDGET = '[budgets.daily]\nusd = 10\nper = "day"\naction = "stop"\n'


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text(BUDGET)
    return tmp_path


@pytest.fixture
def spenders() -> Iterator[list[subprocess.Popen[bytes]]]:
    made = [subprocess.Popen(["sleep", "1000"]) for _ in range(2)]
    yield made
    for each in made:
        each.kill()
        each.wait()


def is_stopped(process: subprocess.Popen[bytes]) -> bool:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def answer(number: int, usd: str, process: subprocess.Popen[bytes]) -> Any:
    now_ns = time.time_ns()
    who = Process(process.pid, now_ns, "/usr/bin/sleep", ("sleep",), "/", os.getuid(), "me")
    return made(f"e{number}", usd, at_ns=now_ns, process=who)


def worker(home: Path, run: int | None = None, tell: Any = None, spent: str = "0") -> Holding:
    """One as it begins; of a run where a process is named."""
    holding = Holding(home, is_run=run is not None)
    holding.refresh = lambda: refresh(home)
    if run is not None:
        cap = Cap(Decimal(10), f"run-{run}", spent=Amount(Decimal(spent), 1))
        holding.watch(None, run, tell, cap)
    holding.guard.look()
    holding.inherit()
    return holding


def refresh(home: Path) -> None:
    from halton_meter.settings import config

    standing.refresh(home, config.read(home).config.budgets, time.time_ns())


def killed_after(work: Callable[[], None]) -> int:
    """Do it in a process of its own that is killed then; its pid, of a zombie as yet."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid


def test_a_limit_holds_again_after_its_worker_was_killed(
    home: Path, spenders: list[subprocess.Popen[bytes]]
) -> None:
    one, other = spenders

    def work() -> None:
        first = worker(home)
        first.keep([answer(1, "11", one)])
        first.keep([answer(2, "0.5", other)])

    os.waitpid(killed_after(work), 0)
    assert is_stopped(one)
    assert is_stopped(other)
    second = worker(home)
    # The killed worker had counted it, and the next one is told of it again: once more is nothing.
    second.keep([answer(2, "0.5", other)])
    (stop,) = stops.read(home / "budgets").stops
    assert stop.by == identity(os.getpid())
    assert set(stop.processes) == {identity(one.pid), identity(other.pid)}
    go_on(home, ["daily"], Decimal(2), everything=False)
    second.tick(time.monotonic() + 1)
    # Both go on, though the second worker has seen only one of them spend.
    wait_until(lambda: not is_stopped(one) and not is_stopped(other), "the end of the stop")
    assert stops.read(home / "budgets").stops == ()
    second.keep([answer(3, "1.4", one)])
    assert not is_stopped(one)
    second.keep([answer(4, "0.7", one)])
    wait_until(lambda: is_stopped(one), "the next stop")
    assert not is_stopped(other)
    second.close()


def test_who_was_killed_before_it_let_go_on_is_followed_by_one_that_does(
    home: Path, spenders: list[subprocess.Popen[bytes]]
) -> None:
    """`budget resume` had found it alive, and has left the rest to it."""
    one, _ = spenders

    def work() -> None:
        worker(home).keep([answer(1, "11", one)])
        folder = home / "budgets"
        with ledger.locked(folder):
            held = stops.read(folder)
            (stop,) = held.stops
            stop = replace(stop, more_usd=Decimal(5))
            stops.write(folder, held.with_stop(stop).allowing(stop.key, Decimal(6)))

    os.waitpid(killed_after(work), 0)
    assert is_stopped(one)
    second = worker(home)
    second.tick(time.monotonic())
    wait_until(lambda: not is_stopped(one), "it goes on")
    assert stops.read(home / "budgets").stops == ()
    second.close()


def test_a_worker_that_was_killed_holds_nothing_though_nobody_has_heard_of_it_yet(
    home: Path, spenders: list[subprocess.Popen[bytes]]
) -> None:
    one, _ = spenders
    pid = killed_after(lambda: worker(home).keep([answer(1, "11", one)]))
    assert not is_alive(identity(pid))
    go_on(home, [], Decimal(5), everything=False)
    wait_until(lambda: not is_stopped(one), "it goes on")
    assert stops.read(home / "budgets").stops == ()
    os.waitpid(pid, 0)
    second = worker(home)
    second.keep([answer(2, "4.9", one)])
    assert not is_stopped(one)
    second.keep([answer(3, "0.1", one)])
    wait_until(lambda: is_stopped(one), "the next stop")
    second.close()


def test_who_is_allowed_more_while_it_is_being_stopped_goes_on(
    home: Path, spenders: list[subprocess.Popen[bytes]]
) -> None:
    """The worker had judged by what was allowed before."""
    one, _ = spenders
    holding = worker(home)
    judged = holding.guard.over

    def over(*args: Any, **how: Any) -> Any:
        found = judged(*args, **how)
        assert found is not None
        folder = home / "budgets"
        with ledger.locked(folder):
            stops.write(folder, stops.read(folder).allowing(found.key, Decimal(5)))
        return found

    holding.guard.over = over  # type: ignore[method-assign]
    holding.keep([answer(1, "11", one)])
    wait_until(lambda: not is_stopped(one), "it goes on")
    assert stops.read(home / "budgets").stops == ()
    holding.guard.over = judged  # type: ignore[method-assign]
    holding.keep([answer(2, "4", one)])
    wait_until(lambda: is_stopped(one), "the stop")
    holding.close()


def test_what_a_run_was_allowed_survives_its_worker(
    home: Path, spenders: list[subprocess.Popen[bytes]]
) -> None:
    one, _ = spenders
    (home / "config.toml").write_text("")
    told: list[dict[str, Any]] = []

    def work() -> None:
        worker(home, one.pid, told.append).keep([answer(1, "11", one)])

    os.waitpid(killed_after(work), 0)
    second = worker(home, one.pid, told.append, spent="11")
    assert is_stopped(one)
    go_on(home, [f"run-{one.pid}"], Decimal(3), everything=False)
    second.tick(time.monotonic() + 1)
    assert told == [{"limit_lifted": f"run-{one.pid}"}]  # who watches gives the terminal back
    second.go_on(None)
    wait_until(lambda: not is_stopped(one), "it goes on")
    second.guard.close(let_go=False)
    third = worker(home, one.pid, told.append, spent="13")
    third.keep([answer(2, "0.9", one)])
    assert not is_stopped(one)
    third.keep([answer(3, "0.1", one)])
    wait_until(lambda: is_stopped(one), "the next stop")
    third.close()


def test_a_lock_that_was_not_to_be_had_is_tried_again(
    home: Path, spenders: list[subprocess.Popen[bytes]]
) -> None:
    """What the file still says of an earlier stop lets nobody go on."""
    one, _ = spenders
    holding = worker(home)
    holding.keep([answer(1, "11", one)])
    go_on(home, ["daily"], Decimal(2), everything=False)
    fd = os.open(home / "budgets" / "lock", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    holding.tick(time.monotonic() + 1)  # goes on, which cannot be noted
    wait_until(lambda: not is_stopped(one), "it goes on")
    holding.keep([answer(2, "2.5", one)])  # nor can this stop
    wait_until(lambda: is_stopped(one), "the next stop")
    holding.tick(time.monotonic() + 2)
    assert is_stopped(one)
    os.close(fd)
    holding.tick(time.monotonic() + 3)
    (stop,) = stops.read(home / "budgets").stops
    assert (stop.more_usd, stop.processes) == (None, (identity(one.pid),))
    assert holding.guard.is_any_over()
    assert holding.trouble is None
    go_on(home, ["daily"], Decimal(2), everything=False)
    holding.tick(time.monotonic() + 4)
    wait_until(lambda: not is_stopped(one), "it goes on")
    holding.close()


def test_the_files_of_budgets_are_their_owners_alone(
    home: Path, spenders: list[subprocess.Popen[bytes]]
) -> None:
    holding = worker(home)
    holding.keep([answer(1, "11", spenders[0])])
    holding.tick(time.monotonic() + 5)
    files = [home / "budget-status.json", home / "budgets", *(home / "budgets").iterdir()]
    assert {each.name for each in files} >= {"stops.json", "spending.ndjson", "fired.json"}
    assert [each for each in files if each.stat().st_mode & 0o077] == []
    holding.close()


# --- who is asked first -------------------------------------------------------------------------


class Sent:
    """A request of a process that was sent whole."""

    def __init__(self, number: int, process: subprocess.Popen[bytes]) -> None:
        self.started_ns = number
        who = Process(process.pid, 1, "/usr/bin/sleep", uid=os.getuid())
        self.made = Exchange(
            id="x",
            connection=Connection(f"c{process.pid}", Source.UPROBES, who),
            protocol=Protocol.HTTP1,
            request=Request(),
            response=Response(),
            started_ns=number,
            first_byte_ns=None,
            ended_ns=1,
            outcome=Outcome.ABORTED,
        )

    def exchange(self, at_ns: int) -> tuple[Exchange, float]:
        return self.made, 1.0


def asks(
    holding: Holding, number: int, process: subprocess.Popen[bytes], most: str | None
) -> Exchange:
    """The process sends a request that costs at most so much; it is answered for that."""
    sent: Any = Sent(number, process)
    holding.preview = lambda _: made("p", "0.01")
    holding.at_most = lambda *_: made("p", most)
    holding.on_request(sent)
    return sent.made


def test_a_process_is_asked_first_once_its_answers_may_come_to_the_limit(
    home: Path, spenders: list[subprocess.Popen[bytes]]
) -> None:
    one, other = spenders
    (home / "config.toml").write_text("")
    told: list[dict[str, Any]] = []
    holding = worker(home, one.pid, told.append)
    first = asks(holding, 1, one, "4")
    assert holding.asking == {}
    second = asks(holding, 2, one, "6")
    assert list(holding.asking) == [one.pid]
    asks(holding, 3, other, "1000")  # of no run
    assert list(holding.asking) == [one.pid]
    for exchange in (first, second):
        holding.on_answer(exchange)
    # Nothing is under way: it is asked all the same, as its answers are on their way to us.
    holding.keep([answer(1, "3", one)])
    assert list(holding.asking) == [one.pid]
    assert holding.goes_on(one.pid)
    holding.on_answer(asks(holding, 4, one, "5"))
    assert holding.asking == {}
    asks(holding, 5, one, None)  # nobody knows what it costs
    assert list(holding.asking) == [one.pid]
    holding.keep([answer(2, "7", one)])
    wait_until(lambda: is_stopped(one), "the stop")
    assert not holding.goes_on(one.pid)
    assert holding.goes_on(other.pid)
    os.kill(one.pid, signal.SIGCONT)  # by somebody: it is stopped again with its next request
    wait_until(lambda: not is_stopped(one), "it goes on")
    assert not holding.goes_on(one.pid)
    wait_until(lambda: is_stopped(one), "the stop")
    holding.close()


def test_budgets_ask_whom_they_cover_and_nobody_would_miss(home: Path) -> None:
    (home / "config.toml").write_text(BUDGET + 'project = "web"\n')
    holding = worker(home)
    job = subprocess.Popen(["sleep", "1000"], process_group=0)
    alone = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    try:
        # In a group of its own, as a shell's job is: the shell would take notice.
        holding.on_answer(asks(holding, 1, job, "11"))
        assert holding.asking == {}
        holding.on_answer(asks(holding, 2, alone, "9"))
        assert holding.asking == {}
        holding.on_answer(asks(holding, 3, alone, "10"))
        assert list(holding.asking) == [alone.pid]
        holding.keep([answer(1, "10", alone)])
        assert not holding.goes_on(alone.pid)
    finally:
        for each in (job, alone):
            each.kill()
            each.wait()
        holding.close()


def test_what_a_worker_stopped_and_somebody_continued_as_it_died_is_stopped_by_the_next(
    home: Path, spenders: list[subprocess.Popen[bytes]]
) -> None:
    one, _ = spenders
    os.waitpid(killed_after(lambda: worker(home).keep([answer(1, "11", one)])), 0)
    os.kill(one.pid, signal.SIGCONT)
    wait_until(lambda: not is_stopped(one), "it goes on")
    second = worker(home)
    wait_until(lambda: is_stopped(one), "the stop")
    second.close()


def test_events_that_were_metered_before_a_run_was_watched_again_count_once(
    home: Path, spenders: list[subprocess.Popen[bytes]]
) -> None:
    one, other = spenders
    (home / "config.toml").write_text("")
    holding = worker(home)
    told: list[dict[str, Any]] = []
    before = {"usd": "8", "requests": 2, "unpriced": 0}
    holding.watch("run", one.pid, told.append, cap_of("run-1", "10", STOP, before, ["e2"]))
    seen = [answer(2, "5", one), answer(3, "1", one), answer(4, "5", other)]
    holding.count("run", seen)
    assert not is_stopped(one)
    holding.count("run", [answer(5, "1", one)])
    wait_until(lambda: is_stopped(one), "the stop")
    assert not is_stopped(other)
    holding.close()


# --- what is not the user's -----------------------------------------------------------------------

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="it becomes another user")


def as_nobody(home: Path, work: Callable[[], None]) -> None:
    """Do it as a user who owns the data folder and nothing else."""
    for each in (home, *home.rglob("*")):
        os.chown(each, NOBODY, NOBODY)
    os.chmod(home, 0o700)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()  # SIGCONT may be sent to anybody's processes of one's own session
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def reachable(home: Path) -> None:
    """Let another user come to the folder, through those of pytest's above it."""
    for each in home.parents:
        if each.stat().st_uid == os.getuid() and not each.stat().st_mode & 0o001:
            os.chmod(each, 0o711)


@needs_root
def test_a_budget_stops_no_process_of_another_users(
    home: Path, spenders: list[subprocess.Popen[bytes]]
) -> None:
    roots, _ = spenders
    reachable(home)

    def work() -> None:
        holding = worker(home)
        holding.keep([answer(1, "11", roots)])
        assert "could not be stopped" in (holding.trouble or "")
        assert stops.read(home / "budgets").stops == ()
        holding.close()

    as_nobody(home, work)
    assert not is_stopped(roots)


@needs_root
@pytest.mark.parametrize("action", ["stop", "end"])
def test_a_file_of_stops_that_the_user_has_written_reaches_no_process_of_anothers(
    home: Path, spenders: list[subprocess.Popen[bytes]], action: str
) -> None:
    roots, running = spenders
    reachable(home)
    roots.send_signal(signal.SIGSTOP)
    wait_until(lambda: is_stopped(roots), "the stop")
    (home / "config.toml").write_text(BUDGET.replace("stop", action))
    folder = ledger.folder_of(home)
    made_up: list[list[Any]] = [list(identity(each.pid)) for each in spenders]
    made_up += [[10**30, 5], [-1, 5], [1, 0], [0, 0]]
    stop = {
        "id": "daily", "budget": "daily", "usd": "10", "limit_usd": "10", "spent_usd": "11",
        "at_least": False, "how": "stopped", "since_ns": 1, "by": [10**30, 7], "program": "x",
        "key": "k", "processes": made_up, "more_usd": None,
    }  # fmt: skip
    (folder / "stops.json").write_text(json.dumps({"stops": [stop], "more": {}}))

    def work() -> None:
        holding = worker(home)  # takes it over, and would let it go on, or end it
        go_on(home, ["daily"], Decimal(1), everything=False)
        for seconds in (1, 20):
            holding.tick(time.monotonic() + seconds)
        (folder / "stops.json").write_text(json.dumps({"stops": [stop], "more": {}}))
        go_on(home, ["daily"], Decimal(1), everything=False)  # as nobody holds it
        holding.close()

    as_nobody(home, work)
    assert is_stopped(roots)
    assert running.poll() is None


def test_what_a_killed_run_has_stopped_is_left_to_the_user(
    home: Path, spenders: list[subprocess.Popen[bytes]]
) -> None:
    one, _ = spenders
    (home / "config.toml").write_text("")

    def work() -> None:
        run = worker(home, one.pid, lambda told: None)
        run.keep([answer(1, "11", one)])
        run.close()

    os.waitpid(killed_after(work), 0)
    wait_until(lambda: is_stopped(one), "the stop")
    (stop,) = stops.read(home / "budgets").stops
    assert stop.id == f"run-{one.pid}"
    go_on(home, [stop.id], Decimal(3), everything=False)
    wait_until(lambda: not is_stopped(one), "it goes on")


def test_what_outlives_a_command_that_is_ended_is_killed(home: Path, tmp_path: Path) -> None:
    (home / "config.toml").write_text("")
    script = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True)"
    command = [sys.executable, "-c", f"{script}; time.sleep(1000)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as deaf:
        try:
            assert deaf.stdout is not None
            deaf.stdout.readline()
            holding = Holding(home, is_run=True)
            cap = Cap(Decimal(10), f"run-{deaf.pid}", END)
            holding.watch(None, deaf.pid, lambda told: None, cap)
            holding.guard.look()
            holding.keep([answer(1, "11", deaf)])
            holding.close()
            assert deaf.wait(60) == -signal.SIGKILL
        finally:
            deaf.kill()
    assert stops.read(home / "budgets").stops == ()


def test_who_waits_for_an_answer_goes_on_when_the_metering_ends(
    home: Path, spenders: list[subprocess.Popen[bytes]]
) -> None:
    """Helper and supervisor may have been killed together: nobody else lets it go on."""
    one, _ = spenders
    (home / "config.toml").write_text("")
    run = worker(home, one.pid, lambda told: None)
    asks(run, 1, one, "20")
    assert list(run.asking) == [one.pid]
    one.send_signal(signal.SIGSTOP)
    wait_until(lambda: is_stopped(one), "the stop")
    run.close()
    wait_until(lambda: not is_stopped(one), "it goes on")
