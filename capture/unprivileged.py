"""How a process of ours gives up root for good, and ends with the one that started it."""

from __future__ import annotations

import ctypes
import os

NOBODY = 65534
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_SIGKILL = 9

_libc = ctypes.CDLL(None, use_errno=True)


def give_up_privileges() -> None:
    """Become nobody for good (where we are root), whom no other process of nobody's can trace."""
    become(NOBODY, NOBODY)


def become(uid: int, gid: int) -> None:
    """Become that user for good (where we are root), of no other group; nobody can trace us."""
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def end_with_parent() -> None:
    """Be killed when the process that started us ends. To be called after a change of user."""
    _libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
