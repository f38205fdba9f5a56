"""`halton-meter run` of a program that nobody ran before: exact from its first request on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from capture.helper.files.known_files import file_name
from capture.helper_process import KNOWN_FILES_DIRECTORY
from tests.lab.conftest import HALTON_METER, Bench, assert_metered, stored_events
from tests.lab.real_clients.programs import BUN, Program
from tests.lab.real_clients.test_metered import script_beside
from tests.lab.test_run import as_sudo
from tests.support.lab.lab import Lab
from tests.support.quick import first
from tests.support.waiting import wait_until

pytestmark = pytest.mark.lab

ATTEMPTS = 5


WRAPPERS = {
    "timeout": ("timeout", "100"),
    "shell": ("bash", "-c", '"$0" "$@"; true'),
    "hidden": ("python3", "-c", "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"),
}
"""What a run sees through, and, last, what it does not: there the program is held at its exec."""


@pytest.mark.parametrize("wrapper", first(["hidden", "timeout", "shell", "direct"]))
def test_a_program_that_was_never_run_is_metered_from_its_first_request_on(
    lab: Lab, installed: Callable[[Program], Path], wrapper: str
) -> None:
    """It is waited for some seconds: where a busy machine needs more, another copy is run."""
    original = installed(BUN[-1])
    for attempt in range(ATTEMPTS):
        program = never_run(original, f"{wrapper}-{attempt}")
        home = lab.user.home / f"run-of-bun-{wrapper}-{attempt}"
        home.mkdir()
        os.chown(home, lab.user.uid, lab.user.gid)
        skip = len(lab.ledger())
        summary = home / "summary.json"
        words = [*WRAPPERS.get(wrapper, ()), str(program), str(script_beside(original)), "1", "3"]
        argv = [*HALTON_METER, "run", "--via", "uprobes", "--json-summary", str(summary)]
        done = lab.run([*argv, "--", *words], env=as_sudo(lab, home))
        assert done.stdout.split() == ["200"] * 3, done.stderr
        events = stored_events(lab, home, missing_ok=True)
        program.unlink()
        if len(events) == 3:
            assert_metered(lab.ledger()[skip:], events)
            losses = json.loads(summary.read_text())["losses"]
            assert losses.keys() <= {"processes_ahead_of_probes"}  # late, yet before the first byte
            return
        assert "metered" in done.stderr, "what is missed is told"
    pytest.fail(f"none of {ATTEMPTS} runs waited long enough")


@pytest.mark.slow
def test_a_search_is_finished_and_kept_behind_its_run(
    lab: Lab, installed: Callable[[Program], Path]
) -> None:
    """Of a program that is killed as soon as it has begun."""
    program = never_run(installed(BUN[-1]), "killed")
    home = lab.user.home / "run-of-killed"
    home.mkdir()
    os.chown(home, lab.user.uid, lab.user.gid)
    kill = "import subprocess, sys; it = subprocess.Popen(sys.argv[1:]); it.kill(); it.wait()"
    argv = [*HALTON_METER, "run", "--via", "uprobes", "--", "python3", "-c", kill, str(program)]
    done = lab.run(argv, env=as_sudo(lab, home))
    assert done.returncode == 0, done.stderr
    kept = f"{KNOWN_FILES_DIRECTORY}/0/{file_name(program.stat())}"
    wait_until(lambda: lab.run(["test", "-e", kept]).returncode == 0, "what the search found")
    program.unlink()


@pytest.mark.slow
def test_the_service_searches_what_a_run_is_about_to_start(
    bench: Bench, installed: Callable[[Program], Path]
) -> None:
    """Where it may hold nothing, as under systemd, that is what the first request needs."""
    original = installed(BUN[-1])
    script = str(script_beside(original))
    for attempt in range(ATTEMPTS):
        program = never_run(original, f"service-{attempt}")
        argv = [*HALTON_METER, "run", "--via", "uprobes", "--", "timeout", "100", str(program)]
        home = str(bench.service.home)
        environment = bench.lab.environment(HALTON_METER_HOME=home)
        seen = bench.observe([*argv, script, "1", "3"], env=environment)
        program.unlink()
        if len(seen.events) == 3:
            assert_metered(seen.served, seen.events)
            return
    pytest.fail(f"none of {ATTEMPTS} runs waited long enough")


@pytest.mark.slow
@pytest.mark.parametrize("redact", [False, True])
def test_a_program_that_writes_no_keys_is_recorded_by_uprobes(
    lab: Lab, installed: Callable[[Program], Path], redact: bool
) -> None:
    program = installed(BUN[-1])
    home = lab.user.home / f"record-of-bun-{redact}"
    home.mkdir()
    os.chown(home, lab.user.uid, lab.user.gid)
    file = home / "recorded.pcapng"
    skip = len(lab.ledger())
    options = ["--via", "uprobes", *(["--redact"] if redact else [])]
    words = [str(program), str(script_beside(program)), "1", "3"]
    argv = [*HALTON_METER, "record", str(file), *options, "--", *words]
    done = lab.run(argv, env=as_sudo(lab, home))
    assert done.stdout.split() == ["200"] * 3, done.stderr
    replay = [*HALTON_METER, "replay", "--json", str(file)]
    said = lab.run(replay, env=as_sudo(lab, home))
    events = [json.loads(line) for line in said.stdout.splitlines()]
    served = [entry["tokens"] for entry in lab.ledger()[skip:]]
    assert len(events) == len(served) == 3, done.stderr + said.stderr
    wanted = sorted((each["input"], each["output"]) for each in served)
    assert sorted((e["tokens"]["input"], e["tokens"]["output"]) for e in events) == wanted


def never_run(original: Path, mark: str) -> Path:
    """A copy that is another program to whoever searches it: bytes after the end make it so."""
    program = original.with_name(f"never-run-{mark}")
    program.write_bytes(original.read_bytes() + f"never run {mark}".encode())
    program.chmod(0o755)
    return program
