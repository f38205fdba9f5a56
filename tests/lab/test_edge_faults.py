"""The proxy's service under trouble: whatever dies, fills up or expires, clients get their answers.

Real mitmproxy, real TLS, real curl, in the lab. Each test counts three ways: what the server
answered, what was metered, and what went by unmetered; the last two make up the first.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from halton_meter.live.control import PROXY_SOCKET_NAME, Control, ServiceAbsent
from proxy_fallback.setup import authority
from tests.lab.conftest import HALTON_METER, Service, stored_events
from tests.lab.test_clients import anthropic_body
from tests.support.lab.lab import Lab
from tests.support.waiting import wait_until

pytestmark = pytest.mark.lab

PORT = 18_081
URL = "https://api.anthropic.com/v1/messages"


class Proxied:
    """`halton-meter daemon --foreground --via proxy` as the lab's user, and curl behind it."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab = lab
        self.home = folder / "state"
        self.home.mkdir()
        (self.home / "config.toml").write_text(f"[proxy]\nport = {PORT}\n")
        for each in (folder, self.home, self.home / "config.toml"):
            os.chown(each, lab.user.uid, lab.user.gid)
        self.log = folder / "log"
        self._process: Any = None
        self.kept = False
        self.served_before = len(lab.ledger())

    def environment(self) -> dict[str, str]:
        return self.lab.environment(HALTON_METER_HOME=str(self.home))

    def start(self, health: str = "ok") -> None:
        command = [*HALTON_METER, "daemon", "--foreground", "--via", "proxy"]
        with self.log.open("ab") as log:
            self._process = self.lab.popen(
                command, user=self.lab.user, env=self.environment(), stdout=log, stderr=log
            )
        self.wait_for(lambda status: status["health"] == health)

    def start_kept(self) -> None:
        """As `halton-meter start` does where there is neither systemd nor launchd."""
        command = [*HALTON_METER, "start", "--via", "proxy"]
        self.kept = True
        done = self.lab.run(command, env=self.environment(), user=self.lab.user)
        assert done.returncode == 0, (done.stderr, (self.home / "proxy.log").read_text())

    def status(self) -> dict[str, Any] | None:
        try:
            control = Control(self.home, name=PROXY_SOCKET_NAME)
            try:
                return control.ask("status")
            finally:
                control.close()
        except ServiceAbsent:
            if not self.kept and self._process.poll() is not None:
                raise AssertionError(f"it ended: {self.log.read_text()}") from None
            return None

    def wait_for(self, condition: Any) -> dict[str, Any]:
        def met() -> dict[str, Any] | None:
            status = self.status()
            return status if status is not None and condition(status) else None

        found: dict[str, Any] = wait_until(met, f"a status ({self.status()}, {self.log})")
        return found

    def stop(self) -> None:
        if self.kept:
            command = [*HALTON_METER, "stop", "--via", "proxy"]
            told = self.lab.run(command, env=self.environment(), user=self.lab.user)
            assert told.stdout == "the proxy stopped\n", told.stderr
            self.kept = False
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            assert self._process.wait(120) == 0, self.log.read_text()

    def curl(self, n: int, *, trusting: bool = True, **options: Any) -> list[str]:
        bundle = self.lab.folder / "ca.pem"
        if trusting:
            both = self.lab.user.home / "both.pem"
            ours = self.home / "proxy-ca" / authority.CERTIFICATE_NAME
            both.write_text(bundle.read_text() + (ours.read_text() if ours.exists() else ""))
            bundle = both
        body = anthropic_body(n, **options)
        how = ["-sS", "--fail", "-m", "120", "-x", f"http://127.0.0.1:{PORT}"]
        headers = ["-H", "x-api-key: made-up", "-H", "content-type: application/json"]
        return ["curl", *how, "--cacert", str(bundle), *headers, "-d", body, URL]

    def ask(self, n: int, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.lab.run(self.curl(n, **options), user=self.lab.user)

    def must(self, count: int, first: int = 0) -> None:
        """So many requests in a row, each of which must succeed."""
        for n in range(first, first + count):
            done = self.ask(n)
            assert done.returncode == 0, (done.stderr, self.status())

    def bypassed(self) -> int:
        status = self.status()
        assert status is not None
        return sum(each["connections"] for each in status["bypassed"])

    def events(self) -> list[dict[str, Any]]:
        """What is in the store once the service has ended."""
        self.stop()
        return stored_events(self.lab, self.home)

    def served(self) -> list[dict[str, Any]]:
        return self.lab.ledger()[self.served_before :]


@pytest.fixture
def proxied(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    folder = lab.user.home / tmp_path_factory.mktemp("edge").name
    folder.mkdir()
    made = Proxied(lab, folder)
    yield made
    made.stop()


@pytest.mark.slow
def test_killed_between_requests(proxied: Proxied) -> None:
    proxied.start()
    proxied.must(3)
    worker = proxied.wait_for(lambda status: status["events"] == 3)["worker"]["pid"]
    os.kill(worker, signal.SIGKILL)
    proxied.must(3, first=3)
    proxied.wait_for(lambda status: status["health"] == "ok")
    proxied.must(2, first=6)
    status = proxied.wait_for(lambda status: status["worker"]["restarts"] == 1)
    unmetered = proxied.bypassed()  # none where the next worker was there before the next request
    [gap] = status["gaps"]
    assert "killed by SIGKILL" in gap["cause"]
    events = proxied.events()
    assert len(proxied.served()) == 8
    assert len(events) + unmetered == 8
    assert {event["response_id"] for event in events} <= {
        each["response_id"] for each in proxied.served()
    }


def test_killed_in_the_middle_of_a_stream(proxied: Proxied) -> None:
    proxied.start()
    argv = proxied.curl(1, chunks=200, delay_ms=30)
    stream = proxied.lab.popen([*argv, "-N"], user=proxied.lab.user, stdout=-1, stderr=-1)
    assert b"message_start" in stream.stdout.readline() + stream.stdout.readline()
    status = proxied.status()
    assert status is not None
    os.kill(status["worker"]["pid"], signal.SIGKILL)
    assert stream.wait(120) != 0  # what mitmproxy was decrypting breaks, and says so
    proxied.must(2)
    proxied.wait_for(lambda status: status["health"] == "ok" and status["gaps"])
    proxied.must(1, first=2)
    proxied.wait_for(lambda status: status["totals"]["requests"] >= 1)


def test_hung(proxied: Proxied) -> None:
    proxied.start()
    proxied.must(1)
    first = proxied.wait_for(lambda status: status["events"] == 1)["worker"]["pid"]
    os.kill(first, signal.SIGSTOP)
    proxied.must(4, first=1)
    proxied.wait_for(lambda status: status["worker"]["pid"] not in (None, first))
    status = proxied.wait_for(lambda status: status["health"] == "ok")
    assert "did not answer" in status["gaps"][-1]["cause"]
    proxied.must(1, first=5)
    unmetered = proxied.bypassed()  # all 4, unless they took longer than it took to replace it
    assert 1 <= unmetered <= 4
    assert len(proxied.events()) + unmetered == 6


@pytest.mark.slow
def test_hung_for_a_moment_only(proxied: Proxied) -> None:
    """It goes on with the streams that it holds."""
    proxied.start()
    argv = proxied.curl(1, chunks=150, delay_ms=30)
    stream = proxied.lab.popen([*argv, "-N"], user=proxied.lab.user, stdout=-1, stderr=-1)
    stream.stdout.readline()
    status = proxied.status()
    assert status is not None
    worker = status["worker"]["pid"]
    os.kill(worker, signal.SIGSTOP)
    proxied.wait_for(lambda status: status["worker"]["state"] == "hung")
    proxied.must(1)
    os.kill(worker, signal.SIGCONT)
    out, err = stream.communicate(timeout=120)
    assert stream.returncode == 0, err
    assert b"message_stop" in out
    status = proxied.wait_for(lambda status: status["health"] == "ok")
    assert status["worker"] | {"pid": worker, "restarts": 0} == status["worker"]
    assert len(proxied.events()) == 1


def test_crash_looping(proxied: Proxied) -> None:
    """A CA that cannot be read, a key that is none: no worker ever comes up, traffic goes on."""
    folder = proxied.home / "proxy-ca"
    folder.mkdir()
    (folder / ".lock").mkdir()  # where a file should be
    os.chown(folder, proxied.lab.user.uid, proxied.lab.user.gid)
    proxied.start(health="degraded")
    proxied.must(3)
    status = proxied.wait_for(lambda status: status["worker"]["restarts"] >= 2)
    assert "cannot be written" in status["worker"]["trouble"]
    proxied.must(2, first=3)
    assert proxied.bypassed() == 5


def test_an_expired_ca_is_never_shown_to_a_client(proxied: Proxied) -> None:
    from halton_meter.providers.registry import Registry

    folder = proxied.home / "proxy-ca"
    then = datetime.datetime.now(datetime.UTC) - 2 * authority.LIFETIME
    authority.ensure_authority(folder, Registry().hosts(), then)
    shutil.copy(folder / authority.CERTIFICATE_NAME, folder / authority.TRUSTED_NAME)
    for each in (folder, *folder.iterdir()):
        os.chown(each, proxied.lab.user.uid, proxied.lab.user.gid)
    proxied.start(health="degraded")
    proxied.wait_for(lambda status: status["worker"]["state"] == "ready")
    proxied.must(3)
    status = proxied.status()
    assert status is not None
    assert not status["certificate_usable"]
    assert status["bypassed"] == [
        {"host": "api.anthropic.com", "cause": "certificate_unusable", "connections": 3}
    ]
    told = proxied.lab.run([*HALTON_METER, "status"], env=proxied.environment())
    assert told.returncode == 1
    assert "halton-meter init" in told.stdout


def test_a_program_that_does_not_trust_us_loses_one_request(proxied: Proxied) -> None:
    proxied.start()
    assert proxied.ask(0, trusting=False).returncode == 60  # curl: not a CA that it knows
    proxied.wait_for(lambda status: status["refused"])
    for n in (1, 2):
        done = proxied.ask(n, trusting=False)
        assert done.returncode == 0, done.stderr
    status = proxied.status()
    assert status is not None
    [refused] = status["refused"]
    assert refused["host"] == "api.anthropic.com"
    assert "curl" in refused["program"]
    assert proxied.bypassed() == 2


def _fill(ballast: Path) -> None:
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_full_disk(proxied: Proxied) -> None:
    """Events wait in memory and are written when there is room."""
    lab, home = proxied.lab, proxied.home
    config = (home / "config.toml").read_text()
    mounted = f"size=4m,uid={lab.user.uid},gid={lab.user.gid},mode=0700"
    done = lab.run(["mount", "-t", "tmpfs", "-o", mounted, "tmpfs", str(home)])
    assert done.returncode == 0, done.stderr
    inside = Path(f"/proc/{lab.pid}/root{home}")  # the mount is in the lab's namespace only
    (inside / "config.toml").write_text(config)
    outside, proxied.home = proxied.home, inside
    try:
        proxied.environment = lambda: lab.environment(HALTON_METER_HOME=str(outside))  # type: ignore[method-assign]
        proxied.start()
        proxied.must(2)
        proxied.wait_for(lambda status: status["events"] == 2)
        _fill(inside / "ballast")
        proxied.must(3, first=2)
        status = proxied.wait_for(lambda status: status["held"] == 3)
        assert status["store_error"].startswith("3 events wait in memory: the disk is full")
        assert status["health"] == "degraded"
        (inside / "ballast").unlink()
        proxied.must(1, first=5)
        proxied.wait_for(lambda status: not status["store_error"] and status["events"] == 6)
        lines = [
            json.loads(line[line.index("{") :])
            for file in (inside / "journal").glob("*.jsonl")
            for line in file.read_text().splitlines()
            if "response_id" in line
        ]
        assert len(lines) == 6
        _fill(inside / "ballast")
        proxied.must(2, first=6)
        # What is written anew, the snapshot, may leave room for one.
        status = proxied.wait_for(lambda status: status["events"] == 8 and status["held"])
        held = status["held"]
        os.kill(status["worker"]["pid"], signal.SIGKILL)
        status = proxied.wait_for(lambda status: status["worker"]["restarts"] == 1)
        assert status["losses"]["unstored_events"] == held
        (inside / "ballast").unlink()
        proxied.wait_for(lambda status: status["worker"]["state"] == "ready")
        proxied.stop()
        assert len(stored_events(lab, outside)) == 8 - held
    finally:
        proxied.home = outside
        proxied.stop()
        lab.run(["umount", "-l", str(outside)])


def test_a_disk_that_was_full_from_the_start(proxied: Proxied) -> None:
    lab, home = proxied.lab, proxied.home
    config = (home / "config.toml").read_text()
    mounted = f"size=64k,nr_inodes=6,uid={lab.user.uid},gid={lab.user.gid},mode=0700"
    done = lab.run(["mount", "-t", "tmpfs", "-o", mounted, "tmpfs", str(home)])
    assert done.returncode == 0, done.stderr
    inside = Path(f"/proc/{lab.pid}/root{home}")
    try:
        (inside / "config.toml").write_text(config)
        for n in range(5):  # until there are neither blocks nor inodes
            _fill(inside / f"ballast{n}")
        command = [*HALTON_METER, "daemon", "--foreground", "--via", "proxy"]
        with proxied.log.open("ab") as log:
            proxied._process = lab.popen(
                command, user=lab.user, env=proxied.environment(), stdout=log, stderr=log
            )
        wait_until(lambda: "listens on" in proxied.log.read_text(), "the edge")
        for n in range(3):
            done = proxied.ask(n)
            assert done.returncode == 0, done.stderr
    finally:
        proxied.stop()
        lab.run(["umount", "-l", str(home)])


def test_a_wrong_value_in_the_configuration_is_left_out(proxied: Proxied) -> None:
    """Where the socket was handed over, clients count on us: systemd would start us for ever."""
    proxied.start_kept()
    proxied.must(1)
    proxied.wait_for(lambda status: status["events"] == 1)  # else the kill may take it away
    good = (proxied.home / "config.toml").read_text()
    (proxied.home / "config.toml").write_text("openai_compatible_hosts = 3\n" + good)
    status = proxied.status()
    assert status is not None
    os.kill(status["pid"], signal.SIGKILL)
    status = proxied.wait_for(
        lambda status: status["config_error"] and status["worker"]["state"] == "ready"
    )
    assert status["health"] == "degraded"
    assert "config.toml:1: openai_compatible_hosts must be a list" in status["config_error"]
    proxied.must(2, first=1)
    (proxied.home / "config.toml").write_text(good)
    proxied.wait_for(lambda status: status["health"] == "ok")
    proxied.must(1, first=3)
    assert len(proxied.events()) == 4


def test_a_port_already_taken_is_told(proxied: Proxied) -> None:
    lab = proxied.lab
    taker = lab.popen(
        [sys.executable, "-c", "import socket, sys\n"
         f"s = socket.create_server(('127.0.0.1', {PORT}))\nprint(flush=True)\nsys.stdin.read()"],
        stdin=-1, stdout=-1,
    )  # fmt: skip
    taker.stdout.readline()
    try:
        for command in (["start", "--via", "proxy"], ["daemon", "--foreground", "--via", "proxy"]):
            done = lab.run([*HALTON_METER, *command], env=proxied.environment(), user=lab.user)
            assert done.returncode == 1
            assert f"127.0.0.1:{PORT}" in done.stderr
            assert "config.toml" in done.stderr
    finally:
        taker.communicate()


def test_nobody_but_this_machine_is_served(proxied: Proxied) -> None:
    """Asked at another address it is not there; from another address it hangs up."""
    proxied.start()
    lab = proxied.lab
    lab.run(["ip", "address", "add", "10.77.0.1/32", "dev", "lo"])
    script = textwrap.dedent(f"""\
        import socket
        try:
            socket.create_connection(("10.77.0.1", {PORT}), 5)
        except ConnectionRefusedError:
            print("refused")
        asker = socket.create_connection(("127.0.0.1", {PORT}), 5, ("10.77.0.1", 0))
        try:
            asker.sendall(b"CONNECT api.example.com:443 HTTP/1.1\\r\\n\\r\\n")
            print(asker.recv(100) or "hung up")
        except ConnectionResetError:
            print("hung up")
        """)
    done = lab.run([sys.executable, "-c", script], user=lab.user)
    assert done.stdout.splitlines() == ["refused", "hung up"], (done.stdout, done.stderr)
    status = proxied.status()
    assert status is not None
    assert status["counts"]["refused_not_loopback"] == 1
    assert "tunnelled" not in status["counts"]


def _ports_of(pid: int) -> list[int]:
    """The ports that a process's network namespace listens on."""
    lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    return [int(each[1].rpartition(":")[2], 16) for each in fields if each[3] == "0A"]


def test_another_user_of_the_machine_is_served_at_neither_port(proxied: Proxied) -> None:
    lab = proxied.lab
    before = {*_ports_of(lab.pid), PORT}
    proxied.start()
    status = proxied.status()
    assert status is not None
    [inner] = set(_ports_of(status["worker"]["pid"])) - before

    def curl(port: int, url: str, user: Any) -> str:
        # Into its standard output: the HTTP status that the proxy gave.
        command = ["curl", "-sS", "-m", "120", "-x", f"http://127.0.0.1:{port}", "-o", "/dev/null"]
        told = lab.run([*command, "-w", "%{http_connect} %{http_code}", url], user=user, env={})
        return str(told.stdout)

    plain = URL.replace("https", "http")
    assert [curl(PORT, url, lab.other) for url in (URL, plain)] == ["403 000", "000 403"]
    assert [curl(inner, url, lab.other) for url in (URL, plain)] == ["000 000", "000 000"]
    assert curl(inner, URL, lab.user) == "403 000"
    assert proxied.served() == []
    proxied.must(1)
    found = proxied.status()
    assert found is not None
    counted = {cause: found["counts"].get(cause) for cause in found["counts"] if "refused" in cause}
    assert counted == {
        "refused_other_user": 2,
        "refused_other_user_at_worker": 2,
        "refused_past_the_edge": 1,
    }
    assert found["losses"] == {}
    told = lab.run([*HALTON_METER, "status"], user=lab.user, env=proxied.environment())
    assert "refused: 2 connections by other users of this machine" in told.stdout


def _memory_kb(pid: int, what: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1])
    raise AssertionError(what)


@pytest.mark.slow
def test_two_hundred_megabytes_stream_through_flat_memory(proxied: Proxied) -> None:
    proxied.start()
    proxied.must(1)
    status = proxied.wait_for(lambda status: status["events"] == 1)
    pids = (status["pid"], status["worker"]["pid"])
    before = [_memory_kb(pid, "VmRSS") for pid in pids]
    argv = proxied.curl(1, chunks=200, piece_bytes=1 << 20)
    count = ["-o", "/dev/null", "-w", "%{size_download}", "-m", "600"]
    done = proxied.lab.run([*argv, *count], user=proxied.lab.user, timeout_s=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 200 << 20
    for pid, kb in zip(pids, before, strict=True):
        assert _memory_kb(pid, "VmHWM") - kb < 64 * 1024
    proxied.wait_for(lambda status: status["events"] == 2)


def test_the_edge_is_killed_and_nobody_is_refused(proxied: Proxied) -> None:
    """`start` keeps the socket open where neither systemd nor launchd does."""
    proxied.start_kept()
    for n in range(3):
        status = proxied.wait_for(lambda status: status["connections"] == 0)
        os.kill(status["pid"], signal.SIGKILL)
        done = proxied.ask(n)
        assert done.returncode == 0, done.stderr
        dead = status["pid"]
        proxied.wait_for(lambda status, dead=dead: status["pid"] != dead)


def test_both_services_share_a_home_and_count_each_exchange_once(proxied: Proxied) -> None:
    probes = Service(proxied.lab, proxied.home)
    try:
        proxied.start()
        pids = set()
        for n in range(4):
            client = proxied.lab.popen(proxied.curl(n), user=proxied.lab.user, stdout=-1)
            client.communicate(timeout=120)
            assert client.returncode == 0
            pids.add(client.pid)
        proxied.wait_for(lambda status: status["events"] == 4)
        wait_until(lambda: (probes.status() or {}).get("events", 0) >= 4, "the probes' events")
        told = proxied.lab.run([*HALTON_METER, "status", "--json"], env=proxied.environment())
        both = json.loads(told.stdout)
        assert (both["health"], both["source"], both["proxy"]["health"]) == ("ok", "uprobes", "ok")
    finally:
        probes.stop()
    events = proxied.events()
    assert len(events) == 4
    assert {event["response_id"] for event in events} == {
        each["response_id"] for each in proxied.served()
    }
    assert {event["pid"] for event in events} == pids


def test_stopped_on_a_machine_that_was_set_up_it_lets_everything_through(proxied: Proxied) -> None:
    proxied.start()
    (proxied.home / "changes.json").write_text("{}")
    run = {"env": proxied.environment(), "user": proxied.lab.user}
    stopped = proxied.lab.run([*HALTON_METER, "stop", "--via", "proxy"], **run)
    assert "passes everything on" in stopped.stdout
    proxied.must(2)
    status = proxied.status()
    assert status is not None
    assert status["health"] == "paused"
    assert proxied.bypassed() == 2
    again = proxied.lab.run([*HALTON_METER, "start", "--via", "proxy"], **run)
    assert again.stdout == "metering again\n", again.stderr
    proxied.must(1, first=2)
    assert len(proxied.events()) == 1
