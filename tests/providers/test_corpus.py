"""Recorded exchanges of 14 projects: put on the wire, read back, and counted exactly.

What is expected is normalised here, from each provider's documented rules and the numbers that the
provider stated, never by our readers. Skipped where the recordings are not beside the checkout.
"""

import json
from typing import Any

import pytest

from halton_meter.model import UsageEvent
from halton_meter.providers.registry import Registry
from tests.support.exchanges import (
    CORPUS,
    Direction,
    converse,
    http1_bytes,
    http2_flights,
    wire_parts,
)

if not CORPUS.is_dir():
    pytest.skip("no recorded exchanges beside the checkout", allow_module_level=True)

CASES = [json.loads(path.read_text()) for path in sorted(CORPUS.glob("*.json"))]

# Hosts of the recordings that only a user's configuration makes a provider's.
REGISTRY = Registry(
    {
        "localhost:3000": "gateway",
        "localhost:8787": "gateway",
        "localhost:5002": "openai",
        "localhost:8000": "openai",
        "127.0.0.1:11434": "ollama",
        "gpustack.test": "openai",
        "ollama.test": "openai",
    }
)
IDS = {"google_ai_studio": "gemini", "bedrock_mantle": "bedrock", "ollama_cloud": "ollama"}


def _hosted(case: dict[str, Any]) -> dict[str, Any]:
    """The case with a host where the recorder put a placeholder for one."""
    request = dict(case["request"] or {})
    for mark in ("gpustack", "ollama"):
        place = f"<{mark.upper()}_API_BASE>"
        request["url"] = request.get("url", "").replace(place, f"http://{mark}.test/v1")
    return {**case, "request": request}


CASES = [_hosted(case) for case in CASES]


# --- what is expected, by the providers' rules --------------------------------------------------


def _sum(*values: int | None) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _last_usage(case: dict[str, Any]) -> dict[str, Any]:
    usages = case["expected"].get("raw_usage") or [{"usage": {}}]
    return usages[-1]["usage"]


def _anthropic(stated: dict[str, Any]) -> dict[str, int | None]:
    """Input excludes both caches; iterations, when several, are what is billed."""
    iterations = stated.get("iterations") or []
    if len(iterations) > 1:
        return {
            "input": _sum(*(i["input_tokens"] for i in iterations)),
            "output": _sum(*(i["output_tokens"] for i in iterations)),
            "cache_read": _sum(*(i["cache_read_input_tokens"] for i in iterations)),
        }
    return {
        "input": stated["input_tokens"],
        "output": stated["output_tokens"],
        "cache_read": stated["cache_read_tokens"],
        "writes": stated["cache_write_tokens"],
        "cache_write_5m": stated["cache_write_5m_tokens"],
        "cache_write_1h": stated["cache_write_1h_tokens"],
        "reasoning": stated["reasoning_tokens"],
    }


def _google(stated: dict[str, Any]) -> dict[str, int | None]:
    """The prompt includes what was cached; thoughts and tools' prompt come on top."""
    prompt, cached = stated["input_tokens"], stated["cache_read_tokens"]
    left = None if prompt is None else prompt - (cached or 0)
    return {
        "input": _sum(left, stated["tool_use_prompt_tokens"]),
        "output": _sum(stated["output_tokens"], stated["reasoning_tokens"]),
        "cache_read": cached,
        "reasoning": stated["reasoning_tokens"],
        "audio_input": stated["audio_input_tokens"],
        "tool_use_input": stated["tool_use_prompt_tokens"],
    }


def _openai(stated: dict[str, Any]) -> dict[str, int | None]:
    """Caches are inside the input, reasoning inside the output."""
    whole, cached = stated["input_tokens"], stated["cache_read_tokens"]
    written = stated["cache_write_tokens"]
    return {
        "input": None if whole is None else max(0, whole - (cached or 0) - (written or 0)),
        "output": stated["output_tokens"],
        "cache_read": cached,
        "writes": written,
        "reasoning": stated["reasoning_tokens"],
        "audio_input": stated["audio_input_tokens"],
        "audio_output": stated["audio_output_tokens"],
    }


def _separate(stated: dict[str, Any]) -> dict[str, int | None]:
    """Bedrock's converse and Cohere: input is what is billed besides caches."""
    return {
        "input": stated["input_tokens"],
        "output": stated["output_tokens"],
        "cache_read": stated["cache_read_tokens"],
        "writes": stated["cache_write_tokens"],
        "cache_write_5m": stated.get("cache_write_5m_tokens"),
    }


def normalised(case: dict[str, Any], stated: dict[str, Any]) -> dict[str, int | None]:
    """The contract's tokens, by the documented rule of whoever stated the numbers."""
    who, api = case["provider_detail"], case["api"]
    found = str(stated.get("usage_found_at"))
    if who == "anthropic" or "message_" in found or api in ("messages", "vertex_rawPredict"):
        return _anthropic(stated)
    if "usageMetadata" in found or api == "interactions":
        return _google(stated)
    if who == "bedrock" or "billed_units" in found:
        return _separate(stated)
    if found == "body.usage" and api in ("invoke",):
        return _separate(stated)
    want = _openai(stated)
    total, reasoning = stated["total_tokens"], stated["reasoning_tokens"]
    both = (stated["input_tokens"] or 0) + (stated["output_tokens"] or 0)
    if who == "xai" and total == both + (reasoning or 0):
        want["output"] = stated["output_tokens"] + (reasoning or 0)
    if who == "google_ai_studio" and total is not None and total > both:
        want["output"] = total - stated["input_tokens"]  # thinking that no field names
    if who == "mistral" and total == both + (stated["audio_input_tokens"] or 0):
        want["input"] += stated["audio_input_tokens"] or 0
    if who == "voyage":
        want["input"] = total  # an embedding's total is its input
    return want


def check_tokens(event: UsageEvent, want: dict[str, int | None], where: str) -> None:
    tokens = event.tokens
    parts = (
        tokens.cache_write,
        tokens.cache_write_5m,
        tokens.cache_write_1h,
        tokens.cache_write_12h,
    )
    writes = _sum(*parts)
    for name, value in want.items():
        got = writes if name == "writes" else getattr(tokens, name)
        if name.startswith("cache_write_") and value == 0:
            got = got or 0
        if value is None and got == 0:
            continue  # The recorder's summary leaves out zeros under names it did not know.
        if name == "reasoning" and len(event.parts) > 1:
            continue  # Stated by the parts alone.
        assert got == value, f"{where}: {name} is {got}, stated {value}"


# --- reading the cases back ---------------------------------------------------------------------


def check(case: dict[str, Any], events: list[UsageEvent], whole_head: bool = True) -> None:
    where, role, stated = case["id"], case["billing_role"], case["expected"]
    for event in events:
        assert event.raw_usage is None or len(event.raw_usage) < 4000
        wanted = IDS.get(case["provider_detail"], case["provider_detail"])
        if "gateway_" not in wanted and wanted not in ("local_openai_compat", "gpustack"):
            assert event.provider == wanted or wanted == "ollama", where
    if role in ("retrieve", "cache_object"):
        assert events == [], where
        return
    if role == "batch_object" and case["request"]["method"] == "GET":
        assert events == [], where
        return
    if role == "poll":
        assert len(events) == int(bool(stated["usage_present"])), where
    elif role == "batch_results":
        assert len(events) == len(stated["items"]), where
        for event, item in zip(events, stated["items"], strict=True):
            assert event.model == item["model"]
            assert event.conditions["batch"] == "true"
            check_tokens(event, normalised(case, {**item, "usage_found_at": ""}), where)
        return
    else:
        assert len(events) == 1, where
    for event in events:
        _check_one(case, event, role, stated, where)


def _check_one(
    case: dict[str, Any], event: UsageEvent, role: str, stated: dict[str, Any], where: str
) -> None:
    assert event.http_status == case["response"]["status"]
    if role == "error":
        assert event.error_class is not None, where
        assert event.free == "error", where
    if role in ("free_count", "free"):
        assert event.free == ("count" if role == "free_count" else "moderation"), where
    if stated.get("counted_tokens") is not None:
        assert event.parts[0].details["counted"] == stated["counted_tokens"], where
    if case["request_recorded"] or not case["streaming"]:
        assert event.streaming == case["streaming"] or role == "error", where
    model = stated["model"] or stated["request_model"]
    if model is not None and (stated["model"] or case["request_recorded"]):
        assert event.model == model.removeprefix("models/"), where
    if role != "error" and stated["usage_present"] and "image" not in case["api"]:
        check_tokens(event, normalised(case, stated), where)
    if not stated["usage_present"] and not case["api"].startswith("batch"):
        assert event.tokens.input is None, where
        assert event.tokens.output is None, where
    if stated["service_tier"] and role != "error":
        assert event.conditions["service_tier"] == stated["service_tier"].lower(), where
    cost = stated["provider_cost_usd"]
    if cost is not None and "gateway_pydantic" not in where:
        assert event.reported_usd is not None, where
        assert float(event.reported_usd) == cost, where


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
@pytest.mark.parametrize("seed", [None, 7], ids=["whole", "split"])
def test_recorded_exchange_over_http1(case: dict[str, Any], seed: int | None) -> None:
    sent, came = http1_bytes(case, chunked=seed is not None)
    flights = [(Direction.SENT, sent), (Direction.RECEIVED, came)]
    exchanges = converse(flights, wire_parts(case)[1], REGISTRY, seed)
    check(case, [event for each in exchanges for event in REGISTRY.read(each)])


def test_recorded_exchanges_interleaved_over_http2() -> None:
    by_host: dict[str, list[dict[str, Any]]] = {}
    for case in CASES:
        by_host.setdefault(wire_parts(case)[1], []).append(case)
    for host, cases in by_host.items():
        if not host.isascii() or "<" in host:
            continue
        exchanges = converse(http2_flights(cases), host, REGISTRY, seed=3)
        events = [event for each in exchanges for event in REGISTRY.read(each)]
        wanted = 0
        for case in cases:
            sent, came = http1_bytes(case, chunked=False)
            flights = [(Direction.SENT, sent), (Direction.RECEIVED, came)]
            alone = converse(flights, host, REGISTRY)
            for event in (event for each in alone for event in REGISTRY.read(each)):
                wanted += 1
                twins = [e for e in events if e.parts == event.parts and e.model == event.model]
                assert twins, case["id"]
        assert len(events) == wanted, host


def test_no_content_gets_into_an_event() -> None:
    for case in CASES:
        sent, came = http1_bytes(case, chunked=False)
        flights = [(Direction.SENT, sent), (Direction.RECEIVED, came)]
        for each in converse(flights, wire_parts(case)[1], REGISTRY):
            for event in REGISTRY.read(each):
                assert "content" not in (event.raw_usage or "").replace("cachedContent", "")
                assert "message" not in json.dumps(event.conditions)
