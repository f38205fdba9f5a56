"""`init`'s choice between uprobes and the proxy, and what `uninstall --graceful` waits for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from halton_meter import accounts, installed
from halton_meter.cli import _for_init, init, init_uprobes, main, quiet, start
from halton_meter.problem import Problem
from proxy_fallback.setup.ledger import Ledger
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="uprobes are Linux's")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.setattr(init_uprobes, "obstacles", list)
    monkeypatch.setattr(init_uprobes, "become_root", lambda: "sudo")
    monkeypatch.setattr(init_uprobes, "runs_from_cache", lambda: False)
    monkeypatch.setattr("halton_meter.privileges.settle", lambda needs_root: None)
    return tmp_path / "data"


def user(monkeypatch: pytest.MonkeyPatch, *, is_root: bool) -> None:
    monkeypatch.setattr(accounts, "is_root", lambda: is_root)


def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True)


def run(*arguments: str, typed: str = "", code: int = 0) -> Result:
    done = CliRunner().invoke(main, ["init", *arguments], input=typed)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == code, done.output
    return done


class Started:
    """Stands in for the service and for sudo."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.probes: list[Any] = []
        self.commands: list[list[str]] = []
        monkeypatch.setattr(start, "start_probes", lambda **given: self.probes.append(given))
        monkeypatch.setattr(subprocess, "call", self._call)

    def _call(self, command: list[str]) -> int:
        self.commands.append(command)
        return 0


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    return Started(monkeypatch)


def test_root_starts_the_service(
    home: Path, monkeypatch: pytest.MonkeyPatch, started: Started
) -> None:
    user(monkeypatch, is_root=True)
    said = run("--non-interactive").stdout
    assert started.probes == [{"quiet": False}]
    assert "init complete: every program of" in said
    assert not home.exists(), "root makes nothing in the user's folder here"


def test_it_names_what_it_will_do_and_asks(
    home: Path, monkeypatch: pytest.MonkeyPatch, started: Started
) -> None:
    user(monkeypatch, is_root=True)
    terminal(monkeypatch)
    said = run(typed="n\n", code=1).output
    assert "init will, as root:" in said
    assert "change no program, shell file, certificate or proxy setting" in said
    assert "Undo it all: sudo halton-meter uninstall" in said
    assert started.probes == []
    run(typed="y\n")
    assert len(started.probes) == 1


def test_a_user_chooses_uprobes_through_sudo(
    home: Path, monkeypatch: pytest.MonkeyPatch, started: Started
) -> None:
    user(monkeypatch, is_root=False)
    terminal(monkeypatch)
    said = run(typed="\n\n").output
    assert "1. uprobes" in said
    assert "2. a local proxy, without root" in said
    assert "sudo may ask for your password" in said
    words = ["-I", "-m", "halton_meter", "init", "--via", "uprobes", "--non-interactive"]
    assert started.commands == [["sudo", sys.executable, *words]]


def test_without_a_terminal_a_user_gets_the_proxy_and_is_told_of_uprobes(
    home: Path, monkeypatch: pytest.MonkeyPatch, started: Started
) -> None:
    user(monkeypatch, is_root=False)
    done = run("--dry-run")
    assert "CA generated" in done.stdout
    assert started.commands == started.probes == []
    monkeypatch.setattr(init, "_by_proxy", lambda *given: None)
    assert "sudo halton-meter init" in run("--non-interactive").stderr


def test_where_uprobes_cannot_work_it_says_why_and_sets_the_proxy_up(
    home: Path, monkeypatch: pytest.MonkeyPatch, started: Started
) -> None:
    user(monkeypatch, is_root=True)
    old = Problem("Linux 5.4 is older than 5.15", "use the proxy")
    monkeypatch.setattr(init_uprobes, "obstacles", lambda: [old])
    done = run("--dry-run")
    assert "uprobes cannot be used here: Linux 5.4 is older than 5.15" in done.stderr
    assert "CA generated" in done.stdout
    refused = run("--via", "uprobes", "--dry-run", code=1)
    assert "fix: use the proxy" in refused.stderr


def test_a_machine_that_the_proxy_was_set_up_on_keeps_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, started: Started
) -> None:
    user(monkeypatch, is_root=True)
    home.mkdir()
    (home / "changes.json").write_text("{}")
    called: list[Any] = []
    monkeypatch.setattr(init, "_by_proxy", lambda *given: called.append(given))
    run("--non-interactive")
    assert (len(called), started.probes) == (1, [])


@pytest.mark.parametrize("option", ["--env-only", "--full", "--java", "--no-shell-rc"])
def test_options_of_the_proxy_choose_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, started: Started, option: str
) -> None:
    user(monkeypatch, is_root=True)
    called: list[Any] = []
    monkeypatch.setattr(init, "_by_proxy", lambda *given: called.append(given))
    run(option, "--non-interactive")
    assert (len(called), started.probes) == (1, [])
    refused = run(option, "--via", "uprobes", code=2)
    assert "these options are the proxy's" in refused.stderr


@pytest.mark.parametrize(
    ("given", "needs_root"),
    [
        ({"via": "auto"}, True),
        ({"via": "uprobes"}, True),
        ({"via": "proxy"}, False),
        ({"via": "auto", "mode": "env-only"}, False),
        ({"via": "auto", "no_shell_rc": True}, False),
        ({"via": "auto", "keep": True}, False),
    ],
)
def test_root_stays_root_for_uprobes_alone(given: dict[str, Any], needs_root: bool) -> None:
    assert _for_init(given) is needs_root


def test_no_shell_file_is_changed_where_none_is_to_be(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user(monkeypatch, is_root=False)
    with_files = run("--env-only", "--dry-run").stdout
    without = run("--env-only", "--no-shell-rc", "--dry-run").stdout
    assert ".bashrc" in with_files
    assert ".bashrc" not in without
    assert ".config/fish" not in without
    assert "env.sh" in without


# --- from uv's cache ------------------------------------------------------------------------------


def test_from_uvs_cache_it_is_installed_first_and_goes_on_there(
    home: Path, monkeypatch: pytest.MonkeyPatch, started: Started, tmp_path: Path
) -> None:
    user(monkeypatch, is_root=False)
    terminal(monkeypatch)
    (tmp_path / "halton-meter").touch()
    ran: list[list[str]] = []

    def execv(program: Path, words: list[str]) -> None:
        ran.append([str(program), *map(str, words)])
        raise SystemExit(0)

    monkeypatch.setattr(init_uprobes, "runs_from_cache", lambda: True)
    monkeypatch.setattr(init_uprobes.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(init_uprobes.os, "execv", execv)
    told = SimpleNamespace(returncode=0, stdout=f"{tmp_path}\n")
    monkeypatch.setattr(subprocess, "run", lambda *words, **more: told)
    monkeypatch.setattr(sys, "argv", ["halton-meter", "init"])
    said = run(typed="1\ny\n").output
    assert "uv's cache, which uv may empty. It is installed for good first: uv tool install" in said
    assert started.commands[0][:3] == ["/usr/bin/uv", "tool", "install"]
    program = str(tmp_path / "halton-meter")
    assert ran == [[program, program, "init"]]


def test_root_is_told_what_to_do_later_about_uvs_cache(
    home: Path, monkeypatch: pytest.MonkeyPatch, started: Started
) -> None:
    user(monkeypatch, is_root=True)
    monkeypatch.setattr(init_uprobes, "runs_from_cache", lambda: True)
    said = run("--non-interactive").stderr
    assert "then the service stops. Later: uv tool install " in said
    assert said.count("&& halton-meter init") == 1


def test_what_cannot_be_installed_goes_on_from_the_cache(
    home: Path, monkeypatch: pytest.MonkeyPatch, started: Started
) -> None:
    user(monkeypatch, is_root=False)
    terminal(monkeypatch)
    monkeypatch.setattr(init_uprobes, "runs_from_cache", lambda: True)
    monkeypatch.setattr(init_uprobes.shutil, "which", lambda name: None)
    done = run(typed="1\ny\n")
    assert f"Later: uv tool install {installed.requirement()}" in done.stderr
    assert started.commands[0][0] == "sudo"


# --- uninstall --graceful -------------------------------------------------------------------------


def waiting(monkeypatch: pytest.MonkeyPatch, states: list[tuple[int, int] | None]) -> list[float]:
    """`quiet._wait` over these (requests, connections), half a second apart."""
    clock = [0.0]
    monkeypatch.setattr(quiet.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(quiet.time, "sleep", lambda s: clock.__setitem__(0, clock[0] + s))
    left = iter(states)
    busy: Callable[[], tuple[int, int] | None] = lambda: next(left, states[-1])  # noqa: E731
    quiet._wait(busy, silent=True)
    return clock


@pytest.mark.parametrize(
    ("states", "seconds"),
    [
        ([None], 0),
        ([(0, 0)], 0),
        ([(2, 3), (1, 2), (0, 0)], 1),
        ([(1, 1), (0, 1)], quiet.IDLE_CONNECTIONS_S_MAX + 0.5),
        ([(0, 1), (1, 1), (0, 1)], quiet.IDLE_CONNECTIONS_S_MAX + 1),
        ([(1, 1)], quiet.WAIT_S_MAX),
        ([(1, 1), None], 0.5),
    ],
)
def test_it_waits_for_requests_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, states: list[tuple[int, int] | None], seconds: float
) -> None:
    assert waiting(monkeypatch, states) == [seconds]


def test_programs_that_still_have_the_address_are_named(home: Path) -> None:
    home.mkdir()
    (home / "config.toml").write_text("[proxy]\nport = 18999\n")
    environment = {"HTTPS_PROXY": "http://127.0.0.1:18999/"}
    with subprocess.Popen(["sleep", "60"], env=environment) as sleeper:
        try:
            # In the middle of its exec a program shows no environment.
            wait_until(
                lambda: quiet.still_pointed(home) == [f"sleep ({sleeper.pid})"],
                "the program that has the address",
            )
        finally:
            sleeper.kill()


def test_what_running_programs_need_is_undone_last(home: Path) -> None:
    from proxy_fallback.setup.changes import Commands, FileMade
    from proxy_fallback.setup.steps import undo_but_the_proxy

    class Named(FileMade):
        """A file under the name of a service."""

        @property
        def key(self) -> str:
            return "service:background" if self.path.endswith("service") else f"file:{self.path}"

    home.mkdir()
    files = [home / name for name in ("ca", "service", "env.sh", "rc")]
    with Ledger.open(home, Commands()) as ledger:
        ledger.begin()
        for file in files:
            ledger.make(Named(str(file), "x"))
        ledger.finish("apps")
        undo_but_the_proxy(ledger)
        assert [file.exists() for file in files] == [True, True, False, False]
        ledger.undo_all()
    assert not any(file.exists() for file in files)
