"""What runs the tests: it counts what pytest printed, and finds every test of a group."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))
import run_tests  # noqa: E402

RUNNING = "bringing up nodes...\n\n..s.F... [ 46%]\n...E"
FAILED = """\
..F. [100%]
=================================== FAILURES ===================================
____ test_one ____
E   assert False
_ _ _ _ _
_ ERROR at teardown of test_two _
E       OSError: busy
=========================== short test summary info ============================
SKIPPED [1] tests/x.py:18: no recorded exchanges beside the checkout
1 failed, 1,234 passed, 1 skipped, 3 deselected in 1.20s
"""


def test_progress_is_counted_from_the_marks() -> None:
    assert run_tests.outcomes(RUNNING) == {"passed": 9, "failed": 2, "skipped": 1}


def test_the_end_is_counted_from_the_summary() -> None:
    log = FAILED.replace("1,234", "1234")
    assert run_tests.outcomes(log) == {"passed": 1234, "failed": 1, "skipped": 1}


def test_what_is_shown_of_a_failed_group_begins_with_its_failures() -> None:
    assert run_tests.failure(FAILED)[1] == "____ test_one ____"
    assert run_tests.failed_tests(FAILED) == [
        ("test_one", "assert False"),
        ("ERROR at teardown of test_two", "OSError: busy"),
    ]
    assert run_tests.failure("mypy: no\nsuch file\n") == ["mypy: no", "such file"]


@pytest.mark.slow
@pytest.mark.parametrize("marker", ["kernel", "lab"])
def test_no_test_of_a_marker_is_outside_its_groups_files(marker: str) -> None:
    """Each group collects its own files only: what pytest finds in all of tests/ must be there."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", "tests"]
    listed = subprocess.run(
        [*command, "-m", marker], cwd=ROOT, capture_output=True, text=True, check=False
    )
    found = set(re.findall(r"^(tests/[^:]+\.py)", listed.stdout, re.M))
    assert found
    files = run_tests.files_marked(marker)
    assert {each for each in found if not each.startswith(files[0])} <= set(files[1:])


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "bench").glob("*_bench.py")))
def test_every_benchmark_has_a_toy_size(name: str) -> None:
    main = importlib.import_module(f"bench.{name}").main
    assert list(inspect.signature(main).parameters) == ["toy"]
