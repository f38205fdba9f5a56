"""The service: kill what you like, clients go on, and nothing that was completed is lost."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.lab.conftest import CLIENTS, HALTON_METER, Service, assert_metered
from tests.lab.test_clients import anthropic_body, curl
from tests.lab.test_run import child_running
from tests.support.lab.lab import Lab
from tests.support.lab.scenario import Scenario
from tests.support.quick import first, slow
from tests.support.waiting import wait_until

pytestmark = pytest.mark.lab


def ask(lab: Lab, n: int) -> None:
    """One whole exchange."""
    done = lab.run([*curl(), "-d", anthropic_body(n)], user=lab.user)
    assert done.returncode == 0, done.stderr


def begin_streams(lab: Lab, python: str) -> subprocess.Popen[Any]:
    """Twenty streams at once that last some three seconds."""
    argv = [python, str(CLIENTS / "sdk.py"), "anthropic", "async-stream", "1", "20"]
    return lab.popen([*argv, "chunks=100", "delay_ms=30"], user=lab.user, stdout=-1, text=True)


def kill(service: Service, *victims: str) -> None:
    """Kill processes of the service's; "supervisor" is the service itself."""
    pids = [
        service.pid if victim == "supervisor" else child_running(service.pid, victim)
        for victim in victims
    ]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def is_seen(service: Service, pid: int) -> bool:
    """Whether a connection of the process's has been captured."""
    coverage = (service.status() or {}).get("coverage", ())
    return any(line["pid"] == pid for line in coverage)


METERING, HELPER = "halton_meter.live.probes.worker", "capture.helper.main"


@pytest.mark.parametrize(
    "victims",
    [
        slow((HELPER,), id="helper"),
        slow((METERING,), id="metering"),
        slow((HELPER, METERING), id="both"),
        pytest.param(("supervisor", HELPER, METERING), id="all"),
    ],
)
def test_killed_in_the_middle_of_streams(
    lab: Lab, own: Service, python: str, victims: tuple[str, ...]
) -> None:
    skip = len(lab.ledger())
    for n in range(5):
        ask(lab, n)
    before = lab.ledger_of(5, skip)
    wait_until(lambda: (own.status() or {}).get("events") == 5, "the first five")
    streams = begin_streams(lab, python)
    wait_until(lambda: is_seen(own, streams.pid), "their connections")
    time.sleep(0.5)  # into the middle of them: the lab paces them for three seconds
    kill(own, *victims)
    if "supervisor" in victims:
        assert own.wait() == -signal.SIGKILL
        own.start()
    out, _ = streams.communicate(timeout=120)
    assert streams.returncode == 0
    said = [json.loads(line) for line in out.splitlines()]
    during = lab.ledger_of(20, skip + 5)
    assert sorted(line["id"] for line in said) == sorted(e["response_id"] for e in during)

    def again() -> bool:
        status = own.status()
        return status is not None and bool(status["gaps"] or status["restarts"])

    wait_until(again, "the restart")
    for n in range(5):
        ask(lab, n)
    after = lab.ledger_of(5, skip + 25)
    own.settle()
    events = own.events()
    status = own.status()
    assert status is not None
    if "supervisor" not in victims:  # the kernel goes on copying: nothing is lost
        assert_metered([*before, *during, *after], events)
        assert status["gaps"] == []
        return
    wanted = {entry["response_id"] for entry in (*before, *after)}
    sure = [event for event in events if event["response_id"] in wanted]
    assert_metered([*before, *after], sure)
    ids = [event["response_id"] for event in events if event["response_id"]]
    assert len(set(ids)) == len(ids)
    (gap,) = status["gaps"]
    assert gap["from"] < gap["to"]


@pytest.mark.parametrize(
    ("resumed_first", "version"),
    [
        (True, "--http1.1"),
        slow(True, "--http2"),
        slow(False, "--http1.1"),
        (False, "--http2"),
    ],
)
def test_what_the_ring_held_when_the_metering_process_died_is_metered(
    lab: Lab, own: Service, version: str, resumed_first: bool
) -> None:
    """Whole exchanges, and one whose beginning the dead process had read; whoever runs first."""
    begun = lab.popen(
        [*curl("-N", version), "-d", anthropic_body(1, chunks=100, delay_ms=30)],
        user=lab.user,
        stdout=subprocess.DEVNULL,
    )

    wait_until(lambda: is_seen(own, begun.pid), "its connection")
    skip = len(lab.ledger())
    helper, metering = child_running(own.pid, HELPER), child_running(own.pid, METERING)
    os.kill(helper, signal.SIGSTOP)
    try:
        for n in range(5):
            ask(lab, n)
        assert begun.wait(120) == 0
        if resumed_first:  # the helper sends it to a reader that lives, and reads no more
            os.kill(metering, signal.SIGSTOP)
            os.kill(helper, signal.SIGCONT)
            wait_until(lambda: _is_idle(helper), "the helper")
        os.kill(metering, signal.SIGKILL)
    finally:
        os.kill(helper, signal.SIGCONT)
    wait_until(lambda: (own.status() or {}).get("restarts"), "the restart")
    own.settle()
    events = own.events()
    assert_metered(lab.ledger_of(6, skip), events)
    (first,) = [event for event in events if event["pid"] == begun.pid]
    assert (first["argv"][:1], first["user"]) == (["curl"], lab.user.name)
    status = own.status()
    assert status is not None
    assert (status["gaps"], status["losses"]) == ([], {})


def _is_idle(pid: int) -> bool:
    """Whether it has run and waits for something to do."""
    before = Path(f"/proc/{pid}/stat").read_text().split()
    time.sleep(0.2)
    after = Path(f"/proc/{pid}/stat").read_text().split()
    return after[2] == "S" and before[13:15] == after[13:15]


STEADY = """
import http.client, json, sys, threading, time
seconds, threads, body = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
until, answered = time.monotonic() + seconds, []
def go_on():
    connection = http.client.HTTPSConnection("api.anthropic.com")
    while time.monotonic() < until:
        connection.request("POST", "/v1/messages", body)
        answer = connection.getresponse()
        answer.read()
        answered.append(answer.status)
        time.sleep(0.04)
running = [threading.Thread(target=go_on) for _ in range(threads)]
for each in running: each.start()
for each in running: each.join()
print(len(answered), set(answered) == {200})
"""


@pytest.mark.parametrize("victims", first([(HELPER, METERING), (HELPER,), (METERING,)]))
def test_a_hundred_exchanges_a_second_go_on_while_our_processes_are_killed(
    lab: Lab, own: Service, python: str, victims: tuple[str, ...]
) -> None:
    """KILL_ROUNDS=10 for the measurement; as a test, two rounds."""
    rounds = int(os.environ.get("KILL_ROUNDS", "2"))
    skip = len(lab.ledger())
    command = [python, "-c", STEADY, str(2 + 3 * rounds), "5", anthropic_body(3)]
    client = lab.popen(command, user=lab.user, stdout=-1, text=True)
    for _ in range(rounds):
        restarts = (own.status() or {}).get("restarts", 0)
        kill(own, *victims)

        def again(before: int = restarts) -> bool:
            status = own.status()
            return status is not None and status["restarts"] >= before + len(victims)

        wait_until(again, "the restart")
    said, _ = client.communicate(timeout=120)
    count, fine = said.split()
    assert fine == "True"
    own.settle()
    assert_metered(lab.ledger_of(int(count), skip), own.events())
    status = own.status()
    assert status is not None
    assert (status["gaps"], status["losses"]) == ([], {})


def test_bytes_reach_a_client_unchanged_whatever_dies(lab: Lab, own: Service) -> None:
    body = anthropic_body(1, chunks=60, delay_ms=30)
    processes = [lab.popen([*curl("-N"), "-d", body], user=lab.user, stdout=-1) for _ in range(2)]
    time.sleep(0.5)
    kill(own, HELPER, METERING)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    plain = lab.run([*curl(), "-d", anthropic_body(1, chunks=60)], user=lab.other)
    digests = {_digest(output) for output in (*outputs, plain.stdout.encode())}
    assert len(digests) == 1


def _digest(answer: bytes) -> str:
    serial = answer.partition(b'"id":"')[2].partition(b'"')[0]
    return hashlib.sha256(answer.replace(serial, b"ID")).hexdigest()


LARGE = """
import http.client, json, sys
size = int(sys.argv[1]) * 1_000_000
asked = {"model": "claude-haiku-4-5", "max_tokens": 9, "stream": True}
talk = [{"role": "user", "content": sys.argv[2]}, {"role": "user", "content": "q" * size}]
connection = http.client.HTTPSConnection("api.anthropic.com")
connection.request("POST", "/v1/messages", json.dumps({**asked, "messages": talk}).encode())
answer = connection.getresponse().read()
assert len(answer) > size, len(answer)
"""


@pytest.mark.parametrize("megabytes", first([5, 20]))
def test_usage_at_the_end_of_a_large_exchange(
    lab: Lab, own: Service, python: str, megabytes: int
) -> None:
    """A request in one write beyond what is kept of one, and an answer of the same size.

    At 50 MB/s: at the speed of memory a busy machine's ring overflows, which is counted but may
    cost the usage.
    """
    skip = len(lab.ledger())
    marker = Scenario(n=3, chunks=megabytes + 1, piece_bytes=1 << 20, delay_ms=20).marker
    done = lab.run([python, "-c", LARGE, str(megabytes), marker], user=lab.user)
    assert done.returncode == 0, done.stderr
    (served,) = lab.ledger_of(1, skip)
    own.settle()
    assert len(own.events()) == 1, own.status()
    (event,) = own.events()
    found = {name: count for name, count in event["tokens"].items() if count}
    assert found == {name: count for name, count in served["tokens"].items() if count}
    assert event["model"] == served["model"]
    assert event["outcome"] == "gapped"
    status = own.status()
    assert status is not None
    assert status["losses"]["call_too_long_bytes"] > 3_000_000


def test_stopping_leaves_no_process_and_no_socket(lab: Lab, own: Service) -> None:
    ask(lab, 1)
    pids = [child_running(own.pid, METERING), child_running(own.pid, HELPER)]
    assert own.stop() == 0
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "their end")
    assert not (own.home / "daemon.sock").exists()
    assert len(own.events()) == 1
    own.start()
    status = own.status()
    assert status is not None
    assert status["gaps"] == []


def test_a_second_service_for_the_same_home_is_refused(lab: Lab, own: Service) -> None:
    command = [*HALTON_METER, "daemon", "--foreground", "--owner", lab.user.name]
    done = lab.run(command, env=lab.environment(HALTON_METER_HOME=str(own.home)))
    assert done.returncode == 1
    assert "another halton-meter service" in done.stderr
    assert own.status() is not None


def test_status_for_people_and_scripts(lab: Lab, own: Service) -> None:
    slow = anthropic_body(1, chunks=100, delay_ms=30)
    client = lab.popen([*curl("-N"), "-d", slow], user=lab.user, stdout=subprocess.DEVNULL)
    environment = lab.environment(HALTON_METER_HOME=str(own.home))

    def seen() -> Any:
        done = lab.run([*HALTON_METER, "status", "--json"], user=lab.user, env=environment)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        return found if any(c["pid"] == client.pid for c in found["coverage"]) else None

    found = wait_until(seen, "curl in the coverage")
    (line,) = [each for each in found["coverage"] if each["pid"] == client.pid]
    assert line["state"] == "metered"
    assert line["host"] == "api.anthropic.com"
    assert found["loader"] in ("libbpf", "bcc")
    assert found["health"] == "ok"
    text = lab.run([*HALTON_METER, "status"], user=lab.user, env=environment)
    assert text.stdout.startswith("uprobes ok, up")
    client.kill()
    client.wait()


UNPROBED = """
import ctypes, socket, sys
ctypes.CDLL(sys.argv[1])
peer = socket.create_connection((sys.argv[2], 443))
print("connected", flush=True)
sys.stdin.read()
"""


def test_a_stack_that_cannot_be_probed_is_told_with_the_host_it_looked_up(
    lab: Lab, own: Service, python: str
) -> None:
    """Two processes with rustls in them: of one a provider is known, of the other nothing."""
    library = lab.user.home / "librustls.so"
    source = 'char name[2000000] = "rustls"; int marked(void) { return name[9]; }'
    build = ["clang", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    assert lab.run(build, input_text=source).returncode == 0
    library.chmod(0o755)
    clients = [
        lab.popen([python, "-c", UNPROBED, str(library), host], user=lab.user, stdin=-1, stdout=-1)
        for host in ("api.openai.com", "api.example.com")
    ]
    for client in clients:
        assert client.stdout.readline() == b"connected\n"
    pids = [client.pid for client in clients]

    def seen() -> Any:
        lines = {line["pid"]: line for line in (own.status() or {}).get("coverage", ())}
        # Until the search in the library has ended, its stack is not known.
        found = all(pid in lines and lines[pid]["stack"] == "rustls" for pid in pids)
        return lines if found else None

    lines = wait_until(seen, "both processes in the coverage, as rustls")
    provider, other = (lines[pid] for pid in pids)
    assert provider["state"] == "unsupported"
    assert provider["host"] == "api.openai.com"
    assert other["host"] is None
    environment = lab.environment(HALTON_METER_HOME=str(own.home))
    text = lab.run([*HALTON_METER, "status"], user=lab.user, env=environment).stdout
    assert "(rustls) -> api.openai.com" in text
    assert "not metered, destination unknown:" in text
    for client in clients:
        client.stdin.close()
        client.wait()


def test_status_of_a_service_that_does_not_run(lab: Lab) -> None:
    environment = lab.environment(HALTON_METER_HOME=str(lab.user.home / "nowhere"))
    done = lab.run([*HALTON_METER, "status"], user=lab.user, env=environment)
    assert done.returncode == 1
    assert "sudo halton-meter start" in done.stdout
    done = lab.run([*HALTON_METER, "status", "--json"], user=lab.user, env=environment)
    assert json.loads(done.stdout)["health"] == "stopped"


def test_start_and_stop_without_systemd(lab: Lab, tmp_path_factory: Any) -> None:
    if Path("/run/systemd/system").exists():
        pytest.skip("systemd runs here: start would install a unit on this machine")
    home = lab.user.home / tmp_path_factory.mktemp("kept").name
    environment = lab.environment(
        SUDO_UID=str(lab.user.uid), SUDO_USER=lab.user.name, HALTON_METER_HOME=str(home)
    )
    started = lab.run([*HALTON_METER, "start"], env=environment)
    assert started.returncode == 0, started.stderr
    assert "without systemd" in started.stdout
    status = json.loads(lab.run([*HALTON_METER, "status", "--json"], env=environment).stdout)
    assert home.stat().st_uid == lab.user.uid
    os.kill(status["supervisor_pid"], signal.SIGKILL)

    def renewed() -> bool:
        done = lab.run([*HALTON_METER, "status", "--json"], env=environment)
        found = json.loads(done.stdout)
        return found.get("supervisor_pid") not in (None, status["supervisor_pid"])

    wait_until(renewed, "the restart")
    stopped = lab.run([*HALTON_METER, "stop"], env=environment)
    assert (stopped.returncode, stopped.stdout) == (0, "stopped\n")
    assert lab.run([*HALTON_METER, "status"], env=environment).returncode == 1


def test_it_costs_nothing_while_nothing_happens(own: Service) -> None:
    pids = [own.pid, child_running(own.pid, METERING), child_running(own.pid, HELPER)]
    own.settle()

    def idle() -> bool:
        before = sum(map(_cpu_s, pids))
        time.sleep(5.0)  # the quantity that is measured
        return sum(map(_cpu_s, pids)) - before <= 0.02

    wait_until(idle, "five seconds without work, once what starting left to do is done")


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
