"""`halton-meter run` of a program that nobody ran before: exact from its first request on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab.conftest import HALTON_METER, assert_metered, stored_events
from tests.lab.real_clients.programs import BUN, Program
from tests.lab.real_clients.test_metered import script_beside
from tests.lab.test_run import as_sudo
from tests.support.lab.lab import Lab

pytestmark = pytest.mark.lab

ATTEMPTS = 5


def test_a_run_waits_until_its_program_has_been_searched(
    lab: Lab, installed: Callable[[Program], Path]
) -> None:
    """It waits some seconds: where that was not enough for a busy machine, another copy is run."""
    original = installed(BUN[-1])
    for attempt in range(ATTEMPTS):
        program = never_run(original, f"{attempt}")
        home = lab.user.home / f"run-of-bun-{attempt}"
        home.mkdir()
        os.chown(home, lab.user.uid, lab.user.gid)
        skip = len(lab.ledger())
        summary = home / "summary.json"
        argv = [*HALTON_METER, "run", "--json-summary", str(summary), "--", str(program)]
        environment = as_sudo(lab, home)
        done = lab.run([*argv, str(script_beside(original)), "1", "3"], env=environment)
        assert done.stdout.split() == ["200"] * 3, done.stderr
        assert json.loads(summary.read_text())
        events = stored_events(lab, home, missing_ok=True)
        if events:
            assert_metered(lab.ledger()[skip:], events)
            return
    pytest.fail(f"none of {ATTEMPTS} runs waited long enough")


def never_run(original: Path, mark: str) -> Path:
    """A copy that is another program to whoever searches it: bytes after the end make it so."""
    program = original.with_name(f"never-run-{mark}")
    program.write_bytes(original.read_bytes() + f"never run {mark}".encode())
    program.chmod(0o755)
    return program
