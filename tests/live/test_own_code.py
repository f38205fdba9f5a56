"""What root would run: our own code from one place, as it was installed, or nothing."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from halton_meter import __version__
from halton_meter.cli import main
from halton_meter.live import own_code
from halton_meter.problem import Problem

SOURCE = Path(own_code.__file__).resolve().parents[2]
ASK = "import json\nfrom halton_meter.live import own_code as o\n"
ASK += "print(json.dumps([[[p.what, p.fix] for p in o.problems()]]))"
# Of the site folders that this Python has, and of an editable install, nothing is left.
ONLY = """import sys
sys.path[:] = [each for each in sys.path if "site-packages" not in each] + {path!r}
sys.meta_path[:] = [each for each in sys.meta_path if "Editable" not in repr(each)]
"""


class Installed:
    """A site folder as pip leaves it, and others beside it."""

    def __init__(self, folder: Path) -> None:
        self.site = folder / "site-packages"
        lines = []
        for name in own_code.PACKAGES:
            ignored = shutil.ignore_patterns("__pycache__", "data", "overlay", "static")
            shutil.copytree(SOURCE / name, self.site / name, ignore=ignored)
            for file in sorted((self.site / name).rglob("*.*")):
                digest = base64.urlsafe_b64encode(hashlib.sha256(file.read_bytes()).digest())
                path = file.relative_to(self.site)
                lines.append(f"{path},sha256={digest.decode().rstrip('=')},{file.stat().st_size}")
        record = self.site / f"halton_meter-{__version__}.dist-info" / "RECORD"
        record.parent.mkdir()
        record.write_text("\n".join([*lines, f"{record.parent.name}/RECORD,,"]) + "\n")

    def problems(
        self, before: Path | None = None, *, isolated: bool = True, **environment: str
    ) -> list[list[str]]:
        """What a process says that finds us there; `before` is earlier on its path."""
        import json

        path = [str(each) for each in (before, self.site) if each is not None]
        flags = ["-I"] if isolated else []
        command = [sys.executable, *flags, "-c", ONLY.format(path=path) + ASK]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd="/", env=environment
        )
        assert done.returncode == 0, done.stderr
        [found] = json.loads(done.stdout)
        return list(found)


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    return Installed(tmp_path)


def overwrite(here: Installed) -> None:
    """As `pip install capture` does with its own."""
    (here.site / "capture" / "__init__.py").write_text("raise SystemExit('foreign code ran')\n")


def uninstall(here: Installed) -> None:
    """As `pip uninstall capture` does afterwards."""
    (here.site / "capture" / "__init__.py").unlink()


def change_the_kernels_program(here: Installed) -> None:
    with (here.site / "capture" / "probe.bpf.c").open("a") as file:
        file.write("/* more */\n")


def test_what_pip_installed_is_well(installed: Installed) -> None:
    assert installed.problems() == []


def test_a_source_tree_has_no_record_and_is_well(tmp_path: Path) -> None:
    shutil.copytree(SOURCE / "halton_meter", tmp_path / "halton_meter")
    for name in own_code.PACKAGES[1:]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    assert Installed.problems(SimpleNamespace(site=tmp_path)) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (overwrite, "capture/__init__.py, which has changed since"),
        (uninstall, "would not find"),
        (change_the_kernels_program, "capture/probe.bpf.c, which has changed since"),
    ],
)
def test_another_package_of_the_name_is_refused_and_not_run(
    installed: Installed, change: Callable[[Installed], None], named: str
) -> None:
    change(installed)
    [[what, mend]] = installed.problems()
    assert named in what
    assert "pip install halton-meter" in mend


@pytest.mark.parametrize("name", own_code.PACKAGES[1:])
def test_a_package_that_hides_ours_is_refused_and_not_run(
    installed: Installed, tmp_path: Path, name: str
) -> None:
    other = tmp_path / "other"
    (other / name).mkdir(parents=True)
    (other / name / "__init__.py").write_text("raise SystemExit('foreign code ran')\n")
    [[what, _]] = installed.problems(before=other)
    assert f"root would run code of {other / name}" in what
    # A folder without __init__ hides nothing.
    (other / name / "__init__.py").unlink()
    assert installed.problems(before=other) == []


def test_pythonpath_may_not_bring_in_what_root_runs(installed: Installed, tmp_path: Path) -> None:
    """Neither what hides ours, nor ours itself: the processes that root starts would not see it."""
    other = tmp_path / "other"
    (other / "pricing").mkdir(parents=True)
    (other / "pricing" / "__init__.py").write_text("raise SystemExit('foreign code ran')\n")
    [[what, mend]] = installed.problems(other, isolated=False, PYTHONPATH=str(other))
    assert str(other / "pricing") in what
    assert "PYTHONPATH" in mend
    [[what, _]] = installed.problems(isolated=False, PYTHONPATH=str(installed.site))
    assert "would not find" in what


def test_a_record_of_an_earlier_version_is_not_ours(installed: Installed) -> None:
    old = installed.site / "halton_meter-0.0.1.dist-info"
    old.mkdir()
    (old / "RECORD").write_text("capture/helper/main.py,sha256=AAAA,1\n")
    assert installed.problems() == []


def test_the_daemon_and_a_run_start_nothing_then(monkeypatch: pytest.MonkeyPatch) -> None:

    from halton_meter import accounts

    monkeypatch.setattr(accounts, "is_root", lambda: True)
    monkeypatch.setattr(
        own_code, "problems", lambda: [Problem("root would run code of /evil", "fix it")]
    )
    for command in (["start"], ["daemon", "--foreground"], ["run", "--", "true"]):
        arguments = [command[0], "--via", "uprobes", *command[1:]]
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 1, (command, done.output)
        assert "root would run code of /evil\n  fix: fix it" in done.output


def test_what_root_starts_is_isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert own_code.python("halton_meter.live.probes.worker", "7")[1:] == ["-I", "-m", *MODULE]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    flag = "-I" if sys.flags.isolated else "-P"
    assert own_code.python("halton_meter.live.probes.worker", "7")[1:] == [flag, "-m", *MODULE]
    shown = CliRunner().invoke(
        main, ["start", "--show-unit"], env={"HALTON_METER_HOME": str(tmp_path)}
    )
    assert f"ExecStart={sys.executable} -I -m halton_meter daemon --foreground" in shown.output


MODULE = ("halton_meter.live.probes.worker", "7")


# --- who may change it ----------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root's files are nobody else's")
def test_what_others_may_change_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "place"
    for name in own_code.PACKAGES:
        (place / name).mkdir(parents=True)
    file = place / "pricing" / "book.py"
    file.touch()
    for each in (tmp_path, *tmp_path.parents):
        if each.stat().st_mode & 0o022 and not each.stat().st_mode & 0o1000:
            pytest.skip(f"{each} is open to others itself")
    monkeypatch.setattr(own_code, "place_of_ours", lambda: place)
    monkeypatch.setattr(own_code, "isolated_path", lambda: [str(place)])
    monkeypatch.setattr(own_code, "sys", _Sys(tmp_path / "python"))
    assert own_code.changeable_by_others() is None
    file.chmod(0o666)
    assert own_code.changeable_by_others() == file
    file.chmod(0o644)
    (place / "x.pth").touch()
    os.chown(place / "x.pth", 54321, 54321)
    assert own_code.changeable_by_others() == place / "x.pth"
    (place / "x.pth").unlink()
    os.chown(place / "capture", 54321, 54321)
    assert own_code.changeable_by_others() == place / "capture"
    os.chown(place / "capture", 0, 0)
    (place / "capture").chmod(0o1777)
    assert own_code.changeable_by_others() is None  # nobody else's file can be taken away there


class _Sys:
    """An interpreter of root's alone."""

    def __init__(self, executable: Path) -> None:
        self.executable = str(executable)
        self.modules: dict[str, object] = {}
