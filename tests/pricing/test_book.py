"""The price book's promises: order of authority, history, plans, hostile events, exact files."""

from __future__ import annotations

import datetime as dt
import json
import re
import tomllib
from decimal import Context, Decimal, getcontext, localcontext
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halton_meter.model import (
    Basis,
    Certainty,
    LineItem,
    Outcome,
    Source,
    Tokens,
    Usage,
    UsageEvent,
)
from pricing import overrides as override_file
from pricing.book import PriceBook
from pricing.files import BUNDLED, PriceFile, Shelf
from pricing.names import candidates
from pricing.plausible import TOKENS_MAX
from pricing.rates import PriceError

FACTS = Path(__file__).resolve().parents[3] / "shared" / "facts" / "vectors.json"


def event(provider="openai", model="gpt-4o", at="2026-11-23", parts=None, **fields):
    day = dt.datetime.fromisoformat(at).replace(tzinfo=dt.UTC)
    values = {
        "id": "e",
        "provider": provider,
        "host": None,
        "endpoint": "x",
        "kind": "chat",
        "model": model,
        "request_model": None,
        "response_id": None,
        "streaming": False,
        "http_status": 200,
        "error_class": None,
        "outcome": Outcome.COMPLETE,
        "source": Source.PCAP,
        "parts": parts or (Usage(model, Tokens(input=1_000_000)),),
        "certainty": Certainty.REPORTED,
        "at_ns": int(day.timestamp()) * 10**9,
        "ttft_ms": None,
        "duration_ms": None,
    }
    return UsageEvent(**{**values, **fields})


@pytest.fixture(scope="module")
def book():
    return PriceBook.load()


def book_with(tmp_path, text):
    (tmp_path / "pricing.toml").write_text(text)
    return PriceBook.load(tmp_path)


@pytest.mark.skipif(not FACTS.exists(), reason="the worked vectors are not on this machine")
def test_worked_vectors_to_the_pico_dollar(book):
    from halton_meter.explain.reader import events_of

    for vector in json.loads(FACTS.read_text()):
        for document, provider in ((vector["response"], vector["provider"]), (vector, None)):
            events = events_of(json.dumps(document).encode(), provider, event().at_ns)
            total = sum(book.price(each).list_usd for each in events)
            assert abs(total - Decimal(vector["expected_usd"])) < Decimal("1e-12"), vector["name"]


# --- order of authority ---


def test_an_override_comes_before_the_book_and_a_stated_cost_before_the_override(tmp_path):
    book = book_with(
        tmp_path, '[[override]]\nmodel = "gpt-4o"\nrates = { input = "1", output = "2" }\n'
    )
    assert book.price(event()).list_usd == 1
    stated = book.price(event(reported_usd=Decimal("0.7")))
    assert (stated.list_usd, stated.basis) == (Decimal("0.7"), Basis.REPORTED)


def test_an_override_prices_a_model_nobody_knows(tmp_path):
    book = book_with(tmp_path, '[[override]]\nmodel = "ours-*"\nrates = { input = "0.25" }\n')
    priced = book.price(event("our-vllm", "ours-7b"))
    assert priced.list_usd == Decimal("0.25")
    assert priced.line_items[0].source == "your override"


def test_a_dated_override_holds_from_its_day_and_the_later_one_wins(tmp_path):
    book = book_with(
        tmp_path,
        '[[override]]\nmodel = "gpt-4o"\nfrom = 2026-06-01\nfactor = "0.5"\n'
        '[[override]]\nmodel = "gpt-4o"\nfrom = 2026-09-01\ndiscount = "20%"\n',
    )
    prices = [
        book.price(event(at=at)).list_usd for at in ("2026-05-31", "2026-06-01", "2026-09-01")
    ]
    assert prices == [Decimal("2.5"), Decimal("1.25"), Decimal("2.0")]


def test_a_discount_applies_to_tools_too_and_says_so(tmp_path):
    book = book_with(tmp_path, '[[override]]\nmodel = "gpt-4o"\ndiscount = "10"\n')
    part = Usage("gpt-4o", Tokens(input=0, output=0), {"web_search_requests": 100})
    priced = book.price(event(parts=(part,)))
    assert priced.list_usd == Decimal("0.9")
    assert "your override" in priced.line_items[0].note


def test_rates_of_ones_own_are_final_under_any_tier(tmp_path):
    book = book_with(tmp_path, '[[override]]\nmodel = "gpt-4o"\nrates = { input = "1" }\n')
    for tier in ("flex", "priority", "unheard-of"):
        priced = book.price(event(conditions={"service_tier": tier}))
        assert priced.list_usd == 1, tier


def test_an_override_for_one_provider_leaves_the_others(tmp_path):
    book = book_with(tmp_path, '[[override]]\nmodel = "gpt-4o"\nprovider = "azure"\nfactor = "0"\n')
    assert book.price(event("azure_openai")).list_usd == 0
    assert book.price(event("openai")).list_usd == Decimal("2.5")


def test_overrides_change_the_books_version(tmp_path, book):
    first = book_with(tmp_path, '[[override]]\nmodel = "a"\nfactor = "0.5"\n').version
    second = book_with(tmp_path, '[[override]]\nmodel = "a"\nfactor = "0.6"\n').version
    assert len({first, second, book.version}) == 3


@pytest.mark.parametrize(
    "text",
    [
        "[[override]]\nfactor = '1'\n",
        "[[override]]\nmodel = 'a'\n",
        "[[override]]\nmodel = 'a'\nfactor = '1'\ndiscount = '5'\n",
        "[[override]]\nmodel = 'a'\nfactor = '-1'\n",
        "[[override]]\nmodel = 'a'\nfactor = 'NaN'\n",
        "[[override]]\nmodel = 'a'\ndiscount = '120%'\n",
        "[[override]]\nmodel = 'a'\nrates = { input = 'much' }\n",
        "[[override]]\nmodel = 'a'\nfrom = 'soon'\nfactor = '1'\n",
        "override = 3\n",
        "[[override]\n",
    ],
)
def test_a_wrong_override_is_a_named_error(tmp_path, text):
    with pytest.raises(PriceError, match=r"override|pricing\.toml"):
        book_with(tmp_path, text)


def test_overrides_written_are_overrides_read(tmp_path):
    table = {"model": 'odd"name*', "provider": "openai", "from": dt.date(2026, 1, 2)}
    one = override_file.override_of({**table, "rates": {"images_each": "0.5"}})
    two = override_file.override_of({"model": "b", "discount": "5%", "note": "a\\b"})
    override_file.write(tmp_path, (one, two))
    assert override_file.read(tmp_path) == (one, two)


def test_a_line_says_what_was_billed_at_which_rate(book):
    (item,) = book.price(event()).line_items
    assert (item.what, item.quantity, item.usd, item.model) == (
        "input", Decimal(1_000_000), Decimal("2.5"), "gpt-4o",
    )  # fmt: skip


# --- names ---


@pytest.mark.parametrize(
    ("provider", "name", "model"),
    [
        ("anthropic", "claude-sonnet-4-5-20250929", "claude-sonnet-4-5"),
        ("anthropic", "anthropic/claude-opus-5-5", "claude-opus-5-5"),
        ("anthropic", "CLAUDE-OPUS-5-5", "claude-opus-5-5"),
        ("gemini", "models/gemini-2.5-flash-001", "gemini-2.5-flash"),
        ("gemini", "publishers/google/models/gemini-2.5-pro", "gemini-2.5-pro"),
        ("openai", "gpt-5.2-2025-12-11", "gpt-5.2"),
        ("openai", "gpt-5.2-20251211", "gpt-5.2"),
        ("openai", "openai/gpt-5-nano", "gpt-5-nano"),
        ("xai", "x-ai/grok-4.3", "grok-4.3"),
        ("vertex", "claude-opus-4-5@20251101", "claude-opus-4-5"),
        ("azure_openai", "gpt-35-turbo", "gpt-3.5-turbo"),
        ("vercel_gateway", "anthropic/claude-sonnet-4", "claude-sonnet-4-0"),
        ("portkey", "gpt-4.1-2025-04-14", "gpt-4.1"),
    ],
)
def test_dated_and_qualified_names_find_their_model(book, provider, name, model):
    assert book.tariff(provider, name, {}, event().at_ns).model == model


@pytest.mark.parametrize(
    "name",
    [
        "gpt-5-min",
        "gpt",
        "gpt-4o-minimal",
        "xgpt-4o",
        "claude-opus-5-5",
        "",
        "*",
        "gpt-*",
    ],
)
def test_names_that_only_resemble_a_model_find_nothing(book, name):
    tariff = book.tariff("openai", name, {}, event().at_ns)
    assert tariff.missing is not None


@given(st.text(max_size=400))
@settings(max_examples=150, deadline=None)
def test_any_text_gives_few_candidates(name):
    assert len(list(candidates(name, "openai"))) <= 60


# --- plans, reserved capacity, free calls ---


def test_a_plan_adds_nothing_to_the_bill_even_for_an_unknown_model(book):
    priced = book.price(event(model="gpt-unheard-of", conditions={"plan": "chatgpt"}))
    assert (priced.list_usd, priced.marginal_usd, priced.basis) == (None, 0, Basis.UNPRICED)


def test_an_event_that_says_nothing_of_usage_is_unpriced(book):
    for parts in ((Usage("gpt-4o"),), (Usage(None),)):
        priced = book.price(event(parts=parts, certainty=Certainty.UNKNOWN))
        assert priced.list_usd is None
        assert any(flag.startswith("unpriced:") for flag in priced.flags)


def test_one_part_without_a_price_leaves_the_whole_event_unpriced(book):
    parts = (Usage("gpt-4o", Tokens(input=5)), Usage("gpt-unheard-of", Tokens(input=5)))
    priced = book.price(event(parts=parts))
    assert priced.list_usd is None
    assert priced.line_items


def test_a_stated_cost_is_explained_by_lines_that_add_up(book):
    priced = book.price(event(reported_usd=Decimal("3")))
    assert sum(item.usd for item in priced.line_items) == 3
    assert [item.what for item in priced.line_items] == ["input", "difference_to_reported_cost"]


# --- thresholds ---


def test_a_marginal_threshold_prices_only_what_is_beyond_it(tmp_path):
    folder = tmp_path / "prices" / "overlay"
    folder.mkdir(parents=True)
    (folder / "our-vllm.toml").write_text(
        'provider = "our-vllm"\n[[model]]\nid = "m"\n'
        '[[model.price]]\ninput = "1"\ncache_read = "0.1"\n'
        'output = "2"\ntiers = [{ above = 1000, marginal = true, input = "3" }]\n'
    )
    book = PriceBook.load(tmp_path)
    part = Usage("m", Tokens(input=900, cache_read=400, output=10))
    expected = Decimal(300 * 3 + 600 * 1 + 10 * 2) / 1_000_000 + Decimal("0.00004")
    assert book.price(event("our-vllm", "m", parts=(part,))).list_usd == expected


def test_peak_hours_cost_more(book):
    part = Usage("deepseek-v4-flash", Tokens(input=1_000_000))
    usd = [
        book.price(event("deepseek", "deepseek-v4-flash", f"2026-11-23T{at}", (part,))).list_usd
        for at in ("00:59:59", "01:00:00", "03:59:59", "04:00:00")
    ]
    assert usd == [Decimal(text) for text in ("0.15", "0.3", "0.3", "0.15")]


# --- hostile events ---

counts = st.one_of(st.none(), st.integers(-5, 10**18), st.booleans(), st.text(max_size=3))
amounts = st.one_of(
    st.integers(-5, 10**30), st.decimals(), st.text(max_size=3), st.floats(), st.none()
)


@given(
    st.dictionaries(
        st.sampled_from(["input", "cache_read", "cache_write", "output", "audio_input"]), counts
    ),
    st.dictionaries(st.sampled_from(["web_search_requests", "images", "x", "requests"]), amounts),
    st.dictionaries(
        st.sampled_from(["service_tier", "batch", "region", "byok", "upstream_cost_usd", "plan"]),
        st.text(max_size=8),
    ),
    st.one_of(st.none(), st.decimals()),
    st.integers(-(10**20), 10**22),
)
@settings(max_examples=300, deadline=None)
def test_no_event_makes_the_book_raise(book, tokens, units, conditions, reported, at_ns):
    part = Usage("gpt-5.6-sol", Tokens(**tokens), units)
    priced = book.price(
        event(parts=(part,), conditions=conditions, reported_usd=reported, at_ns=at_ns)
    )
    if priced.list_usd is None:
        assert priced.basis is Basis.UNPRICED
    else:
        assert priced.list_usd >= 0
        assert priced.list_usd.is_finite()
    for item in priced.line_items:
        assert isinstance(item, LineItem)


@given(st.integers(0, TOKENS_MAX), st.integers(0, TOKENS_MAX), st.integers(0, TOKENS_MAX))
@settings(max_examples=100, deadline=None)
def test_prices_are_exact_for_any_count(book, fresh, read, out):
    part = Usage("claude-opus-5-5", Tokens(input=fresh, cache_read=read, output=out))
    priced = book.price(event("anthropic", "claude-opus-5-5", parts=(part,)))
    assert priced.list_usd * 10**7 == fresh * 40 + read * 2 + out * 200


# --- the files ---


@pytest.mark.parametrize("path", sorted((BUNDLED / "data").glob("*.toml")), ids=lambda p: p.stem)
def test_a_file_read_by_sections_is_the_file_parsed_whole(path):
    text = path.read_text()
    by_section = PriceFile(path.stem, text, by_hand=False)
    whole = tomllib.loads(text)["model"]
    assert [model.id for model in by_section.models()] == [table["id"] for table in whole]
    for table in whole:
        for name in table["names"]:
            found = by_section.find(name)
            assert found is not None
    assert all(row.rates or row.when for m in by_section.models() for row in m.rows)


@pytest.mark.parametrize("kind", ["data", "overlay"])
def test_every_rate_says_where_it_is_from_and_when(kind):
    shelf, _ = Shelf.read(None)
    for provider in shelf.providers():
        file = shelf.file(kind, provider)
        for model in file.models() if file else ():
            for row in model.rows:
                for name, rate in row.rates.items():
                    assert rate.source, (provider, model.id, name)
                    assert rate.dated, (provider, model.id, name)
        for rule in file.rules if file else ():
            for name, rate in rule.rates.items():
                assert rate.source, (provider, rule.kind, name)
                assert rate.dated, (provider, rule.kind, name)


def test_the_overlay_names_a_source_for_every_rule():
    for path in (BUNDLED / "overlay").glob("*.toml"):
        document = tomllib.loads(path.read_text())
        for kind in ("fee", "factor", "minimum"):
            for table in document.get(kind, ()):
                assert table["source"].startswith("https://"), (path.name, kind, table)


def test_a_damaged_refreshed_file_is_a_named_error(tmp_path):
    folder = tmp_path / "prices" / "data"
    folder.mkdir(parents=True)
    for text, said in (
        ('x\n[[model]]\nid = "a"\n', ":1: this is no TOML"),
        ('\n[[model]]\nid = "a"\n', "a model's section has no line of names"),
        ("\n[[model]]\nnames = []\n", r":2: openai \?: a model needs an id"),
        ('\n[[model]]\nid = "a"\nprice = 3\n', r":2: \[\[model\]\]: something in it is not"),
        ('\n[[modl]]\nid = "a"\n', ":2: unknown setting .*; did you mean model"),
        ("fee = 3\n", r":1: write it under a line \[\[fee\]\]"),
    ):
        (folder / "openai.toml").write_text(text)
        with pytest.raises(PriceError, match=f"openai.toml.*{said}.*pricing refresh --undo"):
            PriceBook.load(tmp_path)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "modle = 'a'\nfactor = '1'",
            '2: override 1: unknown setting "modle"; did you mean model?',
        ),
        ("model = 'a'\nrates = { inptu = '1' }", "3: .*nothing is billed by that name; .* input?"),
        ("model = 'a'\n[override.rates]\ninput = 'x'", "4: .*rates.input: .* no amount of money"),
        ("model = 3\nfactor = '1'", "2: .*model must be a name in quotes, not 3"),
        ("model = 'a'\nprovider = ''\nfactor = '1'", "3: .*provider must be a name in quotes"),
        ("model = 'a'\nfrom = 2026\nfactor = '1'", "3: .*from: 2026 is no date; write YYYY-MM-DD"),
        ("model = 'a'\nfactor = true", "3: .*factor: true is no amount of money"),
        ("model = 'a'\ndiscount = []", "3: .*discount: .* no amount of money"),
        ("model = 'a'\nfactor = 1\nfactor = 2", "4: this stands twice"),
    ],
)
def test_a_wrong_override_is_one_line_with_its_place(tmp_path, override, said):
    with pytest.raises(PriceError) as refused:
        book_with(tmp_path, f"[[override]]\n{override}\n")
    assert re.search(rf"pricing\.toml:{said.replace('?', '.')}", str(refused.value)), refused.value
    assert "\n" not in str(refused.value)


def test_a_byte_order_mark_is_no_error(tmp_path):
    text = "\ufeff[[override]]\r\nmodel = 'a'\r\nfactor = '0.5'\r\n"
    assert book_with(tmp_path, text).overrides[0].factor == Decimal("0.5")


def test_a_price_is_exact_whatever_the_callers_precision_which_stays_as_it_was(book):
    tokens = Tokens(input=1_234_567, cache_read=7_654_321, output=98_765)
    with localcontext(Context(prec=2)) as theirs:
        priced = book.price(event(parts=(Usage("gpt-4o", tokens),)))
        broken = book.price(event(parts=(Usage("gpt-4o", Tokens(input="x")),)))
        assert getcontext() is theirs
    # 2.50, 1.25 and 10 a million
    assert priced.list_usd == Decimal("3.0864175") + Decimal("9.56790125") + Decimal("0.98765")
    assert "bad_usage" in broken.flags
