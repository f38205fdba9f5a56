"""`daemon --via keylog`: the user's clients, metered by packets and keys that come as they like."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from halton_meter.live import control
from halton_meter.live.keylog.service import KEYS_NAME
from tests.capture.packets.test_quic import HELLO, frame
from tests.capture.packets.test_quic import packet as initial
from tests.lab.conftest import CLIENTS, HALTON_METER, assert_metered, stored_events
from tests.lab.test_key_log import as_sudo, curl
from tests.lab.test_key_log import home as home
from tests.support.lab.lab import Lab
from tests.support.lab.scenario import Scenario
from tests.support.quick import slow
from tests.support.waiting import wait_until

pytestmark = pytest.mark.lab


class KeyLogService:
    """The service, of the lab's user, in the lab."""

    def __init__(self, lab: Lab, home: Path, *options: str) -> None:
        self.lab, self.data = lab, home / "data"
        self.keys = self.data / "keys" / KEYS_NAME
        self._environment = as_sudo(lab, home)
        self._options = options
        self.log = home / "service.log"
        self.start()

    def start(self) -> None:
        command = [*HALTON_METER, "daemon", "--foreground", "--via", "keylog", *self._options]
        with self.log.open("ab") as log:
            self.process: subprocess.Popen[bytes] = self.lab.popen(
                command, env=self._environment, stdout=log, stderr=log
            )
        wait_until(self.status, f"the service's answer: {self.log.read_text()}")

    def status(self) -> dict[str, Any] | None:
        assert self.process.poll() is None, self.log.read_text()
        return control.ask_service(
            self.data, "status", name=control.KEY_LOG_SOCKET_NAME, owner=self.lab.user.uid
        )

    def requests(self) -> int:
        found = self.status()
        return found["events"] if found is not None else 0

    def events(self, number: int) -> list[dict[str, Any]]:
        """What is stored, once it is so many."""
        found: list[dict[str, Any]] = []

        def are_there() -> bool:
            found[:] = stored_events(self.lab, self.data, missing_ok=True)
            return len(found) >= number

        wait_until(are_there, f"{number} events in the store")
        return found

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        argv = [*HALTON_METER, *words]
        return self.lab.run(argv, user=self.lab.user, env=self._environment)

    def client(self, *argv: str, keys: Path | None = None) -> None:
        """Run a client of the user's, with its keys in a file."""
        environment = self.lab.environment(SSLKEYLOGFILE=str(keys or self.keys))
        done = self.lab.run(argv, user=self.lab.user, env=environment)
        assert done.returncode == 0, done.stderr

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(30)

    def sniffers(self) -> list[int]:
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        found = [int(word) for word in listed.split()]
        return [pid for pid in found if b"capture.sniffer" in _command_line(pid)]


def _command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.fixture
def key_log(lab: Lab, home: Path) -> Iterator[KeyLogService]:
    made = KeyLogService(lab, home)
    yield made
    made.stop()


def test_clients_are_metered_with_their_process(
    lab: Lab, key_log: KeyLogService, python: str
) -> None:
    skip = len(lab.ledger())
    key_log.client(*curl(1, "--http1.1"))
    wait_until(lambda: key_log.requests() == 1, "the event")
    key_log.client(python, str(CLIENTS / "sdk.py"), "openai", "sync,async-stream", "1", "3")
    events = key_log.events(7)
    assert_metered(lab.ledger()[skip:], events, "keylog")
    of_sdk = [event for event in events if event["provider"] == "openai"]
    assert {event["user"] for event in of_sdk} == {lab.user.name}
    assert all("sdk.py" in " ".join(event["argv"]) for event in of_sdk)
    found = key_log.status()
    assert found is not None
    assert (found["losses"], found["outages"]) == ({}, [])


def test_who_connects_for_a_moment_is_known_with_program_folder_and_project(
    lab: Lab, key_log: KeyLogService, project: Path
) -> None:
    """Curl lives for some milliseconds once it has connected; this runs many, side by side."""
    count = int(os.environ.get("SHORT_LIVED_CLIENTS", "24"))
    one = shlex.join(curl(1, "--http1.1"))
    script = f"for n in $(seq {count // 4}); do {one} & {one} & {one} & {one} & wait; done"
    environment = lab.environment(SSLKEYLOGFILE=str(key_log.keys))
    done = lab.run(["sh", "-c", script], user=lab.user, env=environment, cwd=project)
    assert done.returncode == 0, done.stderr
    events = key_log.events(count)
    known = [event for event in events if event["process"] and event["process"].endswith("/curl")]
    assert len(known) == len(events) == count
    assert {event["project"] for event in events} == {"acme"}
    assert {event["user"] for event in events} == {lab.user.name}
    assert len({event["pid"] for event in events}) == count


def test_a_budget_counts_what_the_service_meters(key_log: KeyLogService) -> None:
    done = key_log.command("budget", "set", "daily", "20", "--per", "day")
    assert done.returncode == 0, done.stderr
    for n in range(3):
        key_log.client(*curl(n))
    spent = sum(Decimal(event["marginal_usd"]) for event in key_log.events(3))
    assert spent > 0

    def counted() -> bool:
        told = json.loads(key_log.command("budget", "status", "--json").stdout)
        return [Decimal(row["spent_usd"]) for row in told["budgets"]] == [spent]

    wait_until(counted, "the budget's sum")


def test_what_was_read_of_our_own_folder_is_wiped(key_log: KeyLogService) -> None:
    for n in range(3):
        key_log.client(*curl(n))
    wait_until(lambda: key_log.requests() == 3, "the events")
    wait_until(lambda: not key_log.keys.read_bytes().strip(b"\0"), "the wiping")
    assert key_log.keys.stat().st_size > 0  # programs that append go on behind what was wiped
    assert key_log.keys.parent.stat().st_mode & 0o077 == 0
    key_log.stop()
    key_log.start()
    key_log.client(*curl(4))
    wait_until(lambda: key_log.requests() == 1, "an event after a restart")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_keys_in_places_of_the_user_s_are_read_late_rotated_and_left_alone(
    lab: Lab, home: Path, kind: str
) -> None:
    place = home / "mine"
    service = KeyLogService(lab, home, "--keys", str(place))
    try:
        if kind == "folder":
            place.mkdir()
            os.chown(place, lab.user.uid, lab.user.gid)
        files = [place / f"{n}.log" if kind == "folder" else place for n in range(3)]
        for n, file in enumerate(files):
            service.client(*curl(n), keys=file)
            wait_until(lambda n=n: service.requests() == n + 1, "the event")
            if kind == "file":
                assert b"_TRAFFIC_SECRET_0" in file.read_bytes()
                file.rename(home / f"rotated-{n}")
        assert len(service.events(3)) == 3
    finally:
        service.stop()


def test_what_a_shell_is_told_names_a_file_and_places_without_keys_are_said(
    lab: Lab, home: Path
) -> None:
    folder, missing, refused = home / "folder", home / "none" / "tls.log", home / "refused"
    for place, mode in ((folder, 0o755), (refused, 0o700)):
        place.mkdir()
        place.chmod(mode)
    places = [folder, missing, refused]
    service = KeyLogService(lab, home, *(word for each in places for word in ("--keys", str(each))))
    try:
        found = service.status()
        assert found is not None
        assert found["exports"][0] == f"export SSLKEYLOGFILE={folder / KEYS_NAME}"
        said = service.command("status").stdout
        assert f"keys that are not read: {refused}: Permission denied" in said
        assert f"mkdir -p {missing.parent}" in said
        assert f"mkdir -p {missing.parent}" in service.log.read_text()
    finally:
        service.stop()


@pytest.mark.parametrize("via", [(), slow(("--via", "keylog")), slow(("--via", "proxy"))])
def test_a_run_beside_the_service_is_counted_once(
    lab: Lab, key_log: KeyLogService, home: Path, via: tuple[str, ...]
) -> None:
    client = shlex.join(curl(1, "--http1.1"))
    command = [*HALTON_METER, "run", *via, "--", "sh", "-c", f"{client}; sleep 1"]
    done = lab.run(command, env=as_sudo(lab, home), user=lab.user if "proxy" in via else None)
    assert done.returncode == 0, done.stderr
    assert "1 request" in done.stderr
    assert len(key_log.events(1)) == 1
    key_log.client(*curl(2))  # what comes after it: by then the run's was judged
    wait_until(lambda: key_log.requests() >= 1, "the service's own event")
    key_log.stop()
    said = key_log.command("report").stdout
    assert "2 of 2 connections to providers were metered" in said


def test_nobody_captures_and_the_user_meters_and_no_process_has_a_capability(
    lab: Lab, key_log: KeyLogService
) -> None:
    [sniffer] = key_log.sniffers()
    for pid, uid in ((key_log.process.pid, lab.user.uid), (sniffer, 65534)):
        told = Path(f"/proc/{pid}/status").read_text()
        assert re.search(rf"^Uid:(\t{uid}){{4}}$", told, re.MULTILINE), told
        for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert re.search(rf"^{name}:\t0+$", told, re.MULTILINE), told


def test_without_the_right_to_capture_it_says_what_to_do(lab: Lab, home: Path) -> None:
    command = [*HALTON_METER, "daemon", "--foreground", "--via", "keylog"]
    done = lab.run(command, env=as_sudo(lab, home), user=lab.user)
    assert done.returncode == 1
    assert "to capture packets needs root (or CAP_NET_RAW)" in done.stderr
    assert "sudo halton-meter daemon --foreground --via keylog" in done.stderr


def test_an_interface_is_chosen_and_a_wrong_one_named(lab: Lab, home: Path) -> None:
    command = [*HALTON_METER, "daemon", "--foreground", "--via", "keylog", "--interface", "nix0"]
    done = lab.run(command, env=as_sudo(lab, home))
    assert done.returncode == 1
    assert "there is no network interface 'nix0'" in done.stderr
    service = KeyLogService(lab, home, "--interface", "lo")
    service.client(*curl(1))
    wait_until(lambda: service.requests() == 1, "the event")
    assert service.stop() == 0


def test_status_names_who_wrote_no_keys_and_stop_ends_it(lab: Lab, key_log: KeyLogService) -> None:
    done = lab.run(curl(1), user=lab.user)
    assert done.returncode == 0, done.stderr

    def said() -> str:
        return key_log.command("status").stdout

    line = "to api.anthropic.com, 1 connection: it wrote no TLS keys. Use: sudo halton-meter run"
    wait_until(lambda: line in said(), "the line")
    assert "key log ok" in said()
    assert "coverage: 0 of 1 connection to providers was metered" in said()
    done = key_log.command("stop", "--via", "keylog")
    assert "the key log service stopped" in done.stdout
    assert key_log.process.wait(30) == 0
    assert "stopped (data folder" in key_log.command("status").stdout


def test_the_sniffer_s_end_is_an_outage(lab: Lab, key_log: KeyLogService) -> None:
    [sniffer] = key_log.sniffers()
    os.kill(sniffer, signal.SIGKILL)
    assert key_log.process.wait(30) == 1
    assert "the process that captures packets ended" in key_log.log.read_text()
    key_log.start()
    found = key_log.status()
    assert found is not None
    assert [each["cause"] for each in found["outages"]] == [
        "the process that captures packets ended"
    ]


def test_root_reads_no_keys_that_are_another_user_s(lab: Lab, home: Path) -> None:
    """Where root is who it meters for, a file of a user's may be a trap."""
    place = home / "theirs.log"
    place.write_text("")
    os.chown(place, lab.user.uid, lab.user.gid)
    folder = lab.folder / "root"
    folder.mkdir(exist_ok=True)
    environment = lab.environment(HALTON_METER_HOME=str(folder / "data"))
    command = [*HALTON_METER, "daemon", "--foreground", "--via", "keylog", "--keys", str(place)]
    process = lab.popen(command, env=environment)
    name = control.KEY_LOG_SOCKET_NAME

    def status() -> dict[str, Any] | None:
        return control.ask_service(folder / "data", "status", name=name)

    try:
        wait_until(status, "the service's answer")
        argv = [*curl(1)]
        done = lab.run(argv, user=lab.user, env=lab.environment(SSLKEYLOGFILE=str(place)))
        assert done.returncode == 0, done.stderr
        found = wait_until(
            lambda: (told := status()) and told["keys_passed_over"] and told, "the file's name"
        )
        assert found["keys_passed_over"] == [str(place)]
        assert found["handshakes_with_keys"] == 0
        said = lab.run([*HALTON_METER, "status"], env=environment).stdout
        assert f"{place} is not root's, so root does not read it" in said
    finally:
        process.terminate()
        process.wait(30)


def test_probes_and_packets_together_make_one_event_each(lab: Lab, bench: Any, home: Path) -> None:
    """Both services in one data folder: the ids of events are equal."""
    command = [*HALTON_METER, "daemon", "--foreground", "--via", "keylog"]
    data = bench.service.home
    environment = {**as_sudo(lab, home), "HALTON_METER_HOME": str(data)}
    process = lab.popen([*command, "--owner", lab.user.name], env=environment)
    name = control.KEY_LOG_SOCKET_NAME

    def status() -> dict[str, Any] | None:
        return control.ask_service(data, "status", name=name, owner=lab.user.uid)

    try:
        wait_until(status, "the service's answer")
        client = lab.environment(lab.user, SSLKEYLOGFILE=str(data / "keys" / KEYS_NAME))
        body = json.dumps({"model": "gpt-5-mini", "messages": Scenario(n=7).marker})
        url = "https://api.openai.com/v1/chat/completions"
        seen = bench.observe(
            ["curl", "-sS", "-o", "/dev/null", url, "-d", body, "--next", "-sS", "-o",
             "/dev/null", url, "-d", body], env=client,
        )  # fmt: skip
        wait_until(lambda: (status() or {}).get("events") == 2, "the key log's events")
    finally:
        process.terminate()
        process.wait(30)
    again = [event["id"] for event in bench.service.events()]
    assert len(seen.served) == len(seen.events) == 2
    assert len(again) == len(set(again))
    assert {event["response_id"] for event in bench.service.events()} >= {
        entry["response_id"] for entry in seen.served
    }


QUIC_CLIENT = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
    for packet in sys.argv[1:]:
        client.sendto(bytes.fromhex(packet), ("127.0.0.1", 443))
    print("sent", flush=True)
    input()
"""


def test_quic_without_keys_is_counted_by_host_and_program(
    lab: Lab, key_log: KeyLogService, python: str
) -> None:
    hello = HELLO.replace(b"\x00\x0bexample.com", b"\x00\x0bapi.example")  # nobody's
    ours = with_name(b"api.openai.com")
    packets = [initial(frame(0, ours), n).hex() for n in range(3)]
    process = lab.popen(
        [python, "-c", QUIC_CLIENT, *packets], user=lab.user, stdin=-1, stdout=-1, text=True
    )
    other = lab.popen(
        [python, "-c", QUIC_CLIENT, initial(frame(0, hello)).hex()],
        user=lab.user, stdin=-1, stdout=-1, text=True,
    )  # fmt: skip

    def unmetered() -> list[dict[str, Any]]:
        found = key_log.status()
        assert found is not None
        return [
            {name: row[name] for name in ("host", "connections", "cause")}
            for row in found["unmetered"]
        ]

    try:
        wait_until(unmetered, "the connection")
        said = key_log.command("status").stdout
    finally:
        for each in (process, other):
            each.communicate("\n", timeout=30)
    assert unmetered() == [{"host": "api.openai.com", "connections": 1, "cause": "no_keys"}]
    assert "to api.openai.com, 1 connection: it wrote no TLS keys" in said


def with_name(name: bytes) -> bytes:
    """The standard's hello, to another host."""
    before, after = HELLO.split(b"\x00\x00\x00\x10\x00\x0e\x00\x00\x0bexample.com", 1)
    more = len(name) - len(b"example.com")
    extension = b"".join(
        (
            b"\x00\x00",
            (len(name) + 5).to_bytes(2),
            (len(name) + 3).to_bytes(2),
            b"\x00",
            len(name).to_bytes(2),
            name,
        )
    )
    at = before.rindex(b"\x00\xc0")
    whole = before[:at] + (0xC0 + more).to_bytes(2) + before[at + 2 :] + extension + after
    return whole[:1] + (len(whole) - 4).to_bytes(3) + whole[4:]
