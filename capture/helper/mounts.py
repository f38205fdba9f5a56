"""What the root helper mounts for itself alone: tracefs, and headers for bcc where there are none.

In a mount namespace of its own, so that nobody else sees any of it and all of it ends with the
helper.
"""

from __future__ import annotations

import ctypes
import os
import tempfile

_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 0x40000

_libc = ctypes.CDLL(None, use_errno=True)


def own_mounts() -> None:
    """Take a mount namespace of our own, so that mounts made here are seen by nobody else."""
    if _libc.unshare(_CLONE_NEWNS) == 0:
        _libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None)


def tracing_folder() -> str:
    """Where tracefs is; mounted now, for us alone, when it is nowhere."""
    for folder in ("/sys/kernel/tracing", "/sys/kernel/debug/tracing"):
        if os.path.exists(f"{folder}/events/sched"):
            return folder
    folder = "/sys/kernel/tracing"
    if not os.path.isdir(folder):
        folder = tempfile.mkdtemp(prefix="halton-tracing-")
    if _libc.mount(b"nodev", folder.encode(), b"tracefs", ctypes.c_ulong(0), None):
        code = ctypes.get_errno()
        raise OSError(code, f"cannot mount tracefs: {os.strerror(code)}")
    return folder


def offer_headers() -> None:
    """Let bcc find kernel headers of another version where those of this kernel are missing.

    Uprobes use no kernel structure but pt_regs, which does not change.
    """
    release = os.uname().release
    if os.path.exists(f"/lib/modules/{release}/build"):
        return
    names = sorted(os.listdir("/usr/src")) if os.path.isdir("/usr/src") else []
    common = [name for name in names if name.startswith("linux-headers-") and "common" in name]
    build = [name for name in names if name.startswith("linux-headers-") and "common" not in name]
    if not build or not os.path.isdir("/lib/modules"):
        return
    if _libc.mount(b"none", b"/lib/modules", b"tmpfs", ctypes.c_ulong(0), None) == 0:
        os.makedirs(f"/lib/modules/{release}")
        os.symlink(f"/usr/src/{build[-1]}", f"/lib/modules/{release}/build")
        os.symlink(f"/usr/src/{(common or build)[-1]}", f"/lib/modules/{release}/source")
