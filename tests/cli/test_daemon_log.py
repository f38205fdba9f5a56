"""A log that takes nothing ends no service, and what keeps a service alive never gives up."""

from __future__ import annotations

import asyncio
import errno
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from halton_meter.accounts import invoking_account
from halton_meter.cli import daemon, start
from halton_meter.live import restarts
from halton_meter.live.probes import service as probes_service
from halton_meter.live.proxy import run as proxy_run
from halton_meter.live.proxy import service as proxy_service
from halton_meter.live.proxy.worker import Job
from halton_meter.live.restarts import Restarts
from halton_meter.live.result import RunResult
from proxy_fallback.edge.listening import listen

needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """What a service does with signals is not to outlive its test."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def refuse(text: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- what is said -------------------------------------------------------------------------------


@needs_dev_full
def test_what_is_said_to_a_full_disk_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.open("/dev/full", os.O_WRONLY), "w", closefd=True) as full:
        monkeypatch.setattr(sys, "stderr", daemon.log_on(full))
        daemon.say("one")
        sys.stderr.write("what a library prints")
        sys.stderr.flush()


def test_what_is_said_is_written_at_once_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(sys, "stderr", daemon.log_on(log))
        daemon.say("metering into \N{BLACK STAR}")
        said = (tmp_path / "log").read_text(encoding=log.encoding)
    at, text = said[:20], said[20:]
    assert time.strptime(at, "%Y-%m-%d %H:%M:%S ")
    assert text == "halton-meter: metering into \N{BLACK STAR}\n"


def test_what_is_said_to_no_file_has_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    with open(write, "w") as pipe, pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "stderr", daemon.log_on(pipe))
        daemon.say("metering")
    with open(read) as pipe:
        assert pipe.read() == "halton-meter: metering\n"


@pytest.mark.parametrize("stream", [None, SimpleNamespace()])
def test_what_is_no_file_stays_as_it_is(stream: object) -> None:
    assert daemon.log_on(stream) is stream  # type: ignore[arg-type]


@needs_dev_full
@pytest.mark.parametrize("keep", [(), ("--keep",)])
def test_a_full_disk_does_not_change_the_exit_code(tmp_path: Path, keep: tuple[str, ...]) -> None:
    (tmp_path / "config.toml").write_text("no such thing")
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "halton_meter",
                "daemon",
                "--via",
                "proxy",
                "--foreground",
                *keep,
            ],
            env={**os.environ, "HALTON_METER_HOME": str(tmp_path)},
            stdout=full,
            stderr=full,
            check=False,
        )
    assert done.returncode == 1


# --- the services -------------------------------------------------------------------------------


def test_a_fault_of_the_proxys_service_ends_its_process(tmp_path: Path) -> None:
    kept = proxy_service.ProxyService(Job(str(tmp_path), False), dict(os.environ))
    with pytest.raises(OSError, match="No space left"):
        asyncio.run(proxy_run._serve(kept, [listen(0)], refuse))


def test_what_keeps_the_worker_is_begun_again_when_it_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_service, "TICK_S", 0.0)
    kept = proxy_service.ProxyService(Job(str(tmp_path), False), {}, refuse)
    lives: list[int] = []

    async def live() -> int:
        lives.append(len(lives))
        if len(lives) == 3:
            kept.ask_to_stop()
        return 1

    monkeypatch.setattr(kept, "_live", live)

    async def scenario() -> None:
        await kept.start([listen(0)])
        await asyncio.wait_for(kept.stopped(), 60)
        await kept.stop(0.0)

    asyncio.run(scenario())
    assert lives == [0, 1, 2]
    assert kept.edge.counts["loop_errors"] == 2


class Flickering:
    """A supervisor whose metering comes and goes, until it is asked to stop."""

    def __init__(self, plan: object) -> None:
        self.selector = selectors.DefaultSelector()
        self.ready, self.stop_asked, self.wait_s = True, False, 0.0
        self.ticks = 0

    def start(self) -> None:
        """Nothing to start."""

    def tick(self) -> None:
        self.ticks += 1
        self.ready = not self.ready
        self.stop_asked = self.ticks == 4

    def finish(self) -> RunResult:
        return RunResult()


class NoSignals:
    """None comes."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    @staticmethod
    def block() -> None:
        """None is blocked."""

    def fileno(self) -> int:
        return self._read


@needs_dev_full
def test_the_probes_service_goes_on_when_its_log_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Flickering] = []

    def supervisor(plan: object) -> Flickering:
        made.append(Flickering(plan))
        return made[0]

    monkeypatch.setattr(probes_service, "Supervisor", supervisor)
    monkeypatch.setattr(probes_service, "Signals", NoSignals)
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr("click.echo", lambda text, err: full.write(text.encode()))
        plan: Any = SimpleNamespace(home=tmp_path, account=invoking_account())
        probes_service.serve(plan, daemon.say)
    assert made[0].ticks == 4


# --- the keepers --------------------------------------------------------------------------------


def test_a_keepers_waits_grow_to_their_bound_and_no_further() -> None:
    probes = Restarts(daemon.KEPT_BACKOFF_S, daemon.KEPT_HEALTHY_S)
    assert [probes.died() for _ in range(9)] == [0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2, 60.0]
    edge = Restarts(daemon.EDGE_BACKOFF_S, daemon.KEPT_HEALTHY_S)
    assert [edge.died() for _ in range(7)] == [0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    assert probes.died() == 60.0


class Clock:
    """Time that passes only in waits."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, s: float) -> None:
        self.now_s += s


def kept(monkeypatch: pytest.MonkeyPatch, codes: list[int | None]) -> tuple[int, list[str]]:
    """The keeper's exit code and what it said, of children that end so; None cannot be started."""
    said: list[str] = []
    left = iter(codes)
    ending: list[int] = []

    def spawn() -> int:
        code = next(left)
        if code is None:
            raise OSError(errno.EAGAIN, "no more processes")
        ending.append(code)
        return 4_194_305  # past any pid

    def waited(pid: int, options: int) -> tuple[int, int]:
        code = ending.pop()
        return pid, -code if code < 0 else code << 8

    monkeypatch.setattr(daemon, "time", clock := Clock())
    monkeypatch.setattr(restarts, "time", clock)
    monkeypatch.setattr(daemon, "say", said.append)
    monkeypatch.setattr(os, "waitpid", waited)
    return daemon._keep_alive(spawn, daemon.KEPT_BACKOFF_S, final=(0, 1)), said


def test_a_keeper_never_gives_up_and_says_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, said = kept(monkeypatch, [-9, None, *[1] * 20, 0])
    assert code == 0
    assert len(said) == 22
    assert said[0] == "the service was killed by SIGKILL; restart in 0.4 s"
    assert said[1].startswith("the service could not be started: no more processes; ")
    assert said[-1] == "the service ended with code 1; restart in 60 s"


def test_a_keeper_ends_with_what_could_not_start_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept(monkeypatch, [1]) == (1, [])


def test_a_keeper_that_waits_is_stopped_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(clock: Clock, s: float) -> None:
        clock.now_s += s
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Clock, "sleep", stop)
    code, said = kept(monkeypatch, [-9, 0])
    assert (code, len(said)) == (0, 1)


# --- start on a full disk -----------------------------------------------------------------------


def test_start_names_the_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: refuse(""))
    with pytest.raises(SystemExit):
        start._fail_for_disk("the proxy did not become healthy", tmp_path)
    said = capsys.readouterr().err
    assert "did not become healthy: the disk is full" in said
    assert f"fix: df -h {tmp_path}" in said


def test_start_does_not_blame_a_disk_with_room(tmp_path: Path) -> None:
    start._fail_for_disk("the proxy did not become healthy", tmp_path)
    assert list(tmp_path.iterdir()) == []
