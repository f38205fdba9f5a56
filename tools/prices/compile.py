"""Compile genai-prices' rates into `pricing/data/`: one file a provider, history kept.

    python -m venv v && v/bin/pip install genai-prices==0.2.3
    v/bin/python tools/prices/compile.py --names litellm.json            shows the changes in words
    v/bin/python tools/prices/compile.py --names litellm.json --write    and writes them

Run by a maintainer, never by the program: genai-prices (MIT) is no dependency of it. A row that is
in the files already is never altered nor dropped (`pricing/history.py` decides): a new price is a
new dated row, and where one is refused nothing is written. What upstream matches by prefix or
substring becomes a list of exact names, those it lists itself and those of `--names` (litellm's
model_prices_and_context_window.json); the dated alias rules of `pricing/names.py` do the rest at
run time. Read `cross_check.py` next.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sys
import tomllib
from collections.abc import Iterator
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pricing.history import History, describe, merged, rendered  # noqa: E402 - after the path

# upstream's provider -> ours. Others keep their name.
PROVIDER_NAMES = {
    "google": "gemini",
    "x-ai": "xai",
    "aws": "bedrock",
    "azure": "azure_openai",
    "github-copilot": "github_copilot",
}
# litellm's `litellm_provider` -> ours, for the exact names it knows.
LITELLM_PROVIDERS = {
    "anthropic": "anthropic", "openai": "openai", "text-completion-openai": "openai",
    "gemini": "gemini", "vertex_ai-language-models": "gemini",
    "vertex_ai-anthropic_models": "gemini", "xai": "xai", "groq": "groq", "azure": "azure_openai",
    "bedrock": "bedrock", "bedrock_converse": "bedrock", "mistral": "mistral",
    "deepseek": "deepseek", "cohere": "cohere", "cohere_chat": "cohere", "together_ai": "together",
    "fireworks_ai": "fireworks", "perplexity": "perplexity", "openrouter": "openrouter",
}  # fmt: skip
# upstream's price key -> ours; the suffix says per what (see pricing/rates.py).
RATE_NAMES = {
    "input_mtok": "input", "output_mtok": "output", "cache_read_mtok": "cache_read",
    "cache_write_mtok": "cache_write", "cache_write_1h_mtok": "cache_write_1h",
    "input_audio_mtok": "audio_input", "output_audio_mtok": "audio_output",
    "input_image_mtok": "image_input", "output_image_mtok": "image_output",
    "input_video_mtok": "video_input", "output_video_mtok": "video_output",
    "cache_audio_read_mtok": "cached_audio_input", "cache_image_read_mtok": "cached_image_input",
    "output_reasoning_mtok": "reasoning", "output_citation_mtok": "citation",
    "audio_hours": "audio_hours", "input_mchars": "characters", "requests_kcount": "requests_k",
    "web_searches_kcount": "web_search_requests_k",
    "storage_searches_kcount": "file_search_calls_k",
    "input_document_kpages": "pages_k", "input_annotated_document_kpages": "annotated_pages_k",
    "input_text_messages_kcount": "text_messages_k",
}  # fmt: skip
# Dates on which upstream *verified* a tier's rate, not on which it began: the row is held back to
# the start of the standard price that it belongs to, and the date kept as `checked`.
VERIFICATION_DATES = {dt.date(2026, 10, day) for day in (12, 14, 15)}


def number(value: Decimal) -> str:
    """Plain decimal text without trailing zeros."""
    text = format(value, "f")
    return (text.rstrip("0").rstrip(".") or "0") if "." in text else text


def rates_of(price: Any, provider: str) -> dict[str, Any]:
    """Upstream's ModelPrice as our row: rates, and tiers by threshold."""
    row: dict[str, Any] = {}
    tiers: dict[int, dict[str, str]] = {}
    for key, value in price.__dict__.items():
        if value is None or key == "input_audio_hours":  # always beside an equal audio_hours
            continue
        if (
            provider == "gemini"
            and key == "web_searches_kcount"
            and "cache_write_mtok" not in price.__dict__
        ):
            continue  # grounding is by prompt or by query: the overlay holds it
        name = RATE_NAMES[key]
        if isinstance(value, Decimal):
            row[name] = number(value)
            continue
        row[name] = number(value.base)
        for tier in value.tiers:
            tiers.setdefault(tier.start, {})[name] = number(tier.price)
    if tiers:
        row["tiers"] = [
            ({"at_least": start + 1} if start % 1000 == 999 else {"above": start}) | rates
            for start, rates in sorted(tiers.items())
        ]
    return row


def base_rows(model: Any, provider: str) -> Iterator[dict[str, Any]]:
    """The standard prices of a model, oldest first."""
    if not isinstance(model.prices, list):
        yield rates_of(model.prices, provider)
        return
    begun: dict[str, Any] = {}
    for conditional in model.prices:
        constraint = conditional.constraint
        head: dict[str, Any] = {}
        if constraint is not None and hasattr(constraint, "start_date"):
            head = begun = {"from": constraint.start_date}
        elif constraint is not None:  # peak hours belong to the dated price listed before them
            clocks = (constraint.start_time, constraint.end_time)
            head = {**begun, "hours": [clock.strftime("%H:%M") for clock in clocks]}
        yield head | rates_of(conditional.prices, provider)


def variant_rows(model: Any, provider: str, base: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The prices of tiers, batches and modes."""
    for variant in model.price_variants or ():
        when = dict(variant.when)
        if when.get("service_tier") in ("default", "fast") or when.get("search_type") == "web":
            continue  # the standard price; "fast" is served and stated as "priority"
        if when.get("processing") == "batch":
            when = {"batch": "true"}
        row: dict[str, Any] = {}
        if variant.constraint is not None:
            start = variant.constraint.start_date
            if start in VERIFICATION_DATES:
                row["checked"] = start
                begun = [r["from"] for r in base if "from" in r and r["from"] <= start]
                if begun:
                    row["from"] = max(begun)
            else:
                row["from"] = start
        yield row | {"when": when} | rates_of(variant.prices, provider)


def clause_names(clause: Any) -> Iterator[str]:
    """Every literal in upstream's match logic; its patterns are left to the dated aliases."""
    for attribute in ("equals", "starts_with", "contains", "ends_with"):
        if text := getattr(clause, attribute, None):
            yield text
    for attribute in ("or_", "and_"):
        for inner in getattr(clause, attribute, None) or ():
            yield from clause_names(inner)


def litellm_names(path: Path | None) -> dict[str, list[str]]:
    """The model names litellm knows, by our provider."""
    names: dict[str, list[str]] = {}
    for key, entry in json.loads(path.read_text()).items() if path else ():
        provider = LITELLM_PROVIDERS.get(entry.get("litellm_provider", ""))
        if provider and key.count("/") <= 3:
            head, _, rest = key.partition("/")
            own = head in (
                entry["litellm_provider"],
                "vertex_ai",
                "together_ai",
                "fireworks_ai",
                "openrouter",
            )
            names.setdefault(provider, []).append(rest if rest and own else key)
    return names


def compiled(names: dict[str, list[str]], today: dt.date) -> Iterator[tuple[str, History]]:
    """Each provider of the snapshot as a history: model id -> names, source and rows."""
    from genai_prices.data import providers

    for upstream in providers:
        ours = PROVIDER_NAMES.get(upstream.id, upstream.id)
        found: dict[str, list[str]] = {model.id: [] for model in upstream.models}
        literals = [n for m in upstream.models for n in (m.id, *clause_names(m.match))]
        for name in dict.fromkeys(n.lower().rstrip("-@.:") for n in literals + names.get(ours, [])):
            model = upstream.find_model(name)
            if model is not None and model.id in found and name not in ("moderation", "latest"):
                found[model.id].append(name)
        url = (upstream.pricing_urls or [f"https://{upstream.id}"])[0]
        history: History = {}
        for model in upstream.models:
            base = list(base_rows(model, ours))
            for row in base:
                if set(row) <= {"from", "hours"}:  # upstream's empty price: free of charge
                    row |= {"input": "0", "output": "0"}
            rows = base + list(variant_rows(model, ours, base))
            for row in rows:
                row.setdefault("checked", today)
            history[model.id] = {"names": sorted(found[model.id]), "source": url, "price": rows}
        yield ours, history


def main() -> int:
    """Show what would change; write it when asked; 1 when history would be rewritten."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--names", type=Path, help="litellm's JSON, for further exact names")
    parser.add_argument("--write", action="store_true", help="write pricing/data")
    parser.add_argument("--today", type=dt.date.fromisoformat, default=dt.date.today())
    arguments = parser.parse_args()
    upstream = (
        f"genai-prices {version('genai-prices')} (MIT, https://github.com/pydantic/genai-prices)"
    )
    refused = 0
    changed: dict[Path, str] = {}
    for provider, new in compiled(litellm_names(arguments.names), arguments.today):
        path = ROOT / "pricing" / "data" / f"{provider}.toml"
        old = (
            {m["id"]: m for m in tomllib.loads(path.read_text())["model"]} if path.exists() else {}
        )
        history, changes, conflicts = merged(old, new)
        lines = describe(provider, changes)
        for line in (*lines, *(f"REFUSED {provider} {conflict}" for conflict in conflicts)):
            print(line)
        refused += len(conflicts)
        if changes:
            changed[path] = rendered(provider, upstream, arguments.today, history)
    if refused:
        print(f"{refused} rows would rewrite history: date the price or decide in the overlay.")
    elif arguments.write:
        for path, text in changed.items():
            path.write_text(text)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
