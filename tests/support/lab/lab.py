"""A lab: a network namespace with the providers' names in it, their server, and real clients.

`with Lab() as lab: lab.run(["curl", …])`. Commands run in the lab's network and mount namespaces
with an emptied environment, a home of their own, made-up keys and the lab's authority as their
only trust; nothing they do can leave the machine. Needs root. Knows nothing of Halton Meter.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.lab.answers import OTHER_HOSTS, PROVIDER_HOSTS
from tests.support.lab.authority import make_authority

START_SECONDS_MAX = 60.0
SETTLE_SECONDS_MAX = 60.0
FIRST_UID = 100_000_000
PIDS_MAX = 4_194_304  # the kernel's PID_MAX_LIMIT
_labs = itertools.count()
_PACKAGE_ROOT = Path(__file__).resolve().parents[(__package__ or "").count(".") + 1]
_KEYS = ("ANTHROPIC", "OPENAI", "GROQ", "GEMINI", "XAI")


@dataclass(frozen=True, slots=True)
class User:
    """An account that exists only in labs."""

    name: str
    uid: int
    gid: int
    home: Path


class Lab:
    """See the file's head. `paths` are further folders that the lab's users must reach."""

    def __init__(self, paths: Sequence[Path] = ()) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lab-"))
        self.folder.chmod(0o755)
        # Each lab has users of its own: a meter in one must not see the clients of another.
        uid = FIRST_UID + 2 * (os.getpid() + PIDS_MAX * next(_labs))
        self.user = User("labrat", uid, uid, self.folder / "home" / "labrat")
        self.other = User("labmouse", uid + 1, uid + 1, self.folder / "home" / "labmouse")
        self._paths = [Path(sys.base_prefix), Path(sys.prefix), _PACKAGE_ROOT, *paths]
        self._init: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Lab:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self) -> None:
        if os.geteuid() != 0:
            raise PermissionError("the lab makes namespaces: run it as root")
        make_authority(self.folder, (*PROVIDER_HOSTS, *OTHER_HOSTS))
        self._make_accounts()
        command = ["unshare", "--net", "--mount", "--propagation", "private", sys.executable]
        command += ["-m", f"{__package__}.inside", str(self.folder), *map(str, self._paths)]
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(_PACKAGE_ROOT)}
        self._init = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        assert self._init.stdout is not None
        if self._init.stdout.readline() != b"ready\n":
            raise RuntimeError("the lab did not start: its reason is on standard error above")

    def _make_accounts(self) -> None:
        etc = self.folder / "etc"
        etc.mkdir()
        passwd, group = Path("/etc/passwd").read_text(), Path("/etc/group").read_text()
        for user in (self.user, self.other):
            user.home.mkdir(parents=True)
            os.chown(user.home, user.uid, user.gid)
            passwd += f"{user.name}:x:{user.uid}:{user.gid}::{user.home}:/bin/sh\n"
            group += f"{user.name}:x:{user.gid}:\n"
        (etc / "passwd").write_text(passwd)
        (etc / "group").write_text(group)

    def close(self) -> None:
        """End the server, and with it the namespaces once their last command has ended."""
        if self._init is not None:
            assert self._init.stdin is not None
            self._init.stdin.close()
            self._init.wait(START_SECONDS_MAX)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def pid(self) -> int:
        """The process whose namespaces are the lab's."""
        assert self._init is not None
        return self._init.pid

    def environment(self, user: User | None = None, **extra: str) -> dict[str, str]:
        """What a command in the lab sees: nothing of the caller's environment."""
        home = user.home if user else self.user.home
        authority = str(self.folder / "ca.pem")
        return {
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": str(home),
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
            "SSL_CERT_FILE": authority,
            "NODE_EXTRA_CA_CERTS": authority,
            "REQUESTS_CA_BUNDLE": authority,
            "CURL_CA_BUNDLE": authority,
            **{f"{name}_API_KEY": f"made-up-key-of-{name.lower()}" for name in _KEYS},
            **extra,
        }

    def command(
        self, argv: Sequence[str], user: User | None = None, cwd: Path | None = None
    ) -> list[str]:
        """`argv` wrapped so that it runs in the lab; the process id stays the same throughout."""
        enter = ["nsenter", "-t", str(self.pid), "-n", "-m", "--"]
        move = ["/bin/sh", "-c", 'cd "$0" && exec "$@"', str(cwd or self.user.home)]
        become = []
        if user is not None:
            become = [
                "setpriv",
                f"--reuid={user.uid}",
                f"--regid={user.gid}",
                "--clear-groups",
                "--",
            ]
        return [*enter, *move, *become, *argv]

    def popen(
        self,
        argv: Sequence[str],
        *,
        user: User | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """Start a command in the lab."""
        environment = dict(env if env is not None else self.environment(user))
        return subprocess.Popen(self.command(argv, user, cwd), env=environment, **options)

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float = 120,
        input_text: str | None = None,
        **kw: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the lab to its end, output captured."""
        process = self.popen(
            argv,
            stdin=subprocess.PIPE if input_text is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **kw,
        )
        try:
            out, err = process.communicate(input_text, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"{argv} took over {timeout_s} s\n{out}\n{err}") from None
        done = subprocess.CompletedProcess(list(argv), process.returncode, out, err)
        return done

    def ledger(self) -> list[dict[str, Any]]:
        """Everything the server has answered so far."""
        path = self.folder / "ledger.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def ledger_of(self, count: int, skip: int = 0) -> list[dict[str, Any]]:
        """The `count` entries after the first `skip`; waits, bounded, until they are there."""
        deadline = time.monotonic() + SETTLE_SECONDS_MAX
        while len(entries := self.ledger()) < skip + count and time.monotonic() < deadline:
            time.sleep(0.01)
        return entries[skip:]
