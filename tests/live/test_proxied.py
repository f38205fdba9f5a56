"""`run --via proxy` composed: a real client process, real mitmproxy, real TLS, a real store."""

from __future__ import annotations

import asyncio
import http.server
import json
import os
import pwd
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from halton_meter.cli.run import summary_lines
from halton_meter.live import left_running
from halton_meter.live.proxy import past
from halton_meter.live.proxy.run import environment_proxy, meter_command
from halton_meter.live.result import RunResult
from halton_meter.model import Source
from halton_meter.problem import Unavailable
from halton_meter.store import Store
from proxy_fallback.edge.edge import Edge
from proxy_fallback.edge.listening import listen
from tests.support.waiting import WAIT_SECONDS_MAX

CLIENT = """
import json, os, sys, urllib.request
request = urllib.request.Request(
    sys.argv[1] + "/v1/chat/completions",
    data=json.dumps({"model": "gpt-4o-mini", "messages": []}).encode(),
    headers={"Authorization": "Bearer sk-made-up", "Content-Type": "application/json"},
)
with urllib.request.urlopen(request) as answer:
    print(json.load(answer)["id"])
sys.exit(int(sys.argv[2]))
"""

ANSWER = {
    "id": "chatcmpl-proxied-1",
    "object": "chat.completion",
    "model": "gpt-4o-mini-2024-07-18",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}}],
    "usage": {
        "prompt_tokens": 1000,
        "completion_tokens": 200,
        "total_tokens": 1200,
        "prompt_tokens_details": {"cached_tokens": 400},
    },
}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps(ANSWER).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: pytest's output is not the server's."""


@pytest.fixture
def origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pem = tmp_path / "origin.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-keyout", str(pem), "-out", str(tmp_path / "cert.pem"), "-days", "30",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", pem)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    yield f"https://localhost:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def environment(home: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "SSL_CERT_FILE": os.environ["SSL_CERT_FILE"],
    }


def test_a_client_behind_the_proxy_is_metered_with_its_pid_and_its_exit_code_is_kept(
    origin: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", CLIENT, origin, "7"]
    run = meter_command(
        command,
        tmp_path / "home",
        environment(tmp_path),
        {origin.removeprefix("https://"): "openai"},
    )
    assert run.exit_code == 7
    assert capfd.readouterr().out == "chatcmpl-proxied-1\n"
    with Store(tmp_path / "home").reading() as reader:
        [event] = reader.events()
    tokens = event.usage.tokens
    assert (tokens.input, tokens.cache_read, tokens.output) == (600, 400, 200)
    assert event.usage.source is Source.PROXY
    if sys.platform == "linux":
        assert event.usage.process is not None
        # A folder is kept only where all of it is words.
        assert Path(event.usage.process.argv[0]).name == Path(sys.executable).name
    assert run.totals.total.requests == 1
    assert not run.losses
    assert run.unmetered == []  # the proxy's own connections did not go past it
    assert run.connections is not None
    assert (run.connections.seen.connections, run.connections.metered.connections) == (1, 1)


def test_its_events_are_in_the_store_and_the_key_is_nowhere(origin: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    meter_command(
        [sys.executable, "-c", CLIENT, origin, "0"],
        home,
        environment(tmp_path),
        {origin.removeprefix("https://"): "openai"},
    )
    listed = subprocess.run(
        [sys.executable, "-m", "halton_meter", "events", "--json"],
        env={**os.environ, "HALTON_METER_HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    [event] = [json.loads(line) for line in listed.stdout.splitlines()]
    assert event["response_id"] == "chatcmpl-proxied-1"
    assert event["source"] == "proxy"
    files = [file for file in home.rglob("*") if file.is_file()]
    assert files
    assert not any(b"sk-made-up" in file.read_bytes() for file in files)


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("./no-such-program", 127, "./no-such-program: command not found"),
        ("/bin", 126, "cannot run /bin: Permission denied"),
    ],
)
def test_a_command_that_cannot_run_is_told_as_a_shell_would(
    name: str, code: int, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = meter_command([name], tmp_path / "home", {"PATH": "/bin"}, {})
    assert run.exit_code == code
    assert capfd.readouterr().err == f"halton-meter: {words}\n"
    assert (run.connections, run.unseen_ms) == (None, None)  # nothing ran: nothing to cover


class Plain(http.server.BaseHTTPRequestHandler):
    """A model server of one's own, without TLS; it notes the headers that reach it."""

    heads: ClassVar[list[dict[str, str]]] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.heads.append({name.lower(): value for name, value in self.headers.items()})
        body = json.dumps(ANSWER).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_a_model_server_without_tls_is_metered_and_gets_no_header_of_ours(tmp_path: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Plain)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    name = f"localhost:{server.server_address[1]}"
    client = (
        "import sys, urllib.request as r; q = r.Request(sys.argv[1] + '/v1/chat/completions', "
        'data=b\'{"model":"gpt-5-mini"}\', headers={"Content-Type": "application/json"}); '
        "print(len(r.urlopen(q).read()))"
    )
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    command = [sys.executable, "-c", client, f"http://{name}"]
    run = meter_command(command, tmp_path / "home", environment, {name: "openai"})
    server.shutdown()
    server.server_close()
    assert run.exit_code == 0
    assert run.totals.total.requests == 1
    assert not run.losses
    [head] = Plain.heads
    assert "x-halton-meter-client" not in head
    assert "proxy-connection" not in head
    assert head["host"] == name


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("http://proxy.example.com:3128", ("proxy.example.com", 3128)),
        ("proxy.example.com:3128/", ("proxy.example.com", 3128)),
        ("", None),
    ],
)
def test_the_environments_own_proxy_stays_in_use(
    value: str, expected: tuple[str, int] | None
) -> None:
    assert environment_proxy({"HTTPS_PROXY": value}) == expected


@pytest.mark.parametrize("value", ["http://user:secret@proxy:1", "socks5://proxy:1", "proxy:99999"])
def test_a_proxy_that_cannot_be_chained_is_told_without_its_password(value: str) -> None:
    with pytest.raises(Unavailable) as refused:
        environment_proxy({"HTTPS_PROXY": value})
    assert "HTTPS_PROXY" in str(refused.value)
    assert "secret" not in str(refused.value)


def test_what_is_metered_leaves_by_the_upstream_proxy_too(origin: str, tmp_path: Path) -> None:
    company = Edge([])
    listener = listen(0)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(company.serve([listener]), loop).result(10)
    run = meter_command(
        [sys.executable, "-c", CLIENT, origin, "0"],
        tmp_path / "home",
        environment(tmp_path),
        {origin.removeprefix("https://"): "openai"},
        upstream=("127.0.0.1", listener.getsockname()[1]),
    )
    asyncio.run_coroutine_threadsafe(company.stop(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    assert run.exit_code == 0
    assert run.totals.total.requests == 1
    assert company.counts["tunnelled"] == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="sudo makes root")
def test_a_run_under_sudo_serves_the_person_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What sudo runs may act as the person, as `sudo -u` does."""
    from halton_meter.live.proxy import service as proxy_service

    nobody = pwd.getpwnam("nobody").pw_uid
    monkeypatch.setenv("SUDO_UID", str(nobody))
    assert {0, nobody} <= proxy_service._served()
    monkeypatch.delenv("SUDO_UID")
    assert nobody not in proxy_service._served()


# --- what is not metered is named ---------------------------------------------------------------

PAST = """
import socket, ssl, sys, time
host, port = sys.argv[1].removeprefix("https://").split(":")
lax = ssl.create_default_context()
lax.check_hostname, lax.verify_mode = False, ssl.CERT_NONE
held = [lax.wrap_socket(socket.create_connection((host, int(port)))) for _ in range(3)]
time.sleep(1)  # as long as an answer takes; it closes first, which the kernel remembers
for each in held:
    each.close()
"""

REFUSES = """
import os, socket, ssl, sys
host, port = sys.argv[1].removeprefix("https://").split(":")
proxy = os.environ["HTTPS_PROXY"].removeprefix("http://").split(":")
lax = ssl.create_default_context()
lax.check_hostname, lax.verify_mode = False, ssl.CERT_NONE
for attempt in range(5):
    raw = socket.create_connection((proxy[0], int(proxy[1])))
    raw.sendall(f"CONNECT {host}:{port} HTTP/1.1\\r\\n\\r\\n".encode())
    assert b" 200 " in raw.recv(4096)
    with lax.wrap_socket(raw, server_hostname=host) as tls:
        if b"mitm" in tls.getpeercert(True) or b"Halton" in tls.getpeercert(True):
            continue  # as GnuTLS does: the handshake ends, then the certificate is looked at
        tls.sendall(f"GET / HTTP/1.1\\r\\nHost: {host}\\r\\n\\r\\n".encode())
        assert tls.recv(100)
        sys.exit(attempt)
sys.exit(99)
"""


def metered(home: Path, origin: str, *command: str) -> RunResult:
    hosts = {origin.removeprefix("https://"): "openai"}
    return meter_command(command, home / "home", environment(home), hosts)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which connections there are")
def test_a_daemon_whose_parents_nobody_saw_is_named(
    origin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(past, "children_of", lambda pid: iter(()))
    script = tmp_path / "past.py"
    script.write_text(PAST)
    run = metered(tmp_path, origin, "sh", "-c", f"{sys.executable} {script} {origin}; true")
    [row] = run.unmetered
    assert (row.connections, row.cause) == (3, "proxy_ignored")
    assert row.program is not None
    assert row.program.endswith("/past.py")


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which connections there are")
def test_a_program_that_ignores_the_proxy_is_named(origin: str, tmp_path: Path) -> None:
    script = tmp_path / "past.py"
    script.write_text(PAST)
    run = metered(tmp_path, origin, "sh", "-c", f"{sys.executable} {script} {origin}; true")
    assert run.totals.total.requests == 0
    [row] = run.unmetered
    assert (row.connections, row.cause) == (3, "proxy_ignored")
    assert row.program is not None
    assert row.program.startswith(os.path.realpath(sys.executable))
    assert row.program.endswith("/past.py")
    assert row.host is not None
    assert row.host.startswith("localhost") or row.host.startswith("127.0.0.1")
    assert row.fix == "sudo halton-meter run -- CMD"
    assert run.connections is not None
    assert (run.connections.seen.connections, run.connections.metered.connections) == (3, 0)
    asked = [sys.executable, "-m", "halton_meter", "report", "--coverage"]
    told = subprocess.run(
        asked,
        env={**os.environ, "HALTON_METER_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "it ignores proxy settings. Use: sudo halton-meter run -- CMD" in told.stdout


def test_who_refuses_after_the_handshake_fails_once_and_never_again(
    origin: str, tmp_path: Path
) -> None:
    script = tmp_path / "refuses.py"
    script.write_text(REFUSES)
    first = metered(tmp_path, origin, sys.executable, str(script), origin)
    assert first.exit_code == 1  # its second attempt
    again = metered(tmp_path, origin, sys.executable, str(script), origin)
    assert again.exit_code == 0  # its first
    [now] = [row for row in first.unmetered if row.cause == "certificate_refused_now"]
    assert (now.host, now.connections, now.fix) == ("localhost", 1, "sudo halton-meter run -- CMD")
    assert "it refused the proxy's certificate; its next try passes unread" in now.line()
    for run in (first, again):
        [row] = [row for row in run.unmetered if row != now]
        assert (row.host, row.connections, row.cause) == ("localhost", 1, "certificate_refused")
        assert row.program is not None
        assert row.program.endswith("refuses.py")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads environments as Linux shows them")
def test_one_odd_environment_says_nothing_about_a_program(origin: str, tmp_path: Path) -> None:
    odd = ["env", "-u", "SSL_CERT_FILE", sys.executable, "-c", CLIENT, origin, "0"]
    first = metered(tmp_path, origin, *odd)
    assert first.exit_code == 1
    [row] = first.unmetered
    assert row.cause == "certificate_refused_now"
    assert row.program is not None
    assert row.program.endswith(" without our SSL_CERT_FILE")
    usual = metered(tmp_path, origin, *odd[3:])
    assert (usual.exit_code, usual.totals.total.requests) == (0, 1)
    assert usual.unmetered == []


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which connections there are")
def test_a_run_without_connections_says_which_it_cannot_have_seen(tmp_path: Path) -> None:
    run = meter_command(["sleep", "0.3"], tmp_path / "home", {"PATH": os.environ["PATH"]}, {})
    assert run.unseen_ms is not None
    assert run.unseen_ms >= 10
    [line] = [line for line in summary_lines(run) if "coverage" in line]
    assert line == (
        "  coverage: no connection past the proxy was seen; "
        f"one shorter than {run.unseen_ms:,} ms, or by QUIC, may have been missed"
    )


LATER = "({}; exec {} -c '{}' {} 0 >{}) & exit 3"


@pytest.mark.skipif(sys.platform != "linux", reason="reads environments as Linux shows them")
def test_what_the_command_leaves_running_keeps_the_proxy(
    origin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(left_running, "WAIT_S_MAX", WAIT_SECONDS_MAX)  # on a busy machine, too
    out = tmp_path / "out"
    script = LATER.format("sleep 0.3", sys.executable, CLIENT, origin, out)
    run = metered(tmp_path, origin, "sh", "-c", script)
    assert (run.exit_code, run.totals.total.requests) == (3, 1)
    assert out.read_text() == "chatcmpl-proxied-1\n"
    assert run.still_running == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads environments as Linux shows them")
def test_what_still_runs_at_the_end_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(left_running, "WAIT_S_MAX", 0.0)
    pid_file = tmp_path / "pid"
    command = ["sh", "-c", f"sleep 60 & echo $! >{pid_file}"]
    run = meter_command(command, tmp_path / "home", {"PATH": os.environ["PATH"]}, {})
    os.kill(int(pid_file.read_text()), signal.SIGKILL)
    assert len(run.still_running) == 1
    assert "  1 process of the command still runs without the proxy" in "\n".join(
        summary_lines(run)
    )
