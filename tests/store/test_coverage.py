"""Coverage in the store: told again it adds nothing, and a report sums it up by hours."""

from __future__ import annotations

from pathlib import Path

from halton_meter.coverage import Count, Coverage, Part
from halton_meter.store import Selection, Store

HOUR_NS = 3_600_000_000_000
CURL = Part("/usr/bin/curl", "api.openai.com", "OpenSSL", None)
WGET = Part("/usr/bin/wget", "api.openai.com", "GnuTLS", "stack_not_probed")
UNSEEN = Part("/usr/bin/old", "api.openai.com", None, "older_than_probes")


def test_of_what_one_process_says_of_an_hour_the_last_counts(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.count_connections(Coverage({CURL: Count(1, 100)}), HOUR_NS, "a")
    store.count_connections(Coverage({CURL: Count(3, 300), WGET: Count(1, 50)}), HOUR_NS, "a")
    assert store.waiting() == 0  # they are no events
    store.close()
    for segment in (tmp_path / "journal").glob("*.jsonl"):  # told twice, as after a crash
        (segment.parent / f"{segment.stem}-again.jsonl").write_bytes(segment.read_bytes())
    assert Store(tmp_path).flush().stored == 0
    later = Store(tmp_path)
    later.count_connections(Coverage({CURL: Count(2, 200)}), HOUR_NS, "a")  # older news
    later.count_connections(Coverage({CURL: Count(5, 500)}), HOUR_NS, "b")  # another process
    later.count_connections(Coverage({CURL: Count(7, 700)}), 2 * HOUR_NS, "a")
    with later.reading() as reader:
        assert reader.coverage(Selection(to_ns=2 * HOUR_NS)).parts == {
            CURL: Count(8, 800),
            WGET: Count(1, 50),
        }
        assert reader.coverage().seen == Count(16, 1550)
        assert reader.coverage().metered == Count(15, 1500)
        assert list(reader.coverage_by_hour()) == [HOUR_NS, 2 * HOUR_NS]
    later.close()


def test_bytes_that_are_not_known_are_no_zero(tmp_path: Path) -> None:
    store = Store(tmp_path)
    counted = Coverage({CURL: Count(1, 100), UNSEEN: Count(1, None)})
    store.count_connections(counted, HOUR_NS, "a")
    store.flush()
    with store.reading() as reader:
        found = reader.coverage()
    assert found.parts == counted.parts
    assert found.seen == Count(2, 100)
    assert found.has_unknown_bytes
    assert found.metered == Count(1, 100)
