"""The places found in a Go program carry its plaintext, connection and host, and do it no harm.

A small BPF program, on programs that the test builds and runs itself: at the start of Read and
Write it notes (connection, buffer) under the goroutine, at every RET it sends the bytes.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from capture import bpf, loader
from capture.functions.finder.golang import Found, find_go_tls
from tests.capture.functions.test_golang import SOURCE, needs_go, programs
from tests.support.quick import slow

__all__ = ["programs"]  # the fixture

pytestmark = [
    pytest.mark.kernel,
    needs_go,
    pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs root on Linux"),
    pytest.mark.skipif(shutil.which("clang") is None, reason="needs clang"),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="the test program reads x86-64"),
]

RING_BYTES = 1 << 20


@dataclass(frozen=True)
class Seen:
    """One call of Read or Write that returned."""

    conn: int
    sent: bool
    count: int
    host: bytes
    data: bytes


class Probes:
    """The compiled program, on the places found; ends with the process's descriptors."""

    def __init__(self, folder: Path, pid: int, found: Found, path: Path) -> None:
        assert found.server_name is not None
        values = {"TGID": pid, "CONFIG": found.server_name.config, "NAME": found.server_name.name}
        compiled = folder / "go_probe.o"
        subprocess.run(
            ["clang", "-O2", "-g", "-target", "bpf", "-D__x86_64__",
             "-I/usr/include/x86_64-linux-gnu", *(f"-D{k}={v}" for k, v in values.items()),
             "-c", str(SOURCE.parent / "go_probe.bpf.c"), "-o", str(compiled)],
            check=True, capture_output=True,
        )  # fmt: skip
        library = loader.libbpf_library()
        library.bpf_object__open_file.restype = ctypes.c_void_p
        library.bpf_object__find_program_by_name.restype = ctypes.c_void_p
        self._object = ctypes.c_void_p(library.bpf_object__open_file(bytes(compiled), None))
        assert library.bpf_object__load(self._object) == 0
        self._library = library
        self._ring = bpf.Ring(
            library.bpf_object__find_map_fd_by_name(self._object, b"ring"), RING_BYTES
        )
        self._links = []
        for function, begin in ((found.read, "begin_read"), (found.write, "begin_write")):
            self._attach(path, begin, function.offset)
            for at in function.returns:
                self._attach(path, "finish", at)

    def _attach(self, path: Path, name: str, offset: int) -> None:
        program = self._library.bpf_object__find_program_by_name(self._object, name.encode())
        fd = self._library.bpf_program__fd(ctypes.c_void_p(program))
        self._links.append(bpf.attach_uprobe(fd, str(path), offset, at_return=False))

    def seen(self) -> list[Seen]:
        records = []
        for _, record in self._ring.records():
            conn, sent, count, length = struct.unpack_from("=QQqQ", record)
            data = bytes(record[32:])
            records.append(Seen(conn, bool(sent), count, data[: min(length, 64)], data[64:192]))
        return records

    def close(self) -> None:
        for link in self._links:
            os.close(link)
        self._library.bpf_object__close(self._object)


@pytest.fixture
def server(tmp_path: Path) -> Any:
    from tests.support.lab.authority import make_authority
    from tests.support.tls_server import TlsServer

    make_authority(tmp_path, ("api.provider.test",))
    running = TlsServer(tmp_path)
    yield running
    running.close()


@pytest.mark.parametrize("name", ["stripped", slow("pie")])
def test_plaintext_connection_and_host(
    programs: dict[str, Path], server: Any, tmp_path: Path, name: str
) -> None:
    found = find_go_tls(programs[name])
    assert isinstance(found, Found)
    client = subprocess.Popen(
        ["/bin/sh", "-c", 'read go && exec "$@"', "sh", str(programs[name]),
         f"https://api.provider.test:{server.port}/bytes/3000"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={"CA": str(tmp_path / "ca.pem"), "ADDRESS": f"127.0.0.1:{server.port}"},
    )  # fmt: skip
    probes = Probes(tmp_path, client.pid, found, programs[name])
    try:
        out, _ = client.communicate("go\n", timeout=30)
        records = probes.seen()
    finally:
        if client.poll() is None:
            client.kill()
            client.wait()
        probes.close()
    assert client.returncode == 0, out
    assert out.split() == ["200", "3000"] * 3
    (heard,) = server.heard_by("api.provider.test")
    assert {record.host for record in records} == {b"api.provider.test"}
    assert len({record.conn for record in records}) == 1
    sent = [record for record in records if record.sent]
    received = [record for record in records if not record.sent and record.count > 0]
    assert sum(record.count for record in sent) == len(heard.received)
    assert sum(record.count for record in received) == len(heard.sent)
    assert sent[0].data.startswith(b"POST /bytes/3000 HTTP/1.1\r\n")
    assert received[0].data.startswith(b"HTTP/1.1 200 OK\r\n")
