"""A TLS library that nobody knew, in a folder of its own: the first request through it is metered.

A client is held from the moment that its library is found until the probes are there. What makes
the first requests of such libraries be lost otherwise is that the kernel attaches in 3 to 400 ms.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from halton_meter.model import Direction
from tests.kernel.conftest import CLIENTS, PROVIDER, Bench, gather
from tests.support.quick import first


@pytest.fixture
def sender(bench: Bench) -> Path:
    """The client, which sends as soon as it can."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    program = bench.folder / "sends"
    source = CLIENTS / "loads_and_sends.c"
    subprocess.run([compiler, "-O1", "-o", program, source, "-ldl"], check=True)
    return program


@pytest.mark.parametrize("count", first([10, 50]))
def test_the_first_request_through_a_library_that_nobody_knew(
    bench: Bench, sender: Path, count: int
) -> None:
    source = bench.source(files=[])
    for number in range(count):
        own = bench.folder / f"own{number}"
        own.mkdir()
        for each in bench.libraries.iterdir():
            shutil.copy2(each, own)
        libssl = own / bench.libssl.name
        command = [sender, libssl, str(bench.server.port), PROVIDER]
        bench.client(command, source, LD_LIBRARY_PATH=os.fspath(own)).output()
    seen = gather(source.drain())
    sent = sorted(each.data(Direction.SENT) for each in seen.values())
    assert set(sent) == {bytes(each.received) for each in bench.server.connections}
    # All of them, unless others have the machine for as long as a client lives.
    assert count * 9 // 10 <= len(seen) <= count
