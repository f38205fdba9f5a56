"""Loads probe.bpf.c into the kernel, by one of two ways.

`libbpf` loads an object compiled ahead of time (0.2 s, nearly all of it the kernel's verifier, and
14 MB); `bcc` compiles on the spot (0.5 s more, 130 MB, kernel headers). Both only yield file
descriptors of programs and maps; `bpf.py` attaches and reads them, the same for both.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import hashlib
import os
import platform
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from capture import bpf
from capture.functions import stacks

SOURCE = Path(__file__).parent / "probe.bpf.c"
BUILT_OBJECT = Path(__file__).parent / "probe.bpf.o"
CACHE_DIRECTORY = Path("/var/cache/halton-meter")
RING_BYTES = 4 * 1024 * 1024
PROCESS_RING_BYTES = 1024 * 1024  # as in probe.bpf.c

PROGRAMS = (
    *stacks.PROGRAMS,
    "on_lookup",
    "on_looked_up",
    "fork_arrays",
    "fork_locations",
    "on_exec",
    "on_exit",
    "on_socket_state",
    "on_socket_destroyed",
    "on_socket_received",
)
# Also without these: only kernels since 5.15 that know their own types (BTF) take them.
OPTIONAL = ("on_exec_with_arguments", "on_exit_of_last", "on_socket_sent")
# Of these, what finds its way in the kernel by those types, which bcc does not read: it has the
# kernel's headers at best, and those of another version than the one that runs.
BY_TYPES = ("on_exit_of_last",)
# Where the kernel attaches all of a file's probes at once it runs one of these, which carry on as
# the program that belongs there; `FILE_PROGRAMS` has each at its number in `stacks.PROGRAMS`.
AT_ONCE = (AT_ENTRY, AT_RETURN) = ("at_entry", "at_return")
FILE_PROGRAMS = "file_programs"
# Programs that another one stands in for: the verifier takes some 50 ms for each, at every start.
SAME = {"leave_ex": "leave_plain"}
# Besides, where cookies have the program's number, which this one reads.
ANY_WRITE = "enter_any_write"
WRITES = ("enter_write", "enter_write_ex", "enter_write_ex2")
MAPS = (
    "settings",
    "stats",
    "connections",
    "denied",
    "threads",
    "tree",
    "owners",
    "uids",
    "hosts",
    "proofs",
    "name_locations",
    "ring",
    "process_ring",
    "sockets",
    "addresses",
    "pausing",
    "paused",
)


class LoadFailed(Exception):
    """The program could not be loaded; the text says what is missing and how to install it."""


class Loaded(Protocol):
    """A loaded program: descriptors of its programs and maps, by name."""

    name: str
    programs: dict[str, int]
    maps: dict[str, int]


# libbpf prints to stderr by default; formatting a va_list from ctypes is not worth it. It keeps
# the callback for the whole process, so it must live as long.
_SILENT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
    lambda *_: 0
)


@dataclass(slots=True)
class Given:
    """What another process has loaded, by descriptors."""

    name: str
    programs: dict[str, int]
    maps: dict[str, int]


class _Libbpf:
    name = "libbpf"

    def __init__(self, object_path: Path, ring_bytes: int, *, at_once: bool) -> None:
        self._at_once = at_once
        self._library = library = libbpf_library()
        library.libbpf_set_print(_SILENT)
        for function in ("bpf_object__open_file", "bpf_object__find_map_by_name"):
            getattr(library, function).restype = ctypes.c_void_p
        library.bpf_object__find_program_by_name.restype = ctypes.c_void_p
        self._same = SAME | (dict.fromkeys(WRITES, ANY_WRITE) if at_once else {})
        always = [*PROGRAMS, *(AT_ONCE if at_once else ())]
        wanted = [*always, *OPTIONAL]
        if self._load(object_path, ring_bytes):
            wanted = always
            if error := self._load(object_path, ring_bytes, without=OPTIONAL):
                raise LoadFailed(f"the kernel refused the program: {os.strerror(-error)}")
        self.programs = {name: library.bpf_program__fd(self._program(name)) for name in wanted}
        self.maps = {
            name: library.bpf_object__find_map_fd_by_name(self._handle, name.encode())
            for name in (*MAPS, *((FILE_PROGRAMS,) if at_once else ()))
        }
        if at_once:
            table = bpf.Map(self.maps[FILE_PROGRAMS], 4, 4)
            for number, name in enumerate(stacks.PROGRAMS):
                table.set(struct.pack("=I", number), struct.pack("=i", self.programs[name]))

    def _program(self, name: str) -> ctypes.c_void_p:
        name = self._same.get(name, name)
        found = self._library.bpf_object__find_program_by_name(self._handle, name.encode())
        return ctypes.c_void_p(found)

    def _load(self, object_path: Path, ring_bytes: int, without: Sequence[str] = ()) -> int:
        """Open the object and load it; 0, or what the kernel had against it."""
        library = self._library
        handle = library.bpf_object__open_file(os.fsencode(object_path), None)
        if not handle:
            raise LoadFailed(f"libbpf cannot open {object_path}")
        self._handle = ctypes.c_void_p(handle)
        ring = library.bpf_object__find_map_by_name(self._handle, b"ring")
        library.bpf_map__set_max_entries(ctypes.c_void_p(ring), ctypes.c_uint(ring_bytes))
        spared = WRITES if self._at_once else (*AT_ONCE, ANY_WRITE)
        for name in (*without, *spared):
            found = library.bpf_object__find_program_by_name(self._handle, name.encode())
            library.bpf_program__set_autoload(ctypes.c_void_p(found), ctypes.c_bool(False))
        for name in (*stacks.PROGRAMS, *AT_ONCE) if self._at_once else ():
            library.bpf_program__set_expected_attach_type(self._program(name), bpf.UPROBE_MULTI)
        error = int(library.bpf_object__load(self._handle))
        if error:
            library.bpf_object__close(self._handle)
        return error


class _Bcc:
    name = "bcc"

    def __init__(self, ring_bytes: int) -> None:
        module = import_bcc()
        flags = ["-DHALTON_BCC", f"-DRING_BYTES={ring_bytes}", "-Wno-everything"]
        try:
            self._bpf = module.BPF(text=SOURCE.read_text(), cflags=flags)
        except Exception as error:
            raise LoadFailed(f"bcc cannot compile the program: {error}") from error
        kinds = {
            "fork_arrays": module.BPF.TRACEPOINT,
            "fork_locations": module.BPF.TRACEPOINT,
            "on_exec": module.BPF.TRACEPOINT,
            "on_exec_with_arguments": module.BPF.TRACEPOINT,
            "on_socket_state": module.BPF.TRACEPOINT,
            "on_exit": module.BPF.RAW_TRACEPOINT,
            "on_socket_sent": module.BPF.RAW_TRACEPOINT,
            "on_socket_received": module.BPF.RAW_TRACEPOINT,
            "on_socket_destroyed": module.BPF.RAW_TRACEPOINT,
        }
        try:
            self.programs = {
                name: self._bpf.load_func(name, kinds.get(name, module.BPF.KPROBE)).fd
                for name in PROGRAMS
                if name not in SAME
            }
            self.programs |= {name: self.programs[other] for name, other in SAME.items()}
            self.maps = {
                name: module.lib.bpf_table_fd(self._bpf.module, name.encode()) for name in MAPS
            }
        except Exception as error:
            raise LoadFailed(f"the kernel refused the program: {error}") from error
        for name in OPTIONAL:
            if name in BY_TYPES:
                continue
            with contextlib.suppress(Exception):
                self.programs[name] = self._bpf.load_func(name, kinds[name]).fd


def libbpf_library() -> ctypes.CDLL:
    """Open libbpf. Raises LoadFailed."""
    for name in ("libbpf.so.1", ctypes.util.find_library("bpf") or ""):
        with contextlib.suppress(OSError):
            if name:
                return ctypes.CDLL(name)
    raise LoadFailed("libbpf.so.1 is not installed (apt install libbpf1)")


def import_bcc() -> Any:
    """Import bcc, also from outside a virtual environment. Raises LoadFailed."""
    try:
        import bcc
    except ImportError:
        # The distribution's package is plain Python over ctypes and serves any interpreter.
        extra = "/usr/lib/python3/dist-packages"
        sys.path.append(extra)
        try:
            import bcc
        except ImportError:
            raise LoadFailed("bcc is not installed (apt install python3-bpfcc)") from None
        finally:
            sys.path.remove(extra)
    return bcc


def compile_object(target: Path) -> None:
    """Compile the program ahead of time with clang. Raises LoadFailed."""
    compiler = clang()
    if compiler is None:
        raise LoadFailed("clang is not installed (apt install clang)")
    machine = "arm64" if platform.machine() == "aarch64" else "x86"
    target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        made = Path(directory) / target.name
        command = [compiler, "-O2", "-g", "-target", "bpf", f"-D__TARGET_ARCH_{machine}"]
        done = subprocess.run(
            [*command, "-c", str(SOURCE), "-o", str(made)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "TMPDIR": directory},
        )
        if done.returncode:
            raise LoadFailed(f"clang cannot compile {SOURCE.name}: {done.stderr[:500]}")
        made.chmod(0o644)
        made.replace(target)


def clang() -> str | None:
    """The compiler, where there is one."""
    return shutil.which("clang")


def source_digest() -> str:
    """A digest of the program's source: another version has another."""
    return hashlib.blake2b(SOURCE.read_bytes(), digest_size=8).hexdigest()


def _cached_object() -> Path:
    return CACHE_DIRECTORY / f"probe-{source_digest()}-{platform.machine()}.o"


def built_object() -> Path | None:
    """The compiled program: built with the wheel, else from the cache; None when in neither."""
    if BUILT_OBJECT.exists():
        return BUILT_OBJECT
    cached = _cached_object()
    return cached if _is_roots(cached.parent) and _is_roots(cached) else None


def _is_roots(path: Path) -> bool:
    """Whether nobody but root can have written this file or folder; a link is neither."""
    try:
        found = path.lstat()
    except OSError:  # not there, or in a folder that only root may enter
        return False
    return found.st_uid == 0 and not found.st_mode & 0o022 and not stat.S_ISLNK(found.st_mode)


def find_object() -> Path:
    """The compiled program, compiled into the cache now if it must be. Raises LoadFailed."""
    found = built_object()
    if found is None:
        found = _cached_object()
        found.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if not _is_roots(found.parent):
            raise LoadFailed(f"{found.parent} is not root's alone (sudo rm -r {found.parent})")
        compile_object(found)
    return found


def load(way: str = "auto", ring_bytes: int = RING_BYTES, *, at_once: bool = True) -> Loaded:
    """Load the program `way` ("libbpf", "bcc", or "auto": the first that works).

    Its probes are attached one by one with bcc, on kernels before 6.6, and unless `at_once`.
    """
    if way not in ("auto", "libbpf", "bcc"):
        raise LoadFailed(f"there is no loader {way!r}: use auto, libbpf or bcc")
    reasons = []
    if way in ("auto", "libbpf"):
        try:
            at_once = at_once and bpf.attaches_at_once()
            return _Libbpf(find_object(), ring_bytes, at_once=at_once)
        except LoadFailed as error:
            reasons.append(f"libbpf: {error}")
    if way in ("auto", "bcc"):
        try:
            return _Bcc(ring_bytes)
        except LoadFailed as error:
            reasons.append(f"bcc: {error}")
    raise LoadFailed("; ".join(reasons))
