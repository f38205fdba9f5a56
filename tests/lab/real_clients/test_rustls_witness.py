"""What the probes at rustls' record layer copy is what its cryptography is given: record by record.

The witness knows nothing of rustls: it reads the arguments of aws-lc's AEAD functions, which are
found by the errors that they report. Product code needs none of it (ring has no such functions).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from capture import bpf, loader
from capture.functions.elf import Elf
from capture.functions.finder.code import Code
from capture.functions.finder.error_reporters import file_names, functions_around, loads_of
from capture.uprobes import UprobeSource
from halton_meter.model import Direction
from tests.lab.real_clients.programs import Program
from tests.lab.real_clients.rust_packages import IMPIT, PYREQWEST, package
from tests.lab.real_clients.test_rustls import is_probed, source, until_its_end
from tests.support.lab.lab import Lab
from tests.support.waiting import wait_until

__all__ = ["source"]  # the fixture

pytestmark = [
    pytest.mark.lab,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("clang") is None, reason="needs clang"),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="the witness reads x86-64"),
]

CODE = Path(__file__).parents[2] / "support" / "code" / "aead_witness.bpf.c"
RING_BYTES = 1 << 24
LIBRARY_CIPHER = 30
# By the reasons with which each reports errors, in its AEAD code.
REASONS = {"seal": {103, 115, 117}, "open": {101, 103, 115}}
APPLICATION_DATA = 23


def aead_functions(path: Path) -> Mapping[str, int]:
    """File offsets of EVP_AEAD_CTX_seal and _open."""
    found = {}
    with Elf(path) as elf:
        names = frozenset(file_names(elf, b"cipher/aead.c"))
        code = Code(elf)
        library, *others = code.arguments[:4]
        for function in functions_around(code, loads_of(code, names, "aead.c")):
            reasons: set[int] = set()
            for registers in code.constants_at_calls(function).values():
                if registers.get(library) != frozenset((LIBRARY_CIPHER,)):
                    continue
                for reason, file in pairwise(others):
                    if registers.get(file, frozenset()) & names:
                        reasons |= registers.get(reason, frozenset())
            for name, own in REASONS.items():
                if reasons == own:
                    found[name] = elf.offset_of(function.start)
    assert found.keys() == REASONS.keys()
    return {name: offset for name, offset in found.items() if offset is not None}


class Witness:
    """Probes on these functions, for one process."""

    def __init__(self, folder: Path, path: Path, pid: int) -> None:
        compiled = folder / "aead_witness.o"
        command = ["clang", "-O2", "-g", "-target", "bpf", "-D__x86_64__", f"-DTGID={pid}"]
        command += ["-I/usr/include/x86_64-linux-gnu", "-c", str(CODE), "-o", str(compiled)]
        subprocess.run(command, check=True, capture_output=True)
        library = self._library = loader.libbpf_library()
        library.bpf_object__open_file.restype = ctypes.c_void_p
        library.bpf_object__find_program_by_name.restype = ctypes.c_void_p
        self._object = ctypes.c_void_p(library.bpf_object__open_file(bytes(compiled), None))
        assert library.bpf_object__load(self._object) == 0
        ring = library.bpf_object__find_map_fd_by_name(self._object, b"ring")
        self._ring = bpf.Ring(ring, RING_BYTES)
        at = aead_functions(path)
        self._links = [
            self._attach(path, "seal", at["seal"]),
            self._attach(path, "begin_open", at["open"]),
            self._attach(path, "opened", at["open"], at_return=True),
        ]

    def _attach(self, path: Path, name: str, offset: int, *, at_return: bool = False) -> int:
        program = self._library.bpf_object__find_program_by_name(self._object, name.encode())
        fd = self._library.bpf_program__fd(ctypes.c_void_p(program))
        return bpf.attach_uprobe(fd, str(path), offset, at_return=at_return)

    def records(self) -> Iterator[tuple[Direction, bytes]]:
        """Plaintext of records with application data, in order."""
        for _, record in self._ring.records():
            sealed, length = struct.unpack_from("=QQ", record)
            inner = bytes(record[16 : 16 + length]).rstrip(b"\0")
            if inner[-1:] == bytes([APPLICATION_DATA]):
                yield (Direction.SENT if sealed else Direction.RECEIVED), inner[:-1]

    def close(self) -> None:
        for link in self._links:
            os.close(link)
        self._library.bpf_object__close(self._object)


@pytest.mark.parametrize(
    ("program", "version"),
    [(PYREQWEST, "http2"), (PYREQWEST, "http1"), (IMPIT, "http2")],
    ids=str,
)
def test_the_same_records_with_the_same_bytes(
    lab: Lab, source: UprobeSource, python: str, tmp_path: Path, program: Program, version: str
) -> None:
    found = package(lab, program)
    asked = found.asks(python, 1, 1, "6", version, "chunks=40", "piece_bytes=900", "wait")
    pipes: dict[str, Any] = {"stdin": -1, "stdout": -1, "text": True}
    client = lab.popen(asked, user=lab.user, env=found.environment(), **pipes)
    wait_until(lambda: is_probed(source, found.library), "its probes")
    witness = Witness(tmp_path, found.library, client.pid)
    client.stdin.write("\n" * 6)
    client.stdin.close()
    (seen,) = until_its_end(client, source).values()
    records = list(witness.records())
    witness.close()
    for direction in Direction:
        told = [data for each, data in records if each is direction and data]
        assert seen.data(direction) == b"".join(told)
        chunks = seen.chunks[direction]
        if direction is Direction.RECEIVED:
            assert [chunk.data for chunk in chunks] == told
        ends = {sum(map(len, told[: n + 1])) for n in range(len(told))}
        assert ends <= {chunk.offset + chunk.length for chunk in chunks}
        assert len(told) >= 6
