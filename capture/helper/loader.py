"""Gets probe.bpf.c into the kernel, by one of two ways, and attaches it.

`libbpf` loads an object compiled ahead of time (0.2 s, nearly all of it the kernel's verifier, and
14 MB); `bcc` compiles on the spot (0.5 s more, 130 MB, kernel headers). Both only yield file
descriptors of programs and maps; attaching, map access and the ring buffer are the system calls
below, the same for both. Everything lives as long as this process: when it dies, however it dies,
the kernel removes every probe.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import fcntl
import hashlib
import mmap
import os
import platform
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

SOURCE = Path(__file__).parents[1] / "probe.bpf.c"
BUILT_OBJECT = Path(__file__).parents[1] / "probe.bpf.o"
CACHE_DIRECTORY = Path("/var/cache/halton-meter")
RING_BYTES = 4 * 1024 * 1024
PROCESS_RING_BYTES = 1024 * 1024  # as in probe.bpf.c

_X86 = platform.machine() in ("x86_64", "AMD64")
_NR_BPF = 321 if _X86 else 280
_NR_PERF_EVENT_OPEN = 298 if _X86 else 241
_MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _MAP_NEXT, _RAW_TRACEPOINT_OPEN = 1, 2, 3, 4, 17
_LINK_CREATE, _PERF_EVENT = 28, 41
_PERF_TYPE_TRACEPOINT = 2
_PERF_FLAG_FD_CLOEXEC = 8
_IOC_ENABLE, _IOC_SET_BPF = 0x2400, 0x40042408

PROGRAMS = (
    "enter_read",
    "enter_read_ex",
    "enter_write",
    "enter_write_ex",
    "enter_write_ex2",
    "leave_plain",
    "leave_ex",
    "enter_ctrl",
    "enter_set_host",
    "enter_free",
    "enter_clear",
    "enter_shutdown",
    "enter_go_read",
    "enter_go_write",
    "leave_go_read",
    "leave_go_write",
    "enter_go_close",
    "on_mapped",
    "on_lookup",
    "fork_arrays",
    "fork_locations",
    "on_exec",
    "on_exit",
)
# Also without this one: only kernels since 5.15 that know their own types (BTF) take it.
OPTIONAL = "on_exec_with_arguments"
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
    "name_places",
    "ring",
    "process_ring",
)

_libc = ctypes.CDLL(None, use_errno=True)


class LoadFailed(Exception):
    """The program could not be loaded; the text says what was missing and what would mend it."""


# --- system calls -------------------------------------------------------------------------------


def _syscall(number: int, *arguments: Any) -> int:
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _bpf(command: int, attributes: bytes) -> int:
    buffer = ctypes.create_string_buffer(attributes.ljust(128, b"\0"), 128)
    return _syscall(_NR_BPF, ctypes.c_int(command), buffer, ctypes.c_uint(128))


class Map:
    """A BPF map by its file descriptor; keys and values are bytes of the sizes given."""

    def __init__(self, fd: int, key_bytes: int, value_bytes: int) -> None:
        self.fd = fd
        self._key = ctypes.create_string_buffer(key_bytes)
        self._next = ctypes.create_string_buffer(key_bytes)
        self._value = ctypes.create_string_buffer(value_bytes)

    def _call(self, command: int, value: Any = None) -> bool:
        # A field that a command does not use must be zero, or the kernel answers EINVAL.
        at = 0 if value is None else ctypes.addressof(value)
        attributes = struct.pack("=IIQQQ", self.fd, 0, ctypes.addressof(self._key), at, 0)
        try:
            _bpf(command, attributes)
        except FileNotFoundError:
            return False
        return True

    def get(self, key: bytes) -> bytes | None:
        """The value, or None."""
        self._key.raw = key
        return self._value.raw if self._call(_MAP_LOOKUP, self._value) else None

    def set(self, key: bytes, value: bytes) -> None:
        """Insert or replace. Raises OSError (E2BIG when full)."""
        self._key.raw, self._value.raw = key, value
        self._call(_MAP_UPDATE, self._value)

    def drop(self, key: bytes) -> None:
        """Delete, if there."""
        self._key.raw = key
        self._call(_MAP_DELETE)

    def all_keys(self) -> list[bytes]:
        """Every key. Keys that come or go meanwhile may be missed or listed twice."""
        found: list[bytes] = []
        first = struct.pack("=IIQQQ", self.fd, 0, 0, ctypes.addressof(self._next), 0)
        attributes = first
        while len(found) < 1_000_000:
            try:
                _bpf(_MAP_NEXT, attributes)
            except FileNotFoundError:
                break
            found.append(self._next.raw)
            self._key.raw = self._next.raw
            attributes = struct.pack(
                "=IIQQQ", self.fd, 0, ctypes.addressof(self._key), ctypes.addressof(self._next), 0
            )
        return found


def _perf_event_open(kind: int, config: int, config1: int = 0, config2: int = 0) -> int:
    # struct perf_event_attr, 112 bytes (version 5): type, size, config, sample period and type,
    # read format, flags, wakeup, bp_type, config1, config2.
    attributes = struct.pack(
        "=IIQQQQQIIQQ", kind, 112, config, 0, 0, 0, 0, 0, 0, config1, config2
    ).ljust(112, b"\0")
    buffer = ctypes.create_string_buffer(attributes, 112)
    return _syscall(
        _NR_PERF_EVENT_OPEN,
        buffer,
        ctypes.c_int(-1),  # every process: the scope is the program's business
        ctypes.c_int(0),
        ctypes.c_int(-1),
        ctypes.c_ulong(_PERF_FLAG_FD_CLOEXEC),
    )


def _enable(event: int, program: int) -> int:
    try:
        fcntl.ioctl(event, _IOC_SET_BPF, program)
        fcntl.ioctl(event, _IOC_ENABLE, 0)
    except OSError:
        os.close(event)
        raise
    return event


def uprobe_type() -> int:
    """The number of the kernel's uprobe event source. Raises FileNotFoundError without one."""
    return int(Path("/sys/bus/event_source/devices/uprobe/type").read_text())


def attach_uprobe(program: int, path: str, offset: int, *, at_return: bool, cookie: int = 0) -> int:
    """Attach to a file offset of `path`, in every process that maps it; closing detaches.

    The program can ask for `cookie`; a kernel before 5.15 has none to give: OSError (EINVAL).
    """
    name = ctypes.create_string_buffer(os.fsencode(path))
    event = _perf_event_open(uprobe_type(), int(at_return), ctypes.addressof(name), offset)
    if not cookie:
        return _enable(event, program)
    try:
        fcntl.ioctl(event, _IOC_ENABLE, 0)
        return _bpf(_LINK_CREATE, struct.pack("=IIIIQ", program, event, _PERF_EVENT, 0, cookie))
    finally:
        os.close(event)  # the link holds it


def attach_tracepoint(program: int, number: int) -> int:
    """Attach to the tracepoint with this id (tracefs: events/…/id); closing detaches."""
    return _enable(_perf_event_open(_PERF_TYPE_TRACEPOINT, number), program)


def attach_raw_tracepoint(program: int, name: str) -> int:
    """Attach to a raw tracepoint by name; closing detaches."""
    text = ctypes.create_string_buffer(name.encode())
    return _bpf(_RAW_TRACEPOINT_OPEN, struct.pack("=QI", ctypes.addressof(text), program))


class Ring:
    """The consumer's side of a BPF ring buffer (Documentation/bpf/ringbuf.rst)."""

    _BUSY, _DISCARDED, _LENGTH = 1 << 31, 1 << 30, (1 << 30) - 1

    def __init__(self, fd: int, size_bytes: int) -> None:
        page = mmap.PAGESIZE
        self.fd = fd
        self.size_bytes = size_bytes
        self._mask = size_bytes - 1
        consumer = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        # One aligned store. `struct.pack_into` writes zeros first: a kernel that reads just then
        # takes the ring for full and drops the record.
        self._consumer = ctypes.c_uint64.from_buffer(consumer)
        # The kernel offers the data pages twice in a row, so that no record need be split; mapping
        # them once keeps our memory down by the ring's size, and few records lie across the end.
        self._producer = mmap.mmap(
            fd, page + size_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=page
        )
        self._data = memoryview(self._producer)[page:]
        self.position: int = self._consumer.value

    def produced(self) -> int:
        """How far the kernel has reserved."""
        return int(struct.unpack_from("=Q", self._producer)[0])

    def records(self) -> Iterator[tuple[int, memoryview]]:
        """Finished records as (position after it, bytes); call `release` when done with them."""
        at, end = self.position, self.produced()
        while at < end:
            start = at & self._mask
            (header,) = struct.unpack_from("=I", self._data, start)
            if header & self._BUSY:
                break
            length = header & self._LENGTH
            at += (length + 8 + 7) & ~7
            if header & self._DISCARDED:
                continue
            yield at, self._slice((start + 8) & self._mask, length)

    def _slice(self, start: int, length: int) -> memoryview:
        whole = self._data[start : start + length]
        if len(whole) == length:
            return whole
        return memoryview(bytes(whole) + bytes(self._data[: length - len(whole)]))

    def release(self, position: int) -> None:
        """Give the kernel back what lies before `position`."""
        self.position = position
        self._consumer.value = position

    def filled(self) -> int:
        """Bytes that the kernel has reserved and we have not given back."""
        return self.produced() - self.position

    def skip_discarded(self) -> None:
        """Step over discarded records at the front, unseen by `records`."""
        at, end = self.position, self.produced()
        while at < end:
            (header,) = struct.unpack_from("=I", self._data, at & self._mask)
            if header & self._BUSY or not header & self._DISCARDED:
                break
            at += ((header & self._LENGTH) + 8 + 7) & ~7
        if at != self.position:
            self.release(at)


# --- the two ways in ----------------------------------------------------------------------------


class Loaded(Protocol):
    """A loaded program: descriptors of its programs and maps, by name."""

    name: str
    programs: dict[str, int]
    maps: dict[str, int]


# libbpf prints to stderr unless told; formatting a va_list from ctypes is not worth it. It keeps
# the callback for the whole process, so it must live as long.
_SILENT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(
    lambda *_: 0
)


@dataclass(frozen=True, slots=True)
class Given:
    """What another process has loaded, by descriptors."""

    name: str
    programs: dict[str, int]
    maps: dict[str, int]


class _Libbpf:
    name = "libbpf"

    def __init__(self, object_path: Path, ring_bytes: int) -> None:
        self._library = library = libbpf_library()
        library.libbpf_set_print(_SILENT)
        for function in ("bpf_object__open_file", "bpf_object__find_map_by_name"):
            getattr(library, function).restype = ctypes.c_void_p
        library.bpf_object__find_program_by_name.restype = ctypes.c_void_p
        wanted = [*PROGRAMS, OPTIONAL]
        if self._load(object_path, ring_bytes):
            wanted.remove(OPTIONAL)
            if error := self._load(object_path, ring_bytes, without=OPTIONAL):
                raise LoadFailed(f"the kernel refused the program: {os.strerror(-error)}")
        self.programs = {name: library.bpf_program__fd(self._program(name)) for name in wanted}
        self.maps = {
            name: library.bpf_object__find_map_fd_by_name(self._handle, name.encode())
            for name in MAPS
        }

    def _program(self, name: str) -> ctypes.c_void_p:
        found = self._library.bpf_object__find_program_by_name(self._handle, name.encode())
        return ctypes.c_void_p(found)

    def _load(self, object_path: Path, ring_bytes: int, without: str | None = None) -> int:
        """Open the object and load it; 0, or what the kernel had against it."""
        library = self._library
        handle = library.bpf_object__open_file(os.fsencode(object_path), None)
        if not handle:
            raise LoadFailed(f"libbpf cannot open {object_path}")
        self._handle = ctypes.c_void_p(handle)
        ring = library.bpf_object__find_map_by_name(self._handle, b"ring")
        library.bpf_map__set_max_entries(ctypes.c_void_p(ring), ctypes.c_uint(ring_bytes))
        if without:
            library.bpf_program__set_autoload(self._program(without), ctypes.c_bool(False))
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
            OPTIONAL: module.BPF.TRACEPOINT,
            "on_exit": module.BPF.RAW_TRACEPOINT,
        }
        try:
            self.programs = {
                name: self._bpf.load_func(name, kinds.get(name, module.BPF.KPROBE)).fd
                for name in PROGRAMS
            }
            self.maps = {
                name: module.lib.bpf_table_fd(self._bpf.module, name.encode()) for name in MAPS
            }
        except Exception as error:
            raise LoadFailed(f"the kernel refused the program: {error}") from error
        with contextlib.suppress(Exception):
            self.programs[OPTIONAL] = self._bpf.load_func(OPTIONAL, kinds[OPTIONAL]).fd


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
    """What tells one version of the program from another."""
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


def load(way: str = "auto", ring_bytes: int = RING_BYTES) -> Loaded:
    """Load the program `way` ("libbpf", "bcc", or "auto": the first that works)."""
    if way not in ("auto", "libbpf", "bcc"):
        raise LoadFailed(f"there is no loader {way!r}: use auto, libbpf or bcc")
    reasons = []
    if way in ("auto", "libbpf"):
        try:
            return _Libbpf(find_object(), ring_bytes)
        except LoadFailed as error:
            reasons.append(f"libbpf: {error}")
    if way in ("auto", "bcc"):
        try:
            return _Bcc(ring_bytes)
        except LoadFailed as error:
            reasons.append(f"bcc: {error}")
    raise LoadFailed("; ".join(reasons))
