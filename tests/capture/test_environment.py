"""What is said where uprobes cannot work: the fact, and the command or step that mends it."""

from __future__ import annotations

import builtins
import io
import os
import platform
import sys
from pathlib import Path
from typing import Any

import pytest

from capture import environment, loader
from capture.environment import check_environment

LOCKDOWN = "none integrity [confidentiality]\n"
CAPABILITIES = "Name:\thelper\nCapEff:\t{:016x}\n"
ALL = 0x1FFFFFFFFFF


class Machine:
    """A Linux on which everything is there, until a test takes something away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.patch = monkeypatch
        self.capabilities = ALL
        self.missing: set[str] = set()
        self.lockdown = folder / "lockdown"
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(platform, "release", lambda: "6.6.87.2-microsoft-standard-WSL2")
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.setattr(environment, "LOCKDOWN_FILE", str(self.lockdown))
        monkeypatch.setattr(os.path, "exists", lambda path: path not in self.missing)
        monkeypatch.setattr(builtins, "open", self._open)
        monkeypatch.setattr(loader, "libbpf_library", object)
        monkeypatch.setattr(loader, "built_object", lambda: folder / "probe.bpf.o")
        monkeypatch.setattr(loader, "import_bcc", self._nothing("bcc is not installed"))

    def _open(self, path: Any, *arguments: Any, **options: Any) -> Any:
        if path == "/proc/self/status":
            return io.StringIO(CAPABILITIES.format(self.capabilities))
        return io.open(path, *arguments, **options)  # noqa: UP020 (builtins.open is this)

    @staticmethod
    def _nothing(why: str) -> Any:
        def fail() -> Any:
            raise loader.LoadFailed(why)

        return fail

    def problems(self) -> list[tuple[str, str]]:
        return [(each.what, each.fix) for each in check_environment()]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


def test_a_wsl2_guest_is_a_linux_with_bpf(machine: Machine) -> None:
    assert machine.problems() == []


@pytest.mark.parametrize("release", ["5.15.0", "6.18", "6.1.0-28-amd64", "5.15.167.4-generic+"])
def test_kernels_that_will_do_are_told_by_their_first_two_numbers(
    machine: Machine, release: str
) -> None:
    machine.patch.setattr(platform, "release", lambda: release)
    assert machine.problems() == []


def test_an_old_kernel_is_sent_to_the_proxy(machine: Machine) -> None:
    machine.patch.setattr(platform, "release", lambda: "5.10.0-33-amd64")
    assert machine.problems() == [
        (
            "Linux 5.10.0-33-amd64 is older than 5.15",
            "use the proxy: halton-meter run --via proxy -- CMD",
        )
    ]


def test_who_is_not_root_is_told_to_be(machine: Machine) -> None:
    machine.patch.setattr(os, "geteuid", lambda: 1000)
    assert machine.problems() == [("attaching probes needs root", "sudo halton-meter start")]


def test_a_containers_root_is_told_which_capabilities_to_ask_for(machine: Machine) -> None:
    machine.capabilities = ALL & ~(1 << 21) & ~(1 << 19)
    (problem,) = machine.problems()
    assert problem == (
        "this root lacks SYS_PTRACE, SYS_ADMIN (a container?)",
        "docker run --pid=host --cap-add SYS_PTRACE --cap-add SYS_ADMIN …",
    )


def test_a_kernel_without_uprobes_is_sent_to_the_proxy(machine: Machine) -> None:
    machine.missing.add("/sys/bus/event_source/devices/uprobe/type")
    ((what, command),) = machine.problems()
    assert "CONFIG_UPROBE_EVENTS" in what
    assert "--via proxy" in command


@pytest.mark.parametrize(
    ("mode", "refuses"),
    [
        (LOCKDOWN, True),
        ("none [integrity] confidentiality\n", False),
        ("[none] integrity\n", False),
    ],
)
def test_lockdown_refuses_in_confidentiality_only(
    machine: Machine, mode: str, refuses: bool
) -> None:
    machine.lockdown.write_text(mode)
    problems = machine.problems()
    assert bool(problems) == refuses
    if refuses:
        assert "lockdown=integrity" in problems[0][1]
        assert "--via proxy" in problems[0][1]


def test_without_libbpf_bcc_serves_and_without_both_the_package_is_named(machine: Machine) -> None:
    missing = machine._nothing("libbpf.so.1 is not installed (apt install libbpf1)")
    machine.patch.setattr(loader, "libbpf_library", missing)
    ((what, command),) = machine.problems()
    assert "libbpf.so.1 is not installed" in what
    assert command.startswith("apt install libbpf1")
    machine.patch.setattr(loader, "import_bcc", object)
    assert machine.problems() == []


def test_without_a_compiled_program_and_clang_either_is_asked_for(machine: Machine) -> None:
    machine.patch.setattr(loader, "built_object", lambda: None)
    machine.patch.setattr(loader, "clang", lambda: None)
    ((what, command),) = machine.problems()
    assert "not compiled and there is no clang" in what
    assert "apt install clang" in command


def test_another_system_has_no_uprobes(machine: Machine) -> None:
    machine.patch.setattr(sys, "platform", "darwin")
    assert machine.problems() == [
        (
            "uprobes need Linux, this is darwin",
            "use the proxy: halton-meter run --via proxy -- CMD",
        )
    ]


def test_a_cache_that_only_root_may_enter_is_as_good_as_empty(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`doctor` asks as an ordinary user."""

    def forbidden(path: Path, **_: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(loader, "BUILT_OBJECT", tmp_path / "none.o")
    monkeypatch.setattr(loader, "CACHE_DIRECTORY", tmp_path / "of-root")
    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "stat", forbidden)
        patch.setattr(type(tmp_path), "exists", lambda path: False)
        assert loader.built_object() is None
