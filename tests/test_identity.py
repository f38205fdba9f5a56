"""One exchange is one event, whoever saw it; two equal exchanges are two. Also without an id."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halton_meter.meter import Meter
from halton_meter.model import (
    Basis,
    Body,
    Connection,
    Direction,
    Exchange,
    Outcome,
    PricedEvent,
    Process,
    Protocol,
    Request,
    Response,
    Source,
    TlsChunk,
    UsageEvent,
)
from halton_meter.store import Store
from tests.support.quick import every

AT_NS = 1_790_000_000_000_000_000
CLIENT = Process(pid=4711, started_ns=1, exe="/usr/bin/python3")
DATE = ("date", "Tue, 24 Nov 2026 04:00:00 GMT")
ANSWER = json.dumps(
    {"object": "list", "data": [], "model": "m", "usage": {"prompt_tokens": 7, "total_tokens": 7}}
).encode()


def unpriced(usage: UsageEvent) -> PricedEvent:
    return PricedEvent(usage, None, None, None, Basis.UNPRICED)


def embedding(
    source: Source,
    at_ns: int = AT_NS,
    process: Process | None = CLIENT,
    text: str = "same",
    headers: tuple[tuple[str, str], ...] = (DATE,),
    **changed: Any,
) -> Exchange:
    """A call whose answer has no id."""
    made = Exchange(
        id=f"{source}/{at_ns}",
        connection=Connection(f"c{at_ns}", source, process, "api.openai.com"),
        protocol=Protocol.HTTP1,
        request=Request(
            "POST",
            "api.openai.com",
            "/v1/embeddings",
            body=Body((json.dumps({"model": "m", "input": text}).encode(),)),
        ),
        response=Response(200, headers, Body((ANSWER,))),
        started_ns=at_ns,
        first_byte_ns=at_ns + 1000,
        ended_ns=at_ns + 2000,
        outcome=Outcome.COMPLETE,
    )
    return replace(made, **changed)


def metered(*exchanges: Exchange) -> list[PricedEvent]:
    """What one process gives, whose meter saw these."""
    meter = Meter(unpriced)
    return [event for each in exchanges for event in meter.exchange(each)]


def stored(home: Path, *journals: list[PricedEvent]) -> list[PricedEvent]:
    """What is left when several processes have written their journals."""
    for events in journals:
        with Store(home) as store:
            store.append(events)
            store.flush()
    with Store(home) as store, store.reading() as reader:
        return list(reader.events())


LATER_NS = AT_NS + 3_700_000  # what lies between a client's write and the proxy's read of it


def test_seen_by_uprobes_and_by_the_proxy_is_one_event(tmp_path: Path) -> None:
    one = metered(embedding(Source.UPROBES))
    other = metered(embedding(Source.PROXY, LATER_NS))
    assert [event.usage.id for event in one] == [event.usage.id for event in other]
    (event,) = stored(tmp_path, one, other)
    assert event.usage.tokens.input == 7


@pytest.mark.parametrize("apart_ns", [0, 1_000_000, 3_000_000_000], ids=["0", "1 ms", "3 s"])
@pytest.mark.parametrize("dated", [True, False])
def test_equal_calls_are_as_many_events_for_one_source_as_for_two(
    tmp_path: Path, apart_ns: int, dated: bool
) -> None:
    headers = (DATE,) if dated else ()
    calls = [
        [embedding(source, AT_NS + n * apart_ns + skew, headers=headers) for n in range(3)]
        for source, skew in ((Source.UPROBES, 0), (Source.PROXY, 3_700_000))
    ]
    assert len(stored(tmp_path / "one", metered(*calls[0]))) == 3
    assert len(stored(tmp_path / "two", metered(*calls[0]), metered(*calls[1]))) == 3


def test_a_source_that_came_late_adds_nothing(tmp_path: Path) -> None:
    whole = [embedding(Source.PROXY, AT_NS + n) for n in range(3)]
    late = [embedding(Source.UPROBES, AT_NS + n) for n in range(1, 3)]
    assert len(stored(tmp_path, metered(*late), metered(*whole))) == 3


def test_equal_calls_of_two_processes_are_two_events(tmp_path: Path) -> None:
    other = replace(CLIENT, pid=4712)
    calls = [metered(embedding(Source.PROXY, process=each)) for each in (CLIENT, other)]
    assert len(stored(tmp_path, *calls)) == 2


def test_other_requests_are_other_events(tmp_path: Path) -> None:
    calls = [metered(embedding(Source.PROXY, text=text)) for text in ("one", "two")]
    assert len(stored(tmp_path, *calls)) == 2


def test_equal_calls_in_other_seconds_are_other_events_also_after_a_restart(tmp_path: Path) -> None:
    later = ("date", "Tue, 24 Nov 2026 04:00:01 GMT")
    calls = [metered(embedding(Source.PROXY, headers=(date,))) for date in (DATE, later)]
    assert len(stored(tmp_path, *calls)) == 2


@pytest.mark.parametrize("first", [Source.UPROBES, Source.PROXY])
def test_of_a_damaged_and_a_whole_sighting_the_whole_one_stays(
    tmp_path: Path, first: Source
) -> None:
    damaged = embedding(
        Source.UPROBES,
        response=Response(200, (DATE,), Body((ANSWER[:20], ANSWER[40:]), False, 0, 20)),
        outcome=Outcome.GAPPED,
    )
    journals = [metered(damaged), metered(embedding(Source.PROXY, LATER_NS))]
    if first is Source.PROXY:
        journals.reverse()
    (event,) = stored(tmp_path, *journals)
    assert (event.usage.outcome, event.usage.source) == (Outcome.COMPLETE, Source.PROXY)


def test_a_large_upload_that_one_source_saw_in_part_is_one_event(tmp_path: Path) -> None:
    upload = b"--b\r\n" + bytes(range(256)) * 1000
    sightings = [
        embedding(
            source,
            request=Request(
                "POST",
                "api.openai.com",
                "/v1/embeddings",
                headers=(("content-length", str(len(upload))),),
                body=body,
            ),
        )
        for source, body in (
            (Source.UPROBES, Body((upload[:100_000],), False, 0, len(upload) - 100_000)),
            (Source.PROXY, Body((upload,))),
        )
    ]
    assert len(stored(tmp_path, *(metered(each) for each in sightings))) == 1


@pytest.mark.parametrize("known_first", [True, False])
def test_of_two_sightings_the_one_that_knows_the_process_stays(
    tmp_path: Path, known_first: bool
) -> None:
    named = (DATE, ("x-request-id", "req_0123456789abcdef"))
    known = metered(embedding(Source.UPROBES, headers=named))
    unknown = metered(embedding(Source.PROXY, headers=named, process=None))
    journals = (known, unknown) if known_first else (unknown, known)
    (event,) = stored(tmp_path, *journals)
    assert event.usage.process == CLIENT
    meter = Meter(unpriced)
    again = [
        meter.exchange(embedding(Source.PROXY, headers=named, process=process))
        for process in (None, CLIENT, CLIENT)
    ]
    assert [len(events) for events in again] == [1, 1, 0]


def test_what_our_own_proxy_says_upstream_is_nobodys_exchange() -> None:
    argv = ("/usr/bin/python3", "-P", "-m", "halton_meter.live.proxy.worker")
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: api.openai.com\r\ncontent-length: 2\r\n\r\n{}"
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(ANSWER), ANSWER)
    seen = {}
    for name, process in (("client", CLIENT), ("proxy", replace(CLIENT, argv=argv))):
        meter = Meter(unpriced)
        connection = Connection("c", Source.UPROBES, process, "api.openai.com")
        for direction, data in ((Direction.SENT, head), (Direction.RECEIVED, answer)):
            chunk = TlsChunk(connection, direction, 0, data, len(data), AT_NS)
            seen[name] = meter.receive(chunk)
    assert len(seen["client"]) == 1
    assert seen["proxy"] == []


def test_a_capture_replayed_adds_nothing_and_its_equal_calls_stay_apart(tmp_path: Path) -> None:
    calls = [embedding(Source.PCAP, AT_NS + n, process=None) for n in (0, 0, 5)]
    assert len(stored(tmp_path, metered(*calls), metered(*calls))) == 2


# --- a capture, which knows no process --------------------------------------------------------


def recorded(at_ns: int, late_ns: int = 300_000, **changed: Any) -> Exchange:
    """The same call as a capture has it."""
    return embedding(Source.PCAP, at_ns + late_ns, process=None, **changed)


@pytest.mark.parametrize("first", ["live", "recorded"])
@pytest.mark.parametrize("dated", [True, False])
def test_a_recording_replayed_beside_the_live_events_adds_nothing(
    tmp_path: Path, first: str, dated: bool
) -> None:
    """Three equal calls of one second and one more later; the recording is replayed twice."""
    headers = (DATE,) if dated else ()
    at = [AT_NS + step for step in (0, 4_000_000, 9_000_000, 3_000_000_000)]
    live = metered(*(embedding(Source.UPROBES, each, headers=headers) for each in at))
    replay = metered(*(recorded(each, headers=headers) for each in at))
    events = stored(tmp_path, *((live, replay) if first == "live" else (replay, live)), replay)
    assert len(events) == 4
    assert [event.usage.process for event in events] == [CLIENT] * 4


def test_a_recorded_call_that_nobody_saw_live_is_an_event_of_its_own(tmp_path: Path) -> None:
    live = metered(embedding(Source.UPROBES))
    others = [
        recorded(AT_NS, text="other"),
        recorded(AT_NS, late_ns=60_000_000),
        recorded(AT_NS + 10_000_000),
        recorded(AT_NS),
    ]
    # The one that began nearest to the live one is that; each of the others is one more.
    assert len(stored(tmp_path, live, metered(*others))) == 4


@pytest.mark.parametrize("first", ["live", "recorded"])
def test_the_whole_sighting_of_a_capture_takes_the_process_of_the_live_one(
    tmp_path: Path, first: str
) -> None:
    cut = replace(embedding(Source.UPROBES), outcome=Outcome.ABORTED)
    cut = replace(cut, response=replace(cut.response, body=Body((ANSWER[:20],), complete=False)))
    live, replay = metered(cut), metered(recorded(AT_NS))
    (event,) = stored(tmp_path, *((live, replay) if first == "live" else (replay, live)))
    assert (event.usage.outcome, event.usage.process) == (Outcome.COMPLETE, CLIENT)


def cut_short(seen: Exchange) -> Exchange:
    """The same, whose client gave up before it had the answer."""
    response = replace(seen.response, body=Body((ANSWER[:20],), complete=False))
    return replace(seen, outcome=Outcome.ABORTED, response=response)


@pytest.mark.parametrize(
    ("order", "is_cut"),
    every(
        3,
        itertools.product(["rll", "llr", "rlr", "lrr", "lrl", "rlp", "rpl", "rplr"], [False, True]),
    ),
)
def test_a_sighting_that_comes_again_is_known_by_whichever_id_is_stored(
    tmp_path: Path, order: str, is_cut: bool
) -> None:
    """r: the recording, l: the live sighting (whole, or cut short), p: the proxy's."""
    seen = embedding(Source.UPROBES)
    journals = {
        "r": metered(recorded(AT_NS)),
        "l": metered(cut_short(seen) if is_cut else seen),
        "p": metered(embedding(Source.PROXY, LATER_NS)),
    }
    (event,) = stored(tmp_path, *(journals[each] for each in order))
    assert (event.usage.outcome, event.usage.process) == (Outcome.COMPLETE, CLIENT)


def test_two_sightings_of_one_recording_in_one_journal_are_of_one_live_event(
    tmp_path: Path,
) -> None:
    live, again = metered(embedding(Source.UPROBES)), metered(recorded(AT_NS))
    assert len(stored(tmp_path, live, again + again)) == 1


def test_an_equal_call_that_only_the_second_live_source_saw_is_counted(tmp_path: Path) -> None:
    at = [AT_NS, AT_NS + 4_000_000, AT_NS + 9_000_000]
    less = metered(*(embedding(Source.UPROBES, each) for each in at[:2]))
    whole = metered(*(embedding(Source.PROXY, each + 100_000) for each in at))
    assert len(stored(tmp_path, less, whole)) == 3
