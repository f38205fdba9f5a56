"""Root and the person: whose environment a command gets, and acting with the person's rights.

Whatever root reads or writes on a person's behalf is done in a child that has become that person
first, so that no name in their folders can lead root elsewhere. This file starts nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

from halton_meter import untrusted
from halton_meter.config import Account, ConfigError

ENVIRONMENT_BYTES_MAX = 4 << 20
ANSWER_BYTES_MAX = 4 << 20
ANSWER_S_MAX = 120.0  # reading a large store takes a while
PROBLEM_CHARACTERS_MAX = 2000


def user_environment(
    account: Account, environ: Mapping[str, str], parent: bytes | None
) -> dict[str, str]:
    """The environment that the person's command would have had without sudo.

    `parent` is the raw environment of the sudo process (it was started with the person's own), or
    None when there is none to read: then ours is used, with the identity put right.
    """
    base = _parsed_environment(parent) if parent else None
    given = {name: value for name, value in environ.items() if not name.startswith("SUDO_")}
    if "SUDO_UID" not in environ:
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
    return {**added, **identity, **base}


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

    Raises ConfigError with the child's message when it raised one. The result is what a process of
    the account's says: whoever uses it as root looks at what it is first.
    """
    if os.geteuid() != 0 or account.uid == 0:
        return function()
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            become(account)
            try:
                answer = json.dumps({"result": function()})
            except ConfigError as error:
                answer = json.dumps({"problem": str(error)})
            except (ImportError, OSError) as error:
                reason = f"cannot act as {account.name} (uid {account.uid}): {error}"
                answer = json.dumps({"problem": reason})
            with os.fdopen(write_fd, "w") as file:
                file.write(answer)
            code = 0
        finally:
            os._exit(code)
    os.close(write_fd)
    raw = _answer(read_fd, pid)
    os.waitpid(pid, 0)
    said = untrusted.parsed(raw)  # the child was the account's to do with as it likes
    if said is None or not {"result", "problem"} & set(said):
        raise ConfigError(f"cannot act as {account.name} (uid {account.uid})")
    if "problem" in said:
        lines = str(said["problem"])[:PROBLEM_CHARACTERS_MAX].split("\n")
        raise ConfigError("\n".join(untrusted.printable(line, len(line)) for line in lines))
    return said["result"]


def _answer(fd: int, pid: int) -> bytes:
    """What the child says until its end. One that says too much, or nothing for long, is ended."""
    raw, deadline = bytearray(), time.monotonic() + ANSWER_S_MAX
    with os.fdopen(fd, "rb", buffering=0) as pipe:
        while len(raw) <= ANSWER_BYTES_MAX:
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                break
            data = pipe.read(1 << 16)
            if not data:
                return bytes(raw)
            raw += data
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return b""


def become(account: Account) -> None:
    """Give up root for good: groups first, then all three group and user ids."""
    try:
        os.initgroups(account.name, account.gid)
    except OSError:
        os.setgroups([account.gid])
    os.setresgid(account.gid, account.gid, account.gid)
    os.setresuid(account.uid, account.uid, account.uid)
