"""Root and the person: who a command is, whose environment it gets, and acting with their rights.

A command that needs no root becomes the person for good before it does anything (`settle`, called
once for all commands in `cli/__init__.py`). Whatever one that stays root reads or writes on the
person's behalf is done in a child that has become that person first. So no name in their folders
can lead root elsewhere. This file starts nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from halton_meter import untrusted
from halton_meter.accounts import HOME_VARIABLE, Account, caller, home_folder, invoking_account
from halton_meter.config import ConfigError

ENVIRONMENT_BYTES_MAX = 4 << 20
ANSWER_BYTES_MAX = 4 << 20
ANSWER_S_MAX = 120.0  # reading a large store takes a while
PROBLEM_CHARACTERS_MAX = 2000
_CALLER_NAMES = ("SUDO_", "DOAS_USER", "PKEXEC_UID")


def settle(*, needs_root: bool) -> None:
    """Decide who the rest of this process is: the person for good, or root where `needs_root`.

    Also settles where their data is, so that root and person look in the same folder: as the
    person's own environment has it. Does nothing where we are not root, or where root is the
    person. Raises ConfigError, with the next command, when it cannot be done.
    """
    if os.geteuid() != 0:
        return
    account = invoking_account()
    if account.uid == 0:
        return
    environment = user_environment(account, os.environ, sudo_environment())
    called = caller(os.environ) is not None
    home = home_folder(environment if called else os.environ)
    # A service started by systemd is told whose it is; its folder's way may lead through others'.
    if called or not needs_root:
        _refuse_foreign(home, account)
    if not needs_root:
        _become_with(account, environment)
        _refuse_unreadable(account)
    if home != home_folder(account=account if needs_root else None):
        os.environ[HOME_VARIABLE] = str(home)


def _refuse_foreign(home: Path, account: Account) -> None:
    """Raise ConfigError for a data folder that belongs to a third user, or to root."""
    try:
        owner = home.stat().st_uid
    except OSError:  # none yet, or none that can be reached: that is told where it is needed
        return
    if owner != account.uid:
        become_owner = f"-u '#{owner}'" if owner else "env -u SUDO_UID"
        raise ConfigError(
            f"{home} belongs to uid {owner}, and this command acts as {account.name} "
            f"(uid {account.uid}).\n"
            f"  try: sudo {become_owner} {HOME_VARIABLE}={shlex.quote(str(home))} halton-meter …"
        )


def _refuse_unreadable(account: Account) -> None:
    """Raise ConfigError when we, now the person, cannot read the program that we are."""
    import click

    import halton_meter

    for file in (sys.executable, os.__file__, click.__file__, halton_meter.__file__):
        if not os.access(file, os.R_OK):
            raise ConfigError(
                f"this command acts as {account.name}, who cannot read {file}: Halton Meter is "
                "installed where only root can read.\n"
                "  try: sudo python3 -m venv /opt/halton-meter && "
                "sudo /opt/halton-meter/bin/pip install halton-meter"
            )


def user_environment(
    account: Account, environ: Mapping[str, str], parent: bytes | None
) -> dict[str, str]:
    """The environment that the person's command would have had without sudo.

    `parent` is the raw environment of the sudo process (it was started with the person's own), or
    None when there is none to read: then ours is used, with the identity put right.
    """
    base = _parsed_environment(parent) if parent else None
    given = {name: value for name, value in environ.items() if not name.startswith(_CALLER_NAMES)}
    if account.uid == os.getuid():
        return given
    identity = {
        "HOME": str(account.home),
        "USER": account.name,
        "LOGNAME": account.name,
        "SHELL": account.shell,
    }
    if base is None:
        given.pop("MAIL", None)
        return {**given, **identity}
    # What sudo's own command line added ("sudo NAME=value halton-meter …") is kept.
    added = {name: value for name, value in given.items() if name not in base and name != "MAIL"}
    chosen = {name: given[name] for name in (HOME_VARIABLE,) if name in given}
    return {**added, **identity, **base, **chosen}


def _parsed_environment(raw: bytes) -> dict[str, str]:
    pairs = (entry.partition(b"=") for entry in raw.split(b"\0") if b"=" in entry)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs if name}


def sudo_environment() -> bytes | None:
    """The environment of the sudo process that started us, or None."""
    pid = os.getppid()
    try:
        if os.path.basename(os.readlink(f"/proc/{pid}/exe")) != "sudo":
            return None
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read(ENVIRONMENT_BYTES_MAX)
    except OSError:
        return None


def as_account(account: Account, function: Callable[[], Any]) -> Any:
    """The result of `function`, run in a child with the account's rights; it must be JSON-able.

    Raises ConfigError with the child's message when it raised one; ends when the child exits. The
    result is what a process of the account's says: whoever uses it as root looks at what it is.
    """
    if os.geteuid() != 0 or account.uid == 0:
        return function()
    environment = user_environment(account, os.environ, sudo_environment())
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            answer = json.dumps(_answer_as(account, environment, function))
            with os.fdopen(write_fd, "w") as file:
                file.write(answer)
            code = 0
        finally:
            os._exit(code)
    os.close(write_fd)
    raw = _answer(read_fd, pid)
    os.waitpid(pid, 0)
    said = untrusted.parsed(raw)  # the child was the account's to do with as it likes
    if said is None or not {"result", "problem", "exit"} & set(said):
        raise ConfigError(f"cannot act as {account.name} (uid {account.uid})")
    if "problem" in said:
        lines = str(said["problem"])[:PROBLEM_CHARACTERS_MAX].split("\n")
        raise ConfigError("\n".join(untrusted.printable(line, len(line)) for line in lines))
    if "exit" in said:
        sys.exit(untrusted.whole_number(said, "exit", 255) or 0)
    return said["result"]


def _answer(fd: int, pid: int) -> bytes:
    """What the child says until its end. One that says too much, or nothing for long, is ended."""
    raw, deadline = bytearray(), time.monotonic() + ANSWER_S_MAX
    ready = select.poll()  # select() takes no descriptor above 1,023
    ready.register(fd, select.POLLIN | select.POLLHUP)
    with os.fdopen(fd, "rb", buffering=0) as pipe:
        while len(raw) <= ANSWER_BYTES_MAX:
            if not ready.poll(max(0.0, deadline - time.monotonic()) * 1000):
                break
            data = pipe.read(1 << 16)
            if not data:
                return bytes(raw)
            raw += data
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return b""


def _answer_as(
    account: Account, environment: Mapping[str, str], function: Callable[[], Any]
) -> dict[str, Any]:
    """In the child: the result of `function`, or what came of it instead."""
    try:
        _become_with(account, environment)
        return {"result": function()}
    except ConfigError as error:
        return {"problem": str(error)}
    except (ImportError, OSError) as error:
        return {"problem": f"cannot act as {account.name} (uid {account.uid}): {error}"}
    except SystemExit as end:
        return {"exit": end.code if isinstance(end.code, int) else int(end.code is not None)}


def become(account: Account) -> None:
    """Give up root for good: groups first, then all three group and user ids. Raises OSError."""
    try:
        os.initgroups(account.name, account.gid)
    except OSError:
        os.setgroups([account.gid])
    if sys.platform == "darwin":  # which lacks these two; there, root's sets all three as well
        os.setgid(account.gid)
        os.setuid(account.uid)
    else:
        os.setresgid(account.gid, account.gid, account.gid)
        os.setresuid(account.uid, account.uid, account.uid)


def _become_with(account: Account, environment: Mapping[str, str]) -> None:
    """Become the account, with its own environment. Raises ConfigError."""
    try:
        become(account)
    except OSError as error:  # as in a user namespace that does not know the account
        raise ConfigError(
            f"root here cannot become {account.name} (uid {account.uid}): {error.strerror}.\n"
            f"  try: halton-meter as {account.name}, without sudo"
        ) from None
    os.environ.clear()
    os.environ.update(environment)
