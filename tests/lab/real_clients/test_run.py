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
from tests.support.lab.lab import Lab

pytestmark = pytest.mark.lab


def test_a_run_waits_until_its_program_has_been_searched(
    lab: Lab, installed: Callable[[Program], Path]
) -> None:
    original = installed(BUN[-1])
    folder = lab.folder / "programs" / "never-run"
    folder.mkdir()
    program = folder / "bun"
    program.write_bytes(original.read_bytes() + b"never run")
    program.chmod(0o755)
    home = lab.user.home / "run-of-bun"
    home.mkdir()
    os.chown(home, lab.user.uid, lab.user.gid)
    owner = {"SUDO_UID": lab.user.uid, "SUDO_GID": lab.user.gid, "SUDO_USER": lab.user.name}
    environment = lab.environment(
        HALTON_METER_HOME=str(home), **{name: str(value) for name, value in owner.items()}
    )
    skip = len(lab.ledger())
    summary = home / "summary.json"
    argv = [*HALTON_METER, "run", "--json-summary", str(summary), "--"]
    done = lab.run([*argv, str(program), str(script_beside(original)), "1", "3"], env=environment)
    assert done.stdout.split() == ["200"] * 3, done.stderr
    assert_metered(lab.ledger()[skip:], stored_events(lab, home))
    assert json.loads(summary.read_text())
