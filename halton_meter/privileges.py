"""Root and the user: whom a command acts for, with which environment, and with which rights.

A command that needs no root becomes the user for good before it does anything (`settle`, called
once for all commands in `cli/__init__.py`). A command that stays root reads and writes the user's
files in a child process that has become the user first. So no link in the user's folders can lead
root elsewhere. `accounts.py` says who the user is.
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
from halton_meter.settings.config import ConfigError

ENVIRONMENT_BYTES_MAX = 4 << 20
ANSWER_BYTES_MAX = 4 << 20
ANSWER_S_MAX = 120.0  # reading a large store takes a while
PROBLEM_CHARACTERS_MAX = 2000
_CALLER_NAMES = ("SUDO_", "DOAS_USER", "PKEXEC_UID")


def settle(*, needs_root: bool) -> None:
    """Become the user for good, unless the command `needs_root`.

    Also settles where the data folder is, so that root and the user look in the same one: as the
    user's own environment has it. Does nothing where we are not root, or where root is the user.
    Raises ConfigError when it cannot be done.
    """
    if os.geteuid() != 0:
        return
    account = invoking_account()
    if account.uid == 0:
        return
    environment = user_environment(account, os.environ, sudo_environment())
    called = caller(os.environ) is not None
    home = home_folder(environment if called else os.environ)
    # systemd tells a service whose it is; the path to its data folder may lead through others'.
    if called or not needs_root:
        _refuse_foreign(home, account)
    if not needs_root:
        _become_with(account, environment)
        _refuse_unreadable(account)
    if home != home_folder(account=account if needs_root else None):
        os.environ[HOME_VARIABLE] = str(home)


def become_for_good(account: Account) -> None:
    """Become `account`, with its own environment and the same data folder. Raises ConfigError.

    For a service that needs root to begin with. Does nothing where we are not root, or are to be.
    """
    if os.geteuid() != 0 or account.uid == 0:
        return
    home = home_folder(account=account)
    _refuse_foreign(home, account)
    _become_with(account, user_environment(account, os.environ, sudo_environment()))
    _refuse_unreadable(account)
    os.environ[HOME_VARIABLE] = str(home)


def _refuse_foreign(home: Path, account: Account) -> None:
    """Raise ConfigError for a data folder that belongs to another user, or to root."""
    try:
        owner = home.stat().st_uid
    except OSError:  # none yet, or unreachable: whoever needs it reports that
        return
    if owner == account.uid:
        return
    what = f"{home} belongs to uid {owner}, and this command acts as {account.name} "
    what += f"(uid {account.uid})"
    by_place = owner == 0 and invoking_account({HOME_VARIABLE: str(home)}).uid != 0
    if not by_place:
        become_owner = f"-u '#{owner}'" if owner else "env -u SUDO_UID"
        command = f"{HOME_VARIABLE}={shlex.quote(str(home))} halton-meter …"
        raise ConfigError(what, f"sudo {become_owner} {command}")
    # Without sudo, too, it would be so: see `invoking_account`.
    what += f": a folder or link of {account.name}'s leads there"
    other = f"{HOME_VARIABLE}=/var/lib/halton-meter halton-meter …"
    if os.path.realpath(home) != str(home):  # root must not give away where a user's link leads
        raise ConfigError(what, f"use another folder: {other}")
    give = f"sudo chown -Rh {account.uid}:{account.gid} {shlex.quote(str(home))}"
    raise ConfigError(what, f"{give}, or use another folder: {other}")


def _refuse_unreadable(account: Account) -> None:
    """Raise ConfigError when the user, whom we are now, cannot read our own program."""
    import click

    import halton_meter
    from halton_meter import installed

    for file in (sys.executable, os.__file__, click.__file__, halton_meter.__file__):
        if not os.access(file, os.R_OK):
            raise ConfigError(
                f"this command acts as {account.name}, who cannot read {file}: Halton Meter is "
                "installed where only root can read",
                installed.for_root(),
            )


def user_environment(
    account: Account, environ: Mapping[str, str], parent: bytes | None
) -> dict[str, str]:
    """The environment that the user's command would have had without sudo.

    `parent` is the raw environment of the sudo process (it was started with the user's own), or
    None when it cannot be read: then ours is used, with the identity corrected.
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
    result comes from a process of the account's: whoever uses it as root checks it first.
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
    said = untrusted.parsed(raw)  # the account could do with the child as it liked
    if said is None or not {"result", "problem", "exit"} & set(said):
        raise ConfigError(f"cannot act as {account.name} (uid {account.uid})")
    if "problem" in said:
        raise ConfigError(*(_harmless(said, name) for name in ("problem", "fix")))
    if "exit" in said:
        sys.exit(untrusted.whole_number(said, "exit", 255) or 0)
    return said["result"]


def _harmless(said: Mapping[str, Any], name: str) -> str:
    """A text of the child's, which may have several lines."""
    lines = str(said.get(name, ""))[:PROBLEM_CHARACTERS_MAX].split("\n")
    return "\n".join(untrusted.printable(line, len(line)) for line in lines)


def _answer(fd: int, pid: int) -> bytes:
    """What the child writes until its end. It is killed if it writes too much or takes too long."""
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
    """In the child: the result of `function`, or the problem that it met."""
    try:
        _become_with(account, environment)
        return {"result": function()}
    except ConfigError as error:
        return {"problem": error.what, "fix": error.fix}
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
            f"root here cannot become {account.name} (uid {account.uid}): {error.strerror}",
            f"run halton-meter as {account.name}, without sudo",
        ) from None
    os.environ.clear()
    os.environ.update(environment)
