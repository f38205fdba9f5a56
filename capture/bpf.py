"""The system calls of eBPF: maps, ring buffers, attaching. Everything is a file descriptor.

No library is needed for these: libbpf and bcc only load the program (`loader.py`). What is attached
or mapped lives as long as somebody holds its descriptor: when the last holder dies, however it
dies, the kernel removes it. This file knows no program and no map by name.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_X86 = platform.machine() in ("x86_64", "AMD64")
_NR_BPF = 321 if _X86 else 280
_NR_PERF_EVENT_OPEN = 298 if _X86 else 241
_MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _MAP_NEXT, _RAW_TRACEPOINT_OPEN = 1, 2, 3, 4, 17
_MAP_CREATE, _PROG_LOAD, _LINK_CREATE, _PERF_EVENT = 0, 5, 28, 41
_KPROBE, TRACEPOINT = 2, 5
_RINGBUF = 27
UPROBE_MULTI = 48
"""What a program is loaded for that is attached to many places of a file in one call."""
_MULTI_AT_RETURN = 1
_PERF_TYPE_TRACEPOINT = 2
_PERF_FLAG_FD_CLOEXEC = 8
_IOC_ENABLE, _IOC_SET_BPF = 0x2400, 0x40042408

_libc = ctypes.CDLL(None, use_errno=True)


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


def attaches_at_once() -> bool:
    """Whether the kernel attaches one program to many places of a file in one call (since 6.6)."""
    try:
        program = _load_nothing()
    except OSError:
        return False
    try:
        os.close(attach_uprobes(program, "/", [(0, 0)], at_return=False))
    except OSError as error:
        return error.errno == errno.EBADF  # it knows the call: a folder is no file to attach to
    finally:
        os.close(program)
    return True


def _load_nothing() -> int:
    """A program that does nothing, to be attached to many places. Raises OSError."""
    code = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0)  # r0 = 0; exit
    return load(_KPROBE, code, UPROBE_MULTI)


def load(kind: int, code: bytes, attached: int = 0) -> int:
    """Load a program, given as instructions of eight bytes each. Raises OSError."""
    text, license_ = ctypes.create_string_buffer(code), ctypes.create_string_buffer(b"GPL")
    fields = (kind, len(code) // 8, ctypes.addressof(text), ctypes.addressof(license_))
    nothing = (0, 0, 0, 0, 0, b"", 0, attached)  # log, version, flags, name, device
    return _bpf(_PROG_LOAD, struct.pack("=IIQQIIQII16sII", *fields, *nothing))


def make_ring(size_bytes: int) -> int:
    """A ring buffer's descriptor; its size is a power of two, and of pages. Raises OSError."""
    return _bpf(_MAP_CREATE, struct.pack("=IIIII", _RINGBUF, 0, 0, size_bytes, 0))


def attach_uprobes(
    program: int, path: str, places: Sequence[tuple[int, int]], *, at_return: bool
) -> int:
    """Attach to all those file offsets of `path`, each with its cookie, or to none; one descriptor.

    The program must have been loaded for `UPROBE_MULTI`. Raises OSError.
    """
    name = ctypes.create_string_buffer(os.fsencode(path))
    count = len(places)
    offsets = (ctypes.c_uint64 * count)(*(offset for offset, _ in places))
    cookies = (ctypes.c_uint64 * count)(*(cookie for _, cookie in places))
    where = (ctypes.addressof(name), ctypes.addressof(offsets), 0, ctypes.addressof(cookies))
    flags = _MULTI_AT_RETURN if at_return else 0
    fields = (program, 0, UPROBE_MULTI, 0, *where, count, flags, 0)
    return _bpf(_LINK_CREATE, struct.pack("=IIIIQQQQIII", *fields))


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
