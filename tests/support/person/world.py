"""What the tests plant in a person's data folder, and how they see that nobody else's file changed.

`NAMES` is every name that the program uses there; `Watch` finds names that are missing from it.
"""

from __future__ import annotations

import ctypes
import fnmatch
import hashlib
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from halton_meter.store import Store
from tests.support.person.place import Person

# Each name as it stands in the folder; what varies (a process id, a time) as a glob. The globs
# cannot be planted: nobody knows them before.
NAMES = (
    "meter.duckdb",
    "meter.duckdb.wal",
    "meter.duckdb.new-*",
    "meter.duckdb.tmp",
    "journal",
    "journal/refused",
    "journal/*.new",
    "journal/*.jsonl",
    "journal/*.sound",
    "journal/*.half-*",
    "reprice-*.ndjson",
    "config.lock",
    "config.toml",
    "captures.json",
    ".captures.json.*",
    "metrics-token",
    "run-*.sock",
    "budget-status.json",
    ".budget-status.json.*",
    "budgets",
    "budgets/*",
    "pricing.toml",
    ".pricing.toml.*",
    "prices",
    "prices.partial",
    "prices.old",
    "daemon.lock",
    "daemon.log",
    "daemon.sock",
    "daemon.state",
    ".daemon.state.*",
    "gaps.jsonl",
    "node_proxy.cjs",
    ".node_proxy.cjs.*",
    "proxy.log",
    "proxy.pid",
    "proxy.sock",
    "proxy.state",
    "keylog.state",
    ".keylog.state.*",
    "keylog.sock",
    "keylog.log",
    "keylog-gaps.jsonl",
    "keys",
    ".proxy.state.*",
    "proxy-gaps.jsonl",
    "proxy-refusals.json",
    "proxy-refusals-of-runs.json",
    ".proxy-refusals*",
    "proxy-ca",
    "changes.json",
    ".changes.json.lock",
    ".changes.json.*",
    ".config.toml.*",
    "env.sh",
    ".env.sh.*",
    "account.key",
    ".account.key.*",
    "snapshot.json",
    ".snapshot.json.*",
    "snapshot.lock",
    "statusline.json",
    ".statusline.json.*",
    "proxy-ca/*",
)
PLANTABLE = tuple(name for name in NAMES if "*" not in name)
FOLDERS = ("journal", "prices", "proxy-ca")

# A journal line with the right checksum that the database refuses: it goes to journal/refused.
_REST = b'"id":" /home/ann/evil.so ","at_ns":1}'
REFUSED_LINE = b'{"crc":%d,%s\n' % (zlib.crc32(_REST), _REST)


def digest(folder: Path) -> dict[str, tuple[object, ...]]:
    """Everything about a tree: kinds, modes, owners, sizes, times of change, contents."""
    found: dict[str, tuple[object, ...]] = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        status = path.lstat()
        content = ""
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file():
            content = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
        what = (status.st_mode, status.st_uid, status.st_gid, status.st_size, status.st_mtime_ns)
        found[str(path.relative_to(folder))] = (*what, content)
    return found


def make_template(folder: Path) -> None:
    """A data folder with two events, and two lines in the journal, of which one will be refused."""
    from halton_meter.store.journal import loss_line

    with Store(folder) as store:
        from tests.support.made import made

        store.append([made("a"), made("b", project="old")])
        store.flush()
    segment = folder / "journal" / f"{1:020d}-1-000000.jsonl"
    segment.write_bytes(loss_line("x", "tested", 1, 1) + REFUSED_LINE)
    (folder / "config.toml").write_text('loader = "libbpf"\n')


def give(person: Person, template: Path) -> Path:
    """Put the template where the person's data is, theirs alone; the folder."""
    data = person.data
    if data.is_symlink():
        data.unlink()
    shutil.rmtree(data, ignore_errors=True)
    shutil.copytree(template, data)
    data.chmod(0o700)
    for path in (data, *data.rglob("*")):
        os.chown(path, person.uid, person.uid)
    return data


def _symlink(at: Path, target: Path) -> None:
    target.write_text(f"root's: {target.name}\n")
    at.symlink_to(target)


def _dangling(at: Path, target: Path) -> None:
    at.symlink_to(target)


def _hard_link(at: Path, target: Path) -> None:
    target.write_text(f"root's: {target.name}\n")
    target.chmod(0o600)
    os.link(target, at)


def _pipe(at: Path, target: Path) -> None:
    os.mkfifo(at)


def _folder_link(at: Path, target: Path) -> None:
    target.mkdir()
    (target / "refused").write_text("root's\n")
    at.symlink_to(target)


KINDS: dict[str, Callable[[Path, Path], None]] = {
    "symlink": _symlink,
    "dangling": _dangling,
    "hard link": _hard_link,
    "pipe": _pipe,
    "folder link": _folder_link,
}


def plant(kind: str, names: Sequence[str], data: Path, foreign: Path, owner: int) -> None:
    """Put a trap of that kind at each of these names, each with a foreign target of its own."""
    for number, name in enumerate(names):
        at = data / name
        if at.is_dir() and not at.is_symlink():
            shutil.rmtree(at)
        at.unlink(missing_ok=True)
        at.parent.mkdir(exist_ok=True)
        KINDS[kind](at, foreign / f"{kind.replace(' ', '-')}-{number}")
        if kind != "hard link":
            os.chown(at, owner, owner, follow_symlinks=False)


class Watch:
    """Names that come up in a data folder, also such as are gone at once (inotify)."""

    _NEW, _MOVED_TO = 0x100, 0x80

    def __init__(self, data: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self._fd >= 0
        self._folders: dict[int, str] = {}
        for name in ("", *FOLDERS):
            (data / name).mkdir(exist_ok=True)
            watched: int = libc.inotify_add_watch(
                self._fd, os.fsencode(data / name), self._NEW | self._MOVED_TO
            )
            self._folders[watched] = name

    def names(self) -> Iterator[str]:
        """Those since the last call."""
        while True:
            try:
                raw = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                return
            while raw:
                watched, _, _, length = struct.unpack_from("iIII", raw)
                name = os.fsdecode(raw[16 : 16 + length].rstrip(b"\0"))
                raw = raw[16 + length :]
                if name:  # none when a folder itself has gone
                    yield "/".join(filter(None, (self._folders[watched], name)))

    def close(self) -> None:
        """Watch no more."""
        os.close(self._fd)


def is_known(name: str) -> bool:
    """Whether NAMES has it."""
    depth = name.count("/")
    return any(n.count("/") == depth and fnmatch.fnmatchcase(name, n) for n in NAMES)
