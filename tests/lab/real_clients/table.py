"""The clients of `clients.toml`: how each is installed, and what its script finds.

`apt` packages are installed by whoever runs the tests (`make clients`), those of pip and npm once
into the cache of `programs.py`. `test_table.py` runs them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab.real_clients.programs import Unavailable, cache_folder

INSTALL_SECONDS_MAX = 1800.0
CLIENT_SECONDS_MAX = 600.0  # some begin slowly, and other programs may have the machine
EXACT = "exact"
_WANTED_VERSION = re.compile(r"(?<=.)@[^@/]*$")


@dataclass(frozen=True, slots=True)
class Client:
    """A row of `clients.toml`, whose head says what its fields mean."""

    name: str
    package: str
    stack: str
    script: str
    count: int = 1
    uprobes: str = EXACT
    key_log: str = EXACT
    proxy: str = EXACT
    named: str = ""

    def __str__(self) -> str:
        return self.name


TABLE: tuple[Client, ...] = tuple(
    Client(**row)
    for row in tomllib.loads(Path(__file__).with_name("clients.toml").read_text())["client"]
)


def installed(client: Client) -> tuple[dict[str, str], str]:
    """The variables that the client's script finds, and its version. Raises Unavailable."""
    registry, _, packages = client.package.partition(":")
    words = packages.split()
    if registry == "apt":
        return {"PYTHON": sys.executable}, _debian_version(words[0])
    folder = cache_folder() / f"{registry}-{hashlib.sha256(packages.encode()).hexdigest()[:12]}"
    if not (folder / ".complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        {"pip": _venv, "npm": _node_modules}[registry](folder, words)
        (folder / ".complete").touch()
    if registry == "npm":
        name = _WANTED_VERSION.sub("", words[0])
        package = json.loads((folder / "node_modules" / name / "package.json").read_text())
        return {"NPM": str(folder)}, package["version"]
    ask = f"from importlib.metadata import version; print(version({words[0].partition('[')[0]!r}))"
    python = folder / "bin" / "python"
    said = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout
    return {"PYTHON": str(python)}, said.strip()


def _debian_version(package: str) -> str:
    """Without the epoch and what Debian adds to the maker's."""
    ask = ["dpkg-query", "-W", "-f", "${Version}", package]
    told = subprocess.run(ask, capture_output=True, text=True, check=False).stdout
    if not told:
        raise Unavailable(f"{package} is not installed: apt-get install {package}")
    return re.split(r"[-+]", told.rpartition(":")[2])[0]


def _venv(folder: Path, packages: Sequence[str]) -> None:
    _do([sys.executable, "-m", "venv", str(folder)], folder)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--prefer-binary"]
    _do([*pip, *packages], folder)


def _node_modules(folder: Path, packages: Sequence[str]) -> None:
    if shutil.which("npm") is None:
        raise Unavailable("npm is not installed")
    (folder / "package.json").write_text('{"private": true}')
    _do(["npm", "install", "--no-audit", "--no-fund", "--loglevel=error", *packages], folder)


def _do(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=INSTALL_SECONDS_MAX,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["failed"])[-1]
        raise Unavailable(f"{shlex.join(command)}: {last}")
