"""The supervisor's and the metering process's parts that need no root."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from capture.helper_report import Connections
from halton_meter import privileges
from halton_meter.accounts import Account, account_named
from halton_meter.coverage import Count, Coverage, Part
from halton_meter.live.control import REQUEST_BYTES_MAX, SOCKET_NAME, Control, ServiceAbsent
from halton_meter.live.outages import Outages
from halton_meter.live.pipeline import prepare_home
from halton_meter.live.probes import control_answers, metering, service, supervisor
from halton_meter.live.probes.job import Job
from halton_meter.live.restarts import cause_of_death
from halton_meter.live.totals import MODELS_MAX, Totals
from halton_meter.model import (
    Basis,
    Certainty,
    Outcome,
    PricedEvent,
    Process,
    Source,
    Tokens,
    Usage,
    UsageEvent,
)
from halton_meter.settings.config import Config, ConfigError
from halton_meter.store import Flushed, Store

ANN = Account(1000, 1000, "ann", Path("/home/ann"), "/bin/zsh")


def event(
    id_: str = "a", model: str = "m", usd: str | None = "0.5", process: Process | None = None
) -> PricedEvent:
    usage = UsageEvent(
        id=id_,
        provider="openai",
        host="api.openai.com",
        endpoint="responses",
        kind="chat",
        model=model,
        request_model=model,
        response_id=id_,
        streaming=False,
        http_status=200,
        error_class=None,
        outcome=Outcome.COMPLETE,
        source=Source.UPROBES,
        parts=(Usage(model, Tokens(input=10, cache_read=5, output=3)),),
        certainty=Certainty.REPORTED,
        at_ns=1_790_000_000_000_000_000,
        ttft_ms=None,
        duration_ms=None,
        process=process,
    )
    price = None if usd is None else Decimal(usd)
    return PricedEvent(usage, price, price, None, Basis.COMPUTED if usd else Basis.UNPRICED)


# --- whose environment ---------------------------------------------------------------------------


def test_under_sudo_the_persons_own_environment_comes_back() -> None:
    parent = b"HOME=/home/ann\0PATH=/home/ann/bin:/bin\0USER=ann\0OPENAI_API_KEY=k\0BAD\0"
    ours = {"HOME": "/root", "PATH": "/sbin", "SUDO_UID": "1000", "SUDO_USER": "ann", "ADDED": "1"}
    found = privileges.user_environment(ANN, ours, parent)
    assert found["PATH"] == "/home/ann/bin:/bin"
    assert found["OPENAI_API_KEY"] == "k"
    assert found["HOME"] == "/home/ann"
    assert found["ADDED"] == "1"
    assert not [name for name in found if name.startswith("SUDO_")]


def test_without_sudos_environment_only_the_identity_is_put_right() -> None:
    ours = {"HOME": "/root", "USER": "root", "MAIL": "/var/mail/root", "SUDO_UID": "1000", "X": "1"}
    assert privileges.user_environment(ANN, ours, None) == {
        "HOME": "/home/ann",
        "USER": "ann",
        "LOGNAME": "ann",
        "SHELL": "/bin/zsh",
        "X": "1",
    }


def test_without_sudo_nothing_changes() -> None:
    me = account_named(str(os.getuid()))
    assert privileges.user_environment(me, {"HOME": "/h", "X": "1"}, None) == {
        "HOME": "/h",
        "X": "1",
    }


def test_a_data_folder_named_on_sudos_command_line_is_the_one() -> None:
    parent = b"HOME=/home/ann\0HALTON_METER_HOME=/usual\0"
    ours = {"SUDO_UID": "1000", "HALTON_METER_HOME": "/named"}
    found = privileges.user_environment(ANN, ours, parent)
    assert found["HALTON_METER_HOME"] == "/named"


def test_the_service_covers_whom_it_says() -> None:
    assert service.covers({"scope": {"uids": [1000]}}, 1000)
    assert not service.covers({"scope": {"uids": [1000]}}, 1001)
    assert service.covers({"scope": {"everyone": True}}, 1001)
    assert not service.covers({"scope": {"everyone": True, "cgroup": "/x"}}, 1001)
    assert not service.covers({}, 1000)


def test_wanted_users() -> None:
    me = account_named(str(os.getuid()))
    assert list(service.wanted_uids(me, Config(), ())) == [me.uid]
    assert set(service.wanted_uids(me, Config(users=("root",)), ("root",))) == {0}
    with pytest.raises(ConfigError, match="no user 'nobody-of-that-name'"):
        list(service.wanted_uids(me, Config(), ("nobody-of-that-name",)))


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Root's own configuration."""
    from halton_meter.settings import config

    folder = tmp_path / "etc"
    folder.mkdir(mode=0o755)
    path = folder / "config.toml"
    monkeypatch.setattr(config, "SYSTEM_CONFIG", path)
    monkeypatch.setattr(config.load_system, "__defaults__", (path,))
    return path


def planned(home: Path, said: list[str], **asked: Any) -> supervisor.Plan:
    me = account_named(str(os.getuid()))
    asked = {"all_users": False, "users": (), "cgroup": None} | asked
    return service.service_plan(me, home, say=said.append, **asked)


def test_a_persons_file_adds_hosts_for_the_person_and_nobody_else(
    tmp_path: Path, system: Path
) -> None:
    text = 'all_users = true\nusers = ["nobody"]\nopenai_compatible_hosts = ["llm.any.example"]\n'
    (tmp_path / "config.toml").write_text(text)
    said: list[str] = []
    plan = planned(tmp_path, said)
    assert (plan.uids, plan.everyone) == ({os.getuid()}, False)
    assert "llm.any.example" in plan.hosts
    assert ["users has no effect here" in said[0], "all_users has no" in said[1]] == [True, True]
    for asked in ({"all_users": True}, {"users": ("nobody", "root")}):
        said.clear()
        wider = planned(tmp_path, said, **asked)
        assert "llm.any.example" not in wider.hosts
        assert "api.anthropic.com" in wider.hosts
        assert any("ignored: the hosts in" in line for line in said)


@pytest.mark.skipif(os.geteuid() != 0, reason="the file is root's")
def test_root_may_widen_it_in_a_file_of_its_own(tmp_path: Path, system: Path) -> None:
    system.write_text('users = ["nobody"]\nopenai_compatible_hosts = ["llm.corp.example"]\n')
    said: list[str] = []
    plan = planned(tmp_path, said)
    assert plan.uids == {os.getuid(), account_named("nobody").uid}
    assert "llm.corp.example" in plan.hosts
    assert said == []
    for change in (
        lambda: system.chmod(0o666),
        lambda: os.chown(system, 4244, 4244),
        lambda: system.parent.chmod(0o777),
    ):
        change()
        with pytest.raises(ConfigError, match="others than root may change it"):
            planned(tmp_path, said)
        system.chmod(0o644)
        os.chown(system, 0, 0)
        system.parent.chmod(0o755)
    (tmp_path / "elsewhere.toml").write_text("all_users = true\n")
    system.unlink()
    system.symlink_to(tmp_path / "elsewhere.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        planned(tmp_path, said)


def test_configured_hosts_are_watched(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('openai_compatible_hosts = ["llm.example.com"]\n')
    me = account_named(str(os.getuid()))
    config, hosts = service.configured(me, tmp_path)
    assert config.openai_compatible_hosts == ("llm.example.com",)
    assert {"llm.example.com", "api.anthropic.com"} <= set(hosts)


def test_a_family_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[hosts]\n"llm.example.com" = "nobody"\n')
    with pytest.raises(ConfigError, match="nobody"):
        service.configured(account_named(str(os.getuid())), tmp_path)


# --- totals --------------------------------------------------------------------------------------


def test_totals_survive_the_pipe_and_add_up() -> None:
    totals = Totals()
    for priced in (event("a"), event("b", usd=None), event("c", "other", "0.25")):
        totals.add(priced)
    again = Totals.of_json(json.loads(json.dumps(totals.as_json())))
    assert again == totals
    again.merge(totals)
    assert again.total.requests == 6
    assert again.total.input_tokens == 90
    assert again.total.list_usd == Decimal("1.5")
    assert again.total.unpriced == 2
    assert again.models["other"].requests == 2


def test_a_better_sighting_takes_the_place_of_the_first() -> None:
    """A background response: queued when it is made, its usage known when it is asked for."""
    final = event("a", "m", "0.5")
    queued = dataclasses.replace(
        event("a", "unknown yet", "0.0"),
        usage=dataclasses.replace(final.usage, model="unknown yet", parts=(), free="pending"),
    )
    totals = Totals()
    totals.add(queued)
    assert totals.total.requests == 1
    totals.add(final)
    totals.add(event("b"))
    expected = Totals()
    expected.add(final)
    expected.add(event("b"))
    assert totals == expected
    assert list(totals.models) == ["m"]


@pytest.mark.parametrize(
    "hostile",
    [None, [], {}, {"models": []}, {"models": {"x": {"list_usd": "not a number"}}}, {"models": 3}],
)
def test_anything_else_is_not_totals(hostile: object) -> None:
    with pytest.raises(ValueError, match="not totals"):
        Totals.of_json(hostile)


def test_models_past_the_limit_are_counted_together() -> None:
    totals = Totals()
    for number in range(MODELS_MAX + 5):
        totals.add(event(str(number), f"model-{number}"))
    assert len(totals.models) == MODELS_MAX + 1
    assert totals.models["other models"].requests == 5
    assert totals.total.requests == MODELS_MAX + 5


# --- outages -------------------------------------------------------------------------------------

SECOND = 1_000_000_000


def job(home: Path, **fields: Any) -> Job:
    return Job(home=str(home), service=True, **fields)


def test_a_killed_process_leaves_an_outage_from_its_last_sign_of_life(tmp_path: Path) -> None:
    outages = Outages(tmp_path)
    outages.begin(100 * SECOND)
    assert outages.listed() == []
    outages.alive(160 * SECOND)
    Outages(tmp_path).begin(200 * SECOND)
    (outage,) = Outages(tmp_path).listed()
    assert outage["from"] == "1970-01-01T00:02:40.000000Z"
    assert outage["to"] == "1970-01-01T00:03:20.000000Z"
    assert outage["cause"] == "the service was killed"


def test_the_supervisor_knows_better_when_it_died(tmp_path: Path) -> None:
    Outages(tmp_path).begin(100 * SECOND)
    Outages(tmp_path).begin(200 * SECOND, 190 * SECOND, "it was killed by SIGKILL")
    (outage,) = Outages(tmp_path).listed()
    assert outage["from"] == "1970-01-01T00:03:10.000000Z"
    assert outage["cause"] == "it was killed by SIGKILL"


def test_a_stop_that_was_asked_for_is_no_outage(tmp_path: Path) -> None:
    outages = Outages(tmp_path)
    outages.begin(100 * SECOND)
    outages.end(150 * SECOND, clean=True)
    outages.begin(900 * SECOND)
    assert outages.listed() == []


def test_damaged_state_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "daemon.state").write_bytes(b"\0{")
    (tmp_path / "gaps.jsonl").write_bytes(b'{"from": 1}\n\xff\nnot json\n')
    outages = Outages(tmp_path)
    outages.begin(SECOND)
    assert outages.listed() == [{"from": 1}]


# --- the metering loop, on a source of its own ---------------------------------------------------


class FakeSource:
    """Hands out what a test puts in; a socket makes it selectable."""

    def __init__(self) -> None:
        self.near, self.far = socket.socketpair()
        self.items: list[Any] = []
        self.linked = True
        self.resumed: socket.socket | None = None
        self.stopped = False
        self.due_at: float | None = None
        self.repeated = 0  # how many of the next events a process before this one has stored
        self.done = 0
        self.ended: list[Any] = []
        self.open: list[Any] = []

    def put(self, *items: Any) -> None:
        self.items += items
        self.far.send(b"x")

    def die(self) -> None:
        """As when the helper dies."""
        self.linked = False
        self.far.close()

    def resume(self, link: socket.socket) -> None:
        self.near, self.linked = link, True

    def is_repeated(self, index: int) -> bool:
        return index < self.repeated

    def processed(self, count: int, is_open: Any) -> None:
        self.repeated = max(0, self.repeated - count)
        self.done += count

    def fileno(self) -> int:
        return self.near.fileno()

    def read(self, timeout_s: float | None = None) -> list[Any]:
        self.near.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            self.near.recv(100)
        items, self.items, self.due_at = self.items, [], None
        return items

    def drain(self, timeout_s: float, take: Any) -> list[Any]:
        return self.read()

    def watch(self, pid: int, timeout_s: float = 1.0) -> None:
        pass

    def search(self, programs: Any, timeout_s: float = 1.0) -> int:
        return 0

    def pause_run(self, root: int, *, on: bool) -> None:
        pass

    def pause(self, pid: int, *, on: bool) -> None:
        pass

    def take_paused(self) -> list[int]:
        return []

    def answer(self, pid: int, *, goes_on: bool) -> None:
        pass

    def request_report(self, timeout_s: float = 1.0) -> None:
        pass

    def coverage(self) -> list[Any]:
        return []

    def ended_connections(self) -> list[Any]:
        ended, self.ended = self.ended, []
        return ended

    def open_connections(self) -> list[Any]:
        return self.open

    def sees_connections(self) -> bool | None:
        return True

    def status(self) -> Any:
        return SimpleNamespace(
            loader="fake",
            probes=0,
            libraries=(),
            losses={"ring": 3, "none": 0},
            events_lost={},
            counted={},
            rss_bytes=None,
            waits_for_searches=False,
        )

    def stop(self) -> None:
        self.stopped = True


class FakeMeter:
    """Each item is already its event."""

    def __init__(self) -> None:
        self.losses: dict[str, int] = {}
        self.seen_again = self.other_calls = 0

    def receive(self, item: Any) -> list[PricedEvent]:
        return [item]

    def is_open(self, connection_id: str) -> bool:
        return False

    def finish(self, at_ns: int) -> list[PricedEvent]:
        return []

    def told_again(self) -> list[PricedEvent]:
        return []


class FakeStore:
    """Remembers what was journalled."""

    held = dropped = 0
    owed: ClassVar[dict[str, int]] = {}
    trouble = trouble_since_ns = None
    damaged_databases: ClassVar[list[Path]] = []

    def __init__(self) -> None:
        self.events: list[PricedEvent] = []
        self.connections: list[Coverage] = []
        self.flushes = 0

    def append(self, events: Iterable[PricedEvent]) -> int:
        self.events += events
        return 0

    def flush(self) -> Any:
        self.flushes += 1
        return Flushed()

    def count_loss(self, cause: str, count: int, at_ns: int, key: str | None = None) -> None:
        pass

    def count_connections(self, counted: Coverage, hour_ns: int, key: str) -> None:
        self.connections.append(counted)

    def waiting(self) -> int:
        return 0

    def close(self) -> None:
        pass


class Running:
    """A Metering loop in a thread, with the test at both ends."""

    def __init__(
        self, home: Path, monkeypatch: pytest.MonkeyPatch, service: bool, **job: Any
    ) -> None:
        self.commands, theirs = socket.socketpair()
        self.output = io.StringIO()
        stdin = os.fdopen(theirs.detach())
        monkeypatch.setattr(sys, "stdin", stdin)
        for part in (metering, control_answers):
            monkeypatch.setattr(part, "send", self._tell)
        self.told: list[dict[str, Any]] = []
        self.source, self.store = FakeSource(), FakeStore()
        self.home = home
        meter: Any = FakeMeter()
        loop = metering.Metering(
            Job(home=str(home), service=service, **job), self.source, meter, self.store
        )
        self.code: int | None = None
        self._thread = threading.Thread(target=self._run, args=(loop,))
        self._thread.start()

    def _tell(self, message: dict[str, Any]) -> None:
        self.told.append(message)

    def _run(self, loop: metering.Metering) -> None:
        self.code = loop.run()

    def control(self) -> Control:
        deadline = time.monotonic() + 60
        while True:
            try:
                return Control(self.home)
            except ServiceAbsent:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def finish(self) -> int | None:
        self.commands.send(b"finish\n")
        return self.join()

    def join(self) -> int | None:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.code


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Running:
    home = tmp_path / ("deep" * 20) / "home"
    prepare_home(home)
    return Running(home, monkeypatch, service=True)


def test_events_are_journalled_counted_and_flushed_at_the_end(running: Running) -> None:
    running.source.put(event("a"), event("b"))
    control = running.control()
    while control.ask("status")["events"] < 2:
        pass
    control.close()
    assert running.finish() == metering.ENDED
    assert [e.usage.id for e in running.store.events] == ["a", "b"]
    assert running.store.flushes == 1
    assert running.source.stopped
    final = running.told[-1]
    assert final["final"]
    assert final["totals"]["requests"] == 2
    assert final["losses"] == {}
    assert final["capture_losses"] == {"ring": 3}
    assert not (running.home / SOCKET_NAME).exists()


def test_what_comes_without_news_is_read_when_it_is_due(running: Running) -> None:
    control = running.control()
    running.source.items.append(event("a"))
    running.source.due_at = time.monotonic()
    while control.ask("status")["events"] < 1:
        pass
    control.close()
    assert running.finish() == metering.ENDED


def test_a_watched_tree_has_its_own_totals(running: Running) -> None:
    control = running.control()
    assert control.ask("watch", pid=50) == {"watching": 50}
    mine = Process(50, 1)
    child = Process(51, 1, parents=((50, "sh"), (1, "init")))
    other = Process(60, 1, parents=((1, "init"),))
    events = [event(str(n), process=p) for n, p in enumerate((mine, child, other, None))]
    running.source.put(*events)
    reply = control.ask("finish")
    assert reply["totals"]["requests"] == 2
    assert control.ask("nonsense") == {"error": "unknown request"}
    control.close()
    running.finish()


def seen(pid: int, cause: str | None, *, parent: int = 1) -> Connections:
    process = Process(pid, 1, exe="/bin/x", parents=((parent, "sh"), (1, "init")))
    return Connections(process, "api.openai.com", "OpenSSL", cause, 1, 100)


def test_connections_are_told_of_a_run_and_of_all_and_kept(running: Running) -> None:
    """Those that are open are in every answer, and kept when the worker ends."""
    control = running.control()
    control.ask("watch", pid=50)
    running.source.ended = [seen(51, None, parent=50), seen(60, "stack_not_probed")]
    running.source.open = [seen(52, "probed_late", parent=50), seen(61, None)]
    running.source.put()
    run = Coverage.of_json(control.ask("finish")["connections"])
    assert {part.cause: count for part, count in run.parts.items()} == {
        None: Count(1, 100),
        "probed_late": Count(1, 100),
    }
    everything = control.ask("status")["connections"]
    assert (everything["seen"], everything["metered"], everything["known"]) == (4, 2, True)
    control.close()
    running.finish()
    assert running.told[-1]["connections"] == everything
    kept = Coverage()
    for each in running.store.connections:
        kept.merge(Coverage(each.parts))
    # What the journal has of an hour is all of it so far: the second takes the first's place.
    assert kept.parts[Part("/bin/x", "api.openai.com", "OpenSSL", "probed_late")] == Count(1, 100)
    assert running.store.connections[-1].metered == Count(2, 200)


def test_the_control_socket_is_the_owners_alone_and_outlives_garbage(running: Running) -> None:
    control = running.control()
    assert (running.home / SOCKET_NAME).stat().st_mode & 0o777 == 0o600
    rude = running.control()
    with pytest.raises(ServiceAbsent):
        rude.ask("x" * REQUEST_BYTES_MAX)
    rude.close()
    assert control.ask("status")["health"] == "ok"
    assert control.ask("stop") == {"stopping": True}
    assert {"stop": True} in running.told
    control.close()
    running.finish()


def test_when_the_helper_dies_it_goes_on_at_the_next_one(running: Running) -> None:
    control = running.control()
    running.source.items.append(event("last"))
    running.source.die()
    while (status := control.ask("status"))["events"] < 1:
        pass
    assert status["health"] == "degraded"
    running.source.far, theirs = socket.socketpair()
    socket.send_fds(running.commands, [b"link\n"], [theirs.fileno()])
    theirs.close()
    while control.ask("status")["restarts"] < 1:
        pass
    running.source.put(event("next"))
    while control.ask("status")["events"] < 2:
        pass
    control.close()
    assert running.finish() == metering.ENDED
    assert [e.usage.id for e in running.store.events] == ["last", "next"]
    assert Outages(running.home).listed() == []


def test_what_a_process_before_it_has_stored_is_not_stored_again(running: Running) -> None:
    control = running.control()
    running.source.repeated = 1
    running.source.put(event("stored before"), event("new"))
    while control.ask("status")["events"] < 1:
        pass
    control.close()
    assert running.finish() == metering.ENDED
    assert [e.usage.id for e in running.store.events] == ["new"]
    assert running.source.done == 2


def test_when_the_supervisor_dies_it_ends_and_keeps_what_was_there(running: Running) -> None:
    running.control().close()
    running.source.items.append(event("last"))
    running.commands.close()
    assert running.join() == metering.ENDED
    assert [e.usage.id for e in running.store.events] == ["last"]
    assert json.loads((running.home / "daemon.state").read_text())["clean"] is False


class Dead:
    """A metering process that was killed."""

    def __init__(self) -> None:
        self._end, other = socket.socketpair()
        other.close()

    def fileno(self) -> int:
        return self._end.fileno()

    def messages(self) -> None:
        return None

    def refused(self) -> int:
        return 0

    def wait(self, timeout_s: float) -> int:
        self._end.close()
        return -signal.SIGKILL


def test_what_was_stored_last_before_a_death_is_in_the_summary_and_nothing_else(
    tmp_path: Path,
) -> None:
    me = account_named(str(os.getuid()))
    plan = supervisor.Plan(me, tmp_path, Config(), (), service=False)
    watched = supervisor.Supervisor(plan)
    totals = Totals()
    totals.add(event("told"))
    for message in (
        {"storing": ["told"]},
        {"totals": totals.as_json()},
        {"storing": ["stored", "not stored"]},
    ):
        watched._take(message)
    dead: Any = Dead()
    watched._worker = dead
    watched.selector.register(dead, selectors.EVENT_READ, watched.attend)
    now_ns = time.time_ns()
    with Store(tmp_path) as store:
        store.append([replace_time(event("told"), now_ns), replace_time(event("stored"), now_ns)])
    watched.attend()
    result = watched.finish()
    assert result.totals.total.requests == 2
    assert result.totals.total.list_usd == Decimal("1.0")
    assert result.store_error is None
    (outage,) = result.outages
    assert "SIGKILL" in outage[2]


@pytest.mark.parametrize(
    "nonsense",
    [
        {"losses": {"ring": "many"}},
        {"losses": [1], "coverage": 5},
        {"coverage": ["x"], "store_error": ["x"]},
        {"totals": 7, "storing": 3},
    ],
)
def test_no_nonsense_of_the_metering_process_ends_its_supervisor(
    tmp_path: Path, nonsense: dict[str, Any]
) -> None:
    plan = supervisor.Plan(ANN, tmp_path, Config(), (), service=True)
    watched = supervisor.Supervisor(plan)
    watched._take(nonsense | {"final": True})
    assert watched.result.coverage == []
    assert watched.finish().totals.total.requests == 0
    assert supervisor._problems({"unavailable": nonsense})


def replace_time(priced: PricedEvent, at_ns: int) -> PricedEvent:
    return dataclasses.replace(priced, usage=dataclasses.replace(priced.usage, at_ns=at_ns))


def test_a_run_says_what_it_stores_before_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = Running(tmp_path, monkeypatch, service=False)
    running.source.put(event("a"))
    running.finish()
    told = [message for message in running.told if {"storing", "totals"} & set(message)]
    assert told[0] == {"storing": ["a"]}
    assert told[1]["totals"]["requests"] == 1


def test_what_a_worker_before_has_counted_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It died before it could say that it was done with it, so it comes again."""
    running = Running(tmp_path, monkeypatch, service=False, counted_before=["a"])
    running.source.put(event("a"))
    running.source.put(event("b"))
    running.finish()
    totals = [message["totals"]["requests"] for message in running.told if "totals" in message]
    assert totals[-1] == 1
    assert sorted(each.usage.id for each in running.store.events) == ["a", "b"]


def test_the_next_worker_is_told_what_was_counted_and_settles_what_is_uncertain(
    tmp_path: Path,
) -> None:
    plan = supervisor.Plan(ANN, tmp_path, Config(), (), service=False)
    watched = supervisor.Supervisor(plan)
    totals = Totals()
    totals.add(event("counted"))
    watched._take({"storing": ["counted"]})
    watched._take({"totals": totals.as_json()})
    watched._take({"storing": ["uncertain"]})
    assert watched._counted == ["counted"]
    watched._uncertain, watched._storing = watched._storing, []  # the worker dies
    with Store(tmp_path) as store:
        store.append([replace_time(event("uncertain"), time.time_ns())])
    watched._take({"storing": ["uncertain"]})
    totals.add(event("uncertain"))
    watched._take({"totals": totals.as_json()})
    assert watched.finish().totals.total.requests == 2


# --- what a death is called ----------------------------------------------------------------------


def test_causes_are_told_in_words() -> None:
    assert "SIGKILL" in cause_of_death("it", -signal.SIGKILL)
    assert "code 3" in cause_of_death("it", 3)
