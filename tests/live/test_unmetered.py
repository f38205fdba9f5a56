"""How it is said what was not metered, and what was not followed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from halton_meter.live.proxy import past, refusals_file
from halton_meter.live.proxy.refusals_file import RUN_NAME, RefusalsFile, forget
from halton_meter.live.remedies import fix_for
from halton_meter.live.servers import asked_servers
from halton_meter.live.servers import lines as server_lines
from halton_meter.live.unmetered import CAUSES, Unmetered, lines
from tests.support.waiting import WAIT_SECONDS_MAX, wait_until


def test_a_row_is_one_line_with_who_where_why_and_what_to_do() -> None:
    row = Unmetered("/usr/bin/wget", "api.openai.com", 3, "proxy_ignored", "GnuTLS", "run it so")
    assert row.line() == (
        "not metered: wget (GnuTLS) to api.openai.com, at least 3 connections: "
        "it ignores proxy settings. Use: run it so"
    )
    assert Unmetered(None, None, 1, "new_cause").line() == (
        "not metered: a program to an unknown host, 1 connection: new cause"
    )
    script = Unmetered("/usr/bin/python3.11 /home/ann/bot.py", "api.x.ai", 1, "stopped")
    assert script.line().startswith("not metered: python3.11 bot.py to api.x.ai, 1 connection")
    assert Unmetered.of_json(json.loads(json.dumps(row.as_json()))) == row
    with pytest.raises(ValueError, match="no cause"):
        Unmetered.of_json({"program": "x"})


def test_most_connections_come_first_and_the_rest_is_summed() -> None:
    rows = [Unmetered(f"/{n}", "h", n, "stopped") for n in range(1, 6)]
    said = lines(rows, 2)
    assert [line.split(" ")[2] for line in said] == ["5", "4", "6"]
    assert said[2] == "not metered: 6 more connections; --json names them"


@pytest.mark.parametrize(
    ("cause", "program", "stack", "fix"),
    [
        ("proxy_ignored", "/usr/bin/java", "JSSE", "halton-meter run --java -- CMD"),
        ("proxy_ignored", "/usr/bin/php8.2", "OpenSSL", "sudo halton-meter run -- CMD"),
        ("proxy_ignored", "/x/client", "mbedTLS", "sudo halton-meter run -- CMD"),
        (
            "proxy_ignored",
            "/x/client",
            "Erlang ssl",
            "the program's own proxy setting, with the proxy of halton-meter init",
        ),
        ("certificate_refused", "/usr/bin/java", None, "halton-meter run --java -- CMD"),
        ("certificate_refused", "/x/app", "OpenSSL", "sudo halton-meter run -- CMD"),
        ("certificate_refused", "/usr/bin/wget", "GnuTLS", "sudo halton-meter run -- CMD"),
        ("trust_not_configurable", "/x", "GnuTLS", "sudo halton-meter run -- CMD"),
        ("trust_not_configurable", "/x", "Erlang ssl", "halton-meter init --system-trust"),
        ("worker_died", None, None, "halton-meter doctor"),
        ("worker_slow", None, None, ""),
        ("quic", "/x", None, "turn HTTP/3 off in the program"),
        ("no_keys", "/x/client", None, "sudo halton-meter run -- CMD"),
        ("no_keys", None, None, "sudo halton-meter run -- CMD"),
        ("no_keys", "/usr/bin/java", None, "halton-meter run --java -- CMD"),
        ("no_keys", "/x/client", "QUIC", "turn HTTP/3 off in the program"),
    ],
)
def test_the_fix_that_is_known_is_said(
    cause: str,
    program: str | None,
    stack: str | None,
    fix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert cause in CAUSES
    assert fix_for(cause, program, stack) == fix


def test_the_same_interpreter_with_another_script_is_another_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell that forks, and whose fork becomes a shell with a script of its own."""
    monkeypatch.setattr(past, "YOUNG_S", WAIT_SECONDS_MAX)  # on a busy machine, too
    script = tmp_path / "asks.sh"
    script.write_text("# api.openai.com\nread line\n")
    watch = past.Past(["api.openai.com"], {})
    process = subprocess.Popen(
        ["bash", "-c", f"read line; exec bash {script}"], stdin=subprocess.PIPE
    )
    assert process.stdin is not None
    try:
        wait_until(lambda: b"read line" in arguments_of(process.pid), "the shell")
        watch._meet(process.pid)
        process.stdin.write(b"\n")
        process.stdin.flush()
        told = b"bash\0%s\0" % os.fsencode(script)
        wait_until(lambda: arguments_of(process.pid) == told, "the script")
        watch._look()
    finally:
        process.communicate(b"\n")
    (program,) = watch._named["api.openai.com"]
    assert program.endswith("/asks.sh")
    assert watch._processes[process.pid].program == program


def arguments_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def test_where_there_are_no_uprobes_the_system_has_to_trust(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    for cause in ("certificate_refused", "trust_not_configurable"):
        assert fix_for(cause, "/x", "GnuTLS") == "halton-meter init --system-trust"


# --- commands that only ask a server ------------------------------------------------------------


def a_process(proc: Path, pid: int, *argv: str) -> None:
    (proc / str(pid)).mkdir()
    (proc / str(pid) / "cmdline").write_bytes(b"".join(each.encode() + b"\0" for each in argv))


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["tmux", "new", "-d", "claude"], ["tmux"]),
        (["/usr/bin/env", "A=b", "timeout", "-k", "5", "10s", "tmux", "new"], ["tmux"]),
        (["sh", "-c", "cd /x && tmux new -d claude; echo docker"], ["tmux"]),
        (["bash", "-lc", "docker run x | ssh y"], ["docker", "ssh"]),
        (["screen", "-dm", "claude"], []),  # its server is not there yet: it will be the run's
        (["systemd-run", "--user", "claude"], ["systemd-run"]),
        (["systemd-run", "--user", "--scope", "claude"], []),
        (["claude", "-p", "tmux and docker"], []),
        (["env"], []),
        ([], []),
    ],
)
def test_a_command_that_only_asks_a_server_is_known(
    tmp_path: Path, argv: list[str], named: list[str]
) -> None:
    a_process(tmp_path, 7, "tmux: server")
    a_process(tmp_path, 8, "-bash")
    (tmp_path / "self").mkdir()
    assert asked_servers(argv, os.getuid(), tmp_path) == named
    assert asked_servers(["tmux"], os.getuid() + 1, tmp_path) == []  # another user's
    assert len(server_lines(named)) == 2 * len(named)


# --- refusals that are kept ---------------------------------------------------------------------


def test_refusals_are_kept_for_one_authority_and_some_days(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = tmp_path / "ca.pem"
    authority.write_text("one")
    path = tmp_path / RUN_NAME
    kept = RefusalsFile(path, authority)
    assert kept.read() == []
    kept.stacks["/usr/bin/wget"] = "GnuTLS"
    kept.write([("api.x.ai", "/usr/bin/wget"), ("api.x.ai", None)])
    assert path.stat().st_mode & 0o777 == 0o600
    again = RefusalsFile(path, authority)
    assert again.read() == [("api.x.ai", "/usr/bin/wget")]
    assert again.stacks == {"/usr/bin/wget": "GnuTLS"}
    monkeypatch.setattr(refusals_file, "KEPT_OF_RUNS_S", 0)
    assert RefusalsFile(path, authority).read() == []
    monkeypatch.undo()
    authority.write_text("two")
    assert RefusalsFile(path, authority).read() == []
    forget(tmp_path)
    assert not path.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"[]", b'{"refusals": 3}', b'{"refusals": [3, {"host": 1}, {"since": "x"}]}'],
)
def test_a_file_of_nonsense_holds_no_refusal(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / RUN_NAME
    path.write_bytes(content)
    assert RefusalsFile(path, tmp_path / "none").read() == []


def test_a_refusal_from_the_future_is_none(tmp_path: Path) -> None:
    path = tmp_path / RUN_NAME
    row = {"host": "api.x.ai", "program": "/x", "since": int(time.time()) + 1000}
    path.write_text(json.dumps({"authority": None, "refusals": [row]}))
    assert RefusalsFile(path, tmp_path / "none").read() == []


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which connections there are")
@pytest.mark.parametrize(
    ("command", "host"),
    [
        (["curl", "https://api.groq.com/x"], "api.groq.com"),
        (["sh", "-c", "curl api.groq.com/x"], "api.groq.com"),
        (["python", "app.py"], "api.groq.com or api.openai.com"),
    ],
)
def test_of_hosts_that_share_an_address_the_runs_own_arguments_name_one(
    command: list[str], host: str
) -> None:
    names = ["api.openai.com", "api.groq.com"]
    watch = past.Past(names, {})
    with subprocess.Popen(["sleep", "60"]) as process:
        watch.begin(process.pid, command)
        process.kill()
    watch.stop()
    seen = past._Seen(("192.0.2.1", past.HTTPS), 0.0, "/usr/bin/curl")
    assert watch._host_of(seen, {"192.0.2.1": names}) == host
