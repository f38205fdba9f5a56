"""Run the tests in groups that do not compete: `make test`, `make test-all`.

    python tools/run_tests.py [--all | --slow] [--random SEED] [GROUP …] [-- PYTEST-OPTION …]

The groups (lint, unit, kernel, lab) run side by side: lint and unit compute, kernel and lab mostly
wait for programs that they start, so they get the processor first. Each group's output goes to
.cache/tests/GROUP.log; what failed is shown at the end, then one table, and below it a line for
each test that failed. Tests marked `slow` are
left out and properties get fewer examples; with --all everything runs, with --slow only
what is left out otherwise. Exit code: 0 if all groups passed, 1 if a test failed, 130 when it was
interrupted before one did.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / ".cache" / "tests"
PROGRESS_S = 30.0
END_S = 30.0
FAILURE_LINES_MAX = 300
ERROR_CHARACTERS_MAX = 1000
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
NO_TESTS = 5  # pytest's exit code
BIN = Path(sys.executable).parent


@dataclass(slots=True)
class Group:
    """Commands that run one after the other, and how the group fared."""

    name: str
    commands: list[list[str]]
    niceness: int = 0
    may_be_empty: bool = False
    process: subprocess.Popen[bytes] | None = None
    exit_codes: list[int] = field(default_factory=list)
    started: float = 0.0
    wall_s: float = 0.0
    cpu_s: float = 0.0

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return LOGS / f"{self.name}.log"

    @property
    def is_done(self) -> bool:
        """Whether nothing of it runs or will."""
        return len(self.exit_codes) == len(self.commands)

    @property
    def failed(self) -> bool:
        """Whether a command of it failed, or ran no test where there must be some."""
        fine = (0, NO_TESTS) if self.may_be_empty else (0,)
        failed = any(code not in fine for code in self.exit_codes)
        return failed or self.counts()["failed"] > 0

    def start_next(self, environment: dict[str, str]) -> None:
        """Start its next command; the log is emptied before the first."""
        self.started = self.started or time.monotonic()
        command = ["nice", "-n", str(self.niceness), *self.commands[len(self.exit_codes)]]
        with self.log.open("ab" if self.exit_codes else "wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=ROOT,
                start_new_session=True,
            )

    def look(self, environment: dict[str, str]) -> None:
        """Take note of a command that has ended, and start the next."""
        assert self.process is not None
        pid, status, used = os.wait4(self.process.pid, os.WNOHANG)
        if not pid:
            return
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.exit_codes.append(self.process.returncode)
        self.cpu_s += used.ru_utime + used.ru_stime
        self.wall_s = time.monotonic() - self.started
        self.process = None
        if not self.is_done:
            self.start_next(environment)

    def interrupt(self) -> None:
        """End what runs of it as Control-C would."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGINT)

    def wait(self) -> None:
        """Return when it has ended; it is killed if that takes long."""
        if self.process is None:
            return
        self.wall_s = time.monotonic() - self.started
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def counts(self) -> dict[str, int]:
        """How many tests passed, failed and were skipped so far."""
        return outcomes(self.log.read_text(errors="replace"))


_MARKS = {".": "passed", "F": "failed", "E": "failed", "s": "skipped"}
_PROGRESS = re.compile(r"^([.FEsxX]+)(?:\s*\[\s*\d+%\])?$", re.M)
_SUMMARY = re.compile(r"^(?:\d+ \w+(?:, )?)+ in [\d.]+s", re.M)


def outcomes(log: str) -> dict[str, int]:
    """What pytest's output tells: its summary, or the marks that it has printed until now."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    if summary := _SUMMARY.search(log):
        for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", summary[0]):
            counts["failed" if word == "error" else word] += int(count)
        return counts
    for marks in _PROGRESS.findall(log):
        for mark in marks:
            if mark in _MARKS:
                counts[_MARKS[mark]] += 1
    return counts


def files_marked(marker: str) -> list[str]:
    """The test files with tests of a marker; only they are collected for its group."""
    wanted = f"pytest.mark.{marker}"
    files = sorted((ROOT / "tests").glob("**/*.py"))
    named = [str(each.relative_to(ROOT)) for each in files if wanted in each.read_text()]
    folder = f"tests/{marker}/"
    return [folder, *(each for each in named if not each.startswith(folder))]


# What is run: the part of pytest's marker expression, and tests/conftest.py's profile.
MODES = {"quick": (" and not slow", "quick"), "all": ("", "full"), "slow": (" and slow", "full")}


def groups(mode: str, options: Sequence[str] = ()) -> list[Group]:
    """All groups; `options` are pytest's."""
    quick, _ = MODES[mode]
    pytest = [*PYTEST, *options]
    # Of a machine with two cores: one more than it has, as some tests wait.
    unit = [*pytest, "--ignore=tests/kernel", "--ignore=tests/lab"]
    kernel, lab = files_marked("kernel"), files_marked("lab")
    return [
        Group("lab", [[*pytest, "-n", "4", "--dist=loadfile", "-m",
                       f"lab and not kernel{quick}", *lab]]),
        Group("kernel", [[*pytest, "-n", "3", "-m", f"kernel{quick}", *kernel]]),
        Group("lint", [
            [str(BIN / "ruff"), "check", "."],
            [str(BIN / "ruff"), "format", "--check", "."],
            [str(BIN / "mypy")],
            [str(BIN / "lint-imports")],
        ], niceness=5),
        # Collected once alone: then the workers find the tests compiled.
        Group("unit", [
            [*unit, "--collect-only", "-qq", "tests"],
            [*unit, "-n", "3", "-m", f"not kernel and not lab{quick}", "tests"],
        ], niceness=5),
    ]  # fmt: skip


def run(wanted: list[Group], environment: dict[str, str]) -> None:
    """Run all of them at once; print now and then how far they are."""
    LOGS.mkdir(parents=True, exist_ok=True)
    started = said = time.monotonic()
    for group in wanted:
        group.start_next(environment)
    try:
        while running := [group for group in wanted if not group.is_done]:
            time.sleep(0.2)
            for group in running:
                group.look(environment)
                if group.is_done:
                    print(f"{_clock(started)}  {_state(group)}", flush=True)
            if time.monotonic() > said + PROGRESS_S:
                said = time.monotonic()
                line = "; ".join(_state(group) for group in wanted if not group.is_done)
                print(f"{_clock(started)}  {line}", flush=True)
    finally:
        for group in wanted:
            group.interrupt()
        for group in wanted:
            group.wait()


def _clock(started: float) -> str:
    minutes, seconds = divmod(int(time.monotonic() - started), 60)
    return f"{minutes:2}:{seconds:02}"


def _state(group: Group) -> str:
    counts = group.counts()
    ended = (" FAILED" if group.failed else " passed") if group.is_done else ""
    if not any(counts.values()):
        return f"{group.name}{ended or ' runs'}"
    failed = f", {counts['failed']} failed" if counts["failed"] else ""
    return f"{group.name}{ended} ({counts['passed']:,} passed{failed})"


def show(ran: Iterable[Group]) -> None:
    """What failed and what was skipped, then one table."""
    for group in ran:
        if group.failed:
            print(f"\n==== {group.name} failed; all of its output: {group.log.relative_to(ROOT)}")
            print("\n".join(failure(group.log.read_text(errors="replace"))))
    for group in ran:
        for line in re.findall(r"^SKIPPED .*", group.log.read_text(errors="replace"), re.M):
            print(f"{group.name}: {line}")
    print(f"\n{'group':8} {'passed':>7} {'failed':>7} {'skipped':>8} {'wall s':>8} {'CPU s':>8}")
    for group in ran:
        counts = group.counts()
        numbers = f"{counts['passed']:7,} {counts['failed']:7,} {counts['skipped']:8,}"
        print(f"{group.name:8} {numbers} {group.wall_s:8.0f} {group.cpu_s:8.0f}"
              f"{'  FAILED' if group.failed else ''}")  # fmt: skip
    for group in ran:
        for name, error in failed_tests(group.log.read_text(errors="replace")):
            print(f"{group.name}: {name}: {error}")


def failed_tests(log: str) -> list[tuple[str, str]]:
    """The name of each test that failed, and how its error begins."""
    found: list[tuple[str, str]] = []
    name = ""
    for line in failure(log, len(log)):
        if head := re.fullmatch(r"_+ ([^_ ].*?) _+", line):
            name = head[1]
        elif name and (error := re.match(r"E +(.+)", line)):
            found.append((name, error[1][:ERROR_CHARACTERS_MAX]))
            name = ""
    return found


def failure(log: str, lines_max: int = FAILURE_LINES_MAX) -> list[str]:
    """The part of a log that tells what failed: pytest's failures on, or the end."""
    lines = log.splitlines()
    heads = [at for at, line in enumerate(lines) if re.match(r"=+ (FAILURES|ERRORS) =+", line)]
    return lines[heads[0] if heads else 0 :][-lines_max:]


def main() -> int:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--all", action="store_const", const="all", dest="mode", default="quick")
    modes.add_argument("--slow", action="store_const", const="slow", dest="mode")
    parser.add_argument("--random", metavar="SEED", help="shuffle the tests by this seed")
    parser.add_argument("names", nargs="*", metavar="GROUP")
    arguments, after = sys.argv[1:], []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, after = arguments[:at], arguments[at + 1 :]
    options = parser.parse_args(arguments)
    known = groups(options.mode, after)
    if unknown := set(options.names) - {group.name for group in known}:
        parser.error(f"no group {', '.join(unknown)}; there are {', '.join(g.name for g in known)}")
    wanted = [group for group in known if not options.names or group.name in options.names]
    for group in wanted:
        group.may_be_empty = options.mode == "slow"
    # `make test &` and `nohup make test` ignore these, and every test would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the groups end as well
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    # Hundreds of processes import the same files: they are compiled once.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment["HALTON_TESTS"] = MODES[options.mode][1]
    if options.random:
        environment["HALTON_TEST_ORDER"] = options.random
    ended = 0
    try:
        run(wanted, environment)
    except KeyboardInterrupt:
        ended = 130
    show(wanted)
    return 1 if any(group.failed for group in wanted) else ended


if __name__ == "__main__":
    raise SystemExit(main())
