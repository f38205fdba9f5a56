"""What processes run is found in time: however short they live, whenever they load it."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from capture.helper.standard_files import standard_linkers
from halton_meter.model import Direction
from tests.kernel.conftest import (
    CLIENTS,
    GO_CONNECTIONS,
    PROVIDER,
    Bench,
    Client,
    captured_until_end,
    gather,
    same_bytes,
)
from tests.kernel.test_proof import REQUEST, RESPONSE, Subject, captured, plain
from tests.support.waiting import wait_until


@pytest.mark.parametrize("linker", ["the system's", "a container's"])
def test_a_library_loaded_by_a_fork_is_found_when_it_is_mapped(bench: Bench, linker: str) -> None:
    """No exec tells of the child, and the next look at all processes is minutes away."""
    source = bench.source(files=[])
    command: list[str | Path] = [os.path.realpath(sys.executable)]
    if linker != "the system's":
        theirs = bench.folder / "ld-theirs.so.2"
        shutil.copy2(standard_linkers()[0], theirs)
        command.insert(0, theirs)
    client = bench.client([*command, CLIENTS / "loads_in_a_fork.py"], source)
    assert client.line() == b"connected\n"
    wait_until(lambda: source.request_report() or source.status().libraries)
    client.say()
    assert client.line() == b"done\n"
    (seen,) = gather(source.drain()).values()
    assert seen.data(Direction.RECEIVED) == bench.server.connections[0].sent
    assert seen.connection.process is not None
    assert seen.connection.process.parents[0][0] == client.process.pid


def test_a_program_that_ended_before_it_was_looked_at_is_probed_for_its_next_run(
    bench: Bench,
) -> None:
    subject = Subject(bench, bench.folder, run=False)
    helper = subject.source.helper_pid
    assert helper is not None
    short = Client([subject.program, PROVIDER], bench.environment())
    subject.source.add_root(short.process.pid)
    os.kill(helper, signal.SIGSTOP)
    try:
        short.go()
        short.output()
    finally:
        os.kill(helper, signal.SIGCONT)
    wait_until(subject.is_probed)
    subject.run()
    (seen,) = subject.passes(REQUEST, RESPONSE)
    assert captured(seen) == (plain(REQUEST), plain(RESPONSE))


def test_a_run_starts_when_its_program_has_been_searched(bench: Bench, go_client: Path) -> None:
    """It is probed before its exec, though nothing knew it."""
    source = bench.source(files=[], programs=[str(go_client)])
    assert source.status().libraries == (str(go_client),)
    client = bench.client([go_client], source)
    client.say()
    seen = captured_until_end(client, source)
    assert client.output().endswith(b"done\n")
    same_bytes(seen, bench)
    assert len(seen) == GO_CONNECTIONS
