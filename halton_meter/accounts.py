"""Whose command this is, and where that user's data is. The only answers to both.

Under sudo a command acts for the user who called it, not for root. The data folder is
HALTON_METER_HOME, or else `.halton-meter` in that user's home directory. This file asks the
system and changes nothing: `privileges.py` acts.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from halton_meter.settings.config import ConfigError

if TYPE_CHECKING:
    import pwd

HOME_VARIABLE = "HALTON_METER_HOME"
PATH_STEPS_MAX = 512  # of a path with the links in it followed
# Owns everything that has no owner in this user namespace, / and /home among it.
NOBODY_UID = 65534


# Named tuples: every command imports this file, and a frozen dataclass takes a millisecond to make.
class Account(NamedTuple):
    """A user of this machine: whose processes are metered and whose files are written."""

    uid: int
    gid: int
    name: str
    home: Path
    shell: str = "/bin/sh"


def is_root() -> bool:
    """True when this process may attach probes and change users."""
    return sys.platform != "win32" and os.geteuid() == 0


def invoking_account(environ: Mapping[str, str] | None = None) -> Account:
    """The user whose command this is, and whose files it may touch.

    Under sudo, doas or pkexec the user who called it. Where root works without them in a data
    folder that another user controls, that user: what stands there may be a trap for root. Else
    the process's own account. Raises ConfigError for a caller who is no user here.
    """
    environ = os.environ if environ is None else environ
    uid = os.getuid()
    if uid != 0:
        return _account(uid) or _unnamed(uid, os.getgid(), environ.get("HOME", "/"))
    if (called_by := caller(environ)) is not None:
        return called_by
    holder = _holder(home_folder(environ))
    if holder is None:
        return _account(0) or _unnamed(0, 0, environ.get("HOME", "/"))
    return _account(holder.st_uid) or _unnamed(holder.st_uid, holder.st_gid, "/")


def caller(environ: Mapping[str, str]) -> Account | None:
    """The account that called the tool which made us root; None when that was root itself."""
    for name in ("SUDO_UID", "PKEXEC_UID", "DOAS_USER"):
        if value := environ.get(name):
            break
    else:
        return None
    account = None
    if name == "DOAS_USER":
        with contextlib.suppress(ConfigError):
            account = account_named(value)
    elif value.isascii() and value.isdigit():
        account = _account(int(value))
    if account is None:
        raise ConfigError(
            f"{name} is {value!r}, which is no user here",
            f"run it as that user, or as root for root: env -u {name} halton-meter …",
        )
    return account if account.uid != 0 else None


def _account(uid: int) -> Account | None:
    import pwd

    try:
        entry = pwd.getpwuid(uid)
    except (KeyError, OverflowError):
        return None
    return _of_entry(entry)


def _of_entry(entry: pwd.struct_passwd) -> Account:
    home, shell = Path(entry.pw_dir), entry.pw_shell or "/bin/sh"
    return Account(entry.pw_uid, entry.pw_gid, entry.pw_name, home, shell)


def _unnamed(uid: int, gid: int, home: str) -> Account:
    """An account that has no entry, as in many containers."""
    return Account(uid, gid, str(uid), Path(home))


def _holder(folder: Path) -> os.stat_result | None:
    """Who besides root decides where this path leads: the owner of the first folder or link on
    the way that is not root's. None: only root does.
    """
    reached, ahead = Path("/"), [*reversed(folder.parts[1:])]
    for _ in range(PATH_STEPS_MAX):
        if not ahead:
            break
        part = ahead.pop()
        if part == "..":
            reached = reached.parent
            continue
        try:
            found = os.lstat(reached / part)
        except OSError:  # the rest is yet to be made
            break
        if found.st_uid not in (0, NOBODY_UID):
            return found
        if stat.S_ISLNK(found.st_mode):
            target = Path(os.readlink(reached / part))
            reached = Path("/") if target.is_absolute() else reached
            ahead += reversed(target.parts[target.is_absolute() :])
        else:
            reached /= part
    return None


def account_named(name: str) -> Account:
    """The account of that name or numeric id. Raises ConfigError when there is none."""
    import pwd

    try:
        return _of_entry(pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name))
    except (KeyError, ValueError, OverflowError):
        raise ConfigError(f"there is no user {name!r} here", "getent passwd") from None


def home_folder(environ: Mapping[str, str] | None = None, account: Account | None = None) -> Path:
    """The data folder, the only answer to where it is: HALTON_METER_HOME, else `.halton-meter` in
    the home directory of `account`; without one, of the user who called sudo, never root's.
    Raises ConfigError where there is no telling.
    """
    environ = os.environ if environ is None else environ
    named = environ.get(HOME_VARIABLE)
    if named:
        return _absolute(named)
    if account is None and is_root():
        account = caller(environ)
    try:
        home = account.home if account is not None else environ.get("HOME") or Path.home()
    except RuntimeError:
        what = "HOME is not set, and this user has no home directory; "
        raise ConfigError(f"{what}set it: export {HOME_VARIABLE}=FOLDER") from None
    return Path(home) / ".halton-meter"


def _absolute(named: str) -> Path:
    try:
        return Path(named).expanduser().absolute()
    except RuntimeError:
        what = f"{HOME_VARIABLE} is {named!r}: there is no user {named[1:].partition('/')[0]!r} "
        raise ConfigError(f"{what}here; name a folder: export {HOME_VARIABLE}=FOLDER") from None
    except OSError as error:  # relative to a folder that is gone
        what = f"{HOME_VARIABLE} is {named!r}, which is relative to the current folder, and that "
        raise ConfigError(f"{what}cannot be read: {error.strerror}; go to another: cd") from None
