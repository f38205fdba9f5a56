"""`doctor --pid`: real processes, and what is said of each way to meter them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from halton_meter.cli import main
from halton_meter.cli.doctor_process import Way, lines, ways
from halton_meter.model import Process
from halton_meter.problem import Unavailable
from tests.support.go_programs import GO, go_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")

PROXY, CA = "http://127.0.0.1:8081", Path("/nowhere/proxy-ca")
PYTHON = [sys.executable, "-c", "import ssl; print('ready', flush=True); input()"]
GO_SOURCE = """package main

import (
	"fmt"
	"net/http"
)

func main() {
	fmt.Println("ready")
	fmt.Scanln()
	_, _ = http.Get("https://127.0.0.1:1/")
}
"""


@contextmanager
def running(argv: Sequence[str], **environment: str) -> Iterator[int]:
    process = subprocess.Popen(
        argv,
        env={"PATH": os.environ["PATH"], **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
    finally:
        process.stdin.close()
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def capable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which probes can be set."""
    monkeypatch.setattr("capture.environment.check_environment", list)


def found(pid: int) -> Mapping[str, Way]:
    return {each.name: each for each in ways(pid, PROXY, CA)[1]}


def test_python_is_found_by_its_library_and_could_write_keys() -> None:
    with running(PYTHON) as pid:
        told = found(pid)
    assert told["uprobes"].can is True
    assert told["uprobes"].why.startswith("found OpenSSL in /")
    assert told["uprobes"].next == "sudo halton-meter start"
    assert told["key log"].can is None
    assert told["key log"].why == "Python writes keys, but it has no SSLKEYLOGFILE"
    assert told["proxy"].can is None
    assert told["proxy"].why.startswith("it has no proxy variables")


def test_who_writes_keys_is_told_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "my keys.log"
    with running(PYTHON, SSLKEYLOGFILE=str(file)) as pid:
        told = found(pid)["key log"]
    assert (told.can, told.why) == (True, f"Python writes keys to {file}, by SSLKEYLOGFILE")
    assert told.next.endswith(f"--via keylog --keys '{file}'")


def test_keys_that_the_service_reads_are_metered_already(tmp_path: Path) -> None:
    file = tmp_path / "keys" / "tls.log"
    with running(PYTHON, SSLKEYLOGFILE=str(file)) as pid:
        told = ways(pid, PROXY, CA, [str(tmp_path / "keys")])[1][1]
    assert told.why == f"Python writes keys to {file}, which the key log service reads"
    assert (told.can, told.next) == (True, "halton-meter status")


def test_who_asks_need_not_be_root(monkeypatch: pytest.MonkeyPatch) -> None:
    from capture.environment import NEEDS_ROOT
    from halton_meter.problem import Problem

    problem = Problem(NEEDS_ROOT, "sudo halton-meter start")
    monkeypatch.setattr("capture.environment.check_environment", lambda: [problem])
    with running(PYTHON) as pid:
        assert found(pid)["uprobes"].can is True


def test_who_has_our_proxy_is_told_apart_by_trust() -> None:
    with running(PYTHON, HTTPS_PROXY=PROXY, SSL_CERT_FILE=str(CA / "ca-bundle.pem")) as pid:
        assert found(pid)["proxy"].can is True
    with running(PYTHON, HTTPS_PROXY=PROXY) as pid:
        told = found(pid)["proxy"]
    assert (told.can, told.next) == (None, "halton-meter init, then restart the program")
    with running(PYTHON, HTTPS_PROXY="http://who:secret@proxy.example.com:3128") as pid:
        process, every = ways(pid, PROXY, CA)
    said = "\n".join(lines(process, every))
    assert "it has another proxy" in said
    assert "secret" not in said


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
def test_node_is_told_by_its_option() -> None:
    node = ["node", "-e", "console.log('ready'); process.stdin.on('data', () => {})"]
    with running(node) as pid:
        told = found(pid)
    assert told["key log"].why == "Node writes keys with --tls-keylog=FILE"
    assert told["uprobes"].can is True
    with running(node, NODE_OPTIONS="--tls-keylog=/dev/null") as pid:
        assert found(pid)["key log"].can is True


@pytest.mark.skipif(GO is None, reason="needs Go")
def test_go_is_found_by_its_code_and_writes_no_keys_by_itself(tmp_path: Path) -> None:
    source = tmp_path / "client.go"
    source.write_text(GO_SOURCE)
    with running([str(go_program(source, ["-ldflags=-s -w"]))]) as pid:
        told = found(pid)
    assert told["uprobes"].can is True
    assert told["uprobes"].why.startswith("found Go crypto/tls in /")
    assert told["key log"].can is False
    assert "only where the program sets KeyLogWriter" in told["key log"].why


def test_what_is_refused_is_told_with_the_reason(tmp_path: Path) -> None:
    """A program with TLS that nobody knows: the markers of one, and no functions."""
    program = tmp_path / "client"
    program.write_bytes(Path(sys.executable).resolve().read_bytes())
    with program.open("ab") as file:
        file.write(bytes(1 << 20) + b"N5Botan3TLS6ClientE\0")
    program.chmod(0o755)
    code = "print('ready', flush=True); input()"
    home = {"PYTHONHOME": sys.base_prefix}
    with running([str(program), "-S", "-c", code], **home) as pid:
        told = found(pid)
    assert told["uprobes"].can is False
    assert told["uprobes"].why.startswith("refused: Botan in ")
    assert told["uprobes"].next == "halton-meter run --via proxy -- CMD"


def test_a_machine_without_probes_is_named_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    from halton_meter.problem import Problem

    problem = Problem("the kernel is in lockdown", "see docs")
    monkeypatch.setattr("capture.environment.check_environment", lambda: [problem])
    with running(PYTHON) as pid:
        told = found(pid)["uprobes"]
    assert (told.can, told.why, told.next) == (
        False,
        "this machine cannot: the kernel is in lockdown",
        "see docs",
    )


def test_a_process_that_is_gone_is_an_error() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(Unavailable, match=f"there is no process {process.pid}"):
        ways(process.pid, PROXY, CA)


@pytest.mark.parametrize(
    ("root", "uid", "what", "fix"),
    [
        (False, 7, "whose programs you may not look into", "sudo -u ann halton-meter"),
        (False, 0, "whose programs you may not look into", "su -c 'halton-meter"),
        (True, 0, "and the system does not let even root look into it", "name another process"),
    ],
)
def test_what_may_not_be_looked_into_is_told_with_who_may(
    monkeypatch: pytest.MonkeyPatch, root: bool, uid: int, what: str, fix: str
) -> None:
    monkeypatch.setattr("halton_meter.cli.doctor_process._environment", lambda pid: None)
    monkeypatch.setattr("halton_meter.cli.doctor_process.is_root", lambda: root)
    monkeypatch.setattr(
        "capture.processes.proc.read_process", lambda pid: Process(pid, 1, user="ann", uid=uid)
    )
    with pytest.raises(Unavailable) as raised:
        ways(os.getpid(), PROXY, CA)
    problem = raised.value.problems[0]
    assert problem.what.endswith(what)
    assert problem.fix.startswith(fix)


def test_another_users_process_is_named_with_whom_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halton_meter.cli.doctor_process.is_root", lambda: False)
    monkeypatch.setattr("halton_meter.cli.doctor_process._environment", lambda pid: None)
    monkeypatch.setattr(
        "capture.processes.proc.read_process", lambda pid: Process(pid, 1, user="ann", uid=7)
    )
    with pytest.raises(Unavailable) as raised:
        ways(os.getpid(), PROXY, CA)
    problem = raised.value.problems[0]
    assert problem.what == f"process {os.getpid()} is ann's, whose programs you may not look into"
    assert problem.fix == f"sudo -u ann halton-meter doctor --pid {os.getpid()}"


def test_the_command_says_a_line_and_a_command_of_each_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path))
    with running(PYTHON) as pid:
        done = CliRunner().invoke(main, ["doctor", "--pid", str(pid)])
        told = json.loads(CliRunner().invoke(main, ["doctor", "--pid", str(pid), "--json"]).output)
    said = done.output.splitlines()
    assert done.exit_code == 0
    assert said[0].startswith(f"process {pid}: /")
    assert [line[:10] for line in said[1::2]] == ["✓ uprobes:", "- key log:", "- proxy: i"]
    assert all(line.startswith("    next: ") for line in said[2::2])
    assert [each["way"] for each in told["ways"]] == ["uprobes", "key log", "proxy"]
    wrong = CliRunner().invoke(main, ["doctor", "--pid", "1", "--fix"])
    assert wrong.exit_code == 2
