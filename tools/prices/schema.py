"""Write pricing/schema.json: what a price file and a file of overrides may hold.

    .venv/bin/python tools/prices/schema.py --write

The names of rates and conditions are those of halton_meter/vocabulary.py. Without --write it only
says whether the file is as it should be; exit code 1 when it is not.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from halton_meter.vocabulary import PRICED_CONDITIONS, TOKEN_DIMENSIONS, UNITS  # noqa: E402

_WEEKDAYS = "mon|tue|wed|thu|fri|sat|sun"
PATH = ROOT / "pricing" / "schema.json"
DESCRIPTION = (
    "A bare name is USD per million tokens (or characters); _k is per thousand, _each per one, "
    "_hours per hour and _minutes per minute of a unit in seconds."
)


def schema() -> dict[str, Any]:
    """The JSON schema of price files (pricing/data, pricing/overlay) and of overrides."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Prices of Halton Meter",
        "description": "A price file, or the pricing.toml of your own prices. See docs/pricing.md.",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "provider": {"type": "string", "description": "whose prices these are"},
            "upstream": {"type": "string", "description": "what the file was compiled from"},
            "compiled": _date("when the file was compiled"),
            "model": _list(_ref("model"), "models and their dated prices"),
            "default": _list(_ref("default"), "what holds where a request leaves it out"),
            "fee": _list(_ref("fee"), "prices that a model's rows do not hold"),
            "derive": _list(_ref("rule"), "on[0] costs `factor` times on[1], where no row has it"),
            "factor": _list(_ref("rule"), "multiplies what `on` names (all tokens without it)"),
            "minimum": _list(_ref("rule"), "at least `factor` of the unit on[0] is billed"),
            "no_cached_rate": _list(_ref("statement"), "who looked: cached input has no price"),
            "override": _list(_ref("override"), "your own prices: pricing.toml only"),
        },
        "$defs": {
            "model": _model(),
            "row": _table(_head() | _when() | {
                "hours": {
                    "type": "array", "items": {"type": "string", "pattern": r"^\d\d:\d\d$"},
                    "minItems": 2, "maxItems": 2, "description": "from, until: of the UTC day",
                },
                "days": _list(
                    {"type": "string", "pattern": rf"^({_WEEKDAYS}|\d{{4}}-\d\d-\d\d)$"},
                    "weekdays and dates (UTC): the only ones on which the row holds",
                ),
                "replace": _flag("the compiled rows count no more"),
                "tiers": _list(_ref("tier"), "rates of long prompts"),
            }, rates=True),
            "tier": _table({
                "above": _tokens("holds for prompts longer than this"),
                "at_least": _tokens("holds for prompts of this length and longer"),
                "marginal": _flag("prices only what is beyond; else the whole request"),
            }, rates=True),
            "fee": _table(_rule() | _head() | _when(), rates=True),
            "rule": _table(_rule() | _head() | _when() | {
                "factor": _ref("amount"),
                "on": {"anyOf": [{"type": "string"}, _list({"type": "string"}, "dimensions")]},
                "always": _flag("also beside a row that prices the same condition itself"),
            }, required=["factor"]),
            "statement": _table(_rule() | _head() | _when(), required=["source", "checked"]),
            "default": _table(_rule() | _head() | _when() | {
                "conditions": _ref("when"),
                "factor": _ref("amount"),
                "on": _list({"type": "string"}, "each of unit on[1] is `factor` of unit on[0]"),
            }),
            "override": _override(),
            "rates": _table({}, rates=True),
            "amount": {
                "anyOf": [
                    {"type": "string", "pattern": r"^\d+(\.\d+)?$"},
                    {"type": "number", "minimum": 0},
                ],
                "description": "exact, so better written as text",
            },
            "when": {
                "type": "object",
                "description": 'conditions, all to be met; "a|b" is either, "!a" any other',
                "properties": {
                    name: {"type": "string", "description": line}
                    for name, line in PRICED_CONDITIONS.items()
                },
                "additionalProperties": {"type": "string"},
            },
        },
    }  # fmt: skip


def _model() -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["id"],
        "properties": {
            "id": {"type": "string"},
            "names": _list({"type": "string"}, "other names, exact"),
            "source": {"type": "string", "description": "where the prices are published"},
            "price": _list(_ref("row"), "dated: of several the latest that has begun holds"),
        },
    }


def _override() -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["model"],
        "oneOf": [{"required": [name]} for name in ("rates", "factor", "discount")],
        "properties": {
            "provider": {"type": "string", "description": "a name or a glob; every provider's"},
            "model": {"type": "string", "description": 'a name or a glob: "gpt-5*"'},
            "from": _date("in force from this day (UTC)"),
            "note": {"type": "string"},
            "rates": _ref("rates"),
            "factor": _ref("amount"),
            "discount": {"anyOf": [{"type": "string", "pattern": "^[0-9.]+ *%?$"},
                                   {"type": "number", "minimum": 0, "maximum": 100}]},
        },
    }  # fmt: skip


def _table(
    properties: dict[str, Any], *, rates: bool = False, required: list[str] | None = None
) -> dict[str, Any]:
    table = {"type": "object", "additionalProperties": False, "properties": properties}
    if required:
        table["required"] = required
    if rates:
        names = "|".join(sorted(TOKEN_DIMENSIONS | set(UNITS), key=lambda name: (-len(name), name)))
        seconds = "|".join(
            sorted(n.removesuffix("_seconds") for n in UNITS if n.endswith("_seconds"))
        )
        pattern = rf"^(?:(?:{names})(?:_k|_each)?|(?:{seconds})_(?:hours|minutes))$"
        table |= {"patternProperties": {pattern: _ref("amount")}, "description": DESCRIPTION}
    return table


def _head() -> dict[str, Any]:
    return {
        "from": _date("in force from this day (UTC)"),
        "until": _date("in force until the day before"),
        "checked": _date("when somebody last read it at the source"),
        "source": {"type": "string", "description": "where the figure is published"},
        "note": {"type": "string"},
        "evidence": {"type": "string", "description": "what it rests on, if not the vendor's page"},
    }


def _rule() -> dict[str, Any]:
    return {"models": _list({"type": "string"}, "globs over model ids; without it, all models")}


def _when() -> dict[str, Any]:
    return {"when": _ref("when")}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{name}"}


def _list(items: dict[str, Any], description: str) -> dict[str, Any]:
    return {"type": "array", "items": items, "description": description}


def _date(description: str) -> dict[str, Any]:
    pattern = r"^\d{4}-\d\d-\d\d"
    return {"type": "string", "pattern": pattern, "description": description}


def _flag(description: str) -> dict[str, Any]:
    return {"type": "boolean", "description": description}


def _tokens(description: str) -> dict[str, Any]:
    return {"type": "integer", "minimum": 0, "description": description}


def rendered() -> str:
    """The schema as the file's text."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


def main() -> int:
    """Say whether pricing/schema.json is up to date, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--write", action="store_true", help="write pricing/schema.json")
    text = rendered()
    if parser.parse_args().write:
        PATH.write_text(text, "utf-8")
        return 0
    if PATH.is_file() and PATH.read_text("utf-8") == text:
        return 0
    print(f"{PATH} is not up to date; run: python tools/prices/schema.py --write")
    return 1


if __name__ == "__main__":
    sys.exit(main())
