"""Limits that hold: a runaway client is stopped, or refused, at the answer that crosses it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.lab.conftest import CLIENTS, HALTON_METER, Service, stored_events
from tests.lab.test_run import as_sudo, child_running
from tests.support.lab.lab import Lab
from tests.support.quick import first
from tests.support.waiting import wait_until

pytestmark = pytest.mark.lab

RUNAWAY = ("python3", str(CLIENTS / "runaway.py"))
# By the price book: 101 x 15 + 64 x 1.5 + 32 x 18.75 + 29 x 75 dollars a million.
ANSWER_USD = Decimal("0.004386")
LIMIT_USD = Decimal("0.03")
ANSWERS = 7  # the seventh crosses it
RUNS = "RSD"  # not stopped


@pytest.fixture
def home(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home for state that no service writes to."""
    folder = lab.user.home / tmp_path_factory.mktemp("limits").name
    folder.mkdir()
    os.chown(folder, lab.user.uid, lab.user.gid)
    return folder


@pytest.fixture
def bystander(lab: Lab) -> Iterator[subprocess.Popen[Any]]:
    """A process of the same user's that spends nothing."""
    script = "import time\nwhile True: time.sleep(0.05)"
    process = lab.popen(["python3", "-c", script], user=lab.user)
    yield process
    process.kill()
    process.wait()


def state_of(pid: int) -> str:
    """R, S, T …; "" for none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def tree_of(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += tree_of(int(child))
    return found


def begin(lab: Lab, home: Path, *command: str, options: tuple[str, ...] = ()) -> Any:
    """`sudo halton-meter run --max-usd … -- command`, going on."""
    argv = [*HALTON_METER, "run", "--via", "uprobes", "--max-usd", str(LIMIT_USD), *options]
    log = (home / "stderr").open("wb")
    return lab.popen(
        [*argv, "--", *command],
        env=as_sudo(lab, home),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
    )


def said(home: Path) -> str:
    return (home / "stderr").read_text()


def wait_stopped(home: Path, times: int = 1) -> None:
    wait_until(lambda: said(home).count("the command is stopped") >= times, "the stop")


def budget(lab: Lab, home: Path, *words: str) -> Any:
    environment = lab.environment(HALTON_METER_HOME=str(home))
    return lab.run([*HALTON_METER, "budget", *words], user=lab.user, env=environment)


@pytest.mark.parametrize("attempt", first(range(20)))
def test_a_runaway_client_is_stopped_at_the_answer_that_crosses_the_limit(
    lab: Lab, home: Path, bystander: subprocess.Popen[Any], attempt: int
) -> None:
    asked = len(lab.ledger())
    summary = home / "summary.json"
    process = begin(lab, home, *RUNAWAY, options=("--json-summary", str(summary)))
    wait_stopped(home)
    client = child_running(process.pid, "runaway.py")
    assert state_of(client) == "T"
    assert state_of(bystander.pid) in RUNS
    assert state_of(process.pid) in RUNS
    assert {state_of(pid) for pid in tree_of(process.pid)} - {"T"} <= set(RUNS)
    # The provider has been asked for nothing behind the answer that crossed it: the client asks one
    # thing at a time, and waits with each request until all that it was answered is counted.
    assert len(lab.ledger()) - asked == ANSWERS
    time.sleep(0.2)
    assert len(lab.ledger()) - asked == ANSWERS
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    told = json.loads(summary.read_text())
    assert process.returncode in (130, 143)
    assert Decimal(told["limit"]["spent_usd"]) == ANSWERS * ANSWER_USD
    assert told["limit"]["times"] == 1
    assert told["requests"] == ANSWERS
    assert told["limit"]["in_flight"] == 0
    assert out.count(b"answered") in (ANSWERS - 1, ANSWERS)  # stopped as it was about to say so
    (home / "stderr").unlink()
    assert json.loads((home / "budgets" / "stops.json").read_text())["stops"] == []


def all_counted(lab: Lab, told: dict[str, Any], asked: int) -> None:
    """Each answer was counted once; of the last request, which the client's end cut off, the
    provider may have heard nothing whole, and the client not all that was answered."""

    def served() -> int:
        return sum(entry["state"] == "done" for entry in lab.ledger()[asked:])

    # The provider notes an answer when it has sent it, which a client may have read by then.
    whole = told["requests"] - told["aborted_requests"]
    said = {name: told[name] for name in ("requests", "aborted_requests", "seen_again_requests")}
    wait_until(lambda: served() >= whole, f"as many answers as {said}", 10)
    assert told["aborted_requests"] <= 1
    assert served() <= told["requests"]


@pytest.mark.parametrize("part", first(["capture.helper.main", "halton_meter.live.probes.worker"]))
def test_a_limit_holds_and_nobody_hangs_though_ours_are_killed(
    lab: Lab, home: Path, part: str
) -> None:
    """Near the limit each request of the client's waits for both of them."""
    asked, summary = len(lab.ledger()), home / "summary.json"
    options = ("--json-summary", str(summary))
    process = begin(lab, home, *RUNAWAY, "1000", "60", options=options)
    for count in (2, 4):
        wait_until(lambda n=count: len(lab.ledger()) - asked >= n, "answers")
        os.kill(child_running(process.pid, part), signal.SIGKILL)
    wait_stopped(home)
    client = child_running(process.pid, "runaway.py")
    wait_until(lambda: state_of(client) == "T", "the stop")
    assert len(lab.ledger()) - asked >= ANSWERS
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    # What was asked for while it was started again is counted: nothing is lost, nor hangs.
    all_counted(lab, json.loads(summary.read_text()), asked)


def test_what_was_stopped_goes_on_when_the_user_says_so(lab: Lab, home: Path) -> None:
    process = begin(lab, home, "sh", "-c", f"{' '.join(RUNAWAY)} 16; echo behind")
    wait_stopped(home)
    told = json.loads(budget(lab, home, "status", "--json").stdout)
    (stop,) = told["stopped"]
    assert stop["how"] == "stopped"
    assert len(stop["pids"]) == 2  # the shell and the client
    done = budget(lab, home, "resume")
    assert done.stdout == f"{stop['id']}: python3.11 goes on for another $0.03.\n".replace(
        "python3.11", stop["program"]
    )
    wait_stopped(home, 2)
    assert budget(lab, home, "resume", stop["id"], "--more", "5").returncode == 0
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.count(b"answered") == 16
    assert out.endswith(b"behind\n")
    assert "16 requests" in said(home)
    assert len(stored_events(lab, home)) == 16


def test_a_command_is_ended_at_its_limit_where_that_is_asked(lab: Lab, home: Path) -> None:
    process = begin(lab, home, *RUNAWAY, options=("--at-limit", "end"))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert out.count(b"answered") <= ANSWERS
    assert "the command is ended" in said(home)
    assert "limit of $0.0300: it ended at $0.0307, $0.000702 over it" in said(home)


RAW = """
import os, runpy, sys, termios, tty
tty.setraw(0)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_terminal_is_sane_while_a_command_is_stopped_and_ctrl_c_ends_it(
    lab: Lab, home: Path
) -> None:
    leader, follower = os.openpty()
    before = termios.tcgetattr(follower)
    argv = [*HALTON_METER, "run", "--via", "uprobes", "--max-usd", str(LIMIT_USD)]
    process = lab.popen(
        ["setsid", "--ctty", "--wait", *argv, "--", "python3", "-c", RAW, RUNAWAY[1]],
        env=as_sudo(lab, home),
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    screen = Screen(leader)
    wait_until(lambda: "the command is stopped" in screen.text(), "the stop")
    modes = termios.tcgetattr(follower)
    assert modes[3] == before[3]  # echo, lines, signals
    assert modes[3] & termios.ISIG
    client = wait_until(lambda: child_running(process.pid, RUNAWAY[1]), "the client")
    assert state_of(client) == "T"
    os.write(leader, b"\x03")
    assert process.wait(60) in (130, 143)
    assert termios.tcgetattr(follower)[3] == before[3]
    assert "ending the command" in screen.text()
    os.close(leader)
    os.close(follower)


class Screen:
    """What was printed on a pseudo-terminal so far."""

    def __init__(self, leader: int) -> None:
        os.set_blocking(leader, False)
        self._leader, self._said = leader, b""

    def text(self) -> str:
        try:
            while data := os.read(self._leader, 65536):
                self._said += data
        except OSError:
            pass
        return self._said.decode(errors="replace")


# --- through the proxy --------------------------------------------------------------------------


@pytest.mark.parametrize("holds", ["stop", "end"])
def test_the_proxy_refuses_the_next_request(lab: Lab, home: Path, holds: str) -> None:
    """However fast the client asks: nothing is sent on before what was answered is counted."""
    skip = len(lab.ledger())
    summary = home / "summary.json"
    argv = [*HALTON_METER, "run", "--via", "proxy", "--max-usd", str(LIMIT_USD)]
    argv += ["--at-limit", holds, "--json-summary", str(summary), "--", *RUNAWAY, "50", "0"]
    environment = lab.environment(HALTON_METER_HOME=str(home))
    done = lab.run(argv, user=lab.user, env=environment)
    answers, refused = done.stdout.splitlines()[:ANSWERS], done.stdout.splitlines()[ANSWERS:]
    assert answers == ["answered"] * ANSWERS
    # Ended, it may not have come to print what it was refused with.
    assert done.returncode in ((3,) if holds == "stop" else (3, 143))
    assert len(refused) == 1 or (holds == "end" and not refused)
    for line in refused:
        status, _, document = line.partition(" ")
        assert status == "402"
        error = json.loads(document)["error"]
        assert error["type"] == "billing_error"
        assert "this run has spent $0.0307 of its limit of $0.03" in error["message"]
    assert len(lab.ledger()) - skip == ANSWERS
    told = json.loads(summary.read_text())
    assert (told["requests"], told["refused_requests"]) == (ANSWERS, 1)
    assert Decimal(told["list_usd"]) == ANSWERS * ANSWER_USD
    assert len(stored_events(lab, home)) == ANSWERS  # a refusal is no request of the provider's


# --- the service --------------------------------------------------------------------------------


@pytest.fixture
def own(lab: Lab, home: Path) -> Iterator[Service]:
    """A service with budgets: project acme is stopped, and each threshold is written down."""
    fired = home / "fired"
    fired.mkdir()
    os.chown(fired, lab.user.uid, lab.user.gid)
    state = home / "state"
    state.mkdir()
    os.chown(state, lab.user.uid, lab.user.gid)
    command = f'echo "$HALTON_BUDGET_SPENT_USD $(id -u)" >> {fired}/$HALTON_BUDGET_THRESHOLD'
    words = ("acme", str(LIMIT_USD), "--per", "day", "--project", "acme", "--action", "stop")
    done = budget(lab, state, "set", *words, "--command", command)
    assert done.returncode == 0, done.stderr
    running = Service(lab, state)
    yield running
    running.stop()


def ask_on(lab: Lab, project: str, log: Path) -> Any:
    """A runaway client of a project's, in a process group of its own."""
    environment = lab.environment(HALTON_PROJECT=project)
    return lab.popen(
        ["setsid", *RUNAWAY, "1000", "20"], user=lab.user, env=environment, stdout=log.open("wb")
    )


def stopped_now(lab: Lab, own: Service) -> list[Any]:
    """What is stopped at a limit."""
    found = json.loads(budget(lab, own.home, "status", "--json").stdout)["stopped"]
    assert isinstance(found, list)
    return found


def is_held(lab: Lab, own: Service, pid: int, *, beyond: str = "0") -> bool:
    """Whether a process is stopped at a limit above this one."""
    found = [each for each in stopped_now(lab, own) if Decimal(each["limit_usd"]) > Decimal(beyond)]
    return any(pid in each["pids"] for each in found) and state_of(pid) == "T"


def test_the_service_stops_who_goes_over_a_budget_and_nobody_else(
    lab: Lab, home: Path, own: Service
) -> None:
    other = ask_on(lab, "other", home / "other.log")
    spender = ask_on(lab, "acme", home / "acme.log")
    try:
        # Near the limit it waits for a moment with each request: that is no stop yet.
        wait_until(lambda: is_held(lab, own, spender.pid), "the stop")
        answered = (home / "other.log").stat().st_size
        wait_until(lambda: (home / "other.log").stat().st_size > answered, "the other's answers")
        assert state_of(other.pid) in RUNS
        assert (home / "acme.log").read_bytes().count(b"answered") in (ANSWERS - 1, ANSWERS)
        fired = home / "fired"
        wait_until(lambda: len(list(fired.iterdir())) == 4, "the commands of four thresholds")
        # The worker dies: the next one fires nothing again, and holds who goes on.
        os.kill(child_running(own.pid, "halton_meter.live.probes.worker"), signal.SIGKILL)
        own.wait_ready()
        told = json.loads(budget(lab, own.home, "status", "--json").stdout)
        assert [each["id"] for each in told["stopped"]] == ["acme"]
        assert told["budgets"][0]["stopped"]
        done = budget(lab, own.home, "resume", "acme", "--more", "0.02")
        assert "goes on for another $0.02" in done.stdout, done.stderr
        before = told["stopped"][0]["limit_usd"]
        try:
            wait_until(lambda: is_held(lab, own, spender.pid, beyond=before), "the next stop")
        except AssertionError as error:
            known = budget(lab, own.home, "status", "--json").stdout
            raise AssertionError(f"{state_of(spender.pid)} {known}\n{own.status()}") from error
        assert state_of(other.pid) in RUNS
        lines = {path.name: path.read_text().splitlines() for path in fired.iterdir()}
        assert sorted(lines, key=int) == ["50", "80", "95", "100"]
        assert {len(each) for each in lines.values()} == {1}
        uid = str(lab.user.uid)
        assert {each[0].split()[1] for each in lines.values()} == {uid}
        assert lines["100"][0].split()[0] == f"{ANSWERS * ANSWER_USD.normalize()}"
        code = budget(lab, own.home, "check", "acme").returncode
        assert code == 1
    finally:
        for process in (other, spender):
            process.kill()
            process.wait()


def under_service(lab: Lab, own: Service, home: Path, *options: str) -> Any:
    """A runaway client in a run that the service meters."""
    argv = [*HALTON_METER, "run", "--max-usd", str(LIMIT_USD), *options, "--", *RUNAWAY, "1000"]
    environment = lab.environment(HALTON_METER_HOME=str(own.home))
    return lab.popen(
        [*argv, "100"],  # an answer takes long enough that the worker is killed within the run
        user=lab.user,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=(home / "answers").open("wb"),
        stderr=(home / "stderr").open("wb"),
    )


def kill_worker(own: Service) -> None:
    os.kill(child_running(own.pid, "halton_meter.live.probes.worker"), signal.SIGKILL)
    own.wait_ready()


@pytest.mark.slow
def test_the_limit_of_a_run_holds_though_the_services_worker_is_killed(
    lab: Lab, home: Path, own: Service
) -> None:
    asked, summary = len(lab.ledger()), home / "summary.json"
    process = under_service(lab, own, home, "--json-summary", str(summary))
    answers = home / "answers"
    for count in (2, 4):
        wait_until(lambda n=count: answers.read_bytes().count(b"answered") >= n, "answers")
        kill_worker(own)
    wait_stopped(home)
    client = child_running(process.pid, "runaway.py")
    wait_until(lambda: state_of(client) == "T", "the stop")
    assert len(lab.ledger()) - asked >= ANSWERS
    # Killed once more, while it holds the run: the next one does, and lets it go on.
    kill_worker(own)
    assert state_of(client) == "T"
    (stop,) = stopped_now(lab, own)
    assert stop["how"] == "stopped"
    assert budget(lab, own.home, "resume", stop["id"], "--more", "0.01").returncode == 0
    wait_stopped(home, 2)
    wait_until(lambda: state_of(client) == "T", "the next stop")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) in (130, 143)
    told = json.loads(summary.read_text())
    all_counted(lab, told, asked)
    stored = stored_events(lab, own.home)
    assert told["requests"] == len(stored)
    assert Decimal(told["list_usd"]) == sum(Decimal(each["list_usd"]) for each in stored)
    assert told["outages"] == []
    wait_until(lambda: not stopped_now(lab, own), "the end of what was held")
