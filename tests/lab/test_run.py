"""`halton-meter run`: the command is untouched, and what it cost is told at its end."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.lab.conftest import (
    CLIENTS,
    HALTON_METER,
    Service,
    assert_metered,
    stored_events,
)
from tests.lab.test_clients import anthropic_body, curl
from tests.support.lab.lab import Lab
from tests.support.lab.scenario import Scenario
from tests.support.quick import slow
from tests.support.waiting import wait_until

pytestmark = pytest.mark.lab


@pytest.fixture
def home(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home for state that no service writes to."""
    folder = lab.user.home / tmp_path_factory.mktemp("run").name
    folder.mkdir()
    os.chown(folder, lab.user.uid, lab.user.gid)
    return folder


def as_sudo(lab: Lab, home: Path, **extra: str) -> dict[str, str]:
    """The environment as sudo would leave it for the lab's user."""
    user = lab.user
    return lab.environment(
        SUDO_UID=str(user.uid),
        SUDO_GID=str(user.gid),
        SUDO_USER=user.name,
        HALTON_METER_HOME=str(home),
        **extra,
    )


def run(lab: Lab, home: Path, *command: str, options: Sequence[str] = (), **kw: Any) -> Any:
    """`sudo halton-meter run … -- command`."""
    argv = [*HALTON_METER, "run", *options, "--", *command]
    return lab.run(argv, env=as_sudo(lab, home), **kw)


def test_output_input_and_exit_code_are_the_commands_own(lab: Lab, home: Path) -> None:
    script = "cat; echo error >&2; exit 37"
    done = run(lab, home, "sh", "-c", script, input_text="typed\n")
    assert (done.returncode, done.stdout) == (37, "typed\n")
    first, *summary = done.stderr.splitlines()
    assert first == "error"
    assert summary == [
        "halton-meter: 0 requests, 0 tokens in, 0 out, $0.0000 list price",
        "  coverage: no connection to a provider carried a request",
    ]


def test_the_command_runs_as_the_person(lab: Lab, home: Path) -> None:
    done = run(lab, home, "sh", "-c", "id -u; id -G; echo $HOME $USER; env | grep -c ^SUDO_")
    assert done.stdout.splitlines() == [
        str(lab.user.uid),
        str(lab.user.gid),
        f"{lab.user.home} {lab.user.name}",
        "0",
    ]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("sh", "-c", "kill -TERM $$"), 143),
        slow(("sh", "-c", "kill -KILL $$"), 137),
        (("no-such-command-here",), 127),
        slow(("/etc/hosts",), 126),
    ],
)
def test_ends_that_are_no_exit(lab: Lab, home: Path, command: tuple[str, ...], code: int) -> None:
    assert run(lab, home, *command).returncode == code


@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGINT), slow(signal.SIGHUP)])
def test_a_signal_sent_to_run_reaches_the_command(lab: Lab, home: Path, number: int) -> None:
    mark = home / "begun"
    script = f"trap 'exit 9' TERM INT HUP; echo x > {mark}; while :; do sleep 0.05; done"
    process = lab.popen([*HALTON_METER, "run", "--", "sh", "-c", script], env=as_sudo(lab, home))
    wait_until(mark.exists, "the command's start")
    process.send_signal(number)
    assert process.wait(120) == 9


def test_a_ctrl_c_at_the_terminal_is_given_to_the_command_once(lab: Lab, home: Path) -> None:
    mark = home / "begun"
    script = (
        f"import signal, time, pathlib\nseen = []\n"
        f"signal.signal(2, lambda *_: seen.append(1))\n"
        f"pathlib.Path({str(mark)!r}).write_text('x')\n"
        f"end = time.monotonic() + 60\n"
        f"while not seen and time.monotonic() < end: time.sleep(0.05)\n"
        f"time.sleep(0.5)\n"  # in which a second one would come
        f"raise SystemExit(40 + len(seen))"
    )
    leader, follower = os.openpty()
    process = lab.popen(
        ["setsid", "--ctty", "--wait", *HALTON_METER, "run", "--", "python3", "-c", script],
        env=as_sudo(lab, home),
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    wait_until(mark.exists, "the command's start")
    os.write(leader, b"\x03")
    assert process.wait(120) == 41
    os.close(leader)


def test_what_it_cost(lab: Lab, home: Path, python: str, project: Path) -> None:
    skip = len(lab.ledger())
    summary = home / "summary.json"
    argv = [python, str(CLIENTS / "sdk.py"), "openai", "sync,async-stream", "1", "10"]
    done = run(lab, home, *argv, options=["--json-summary", str(summary)], cwd=project)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 20
    served = lab.ledger()[skip:]
    events = stored_events(lab, home)
    assert_metered(served, events)
    told = json.loads(summary.read_text())
    assert summary.stat().st_uid == lab.user.uid
    assert told["requests"] == 20
    sent = sum(e["tokens"]["input"] + e["tokens"]["cache_read"] for e in served)
    assert told["input_tokens"] == sent
    assert told["output_tokens"] == sum(e["tokens"]["output"] for e in served)
    # A busy machine may probe a process late; what passed before was nothing, as counted above.
    assert told["losses"].keys() <= {"processes_ahead_of_probes"}
    assert "halton-meter: 20 requests" in done.stderr
    assert {event["project"] for event in events} == {"acme"}


def test_only_its_own_tree_is_metered(lab: Lab, home: Path) -> None:
    mark = home / "begun"
    script = f"echo x > {mark}; sleep 1.5; {shell(curl())} -d '{anthropic_body(1)}'"
    process = lab.popen([*HALTON_METER, "run", "--", "sh", "-c", script], env=as_sudo(lab, home))
    wait_until(mark.exists, "the command's start")
    other = lab.run([*curl(), "-d", anthropic_body(2)], user=lab.user)
    assert other.returncode == 0
    assert process.wait(120) == 0
    (event,) = stored_events(lab, home)
    assert event["tokens"]["input"] == 101


def shell(argv: Sequence[str]) -> str:
    """A command line for sh."""
    import shlex

    return shlex.join(argv)


def test_children_of_children_are_metered(lab: Lab, home: Path) -> None:
    inner = f"{shell(curl())} -d '{anthropic_body(4)}'"
    done = run(lab, home, "sh", "-c", f"sh -c \"setsid sh -c '{quoted(inner)}'\"; true")
    assert done.returncode == 0
    assert "halton-meter: 1 request," in done.stderr


def quoted(text: str) -> str:
    """`text` for use inside double quotes inside of which it is in single quotes."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("'", "'\\''")


@pytest.fixture
def served_home(service: Service) -> Path:
    """The home that the running service writes to."""
    return service.home


def test_with_the_service_running_no_root_is_needed(
    lab: Lab, served_home: Path, service: Service
) -> None:
    command = [*HALTON_METER, "run", "--", *curl(), "-d", anthropic_body(6)]
    environment = lab.environment(HALTON_METER_HOME=str(served_home))
    done = lab.run(command, user=lab.user, env=environment)
    assert done.returncode == 0, done.stderr
    asked = Scenario(n=6)
    sent = asked.fresh + asked.cached + asked.cache_written
    told = f"halton-meter: 1 request, {sent} tokens in, {asked.output} out"
    assert told in done.stderr


def test_a_child_that_became_a_daemon_is_of_the_run(
    lab: Lab, served_home: Path, service: Service
) -> None:
    """It is init's child when it talks; the command only waits for its mark."""
    folder = lab.user.home / "becomes-a-daemon"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    talk, mark = folder / "talk.sh", folder / "done"
    talk.write_text(f"sleep 0.3; {shell(curl())} -d '{anthropic_body(7)}'; touch {mark}\n")
    script = f"(setsid nohup sh {talk} >/dev/null 2>&1 &)\n"
    script += f"for i in $(seq 200); do [ -e {mark} ] && exit; sleep 0.1; done; exit 1"
    environment = lab.environment(HALTON_METER_HOME=str(served_home))
    command = [*HALTON_METER, "run", "--", "sh", "-c", script]
    done = lab.run(command, user=lab.user, env=environment)
    assert done.returncode == 0, done.stderr
    assert "halton-meter: 1 request," in done.stderr


def test_what_outlives_the_command_is_named(lab: Lab, home: Path) -> None:
    """The subshell runs no program of its own: the kernel knows it by its fork alone."""
    summary = home / "summary.json"
    begun = 'until [ "$(ps -o comm= --ppid $!)" = sleep ]; do :; done'  # before, it is a bash
    script = f"(sleep 20; :) >/dev/null 2>&1 & {begun}; exit 3"
    options = ("--json-summary", str(summary))
    done = run(lab, home, "bash", "-c", script, options=options)
    assert done.returncode == 3
    said = "2 processes of the command still run and are no longer metered: bash, sleep. "
    assert f"{said}Use: sudo halton-meter start" in done.stderr
    assert json.loads(summary.read_text())["still_running"] == ["bash", "sleep"]


@pytest.mark.parametrize("via", ["uprobes", slow("proxy")])
def test_what_the_command_does_as_another_user_is_said(lab: Lab, home: Path, via: str) -> None:
    """As under sudo: the kernel tells nothing of it, and the proxy serves its owner alone."""
    become = lab.folder / "become"
    shutil.copy("/usr/bin/setpriv", become)
    become.chmod(0o4755)
    argv = [str(become), f"--reuid={lab.other.uid}", f"--regid={lab.other.gid}", "--clear-groups"]
    argv += ["env", f"CURL_CA_BUNDLE={lab.folder}/ca.pem", *curl(), "-d", anthropic_body(6)]
    options = ["--via", via]
    if via == "uprobes":
        done = run(lab, home, *argv, options=options)
        assert done.returncode == 0, done.stderr
        said = "2 programs of the command ran as another user: not metered."  # env and curl
    else:
        environment = lab.environment(HALTON_METER_HOME=str(home))
        command = [*HALTON_METER, "run", *options, "--", *argv]
        done = lab.run(command, user=lab.user, env=environment)
        said = "1 connection of another user's program refused by the proxy"
    assert "no request was metered; what the command spent is not known" in done.stderr
    assert said in done.stderr
    assert "Use: sudo halton-meter start --user NAME" in done.stderr


def test_without_root_and_service_uprobes_say_what_to_do(lab: Lab, home: Path) -> None:
    command = [*HALTON_METER, "run", "--via", "uprobes", "--", "touch", str(home / "ran")]
    environment = lab.environment(HALTON_METER_HOME=str(home))
    done = lab.run(command, user=lab.user, env=environment)
    assert done.returncode == 1
    assert "sudo halton-meter run" in done.stderr
    assert not (home / "ran").exists()


def test_without_root_and_service_auto_goes_through_the_proxy(lab: Lab, home: Path) -> None:
    command = [*HALTON_METER, "run", "--", *curl(), "-d", anthropic_body(6)]
    environment = lab.environment(HALTON_METER_HOME=str(home))
    done = lab.run(command, user=lab.user, env=environment)
    assert done.returncode == 0, done.stderr
    assert "not root and no service running: using a local proxy" in done.stderr
    assert "sudo halton-meter start" in done.stderr
    asked = Scenario(n=6)
    sent = asked.fresh + asked.cached + asked.cache_written
    assert f"halton-meter: 1 request, {sent} tokens in, {asked.output} out" in done.stderr
    (event,) = stored_events(lab, home)
    assert event["source"] == "proxy"


def test_a_root_without_its_capabilities_is_told_which(lab: Lab, home: Path) -> None:
    """As in a container: root by name, with no right to load BPF."""
    dropped = "-sys_admin,-bpf,-perfmon"
    argv = ["setpriv", f"--bounding-set={dropped}", f"--inh-caps={dropped}"]
    command = [*argv, *HALTON_METER, "run", "--", "touch", str(home / "ran")]
    done = lab.run(command, env=as_sudo(lab, home))
    assert done.returncode == 1
    assert "this root lacks SYS_ADMIN" in done.stderr
    assert "--cap-add SYS_ADMIN" in done.stderr
    assert "halton-meter run --via proxy" in done.stderr
    assert not (home / "ran").exists()


def test_a_bad_configuration_is_said_and_the_command_runs(lab: Lab, home: Path) -> None:
    (home / "config.toml").write_text("\nall_user = true\n")
    done = run(lab, home, "touch", str(home / "ran"))
    assert done.returncode == 0
    assert "config.toml:2: unknown setting" in done.stderr
    (home / "config.toml").write_text("loader = 3\n")
    again = run(lab, home, "true")
    assert "not 3; this run goes on without it" in again.stderr
    assert "all_users" in done.stderr
    assert (home / "ran").exists()


@pytest.mark.parametrize("victim", ["capture.helper.main", slow("halton_meter.live.probes.worker")])
def test_when_ours_dies_the_command_goes_on_and_all_of_it_is_metered(
    lab: Lab, home: Path, victim: str
) -> None:
    stop = home / "stop"
    one = f"{shell(curl())} -o /dev/null -w '%{{http_code}}\\n' -d '{anthropic_body(1)}'"
    script = f"{one}; while [ ! -e {stop} ]; do sleep 0.5; {one}; done"
    command = [*HALTON_METER, "run", "--", "sh", "-c", script]
    process = lab.popen(command, env=as_sudo(lab, home), stdout=-1, stderr=-1, text=True)

    def stored() -> int:
        return len(stored_events(lab, home, missing_ok=True))

    wait_until(stored, "the first request")
    os.kill(child_running(process.pid, victim), signal.SIGKILL)
    before = stored()
    wait_until(lambda: stored() > before + 1, "requests metered after the restart")
    stop.touch()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert set(out.split()) == {"200"}
    assert f"{len(out.split())} requests" in err
    assert "not metered" not in err
    assert f"halton-meter: {stored()} requests" in err
    assert stored() <= len(out.split())


def child_running(pid: int, module: str) -> int:
    """The process below `pid` whose command line names `module`."""
    return wait_until(lambda: _descendant(pid, module), f"a process that runs {module}")


def _descendant(pid: int, module: str) -> int | None:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    for child in map(int, children.read_text().split()):
        line = Path(f"/proc/{child}/cmdline").read_bytes().decode()
        if module in line:
            return child
        if found := _descendant(child, module):
            return found
    return None
