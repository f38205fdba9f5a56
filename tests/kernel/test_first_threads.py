"""A process is its threads: its first one may end before the others, or as another runs exec."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.kernel.conftest import CLIENTS, PROVIDER, Bench, gather, same_bytes
from tests.kernel.test_short_lives import WAYS, assert_is_curl, curl, the_process
from tests.support.quick import first

pytestmark = pytest.mark.kernel
CLIENT = CLIENTS / "loses_its_first_thread.py"


def connections(bench: Bench, *command: str | Path, way: str = "libbpf") -> dict[str, int]:
    """Run a client that is metered; how many connections sockets show, by cause."""
    source = bench.source(loader=way)
    bench.client([sys.executable, CLIENT, *command], source).output()
    seen = gather(source.drain())
    same_bytes(seen, bench)
    assert all(each.closed for each in seen.values())
    source.request_report()
    rows = [*source.ended_connections(), *source.open_connections()]
    found: Counter[str] = Counter()
    for row in rows:
        if row.host == PROVIDER:
            found[row.cause or "metered"] += row.connections
    return found


@pytest.mark.parametrize("way", first(WAYS))
def test_what_a_thread_becomes_stays_in_scope(bench: Bench, way: str) -> None:
    source = bench.source(loader=way)
    shell = ["sh", "-c", '"$@"; "$@"', "sh", *curl(bench)]  # and so does what it starts
    client = bench.client([sys.executable, CLIENT, "exec", *shell], source)
    client.output()
    seen = gather(source.drain())
    same_bytes(seen, bench)
    assert len(seen) == 2
    for each in seen.values():
        assert each.connection.process
        assert each.connection.process.pid != client.process.pid


def test_a_thread_that_becomes_a_client_has_its_processs_number(bench: Bench) -> None:
    source = bench.source()
    client = bench.client([sys.executable, CLIENT, "exec", *curl(bench)], source)
    client.output()
    seen = gather(source.drain())
    same_bytes(seen, bench)
    process = the_process(seen)
    assert_is_curl(process)
    assert process.pid == client.process.pid


@pytest.mark.parametrize("kind", ["before", "amid"])
def test_its_connections_outlive_the_first_thread(bench: Bench, kind: str) -> None:
    assert connections(bench, kind) == {"metered": 2}
