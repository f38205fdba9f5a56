"""Compare our rates with litellm's price file: every disagreement is listed here or is new.

    pip download --no-deps litellm && unzip -j litellm-*.whl '*model_prices*backup.json'
    .venv/bin/python tools/prices/cross_check.py model_prices_and_context_window_backup.json

litellm's file (MIT) has more dimensions and no history, so it checks the rates in force today and
is never a source by itself. Known disagreements stand in `disagreements.toml` with what was
decided and why; exit code 1 says that there is one that nobody has decided. Nothing is written.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import tomllib
from collections.abc import Iterator
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pricing.book import PriceBook  # noqa: E402 - after the path
from pricing.rates import Rate  # noqa: E402
from pricing.tariff import Tariff  # noqa: E402

# litellm's provider -> ours. Resellers that it fills by hand are left out.
PROVIDERS = {
    "anthropic": "anthropic",
    "openai": "openai",
    "gemini": "gemini",
    "xai": "xai",
    "groq": "groq",
    "mistral": "mistral",
    "deepseek": "deepseek",
}
# litellm's key without its suffixes -> our dimension.
DIMENSIONS = {
    "input_cost_per_token": "input",
    "output_cost_per_token": "output",
    "cache_read_input_token_cost": "cache_read",
    "cache_creation_input_token_cost": "cache_write",
    "cache_creation_input_token_cost_above_1hr": "cache_write_1h",
    "cache_creation_input_token_cost_above_12hr": "cache_write_12h",
    "input_cost_per_audio_token": "audio_input",
    "output_cost_per_audio_token": "audio_output",
    "cache_read_input_audio_token_cost": "cached_audio_input",
    "input_cost_per_image_token": "image_input",
    "output_cost_per_image_token": "image_output",
    "cache_read_input_image_token_cost": "cached_image_input",
    "output_cost_per_reasoning_token": "reasoning",
}
# The suffixes: a threshold of the prompt in thousands of tokens, then how it was served.
_KEY = re.compile(r"(.+?)(?:_above_(\d+)k_tokens)?(?:_(flex|priority|ultrafast|batches))?")
# A dimension without a rate of its own is billed at this one's.
FALLBACKS = {
    "audio_input": "input",
    "audio_output": "output",
    "image_input": "input",
    "image_output": "output",
    "cache_read": "input",
    "cached_audio_input": "cache_read",
    "cached_image_input": "cache_read",
    "reasoning": "output",
}
# Beyond rounding in a file of floats.
TOLERANCE = Decimal("0.001")


def differences(entries: dict[str, Any], book: PriceBook, at_ns: int) -> Iterator[tuple[str, str]]:
    """(provider/model/dimension[/condition], what each side says) where the two disagree."""
    for key, entry in entries.items():
        provider = PROVIDERS.get(entry.get("litellm_provider", ""))
        if provider is None or entry.get("mode") not in ("chat", "responses", "embedding"):
            continue
        model = key.removeprefix(f"{entry['litellm_provider']}/")
        for theirs_key, theirs in entry.items():
            match = _KEY.fullmatch(theirs_key)
            dimension = DIMENSIONS.get(match.group(1)) if match else None
            if match is None or dimension is None or not theirs:
                continue
            served = match.group(3)
            conditions = (
                {"batch": "true"}
                if served == "batches"
                else {"service_tier": served}
                if served
                else {}
            )
            tariff = book.tariff(provider, model, conditions, at_ns)
            if tariff.missing is not None and tariff.missing.startswith("model="):
                break  # unknown to us: not a disagreement
            above = int(match.group(2) or 0) * 1000
            name = "/".join((provider, model, dimension, *conditions.values()))
            if above:
                name += f"/{above}"
            rate = _rate(tariff, dimension, above)
            told = Decimal(str(theirs)) * 1_000_000
            if rate is None:
                yield name, f"ours unpriced, litellm ${told.normalize():f}"
            elif abs(rate.usd - told) > TOLERANCE * max(rate.usd, told):
                yield name, f"ours ${rate.usd.normalize():f}, litellm ${told.normalize():f}"


def _rate(tariff: Tariff, dimension: str, above: int) -> Rate | None:
    """The rate of a prompt longer than `above`; a dimension without one is billed at another's."""
    levels = [level for level in tariff.levels if level.above <= above]
    rates = levels[-1].rates if levels else {}
    name: str | None = dimension
    while name is not None:
        if name in rates:
            return rates[name]
        name = FALLBACKS.get(name)
    return None


def main() -> int:
    """Print each disagreement and its decision; 1 when one is undecided."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("litellm", type=Path, help="litellm's model_prices… JSON")
    parser.add_argument("--undecided", action="store_true", help="only those nobody has decided")
    arguments = parser.parse_args()
    known = tomllib.loads((Path(__file__).parent / "disagreements.toml").read_text())[
        "disagreement"
    ]
    book = PriceBook.load()
    undecided, decided = 0, 0
    entries = json.loads(arguments.litellm.read_text())
    for name, what in differences(entries, book, time.time_ns()):
        decision = next((d for d in known if fnmatchcase(name, d["rate"])), None)
        if decision is None:
            undecided += 1
            print(f"UNDECIDED {name}: {what}")
            continue
        decided += 1
        if not arguments.undecided:
            print(f"{name}: {what}\n    for {decision['decided']}: {decision['why']}")
    print(f"{decided} disagreements decided, {undecided} undecided")
    return 1 if undecided else 0


if __name__ == "__main__":
    sys.exit(main())
