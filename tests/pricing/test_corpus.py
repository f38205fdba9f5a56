"""Recorded exchanges that state their own cost, against what their tokens come to.

The recordings are read from a shared folder and are no part of the project; without it these tests
are skipped. A difference between the two has a reason, written here, or it is our fault.
"""

from __future__ import annotations

import base64
import datetime as dt
import gzip
import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from halton_meter.explain.reader import events_of
from halton_meter.model import (
    Basis,
    Body,
    Connection,
    Exchange,
    Outcome,
    Protocol,
    Request,
    Response,
    Source,
)
from pricing.book import PriceBook
from tests.support.exchanges import REGISTRY

CORPUS = Path(__file__).resolve().parents[3] / "shared" / "corpus" / "exchanges"
pytestmark = pytest.mark.skipif(not CORPUS.exists(), reason="no recorded exchanges here")

# Recorded before a price changed: priced as of then.
RECORDED = {"xai.chat_completions.s.005": "2026-01-15"}
# Providers that state a cost in their usage, by the reason why a statement may be missing from it.
STATES_COST = ("xai", "openrouter", "perplexity", "vercel_gateway", "avian")
# With the user's own key OpenRouter states 0, its own fee; the upstream's charge is beside it.
OWN_KEY = {"openrouter.chat_completions.n.002"}
# What a body alone does not say: the prompt's text, the size asked for, who served the call, that a
# document of three words is an error, or anything at all.
BODY_ALONE_IS_SILENT = {
    "anthropic.text_completion.n.001", "anthropic.text_completion.s.002",
    "azure_openai.chat_completions.s.002", "bedrock.converse_stream.s.003",
    "bedrock.count_tokens.n.001", "bedrock.count_tokens.n.003",
    "huggingface.chat_completions.n.002", "mistral.audio_speech.n.001",
    "mistral.chat_completions.n.002", "openai.chat_completions.n.001", "openai.images.n.003",
    "replicate.replicate_predictions.s.001", "xai.audio_transcription.n.002", "xai.batch.n.001",
}  # fmt: skip


def body(message):
    if message.get("body") is not None:
        return message["body"].encode() if isinstance(message["body"], str) else b"{}"
    return base64.b64decode(message.get("body_b64") or "")


def answered(recorded):
    raw = body(recorded["response"])
    if recorded["wire"]["response_body_encoding"] == "gzip":
        return gzip.decompress(raw)
    if recorded["wire"]["response_body_encoding"] == "br":
        import brotli

        return brotli.decompress(raw)
    return raw


def events(path):
    recorded = json.loads(path.read_text())
    asked, answer = recorded["request"], recorded["response"]
    raw = answered(recorded)
    url = urlsplit(asked["url"])
    day = dt.datetime.fromisoformat(RECORDED.get(recorded["id"], "2026-11-23"))
    at_ns = int(day.replace(tzinfo=dt.UTC).timestamp()) * 10**9

    def headers(message):
        return tuple(
            (name.lower(), str(value))
            for name, value in message["headers"].items()
            if name.lower() != "content-encoding"
        )

    exchange = Exchange(
        id=recorded["id"],
        connection=Connection("c", Source.PCAP, peer=url.hostname),
        protocol=Protocol.HTTP1,
        request=Request(
            asked["method"], url.hostname, url.path, (), headers(asked), Body((body(asked),))
        ),
        response=Response(answer["status"], headers(answer), Body((raw,))),
        started_ns=at_ns,
        first_byte_ns=at_ns,
        ended_ns=at_ns,
        outcome=Outcome.COMPLETE,
    )
    return list(REGISTRY.read(exchange))


def files():
    return sorted(CORPUS.glob("*.json")) if CORPUS.exists() else []


@pytest.fixture(scope="module")
def book():
    return PriceBook.load()


@pytest.fixture(scope="module")
def stated():
    found = [(path.stem, event) for path in files() for event in events(path)]
    return [(name, event) for name, event in found if event.reported_usd is not None]


def test_every_stated_cost_is_what_the_tokens_come_to(book, stated):
    compared = 0
    for name, event in stated:
        if name in OWN_KEY:
            continue
        computed = book.price(replace(event, reported_usd=None))
        assert computed.basis is Basis.COMPUTED, (name, computed.flags)
        assert abs(computed.list_usd - event.reported_usd) < Decimal("1e-12"), (
            name,
            [(item.what, item.quantity, item.rate_usd) for item in computed.line_items],
        )
        compared += 1
    assert compared >= 15


def test_a_stated_cost_is_the_price(book, stated):
    for name, event in stated:
        priced = book.price(event)
        assert priced.basis is Basis.REPORTED, name
        if name not in OWN_KEY:
            assert priced.list_usd == event.reported_usd, name


def test_with_ones_own_key_the_price_is_what_the_upstream_charged(book, stated):
    own = [event for name, event in stated if name in OWN_KEY]
    for event in own:
        upstream = Decimal(event.conditions["upstream_cost_usd"])
        assert book.price(event).list_usd == upstream + event.reported_usd


def test_a_body_alone_costs_what_its_exchange_costs(book):
    compared = 0
    for path in files():
        whole = events(path)
        if not whole or path.stem in BODY_ALONE_IS_SILENT:
            continue
        first, raw = whole[0], answered(json.loads(path.read_text()))
        alone = events_of(raw, first.provider, first.at_ns, first.request_model)
        costs = [[book.price(each).list_usd for each in some] for some in (whole, alone)]
        assert costs[0] == costs[1], path.stem
        compared += 1
    assert compared >= 150


def test_several_providers_state_their_cost(stated):
    assert {event.provider for _, event in stated} >= set(STATES_COST)


def test_no_recorded_call_of_the_five_named_providers_is_unpriced_for_want_of_a_rate(book):
    for path in files():
        for event in events(path):
            if event.provider not in ("anthropic", "openai", "gemini", "xai", "groq"):
                continue
            priced = book.price(event)
            for flag in priced.flags:
                wanting = flag.startswith("unpriced:") and flag not in (
                    "unpriced:model",  # a transcription whose request was not recorded
                    "unpriced:usage",  # the response carries none
                )
                # A customer's fine-tune of a retired model, which no price page lists any more.
                assert not wanting or "davinci:2023" in flag, (path.stem, flag)
