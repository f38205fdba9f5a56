"""A place where a test may be root under sudo.

`with Place() as place: place.run("report")` is `sudo halton-meter report`, typed by `place.ann`.
Commands run in mount, network and process namespaces of their own: nothing here lasts, everybody
can read the program (below /root they could not), `/var/cache/halton-meter` and `/etc/systemd` are
empty, and there is no systemd. They are forked from one process that has imported everything, so
that a hundred of them take seconds. Without `probes` root lacks the capabilities that attaching
needs. Needs root on Linux.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[3]
# What is waited for at most: a command that hangs is ended, and fails its test.
COMMAND_S_MAX = 120.0
ANN_UID, BOB_UID = 64_001, 64_002
_NEEDED_BY_PROBES = "-sys_admin,-sys_ptrace,-bpf,-perfmon"


@dataclass(frozen=True, slots=True)
class Person:
    """An account that exists only here."""

    name: str
    uid: int
    home: Path

    @property
    def data(self) -> Path:
        """The folder where its Halton Meter keeps state."""
        return self.home / ".halton-meter"


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended: its exit code (negative: the signal), and what it said."""

    code: int
    out: str
    err: str


class Place:
    """See the file's head. `root` is root's home; `foreign` a folder of root's with files in it."""

    def __init__(self, *, probes: bool = False) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sudo-place-"))
        self.folder.chmod(0o755)
        self.ann = Person("ann", ANN_UID, self.folder / "ann")
        self.bob = Person("bob", BOB_UID, self.folder / "bob")
        self.root = self.folder / "root"
        self.foreign = self.folder / "foreign"
        self._probes = probes
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Place:
        etc = self.folder / "etc"
        for folder in (etc, self.folder / "etc-here", self.root, self.foreign):
            folder.mkdir(mode=0o755)
        passwd, group = Path("/etc/passwd").read_text(), Path("/etc/group").read_text()
        for person in (self.ann, self.bob):
            person.home.mkdir(mode=0o755)
            os.chown(person.home, person.uid, person.uid)
            passwd += f"{person.name}:x:{person.uid}:{person.uid}::{person.home}:/bin/sh\n"
            group += f"{person.name}:x:{person.uid}:\nwheel-{person.name}:x:64100:{person.name}\n"
        answer = '{"type": "message", "model": "claude-opus-4-5", "usage": {"output_tokens": 7}}'
        (self.ann.home / "answer.json").write_text(answer)
        os.chown(self.ann.home / "answer.json", ANN_UID, ANN_UID)
        (etc / "passwd").write_text(passwd)
        (etc / "group").write_text(group)
        command = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command += ["--propagation", "private", sys.executable, "-m", "tests.support.person.place"]
        self._process = subprocess.Popen(
            [*command, "lay-out", str(self.folder), *(["probes"] if self._probes else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "LANG": "C.UTF-8"},
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", "its reason is on standard error"
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(COMMAND_S_MAX)
        shutil.rmtree(self.folder, ignore_errors=True)

    def under_sudo(self, **extra: str | None) -> dict[str, str]:
        """The environment that sudo gives root for ann; None takes a variable away."""
        given: dict[str, str | None] = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.root),
            "USER": "root",
            "LOGNAME": "root",
            "LANG": "C.UTF-8",
            "SUDO_UID": str(self.ann.uid),
            "SUDO_GID": str(self.ann.uid),
            "SUDO_USER": self.ann.name,
            **extra,
        }
        return {name: value for name, value in given.items() if value is not None}

    def run(
        self,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        until: str | None = None,
        before: str | None = None,
        seconds: float = COMMAND_S_MAX,
    ) -> Done:
        """`sudo halton-meter ARGUMENTS`, to its end, or interrupted once it has said `until`.

        `before` names a function of this file that is called in the command's process before it.
        """
        request = {
            "arguments": arguments,
            "env": dict(self.under_sudo() if env is None else env),
            "cwd": str(self.ann.home),
            "until": until,
            "before": before,
            "seconds": seconds,
        }
        return Done(**self._ask(request))

    def end_all(self) -> None:
        """Kill what commands have left running here."""
        self._ask({"end_all": True})

    def _ask(self, request: Mapping[str, Any]) -> Any:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


# --- inside ---------------------------------------------------------------------------------------


def only_tell_who() -> None:
    """Have commands not do what they do, but say who would do it."""
    import click

    click.Command.invoke = lambda *_: _tell_who()  # type: ignore[method-assign]


def _tell_who() -> None:
    from halton_meter.accounts import home_folder

    told = {
        "uids": os.getresuid(),
        "gids": os.getresgid(),
        "groups": sorted(os.getgroups()),
        "home": os.environ.get("HOME"),
        "data": str(home_folder()),
        "can_return": _can_become_root(),
    }
    print(json.dumps(told))


def be_ann() -> None:
    """Be ann herself, without sudo."""
    os.initgroups("ann", ANN_UID)
    os.setresgid(ANN_UID, ANN_UID, ANN_UID)
    os.setresuid(ANN_UID, ANN_UID, ANN_UID)
    os.environ["HOME"] = os.path.expanduser("~ann")


def be_impatient() -> None:
    """Do not wait long for a service that cannot become healthy."""
    from halton_meter.cli import start

    start.START_S_MAX = 2.0


def hide_the_program() -> None:
    """Have the program installed where only root can read."""
    sys.executable = "/var/cache/halton-meter/python"
    os.close(os.open(sys.executable, os.O_CREAT, 0o700))


def _can_become_root() -> bool:
    try:
        os.seteuid(0)
    except PermissionError:
        return False
    return True


def _lay_out(folder: Path, probes: bool) -> None:
    from tests.support.lab.inside import _bind, _mount, _open_to_all

    # All of /etc: a mount on a single file is gone when somebody puts another one in its place.
    _mount("tmpfs", str(folder / "etc-here"), "tmpfs", 0, "mode=0755")
    subprocess.run(["cp", "-a", "/etc/.", str(folder / "etc-here")], check=True)
    for name in ("passwd", "group"):
        shutil.copyfile(folder / "etc" / name, folder / "etc-here" / name)
    _bind(folder / "etc-here", Path("/etc"))
    for path in ("/var/cache/halton-meter", "/etc/systemd/system", "/run/systemd"):
        Path(path).mkdir(parents=True, exist_ok=True)
        _mount("tmpfs", path, "tmpfs", 0, "mode=0755")
    _open_to_all([Path(sys.base_prefix), Path(sys.prefix), REPOSITORY])
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    serve = [sys.executable, "-m", "tests.support.person.place", "serve"]
    if not probes:
        serve = ["setpriv", f"--bounding-set={_NEEDED_BY_PROBES}", "--", *serve]
    os.execvp(serve[0], serve)


def _serve() -> None:
    import halton_meter.cli as cli

    for entry in cli._COMMANDS.values():
        __import__(entry.target.partition(":")[0])
    for name in (
        "duckdb",
        "orjson",
        "capture.uprobes",
        "halton_meter.live.proxy.run",
        "pricing.book",
    ):
        __import__(name)
    ends, told = os.pipe()
    for fd in (ends, told):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(told)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line), ends)), flush=True)


def _run(request: Mapping[str, Any], ends: int) -> dict[str, Any]:
    if request.get("end_all"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # the first process of a namespace spares itself
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)
        return {}
    output, errors = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output[1], 1)
        os.dup2(errors[1], 2)
        os.closerange(3, 64)
        _be_command(request)
    os.close(output[1])
    os.close(errors[1])
    code, said = _attend(pid, ends, (output[0], errors[0]), request)
    out, err = (text.decode(errors="replace") for text in said)
    return {"code": code, "out": out, "err": err}


def _attend(
    pid: int, ends: int, pipes: tuple[int, int], request: Mapping[str, Any]
) -> tuple[int, list[bytes]]:
    """Read what the command says until its end; it is interrupted or killed where it must be."""
    said = dict.fromkeys(pipes, b"")
    deadline, until = time.monotonic() + request["seconds"], request["until"]
    status = None
    while status is None:
        select.select([ends, *said], [], [], max(0.0, deadline - time.monotonic()))
        status = _reaped(ends).get(pid)
        for fd in said:
            os.set_blocking(fd, False)
            with contextlib.suppress(BlockingIOError):
                said[fd] += os.read(fd, 1 << 20)
        if until is not None and until.encode() in b"".join(said.values()):
            until = None
            os.kill(pid, signal.SIGINT)
        if status is None and time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            said[pipes[1]] += b"\nkilled: it did not end\n"
    for fd in said:
        os.close(fd)
    return os.waitstatus_to_exitcode(status), list(said.values())


def _reaped(ends: int) -> dict[int, int]:
    """The children that have ended, orphans of commands among them, and how."""
    with contextlib.suppress(BlockingIOError):
        os.read(ends, 4096)
    found = {}
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            found[ended[0]] = ended[1]
    return found


def _be_command(request: Mapping[str, Any]) -> None:
    """In the child: be `halton-meter`, as its console script is."""
    code: Any = 1
    try:
        from halton_meter.cli import main

        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        sys.argv = ["halton-meter", *request["arguments"]]
        if request["before"]:
            globals()[request["before"]]()
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "lay-out":
        _lay_out(Path(sys.argv[2]), "probes" in sys.argv[3:])
    else:
        _serve()
