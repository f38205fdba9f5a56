"""The lab and a Halton Meter service in it, once for all tests here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pytest

from halton_meter.live.control import Control, ServiceAbsent
from tests.lab.real_clients.programs import cache_folder
from tests.support.lab.client_python import client_python
from tests.support.lab.lab import Lab, User
from tests.support.waiting import WAIT_SECONDS_MAX, wait_until

HALTON_METER = [sys.executable, "-m", "halton_meter"]
CLIENTS = Path(__file__).parents[1] / "support" / "lab" / "clients"


@pytest.fixture(scope="session")
def python() -> str:
    """The clients' interpreter, with the providers' SDKs."""
    return str(client_python())


@pytest.fixture(scope="session")
def lab(python: str) -> Iterator[Lab]:
    """One lab for the whole session; skipped, aloud, where namespaces cannot be made."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("the lab needs root on Linux: sudo make lab")
    programs = cache_folder()
    programs.mkdir(parents=True, exist_ok=True)
    with Lab([Path(python).parent.parent, programs]) as made:
        yield made


@pytest.fixture(scope="session")
def project(lab: Lab) -> Path:
    """A folder of the lab's user under git: project `acme`, branch `topic/lab`."""
    folder = lab.user.home / "code" / "clone-of-acme"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/topic/lab\n")
    origin = '[remote "origin"]\n\turl = git@git.example.com:team/acme.git\n'
    (folder / ".git" / "config").write_text(origin)
    return folder


class Service:
    """`halton-meter daemon --foreground` in the lab, metering the lab's user."""

    def __init__(self, lab: Lab, home: Path, options: Sequence[str] = ()) -> None:
        self.lab = lab
        self.home = home
        self._options = options
        self._log = home.parent / f"{home.name}.log"
        self._process: Any = None
        self.known_ids: set[str] = set()
        self.start()

    def start(self) -> None:
        """Start it, and return when it meters."""
        command = [*HALTON_METER, "daemon", "--foreground", "--owner", self.lab.user.name]
        environment = self.lab.environment(HALTON_METER_HOME=str(self.home))
        with self._log.open("ab") as log:
            self._process = self.lab.popen(
                [*command, *self._options], env=environment, stdout=log, stderr=log
            )
        self.wait_ready()

    def wait_ready(self) -> dict[str, Any]:
        """Its status, as soon as it gives one."""

        def ready() -> dict[str, Any] | None:
            if self._process.poll() is not None:
                raise AssertionError(f"the service ended: {self._log.read_text()}")
            return self.status()

        found: dict[str, Any] = wait_until(ready, f"the service's answer ({self._log})")
        return found

    def status(self) -> dict[str, Any] | None:
        """What it says of itself; None while it does not answer."""
        try:
            control = Control(self.home)
            try:
                return control.ask("status")
            finally:
                control.close()
        except ServiceAbsent:
            return None

    def settle(self) -> None:
        """Return when all that clients did so far is in the database."""
        control = Control(self.home, timeout_s=WAIT_SECONDS_MAX)
        control.ask("watch", pid=1)
        control.ask("finish")
        control.close()

    def log(self) -> str:
        """What it has printed."""
        return self._log.read_text()

    @property
    def pid(self) -> int:
        """The supervisor's process id."""
        return int(self._process.pid)

    def stop(self) -> int:
        """End it as systemd would; its exit code."""
        if self._process.poll() is None:
            self._process.terminate()
        return int(self._process.wait(WAIT_SECONDS_MAX))

    def wait(self) -> int:
        """Its exit code once it has ended by itself."""
        return int(self._process.wait(WAIT_SECONDS_MAX))

    def events(self) -> list[dict[str, Any]]:
        """All events in the store, as `halton-meter events --json` prints them."""
        return stored_events(self.lab, self.home)


def stored_events(
    lab: Lab, home: Path, user: User | None = None, *, missing_ok: bool = False
) -> list[dict[str, Any]]:
    """What `halton-meter events --json` prints for a home; with `missing_ok` [] for no store."""
    environment = lab.environment(HALTON_METER_HOME=str(home))
    command = [*HALTON_METER, "events", "--json", "--limit", "100000"]
    done = lab.run(command, env=environment, user=user or lab.user)
    if missing_ok and done.returncode:
        return []
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def stored_ids(home: Path) -> list[str]:
    """The ids of all events in a home's database; a command would take twenty times as long."""
    path = home / "meter.duckdb"
    if not path.exists():
        return []

    def opened() -> duckdb.DuckDBPyConnection | None:
        try:
            return duckdb.connect(str(path), read_only=True)
        except duckdb.IOException:  # the service writes to it
            return None

    with wait_until(opened, f"{path} to be free") as connection:
        return [event_id for (event_id,) in connection.execute("SELECT id FROM event").fetchall()]


@pytest.fixture(scope="session")
def service(lab: Lab) -> Iterator[Service]:
    """The service that most tests share."""
    running = Service(lab, lab.user.home / ".halton-meter")
    yield running
    assert running.stop() == 0


@pytest.fixture
def own(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of this test's own, with a home of its own."""
    folder = lab.user.home / tmp_path_factory.mktemp("own").name
    folder.mkdir()
    os.chown(folder, lab.user.uid, lab.user.gid)
    running = Service(lab, folder / "state")
    yield running
    running.stop()


@dataclass
class Observed:
    """What one client did: its process, its ledger and its events."""

    pid: int
    output: str
    served: list[dict[str, Any]]
    events: list[dict[str, Any]]


class Bench:
    """Runs clients under the service and hands out what was served and what was metered."""

    def __init__(self, service: Service, project: Path, python: str) -> None:
        self.service = service
        self.lab = service.lab
        self.project = project
        self.python = python

    def observe(self, argv: Sequence[str], seconds: float = 180, **options: Any) -> Observed:
        """Run a client to its end; what it added to the ledger and to the store.

        What the service saw before, of whichever test, is known by then.
        """
        self.service.settle()
        self.service.known_ids.update(stored_ids(self.service.home))
        skip = len(self.lab.ledger())
        options = {"user": self.lab.user, "cwd": self.project} | options
        process = self.lab.popen(argv, text=True, stdout=-1, stderr=-1, **options)
        out, err = process.communicate(timeout=seconds)
        assert process.returncode == 0, err
        self.service.settle()
        known = self.service.known_ids
        events = [event for event in self.service.events() if event["id"] not in known]
        known.update(event["id"] for event in events)
        return Observed(process.pid, out, self.lab.ledger()[skip:], events)


@pytest.fixture
def bench(service: Service, project: Path, python: str) -> Bench:
    """See Bench."""
    return Bench(service, project, python)


def projects(events: Iterable[dict[str, Any]]) -> set[str | None]:
    """Of the events whose process's working directory was read.

    The kernel does not copy it, and a client of some milliseconds may be gone before a busy machine
    gets to read it: its project is not known then.
    """
    return {event["project"] for event in events if event["cwd"] is not None}


def assert_metered(
    served: list[dict[str, Any]], events: list[dict[str, Any]], source: str = "uprobes"
) -> None:
    """Each exchange of the ledger is one event with its ids, model and tokens; nothing else is."""
    assert len(events) == len(served), f"{len(served)} served, {len(events)} metered"
    key = _identity
    for expected, event in zip(sorted(served, key=key), sorted(events, key=key), strict=True):
        for name in ("provider", "host", "model", "response_id", "streaming"):
            assert event[name] == expected[name], (name, expected, event)
        found = {name: count for name, count in event["tokens"].items() if count}
        wanted = {name: count for name, count in expected["tokens"].items() if count}
        assert found == wanted, (expected, event)
        assert event["outcome"] == "complete", event
        assert event["source"] == source
        assert event["http_status"] in (200, 101)


def _identity(line: dict[str, Any]) -> tuple[str, str]:
    return (line["response_id"] or "", json.dumps(line["tokens"].get("input")))
