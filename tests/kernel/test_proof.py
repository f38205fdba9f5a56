"""Functions found by structure must pass HTTP first, or nothing of theirs is copied."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from capture.functions.elf import Elf
from capture.functions.library import Function, Library, Probe, Proof
from capture.functions.stacks import Stack
from capture.helper.files.known_files import KnownFiles
from capture.helper_report import CoverageState
from capture.uprobes import UprobeSource
from halton_meter.model import Direction
from tests.kernel.conftest import CLIENTS, PROVIDER, Bench, Client, Seen, gather
from tests.support.waiting import wait_until

REQUEST, RESPONSE = r"POST /v1 HTTP/1.1\r\nhost: x\r\n\r\n", r"HTTP/1.1 200 OK\r\n\r\n"
NOISE = "not what TLS carries to a provider"
COMPILER = shutil.which("clang") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")


class Subject:
    """A program whose functions a search is said to have found; it passes what it is told."""

    def __init__(self, bench: Bench, folder: Path, *, run: bool = True) -> None:
        self._bench = bench
        self.program = folder / "passes_plaintext"
        source = CLIENTS / "passes_plaintext.c"
        command = [
            str(COMPILER),
            "-O1",
            "-w",
            "-Wl,--build-id",
            str(source),
            "-o",
            str(self.program),
        ]
        subprocess.run(command, check=True, timeout=60)
        names = {"pass_in": "enter_read", "pass_out": "enter_write", "pass_host": "enter_set_host"}
        with Elf(self.program) as elf:
            found = {names[each.name]: elf.offset_of(each.address) for each in elf.symbols(names)}
            self.build_id = elf.build_id
        probes = []
        for program in names.values():  # as the finder orders them: the host last
            offset = found[program]
            assert offset is not None
            probes.append(Probe(program, offset))
            if program != "enter_set_host":
                probes.append(Probe("leave_plain", offset, at_return=True))
        with self.program.open("rb") as file:
            starts = {probe.offset: Function(probe.offset, Proof.UNWIND) for probe in probes}
            library = Library(
                Stack.BORINGSSL,
                tuple(probes),
                self.build_id,
                unproved=True,
                functions=tuple(starts.values()),
            )
            KnownFiles(folder / "known").remember(file.fileno(), library)
        self.source: UprobeSource = bench.source(files=[], cache_directory=str(folder / "known"))
        if run:
            self.run()

    def run(self) -> None:
        """Start it, and return when it is probed."""
        self.client: Client = self._bench.client([self.program, PROVIDER], self.source)
        assert self.client.line() == b"up\n"
        wait_until(self.is_probed)

    def is_probed(self) -> bool:
        self.source.request_report()
        return str(self.program) in self.source.status().libraries

    def passes(self, sent: str, received: str, *names: str) -> list[Seen]:
        """A connection on which these are the first bytes; what was captured since the last one."""
        assert self.client.process.stdin is not None
        self.client.process.stdin.write("|".join((sent, received, *names)).encode() + b"\n")
        self.client.process.stdin.flush()
        assert self.client.line() == b"done\n"
        return list(gather(self.source.drain()).values())


@pytest.fixture
def subject(bench: Bench) -> Callable[[], Subject]:
    return lambda: Subject(bench, bench.folder)


def captured(seen: Seen) -> tuple[bytes, bytes]:
    return seen.data(Direction.SENT), seen.data(Direction.RECEIVED)


def plain(text: str) -> bytes:
    return text.encode().decode("unicode_escape").encode()


def test_http_proves_the_functions(subject: Callable[[], Subject]) -> None:
    client = subject()
    (seen,) = client.passes(REQUEST, RESPONSE)
    assert captured(seen) == (plain(REQUEST), plain(RESPONSE))
    assert client.is_probed()
    assert client.source.status().events_lost["not_http"] == 0


def test_http2_proves_them_too(subject: Callable[[], Subject]) -> None:
    (seen,) = subject().passes(r"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", RESPONSE)
    assert seen.data(Direction.SENT).startswith(b"PRI * HTTP/2.0")


@pytest.mark.parametrize(
    ("sent", "received"), [(NOISE, NOISE), (NOISE, RESPONSE), (REQUEST, NOISE)],
    ids=["both", "write", "read"],
)  # fmt: skip
def test_functions_that_pass_something_else_are_not_recognised(
    subject: Callable[[], Subject], sent: str, received: str
) -> None:
    client = subject()
    for seen in client.passes(sent, received):
        assert NOISE.encode() not in b"".join(captured(seen))
    wait_until(lambda: not client.is_probed())
    (line,) = client.source.coverage()
    assert line.state is CoverageState.NOT_RECOGNISED
    assert line.library == str(client.program)
    assert "passed bytes that are not HTTP" in (line.advice or "")
    assert str(client.build_id) in (line.advice or "")
    assert client.source.status().events_lost["not_http"] == 1
    # The kernel takes some 0.1 s to remove each; then nothing is probed any more.
    wait_until(lambda: client.passes(REQUEST, RESPONSE) == [])


def test_one_odd_connection_of_proved_functions_is_left_out(
    subject: Callable[[], Subject],
) -> None:
    client = subject()
    client.passes(REQUEST, RESPONSE)
    assert not any(NOISE.encode() in captured(seen)[0] for seen in client.passes(NOISE, NOISE))
    assert client.is_probed()
    (seen,) = (each for each in client.passes(REQUEST, RESPONSE) if each.data(Direction.SENT))
    assert captured(seen) == (plain(REQUEST), plain(RESPONSE))
    assert client.source.status().events_lost["not_http"] == 1
