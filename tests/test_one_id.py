"""One id of several exchanges: each is an event, once, whoever saw which of them in what order."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halton_meter import meter as metering
from halton_meter.identity import ID_REPEATED, Entry, Group
from halton_meter.meter import Meter
from halton_meter.model import (
    Body,
    Connection,
    Exchange,
    Headers,
    Outcome,
    PricedEvent,
    Process,
    Protocol,
    Request,
    Response,
    SessionSource,
    Source,
)
from halton_meter.providers.registry import Registry
from halton_meter.store import Store
from halton_meter.store.rows import traits_of_text, traits_text
from tests.test_identity import metered, stored, unpriced

AT_NS = 1_790_000_000_000_000_000
SECOND_NS = 1_000_000_000
CLIENT = Process(pid=4711, started_ns=1, exe="/usr/bin/python3")
HOST = "api.anthropic.com"
ID = "msg_018OneIdOfThemAll"


@dataclass(frozen=True)
class Call:
    """One exchange; `number` tells it from others, in as many ways as are asked for."""

    number: int
    told_by: frozenset[str] = frozenset()
    step_ns: int = 5 * SECOND_NS

    def by(self, source: Source, late_ns: int = 0, **changed: Any) -> Exchange:
        """As a source saw it."""
        number, told = self.number, self.told_by
        at_ns = AT_NS + number * self.step_ns + late_ns
        usage = {"input_tokens": 1000 + number * ("usage" in told), "output_tokens": 50}
        answer = {"id": ID, "type": "message", "model": "claude-opus-4-8", "usage": usage}
        headers: Headers = ()
        if "date" in told:
            headers += (("date", f"Tue, 24 Nov 2026 04:00:{number:02} GMT"),)
        if "request-id" in told:
            headers += (("request-id", f"req_0123456789abcdef{number}"),)
        asked = {"model": "claude-opus-4-8", "n": number if "body" in told else 0}
        made = Exchange(
            id=f"{source}/{number}",
            connection=Connection(f"c{source}", source, CLIENT, HOST),
            protocol=Protocol.HTTP1,
            request=Request("POST", HOST, "/v1/messages", body=Body((json.dumps(asked).encode(),))),
            response=Response(200, headers, Body((json.dumps(answer).encode(),))),
            started_ns=at_ns,
            first_byte_ns=at_ns + 1000,
            ended_ns=at_ns + min(self.step_ns // 2, SECOND_NS),
            outcome=Outcome.COMPLETE,
        )
        return replace(made, **changed)


def united(*journals: Iterable[PricedEvent]) -> list[str]:
    """The ids under which the store keeps what these meters gave out."""
    groups: dict[str, Group] = {}
    for event in (event for journal in journals for event in journal):
        usage = event.usage
        shared_id = usage.shared_id or usage.id
        group = groups.setdefault(shared_id, Group(shared_id))
        assert usage.traits is not None
        traits = traits_of_text(traits_text(usage.traits))
        assert traits == usage.traits
        assert traits is not None
        if (entry := group.find(traits)) is None:
            group.add(Entry(group.new_id(traits), traits))
        else:
            group.learn(entry, traits)
    return [entry.event_id for group in groups.values() for entry in group]


WAYS = ("usage", "date", "request-id", "body")
TOLD_BY = st.frozensets(st.sampled_from(WAYS))


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 6),
    TOLD_BY,
    st.lists(
        st.tuples(
            st.sampled_from([Source.UPROBES, Source.PROXY]),
            st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True),
            st.integers(0, 1_000_000),
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_each_exchange_is_one_event_whoever_saw_it_in_what_order(
    count: int, told_by: frozenset[str], sightings: list[tuple[Source, list[int], int]]
) -> None:
    """Without anything else, they are told apart by their times."""
    seen: set[int] = set()
    journals = []
    for source, numbers, late_ns in sightings:
        mine = [number for number in numbers if number < count]
        seen |= set(mine)
        journals.append(metered(*(Call(n, told_by).by(source, late_ns) for n in mine)))
    assert len(united(*journals)) == len(set(united(*journals))) == len(seen)
    assert len(united(*journals, *journals)) == len(seen)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), TOLD_BY, st.integers(0, 6), st.booleans())
def test_calls_right_after_each_other_are_as_many_for_two_sources_as_for_one(
    count: int, told_by: frozenset[str], of_them: int, first: bool
) -> None:
    calls = [Call(number, told_by, step_ns=2_000_000) for number in range(count)]
    whole = metered(*(call.by(Source.UPROBES) for call in calls))
    some = metered(*(call.by(Source.PROXY, 500_000) for call in calls[:of_them]))
    journals = (some, whole) if first else (whole, some)
    assert len(whole) == count
    assert len(united(*journals)) == count


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), TOLD_BY, st.integers(0, 1 << 30))
def test_one_meter_that_has_both_sources_counts_each_once(
    count: int, told_by: frozenset[str], seed: int
) -> None:
    sightings = [
        Call(number, told_by).by(source, late_ns)
        for number in range(count)
        for source, late_ns in ((Source.UPROBES, 0), (Source.PROXY, 700_000))
    ]
    random.Random(seed).shuffle(sightings)
    meter = Meter(unpriced)
    events = [event for each in sightings for event in meter.exchange(each)]
    assert len({event.usage.id for event in events}) == len(events) == count
    assert meter.seen_again == count


def damaged(exchange: Exchange, how: str) -> Exchange:
    """A poorer sighting of an exchange."""
    connection, request, response = exchange.connection, exchange.request, exchange.response
    (body,) = response.body.pieces
    if how == "cut off":
        cut = Body((body[:-20],), complete=False)
        return replace(
            exchange, response=replace(response, body=cut), outcome=Outcome.ABORTED, gap=None
        )
    if how == "request lost in part":
        (asked,) = request.body.pieces
        holed = Body((asked[:5], asked[9:]), False, 0, 4)
        lost = replace(request, body=holed)
        return replace(exchange, request=lost, outcome=Outcome.GAPPED, gap="request bytes lost")
    assert how == "head lost"
    return replace(
        exchange,
        connection=replace(connection, joined=True),
        request=Request(host=HOST),
        response=replace(response, headers=()),
        started_ns=exchange.started_ns + 1000,
        outcome=Outcome.GAPPED,
        gap="request head lost",
    )


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["cut off", "request lost in part", "head lost"]),
    TOLD_BY,
    st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True),
    st.permutations(range(2)),
)
def test_a_poorer_sighting_is_no_other_exchange(
    how: str, told_by: frozenset[str], hurt: list[int], order: Sequence[int]
) -> None:
    calls = [Call(number, told_by) for number in range(4)]
    whole = metered(*(call.by(Source.PROXY, 2_000_000) for call in calls))
    poor = metered(*(damaged(calls[number].by(Source.UPROBES), how) for number in hurt))
    journals = [(whole, poor)[which] for which in order]
    assert len(united(*journals)) == 4


def test_the_store_keeps_each_once_and_the_first_keeps_its_id(tmp_path: Path) -> None:
    """Uprobes saw all six, the proxy three; restarts, replays of a journal, another order."""
    calls = [Call(number, frozenset(WAYS)) for number in range(6)]
    (alone,) = metered(calls[3].by(Source.PROXY))
    proxy = [metered(calls[n].by(Source.PROXY, 400_000)) for n in (3, 4, 5)]
    uprobes = metered(*(call.by(Source.UPROBES) for call in calls))
    events = stored(tmp_path, *proxy, uprobes, *proxy, uprobes)
    assert [event.usage.tokens.input for event in events] == [1000, 1001, 1002, 1003, 1004, 1005]
    assert len({event.usage.id for event in events}) == 6
    assert events[3].usage.id == alone.usage.id  # the first that was stored
    assert [event.usage.shared_id for event in events] == [
        None if n == 3 else alone.usage.id for n in range(6)
    ]
    assert [ID_REPEATED in event.usage.flags for event in events] == [n != 3 for n in range(6)]
    with Store(tmp_path) as store:
        store.append([*uprobes, *(event for journal in proxy for event in journal)])
        assert store.flush().repeated == 9


@pytest.mark.parametrize("version_knew", [True, False])
def test_of_an_older_database_the_times_tell(tmp_path: Path, version_knew: bool) -> None:
    """Its events have no traits: what is replayed again finds its own, and the others are new."""
    calls = [Call(number, frozenset(WAYS)).by(Source.UPROBES) for number in range(3)]
    events = metered(*calls)
    older = events[:1]
    if not version_knew:
        older = [replace(each, usage=replace(each.usage, traits=None)) for each in older]
    found = stored(tmp_path, older, events, events)
    assert len(found) == 3
    assert found[0].usage.id == older[0].usage.id


@pytest.mark.parametrize("source", [Source.PCAP, Source.UPROBES])
def test_equal_calls_of_other_connections_are_apart_if_one_follows_the_other(
    source: Source,
) -> None:
    """Seen twice at once, by an intermediary's two connections, they are one."""
    first = Call(0).by(source)
    unknown = [
        replace(first, id=str(n), connection=Connection(str(n), source, None, HOST))
        for n in range(2)
    ]
    one, other = unknown
    soon = one.ended_ns + 1000
    after = replace(other, started_ns=soon, ended_ns=soon + 1000)
    assert len(metered(one, after)) == 2
    assert len(united(metered(one, after), metered(one, after))) == 2
    within = replace(other, started_ns=one.started_ns + 10, ended_ns=one.ended_ns - 10)
    assert len(metered(one, within)) == 1


# --- what an id itself names ---------------------------------------------------------------------


def test_a_request_sent_again_with_its_key_is_billed_once() -> None:
    def sent(number: int, key: str | None) -> Exchange:
        made = Call(number, frozenset({"date", "request-id"})).by(Source.UPROBES)
        headers = () if key is None else (("idempotency-key", key),)
        return replace(made, request=replace(made.request, headers=headers))

    for keys, count in (("same", "same"), 1), (("one", "two"), 2), ((None, None), 2):
        assert len(metered(*(sent(n, key) for n, key in enumerate(keys)))) == count


@pytest.mark.parametrize("header", ["cf-aig-cache-status", "helicone-cache", "x-cache"])
def test_what_a_gateway_kept_is_not_billed_again(header: str) -> None:
    """Unless it says so of another request's answer, too."""
    first, again = (Call(n, frozenset({"date", "request-id"})).by(Source.PROXY) for n in (0, 1))
    headers = (*again.response.headers, (header, "HIT"))
    kept = replace(again, response=replace(again.response, headers=headers))
    assert len(metered(first, kept)) == 1
    assert len(united(metered(first), metered(kept))) == 1
    assert len(united(metered(kept), metered(first))) == 1
    asked = replace(kept.request, body=Body((b'{"model":"claude-opus-4-8","n":9}',)))
    assert len(metered(first, replace(kept, request=asked))) == 2


def test_a_gateway_on_this_machine_that_passes_an_answer_on_adds_nothing() -> None:
    """Its own call of the provider lies within the client's call of it; a later one does not."""
    inner = Call(0, frozenset(WAYS)).by(Source.UPROBES)
    outer = replace(
        inner,
        id="other",
        connection=Connection("other", Source.UPROBES, replace(CLIENT, pid=1), "llm.example.com"),
        request=replace(inner.request, host="llm.example.com", body=Body((b'{"other":1}',))),
        response=replace(inner.response, headers=(("x-request-id", "of-the-gateway-itself"),)),
        started_ns=inner.started_ns - 1000,
        ended_ns=inner.ended_ns + 1000,
    )
    minute_ns = 60 * SECOND_NS
    later = replace(
        outer,
        id="later",
        started_ns=outer.started_ns + minute_ns,
        ended_ns=outer.ended_ns + minute_ns,
    )
    for calls, count in ((inner, outer), 1), ((outer, inner), 1), ((inner, later), 2):
        meter = Meter(unpriced, registry=Registry({"llm.example.com": "anthropic"}))
        assert len([event for each in calls for event in meter.exchange(each)]) == count


@pytest.mark.parametrize("first", ["gateway", "client"])
def test_a_gateway_that_drops_the_session_does_not_hide_it(tmp_path: Path, first: str) -> None:
    """The client names its session to the gateway, which does not pass it on to the provider."""
    gateway = replace(CLIENT, pid=1, root="1-aa")
    inner = Call(0, frozenset(WAYS)).by(Source.UPROBES)
    inner = replace(
        inner,
        connection=replace(inner.connection, process=gateway),
        request=replace(inner.request, headers=(("user-agent", "litellm/1.80.0"),)),
    )
    words = (("user-agent", "claude-cli/2.1.332"), ("x-claude-code-session-id", "s-1"))
    outer = replace(
        inner,
        id="other",
        connection=Connection("other", Source.UPROBES, CLIENT, "llm.example.com"),
        request=replace(inner.request, host="llm.example.com", headers=words),
        started_ns=inner.started_ns - 1000,
        ended_ns=inner.ended_ns + 1000,
    )
    meter = Meter(unpriced, registry=Registry({"llm.example.com": "anthropic"}))
    calls = (inner, outer) if first == "gateway" else (outer, inner)
    events = [event for each in calls for event in meter.exchange(each)]
    assert (len(events), meter.seen_again) == (1, 1)  # counted once, by who counts
    again = meter.told_again()
    assert len(again) == (first == "gateway")
    assert meter.told_again() == []
    (kept,) = stored(tmp_path, events, again)
    caller = kept.usage.caller
    assert (caller.session_id, caller.session_source) == ("s-1", SessionSource.CLIENT)
    assert caller.client == ("litellm" if first == "gateway" else "claude-cli")


def openai(method: str, path: str, number: int, answer: Any, **headers: str) -> Exchange:
    """An exchange with OpenAI, `number` seconds after the first."""
    made = Call(number).by(Source.UPROBES)
    request = replace(made.request, method=method, host="api.openai.com", path=path)
    told = tuple({"date": f"Tue, 24 Nov 2026 05:00:{number:02} GMT", **headers}.items())
    text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return replace(made, request=request, response=Response(200, told, Body((text,))))


def test_a_background_job_that_is_polled_is_one_cost_and_its_start_another_event(
    tmp_path: Path,
) -> None:
    job = {"id": "resp_0123456789abcdef", "object": "response", "background": True}
    usage = {"input_tokens": 9, "output_tokens": 7, "total_tokens": 16}
    done = {**job, "status": "completed", "usage": usage}
    polls = [
        openai("GET", f"/v1/responses/{job['id']}", n, done if n > 2 else {**job, "usage": None})
        for n in range(1, 6)
    ]
    begun = openai("POST", "/v1/responses", 0, {**job, "status": "queued"})
    meter = Meter(unpriced)
    events = [event for each in (begun, *polls) for event in meter.exchange(each)]
    assert [event.usage.free for event in events] == ["pending", None]
    assert meter.seen_again == 2
    later = metered(*(replace(each, id=f"later{n}") for n, each in enumerate(polls)))
    assert len(stored(tmp_path, events, later)) == 2


def test_what_is_read_back_is_one_of_those_made_and_hides_none() -> None:
    usage = {"input_tokens": 9, "output_tokens": 7, "total_tokens": 16}
    job = {"id": "resp_0123456789abcdef", "object": "response", "background": True}
    done = {**job, "status": "completed", "usage": usage}
    read = openai("GET", f"/v1/responses/{job['id']}", 9, done)
    made = [openai("POST", "/v1/responses", n, done) for n in (1, 2)]
    for order in ((read, *made), (*made, read)):
        assert len(metered(*order)) == 2
    assert len(united(metered(read), metered(made[1]), metered(*made), metered(read))) == 2


def test_lines_of_a_batch_with_one_id_are_as_many_as_their_own_ids() -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}
    body = {"id": "chatcmpl-constant-id-of-all", "object": "chat.completion", "usage": usage}
    lines = [
        {"id": f"batch_req_{n}", "custom_id": f"row {n}", "response": {"body": body}}
        for n in range(3)
    ]
    file = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    meter = Meter(unpriced)
    found = []
    for number in (0, 7):  # downloaded twice
        read = openai("GET", "/v1/files/file-abc/content", number, file)
        found.append(list(meter.exchange(read)))
    assert [len(events) for events in found] == [3, 0]
    assert len(united(*found, metered(read))) == 3


def test_turns_of_one_websocket_with_one_id_are_as_many_as_they_are() -> None:
    response = {"id": "resp_constant_of_a_server", "usage": {"input_tokens": 9, "output_tokens": 7}}
    turn = json.dumps({"type": "response.completed", "response": response}).encode()
    asked = json.dumps({"type": "response.create", "response": {"model": "gpt-5"}}).encode()
    turns = []
    for number in range(4):
        made = openai("GET", "/v1/responses", number, turn)
        body = Body((asked,))
        turns.append(
            replace(made, protocol=Protocol.WEBSOCKET, request=replace(made.request, body=body))
        )
    assert len(metered(*turns)) == 4
    assert len(united(metered(*turns[:2]), metered(*turns), metered(*turns[1:]))) == 4


@pytest.mark.parametrize(
    "text",
    [None, "", " ", "x", "1+2", "1+2 l", "1+ l1 h", "1+2 lw" + "1" * 30, "\u0663+2 l1 h", "1+2 1 "],
)
def test_traits_of_anothers_making_are_none(text: str | None) -> None:
    found = traits_of_text(text)
    assert found is None or found.nth == 1


# --- bounds --------------------------------------------------------------------------------------


def test_what_is_forgotten_is_given_out_again_and_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metering, "EXCHANGES_REMEMBERED_MAX", 3)
    meter, told = Meter(unpriced), frozenset(WAYS)
    calls = [Call(number, told) for number in range(8)]
    events = [event for each in calls for event in meter.exchange(each.by(Source.UPROBES))]
    assert len(events) == 8
    assert len(meter._identities) == 3
    assert len(united(events, metered(*(each.by(Source.PROXY) for each in calls)))) == 8


def test_thousands_of_one_id_take_no_longer_each() -> None:
    made = Call(0, frozenset(WAYS)).by(Source.UPROBES)
    meter = Meter(unpriced)
    for number in range(1_000):
        headers = (("request-id", f"req_0123456789abcdef{number}"),)
        response = replace(made.response, headers=headers)
        (event,) = meter.exchange(replace(made, id=str(number), response=response))
    assert event.usage.shared_id is not None
    assert meter.seen_again == 0
