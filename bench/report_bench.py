"""How long `report` takes over millions of events, cold, beside the same question of SQLite.

    python -m bench report                              3 and 10 million events
    HALTON_BENCH_EVENTS=100000 python -m bench report   another number

Rows are made inside DuckDB; flushes of the store then sum up the days that are over, as they do
while events come (`store/rollup.py`). Reports by more than one thing, or of one project, read the
events themselves. Every figure is the best of five cold processes; the file is in the
page cache, as it is on a machine that meters. SQLite is asked for requests, tokens and cost by
model over the file that `halton-meter export sqlite` writes, without the percentiles, comparison
and coverage that `report` answers as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from decimal import Decimal
from pathlib import Path

from halton_meter.model import (
    Basis,
    Certainty,
    Outcome,
    PricedEvent,
    Source,
    Tokens,
    Usage,
    UsageEvent,
)
from halton_meter.store import Store
from halton_meter.store.rollup import DAY_NS, DAYS_AT_ONCE_MAX

EVENTS = tuple(map(int, os.environ.get("HALTON_BENCH_EVENTS", "3000000 10000000").split()))
TOY_EVENTS = 20_000  # some two days, so that there is one to sum up
SQLITE_EVENTS_MAX = 3_000_000
RUNS, TOY_RUNS = 5, 1
SPACING_NS = 8 * 10**9  # a request every 8 seconds, until now

_SQLITE = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute(
    "SELECT model, count(*), sum(input_tokens), sum(cache_read_tokens), sum(cache_write_tokens), "
    "sum(output_tokens), sum(thinking_tokens), sum(cost_usd_micro_units), count(error_class) "
    "FROM requests GROUP BY model").fetchall()
"""

# 40 models, 60 projects, sessions of 30 requests; every 50th fails, every 7th lacks the cache.
_ROWS = f"""
INSERT INTO event BY NAME SELECT
    md5(CAST(i AS VARCHAR)) AS id,
    CAST(? AS BIGINT) + i * {SPACING_NS} AS at_ns,
    ['anthropic', 'openai', 'gemini', 'xai', 'groq'][1 + i % 5] AS provider,
    'api.' || (i % 5) || '.example' AS host, 'messages' AS endpoint, 'chat' AS kind,
    'model-' || (hash(i) % 40) AS model, 'model-' || (hash(i) % 40) AS request_model,
    md5(CAST(-i AS VARCHAR)) AS response_id, i % 3 > 0 AS streaming,
    CASE WHEN i % 50 = 0 THEN 429 ELSE 200 END AS http_status,
    CASE WHEN i % 50 = 0 THEN 'rate_limit' END AS error_class,
    CASE WHEN i % 200 = 0 THEN 'gapped' ELSE 'complete' END AS outcome, 'uprobes' AS source,
    hash(i + 1) % 30000 AS pid, '/usr/bin/tool-' || (hash(i) % 12) AS process,
    'project-' || (hash(i + 7) % 60) AS project,
    CAST(md5(CAST(i // 30 AS VARCHAR)) AS UUID)::VARCHAR AS session_id,
    'client' AS session_source, md5(CAST(i // 7 AS VARCHAR)) AS turn_id,
    CASE WHEN i % 9 = 0 THEN 'Explore' ELSE 'main' END AS agent, 'claude-cli' AS client,
    '2.1.' || (i // 100000) AS client_version, 0 AS retry_count,
    hash(i + 1) % 20000 AS input_tokens,
    CASE WHEN i % 7 > 0 THEN hash(i + 2) % 100000 END AS cache_read_tokens,
    CASE WHEN i % 5 = 0 THEN hash(i + 3) % 9000 END AS cache_write_5m_tokens,
    hash(i + 4) % 4000 AS output_tokens, hash(i + 4) % 1000 AS reasoning_tokens,
    'reported' AS certainty, 100.5 + hash(i + 5) % 60000 AS duration_ms, 7 AS sighting_rank,
    '{{"parts":[],"conditions":{{}},"flags":[],"reported_usd":null,"raw_usage":null,"process":null}}'
        AS usage_document,
    CASE WHEN i % 90 > 0 THEN CAST(hash(i + 6) % 2000000000 AS DECIMAL(18,0)) / 1000000000 END
        AS list_usd,
    CASE WHEN i % 90 > 0 THEN CAST(hash(i + 6) % 2000000000 AS DECIMAL(18,0)) / 1000000000 END
        AS marginal_usd,
    CASE WHEN i % 90 > 0 THEN 'computed' ELSE 'unpriced' END AS basis, 'bench' AS price_book,
    '{{"list_usd":null,"marginal_usd":null,"reported_usd":null,"flags":[],"line_items":[]}}'
        AS price_document
FROM range(CAST(? AS BIGINT)) rows(i)
"""


def fill(home: Path, events: int) -> None:
    """Make a store of `events` events; the store itself makes the file and its schema."""
    import duckdb

    usage = UsageEvent(
        id="first",
        provider="anthropic",
        host=None,
        endpoint="messages",
        kind="chat",
        model="model-1",
        request_model=None,
        response_id=None,
        streaming=False,
        http_status=200,
        error_class=None,
        outcome=Outcome.COMPLETE,
        source=Source.PCAP,
        parts=(Usage("model-1", Tokens(input=1)),),
        certainty=Certainty.REPORTED,
        at_ns=time.time_ns() - (events + 1) * SPACING_NS,
        ttft_ms=None,
        duration_ms=None,
    )
    first = PricedEvent(usage, Decimal(1), Decimal(1), None, Basis.COMPUTED)
    with Store(home) as store:
        store.append([first])
        store.flush()
        with duckdb.connect(str(store.database_path)) as connection:
            connection.execute(_ROWS, [time.time_ns() - events * SPACING_NS, events])
        # Every flush sums up some days more, as it does over the weeks in which events come.
        for _ in range(events * SPACING_NS // (DAYS_AT_ONCE_MAX * DAY_NS) + 2):
            store.append([first])
            store.flush()


def best(command: list[str], home: Path, runs: int = RUNS) -> tuple[float, float]:
    """(wall-clock, processor) seconds of a new process, the least of `runs` each."""
    environment = {**os.environ, "HALTON_METER_HOME": str(home)}
    # As installed, Python's bytecode is cached: the first run here writes it.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    walls, processor = [], []
    for _ in range(runs):
        began = time.perf_counter()
        child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(child.pid, 0)
        walls.append(time.perf_counter() - began)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise RuntimeError(f"{' '.join(command)} exited with {child.returncode}")
        processor.append(used.ru_utime + used.ru_stime)
    return min(walls), min(processor)


def show(name: str, taken: tuple[float, float], note: str = "") -> None:
    """Print one line; under load, processor time tells more than the clock."""
    print(
        f"{name:42} {taken[0]:7.3f} s   processor {taken[1]:7.3f} s   {note}".rstrip(), flush=True
    )


def main(toy: bool = False) -> None:
    """Print the figures for each number of events."""
    for events in (TOY_EVENTS,) if toy else EVENTS:
        with tempfile.TemporaryDirectory() as scratch:
            _measure(Path(scratch), events, TOY_RUNS if toy else RUNS)


def _measure(scratch: Path, events: int, runs: int) -> None:
    program = [str(Path(sys.executable).with_name("halton-meter"))]
    home = scratch / "home"
    fill(home, events)
    size = Store(home).database_path.stat().st_size
    print(f"{events:,} events, {size / 1e6:,.0f} MB")
    plain = best([*program, "report"], home, runs)
    show("report, cold process", plain, "aim: 0.3 s for 3 million")
    for options in (
        ["--by", "project"],
        ["--since", "30d", "--vs-previous"],
        ["--project", "project-7"],
        ["--by", "project,day"],
        ["--by", "agent"],
    ):
        show(
            f"report {' '.join(options)}", best([*program, "report", *options], home, min(runs, 3))
        )
    for words in ("session list", "session list --since 7d", "session show latest"):
        taken = best([*program, *words.split()], home, min(runs, 3))
        show(words, taken, "aim: 0.4 s for 3 million")
    if events > SQLITE_EVENTS_MAX:
        return  # the export alone would take minutes
    target = scratch / "spend.sqlite"
    exported = best([*program, "export", "sqlite", str(target)], home, 1)
    show("export sqlite", exported, f"{events / exported[0]:,.0f} rows/s")
    sqlite = best([sys.executable, "-c", _SQLITE, str(target)], home, 2)
    ratio = f"report is {sqlite[0] / plain[0]:.1f} times as fast"
    show("SQLite, sums by model only", sqlite, ratio)


if __name__ == "__main__":
    main()
