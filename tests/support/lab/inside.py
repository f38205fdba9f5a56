"""The lab's first process: run in fresh network and mount namespaces, it lays the place out.

Usage (by `lab.py` only): `unshare --net --mount … python -m <package>.inside FOLDER`. It listens,
then mounts, then says "ready" on standard output, and ends when its standard input does. It
listens first so that the server itself keeps the system's TLS library: the clients get private
copies, and a probe on a copy sees nobody but the lab.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

from tests.support.lab import http3
from tests.support.lab.answers import OTHER_HOSTS, PROVIDER_HOSTS
from tests.support.lab.authority import server_context
from tests.support.lab.server import Ledger, Server, said_by

_MS_BIND = 0x1000
_libc = ctypes.CDLL(None, use_errno=True)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None) -> None:
    def text(value: str | None) -> bytes | None:
        return None if value is None else value.encode()

    if _libc.mount(text(source), text(target), text(kind), ctypes.c_ulong(flags), text(data)):
        raise OSError(ctypes.get_errno(), f"cannot mount {source} on {target}")


def _bind(source: Path, target: Path) -> None:
    _mount(str(source), str(target), None, _MS_BIND, None)


def tls_files() -> set[Path]:
    """The files whose TLS code the clients run: shared OpenSSL, and Node, which has its own."""
    listed = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True)
    found = {
        Path(line.rpartition("=> ")[2].strip()).resolve()
        for line in listed.stdout.splitlines()
        if line.strip().startswith(("libssl.so", "libcrypto.so"))
    }
    node = shutil.which("node")
    return found | ({Path(node).resolve()} if node else set())


def _use_private_copies(folder: Path) -> None:
    copies = folder / "copies"
    copies.mkdir()
    for original in tls_files():
        copy = copies / str(original).strip("/").replace("/", "_")
        shutil.copy2(original, copy)
        _bind(copy, original)


def _closed_ancestor(path: Path) -> Path | None:
    """The topmost folder above `path` that other users may not enter."""
    closed = [p for p in path.parents if not p.stat().st_mode & stat.S_IXOTH]
    return closed[-1] if closed else None


def _open_to_all(paths: list[Path]) -> None:
    """Let the lab's users reach `paths` even under a closed home, with nothing else beside them."""
    closed: dict[Path, list[tuple[Path, int]]] = {}
    for path in sorted(paths):  # a folder before what is inside it
        if path.exists() and (ancestor := _closed_ancestor(path)):
            closed.setdefault(ancestor, []).append((path, os.open(path, os.O_PATH)))
    for ancestor, inside in closed.items():
        _mount("tmpfs", str(ancestor), "tmpfs", 0, "mode=0755")
        for path, fd in inside:
            if not path.exists():
                path.mkdir(parents=True)
                _mount(f"/proc/self/fd/{fd}", str(path), None, _MS_BIND, None)
            os.close(fd)


def _lay_out(folder: Path, paths: list[Path]) -> None:
    # What an earlier lab's meter found out about programs must not help this one's.
    for name in ("tls", "tls-names"):
        known = Path("/var/cache/halton-meter") / name
        known.mkdir(parents=True, exist_ok=True, mode=0o700)
        _mount("tmpfs", str(known), "tmpfs", 0, "mode=0700")
    etc = folder / "etc"
    names = " ".join((*PROVIDER_HOSTS, *OTHER_HOSTS))
    (etc / "hosts").write_text(f"127.0.0.1 localhost {names}\n")
    (etc / "resolv.conf").write_text("")
    for name in ("hosts", "resolv.conf", "passwd", "group"):
        _bind(etc / name, Path("/etc") / name)
    _use_private_copies(folder)
    _open_to_all(paths)


async def _run(folder: Path, paths: list[Path]) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    ledger = Ledger(folder / "ledger.jsonl")
    server = Server(ledger, server_context(folder))
    await http3.listen(ledger, said_by, folder, 443)
    await server.listen(443)
    _lay_out(folder, paths)
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)


if __name__ == "__main__":
    asyncio.run(_run(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]]))
    os._exit(0)  # streams still open need no farewell
