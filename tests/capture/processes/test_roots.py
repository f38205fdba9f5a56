"""The root of a client's tree: what is one run of a program, and what is another's."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from capture.processes.proc import read_process
from capture.processes.roots import ANCESTORS_MAX, Ancestor, name_of_root, root_of
from tests.support.waiting import wait_until

PYTHON, NODE = "/usr/bin/python3.11", "/usr/bin/node"
BASH = Ancestor(10, 1, 1, "/bin/bash", ("-bash",))


def root(*chain: Ancestor) -> int:
    """The root of the first, whose ancestors the others are."""
    by_pid = {each.pid: each for each in chain}
    return root_of(chain[0], by_pid.get).pid


@pytest.mark.parametrize(
    ("below", "above", "expected"),
    [
        (("/x/claude", ["claude", "--worker"]), ("/x/claude", ["claude"]), 20),
        (("/x/claude", ["claude"]), ("/y/claude", ["claude"]), 30),
        ((PYTHON, ["python", "app.py", "w"]), (PYTHON, ["python", "-u", "app.py"]), 20),
        ((PYTHON, ["python", "agent.py"]), (PYTHON, ["python", "-m", "pytest"]), 30),
        ((PYTHON, ["python", "-c", "x", "--multiprocessing-fork"]), (PYTHON, ["python", "a"]), 20),
        ((NODE, ["node", "--max-old-space-size=1", "g.js"]), (NODE, ["node", "g.js"]), 20),
        ((NODE, ["node", "g.js"]), (NODE, ["node", "/usr/bin/npx", "g"]), 30),
        ((None, ["x"]), (None, ["x"]), 30),
    ],
)  # fmt: skip
def test_what_is_one_program(
    below: tuple[str | None, list[str]], above: tuple[str | None, list[str]], expected: int
) -> None:
    assert root(Ancestor(30, 9, 20, *below), Ancestor(20, 5, 10, *above), BASH) == expected


def test_a_later_process_with_the_parents_number_is_no_parent() -> None:
    reused = Ancestor(20, 50, 10, "/x/claude", ("claude",))
    assert root(Ancestor(30, 9, 20, "/x/claude", ("claude",)), reused, BASH) == 30


def test_a_circle_of_parents_ends() -> None:
    one = Ancestor(20, 5, 30, "/x/claude", ())
    other = Ancestor(30, 5, 20, "/x/claude", ())
    assert root(one, other) in (20, 30)
    assert ANCESTORS_MAX % 2 == 0


def test_a_name_has_the_pid_and_is_of_one_start_alone() -> None:
    names = {name_of_root(7, start, boot) for start in (1, 2) for boot in ("a", "b")}
    assert len(names) == 4
    assert all(name.startswith("7-") and len(name) == 10 for name in names)


def test_real_processes_of_two_clients_have_two_roots() -> None:
    """A worker of this very program has our root, a script that we start has its own."""
    ours = read_process(os.getpid())
    assert ours is not None
    scripts = [
        subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({60 + n})"])
        for n in (0, 1)
    ]
    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    worker.start()
    try:
        found = [read_process(each.pid) for each in scripts]
        assert all(each is not None and each.root is not None for each in found)
        roots = {each.root for each in found if each is not None}
        assert len(roots) == 2
        assert ours.root not in roots
        assert worker.pid is not None
        command_line = Path(f"/proc/{worker.pid}/cmdline")
        wait_until(lambda: b"--multiprocessing-fork" in command_line.read_bytes(), "its exec")
        child = read_process(worker.pid)
        assert child is not None
        assert child.root == ours.root
    finally:
        worker.kill()
        worker.join()
        for each in scripts:
            each.kill()
            each.wait()
