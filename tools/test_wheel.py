"""Run the unit tests in one process against the wheel as a person installs it.

    python tools/test_wheel.py [PYTEST-ARGUMENT …]

It builds the wheel, installs it into a fresh virtual environment, and copies what the tests need
into .cache/wheel/checkout: everything of the checkout but the packages themselves. So an import of
`capture`, `halton_meter`, `pricing` or `proxy_fallback` can only find what the wheel brought;
tests/conftest.py refuses to start otherwise. Tests marked `checkout` read the packages' sources and
are left out. Exit code: that of pytest, or of the step that failed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".cache" / "wheel"
PACKAGES = ("capture", "halton_meter", "pricing", "proxy_fallback")
NOT_COPIED = {*PACKAGES, "build", "dist", "setup.py"}


def wheel() -> Path:
    """Build it from a copy of what git knows, so that nothing left in the checkout gets in."""
    source = FOLDER / "source"
    for name in tracked():
        copy_to(source, name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", FOLDER, source]
    subprocess.run(command, check=True)
    (found,) = FOLDER.glob("*.whl")
    check_contents(found)
    return found


def check_contents(built: Path) -> None:
    """Refuse a wheel that lacks a file of the packages: data is easily forgotten."""
    held = set(zipfile.ZipFile(built).namelist())
    wanted = {name for name in tracked() if name.partition("/")[0] in PACKAGES}
    if shutil.which("clang"):
        wanted.add("capture/probe.bpf.o")
    if missing := sorted(wanted - held):
        raise SystemExit(
            f"{built.name} lacks {', '.join(missing)}: see package-data in pyproject.toml"
        )


def tracked() -> list[str]:
    """Every file that git tracks and that is still there."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def copy_to(folder: Path, name: str) -> None:
    """Copy a file of the checkout to its place in `folder`."""
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(ROOT / name, target)


def install(built: Path) -> Path:
    """A fresh environment with the wheel and what the tests need; its interpreter."""
    environment = FOLDER / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, f"{built}[dev]"], check=True)
    return python


def main() -> int:
    """Build, install, copy, run."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    try:
        python = install(wheel())
    except subprocess.CalledProcessError as error:
        print(f"{error}. Run the command by hand to see more.", file=sys.stderr)
        return error.returncode
    checkout = FOLDER / "checkout"
    for name in tracked():
        if name.partition("/")[0] not in NOT_COPIED:
            copy_to(checkout, name)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "HALTON_TEST_WHEEL": "1", "PATH": path}
    for name in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE"):
        environment.pop(name, None)
    which = ["-m", "not kernel and not lab and not slow and not checkout"]
    which += ["-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [python, "-m", "pytest", *which, *(sys.argv[1:] or ["tests"])]
    return subprocess.run(command, cwd=checkout, env=environment, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
