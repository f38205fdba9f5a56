"""The rates that hold for one model under one set of conditions at one time.

A tariff is made once and used for every event alike: the dated row, the rows of the tier, batch or
mode that was served, the overlay's fees, derived rates and factors, then the user's override.
A condition that changes the price (a tier, a batch, a speed) and that no row or rule prices leaves
`missing` set: the event is then unpriced, never priced as standard. No event is seen here.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal

from halton_meter.vocabulary import PRICED_CONDITIONS, TOKEN_DIMENSIONS
from pricing.files import Model, PriceFile, Rule, Shelf
from pricing.names import RULES_AS, candidates, price_providers
from pricing.overrides import Override
from pricing.rates import EXACT, Level, Rate, Row, in_force, matches
from pricing.rates import rate as rate_of

# Conditions that no tariff may pass over: without a row or a rule for them there is no price.
_MUST_BE_PRICED = ("service_tier", "batch", "speed")
_STANDARD_TIERS = frozenset(
    {
        "standard",
        "default",
        "auto",
        "on_demand",
        "standard_only",
        "scale",
        "reserved",
        "unspecified",
    }
)
_VERTEX_TIERS = {"ON_DEMAND_FLEX": "flex", "ON_DEMAND_PRIORITY": "priority"}


@dataclass(frozen=True, slots=True)
class Tariff:
    """`levels[0]` prices every prompt, a later level those longer than its `above`."""

    model: str | None
    levels: tuple[Level, ...] = ()
    minimums: Mapping[str, Decimal] = field(default_factory=dict)
    # What a request may leave out: (unit, how much of it, why) of each of another unit; and the
    # dimensions whose price depends on a condition that is assumed.
    defaults: Mapping[str, tuple[str, Decimal, str]] = field(default_factory=dict)
    assumed: frozenset[str] = frozenset()
    missing: str | None = None
    origin: str | None = None  # "override", "overlay" or "compiled"
    no_cached_rate: str | None = None  # who publishes no price of cached input, and who looked


def context_of(conditions: Mapping[str, str]) -> dict[str, str]:
    """The conditions in the words of the price files; those that change nothing are left out."""
    context = {key: value for key, value in conditions.items() if key in PRICED_CONDITIONS}
    traffic = context.pop("traffic_type", "")
    tier = context.pop("service_tier", "").lower() or _VERTEX_TIERS.get(traffic, "")
    if tier == "batch":
        context["batch"] = "true"
    elif tier == "fast":  # OpenAI serves and bills "fast" as "priority"
        context["service_tier"] = "priority"
    elif tier and tier not in _STANDARD_TIERS:
        context["service_tier"] = tier
    if context.get("batch", "true") != "true":
        del context["batch"]
    if context.get("speed") == "standard":
        del context["speed"]
    return context


def tariff_for(
    shelf: Shelf,
    overrides: Iterable[Override],
    provider: str,
    model: str,
    conditions: Mapping[str, str],
    moment: dt.datetime,
) -> Tariff:
    """The tariff of `provider`'s `model`; `missing` says why there is none."""
    context = context_of(conditions)
    override = _override_for(overrides, provider, model, moment)
    found, files, name = _find(shelf, provider, model, context)
    if not found:
        if override is None or not override.rates:
            return Tariff(None, missing=f"model={model}")
        return Tariff(model, (Level(0, override.rates),), origin="override")
    model_id = found[0].id
    concerned = [
        rule
        for file in files
        for rule in file.rules
        if rule.concerns({model_id.lower(), name}, moment.date())
    ]
    left_out = _left_out(concerned, context)
    context |= left_out
    rows, covered, origin = _rows(found, context, moment)
    if rows is None:
        return Tariff(model_id, missing=f"date={moment.date()}")
    levels = _levels(rows)
    rules = [rule for rule in concerned if matches(rule.when, context)]
    levels, covered = _apply(rules, levels, covered, context)
    for key in _MUST_BE_PRICED:
        if key in context and key not in covered and not (override and override.rates):
            return Tariff(model_id, missing=f"{key}={context[key]}")
    if override is not None:
        origin = "override"
        levels = tuple(
            Level(level.above, override.applied(level.rates), level.marginal) for level in levels
        )
    minimums = {r.on[0]: r.factor for r in rules if r.kind == "minimum"}
    defaults = {r.on[1]: (r.on[0], r.factor, r.note) for r in rules if r.kind == "default" and r.on}
    looked = next((rule.note for rule in rules if rule.kind == "no_cached_rate"), None)
    return Tariff(
        model_id,
        levels,
        minimums,
        defaults,
        _depending(found, left_out, moment),
        origin=origin,
        no_cached_rate=looked,
    )


def _left_out(rules: Iterable[Rule], context: Mapping[str, str]) -> dict[str, str]:
    """The documented conditions of what a request leaves out, or leaves to the provider."""
    found: dict[str, str] = {}
    for rule in rules:
        if rule.kind == "default" and matches(rule.when, context):
            for name, value in rule.conditions.items():
                if context.get(name, "auto") == "auto":
                    found.setdefault(name, value)
    return found


def _depending(
    found: Iterable[Model], left_out: Mapping[str, str], moment: dt.datetime
) -> frozenset[str]:
    """The dimensions that another value of what was left out would have priced otherwise."""
    rows = (row for model in found for row in model.rows if row.holds(moment))
    return frozenset(
        name for row in rows if not left_out.keys().isdisjoint(row.when) for name in row.rates
    )


def _override_for(
    overrides: Iterable[Override], provider: str, model: str, moment: dt.datetime
) -> Override | None:
    """The user's override in force: the last written of those that concern the model."""
    best: Override | None = None
    for override in overrides:
        if override.concerns(provider, model, moment) and (
            best is None or (override.start or dt.date.min) >= (best.start or dt.date.min)
        ):
            best = override
    return best


def _find(
    shelf: Shelf, provider: str, model: str, context: Mapping[str, str]
) -> tuple[list[Model], list[PriceFile], str]:
    """The model in the compiled data and the overlays, the overlays whose rules hold, its name."""
    wanted = [model]
    profile = context.get("inference_profile")
    if provider == "bedrock" and profile and not model.startswith(f"{profile}."):
        # The path names the profile; the maker's own body only its own name of the model.
        maker = "anthropic." if model.startswith("claude") else ""
        wanted.insert(0, f"{profile}.{maker}{model}")
    for owner in price_providers(provider, model):
        data, overlay = shelf.file("data", owner), shelf.file("overlay", owner)
        files = [file for file in (data, overlay) if file is not None]
        for name in (n for w in wanted for n in candidates(w, owner)):
            found = [m for file in files if (m := file.find(name)) is not None]
            if not found:
                continue
            # The overlay may know the model by its compiled id only, and the other way round.
            if len(found) == 1 and overlay and data:
                model_id = found[0].id.lower()
                found = [m for file in files if (m := file.find(model_id)) is not None] or found
            own = shelf.file("overlay", provider) if owner != provider else None
            lent = shelf.file("overlay", RULES_AS[owner]) if owner in RULES_AS else None
            return found, [file for file in (own, overlay, lent) if file is not None], name
    return [], [], ""


def _rows(
    found: list[Model], context: Mapping[str, str], moment: dt.datetime
) -> tuple[list[Row] | None, set[str], str]:
    """The rows in force, later over earlier; the conditions they price; where they are from."""
    rows: list[Row] = []
    covered: set[str] = set()
    for model in found:
        base = in_force(model.rows, moment)
        if base is not None:
            rows = [base] if base.replace else [*rows, base]
    if not rows:
        return None, covered, ""
    for model in found:
        served: dict[tuple[tuple[str, str], ...], Row] = {}
        for row in model.rows:
            if row.when and row.holds(moment) and matches(row.when, context):
                key = tuple(sorted(row.when.items()))
                known = served.get(key)
                if known is None or (row.start or dt.date.min) >= (known.start or dt.date.min):
                    served[key] = row
        # The more conditions a row names, the more exact it is: it comes last and wins.
        for row in sorted(served.values(), key=lambda r: len(r.when)):
            rows.append(_noted(row))
            covered.update(row.when)
    return rows, covered, "overlay" if len(found) > 1 else "compiled"


def _noted(row: Row) -> Row:
    """The row with its conditions in the notes of its rates, where they have none of their own."""
    under = ", ".join(f"{key}={value}" for key, value in row.when.items())
    return replace(
        row,
        rates={n: r if r.note else r._replace(note=under) for n, r in row.rates.items()},
        levels=tuple(
            replace(
                level,
                rates={n: r if r.note else r._replace(note=under) for n, r in level.rates.items()},
            )
            for level in row.levels
        ),
    )


def _levels(rows: Iterable[Row]) -> tuple[Level, ...]:
    """The rows as levels. A row that names a dimension ends what earlier rows said of it."""
    rows = list(rows)
    thresholds: dict[int, bool] = {}
    for row in rows:
        for level in row.levels:
            thresholds[level.above] = thresholds.get(level.above, False) or level.marginal
    standard: dict[str, Rate] = {}
    for row in rows:
        if not row.when:
            standard.update(row.rates)
    levels: list[Level] = []
    for above in (0, *sorted(thresholds)):
        rates: dict[str, Rate] = {}
        for row in rows:
            if above and row.when and not row.levels:
                rates.update(_in_proportion(row.rates, standard, rates))
                continue
            rates.update(row.rates)
            for level in row.levels:
                if level.above <= above:
                    noted = {n: _long(r, level.above) for n, r in level.rates.items()}
                    rates.update(noted)
        levels.append(Level(above, rates, thresholds.get(above, False)))
    return tuple(levels)


def _in_proportion(
    own: Mapping[str, Rate], short: Mapping[str, Rate], long: Mapping[str, Rate]
) -> dict[str, Rate]:
    """The rates of a tier whose row tells no long prompts apart, raised as the standard ones are.

    A tier's multiple holds for long prompts too: none is listed as cheaper for being long.
    """
    raised: dict[str, Rate] = {}
    for name, rate in own.items():
        before, after = short.get(name), long.get(name)
        if before is None or after is None or not before.usd or before.usd == after.usd:
            raised[name] = rate
            continue
        usd = EXACT.divide(EXACT.multiply(rate.usd, after.usd), before.usd)
        raised[name] = rate_of(usd, rate.per, rate.source, rate.dated, after.note)
    return raised


def _long(rate: Rate, above: int) -> Rate:
    return rate._replace(note="; ".join(filter(None, (rate.note, f"prompt over {above} tokens"))))


def _apply(
    rules: Iterable[Rule], levels: tuple[Level, ...], covered: set[str], context: Mapping[str, str]
) -> tuple[tuple[Level, ...], set[str]]:
    """Fees, derived rates, factors. A factor yields to a row that prices its condition."""
    tables = [dict(level.rates) for level in levels]
    priced = set(covered)
    for rule in rules:
        if rule.kind == "fee":
            for table in tables:
                for name, rate in rule.rates.items():
                    table.setdefault(name, rate)
            priced.update(rule.when)
    for rule in rules:
        if rule.kind == "derive":
            target, of = rule.on
            for table in tables:
                if target not in table and of in table:
                    table[target] = table[of].times(rule.factor, rule.note)
    multiplied: list[Mapping[str, str]] = []
    for rule in rules:
        if rule.kind != "factor" or (not rule.always and any(key in covered for key in rule.when)):
            continue
        if rule.when in multiplied:
            continue  # a reseller and the maker both say that a batch is half: it is half once
        multiplied.append(rule.when)
        priced.update(rule.when)
        if rule.factor == 1:
            continue
        for table in tables:
            for name in [n for n in table if (n in rule.on if rule.on else n in TOKEN_DIMENSIONS)]:
                table[name] = table[name].times(rule.factor, f"x{rule.factor} {rule.note}")
    changed = tuple(
        Level(level.above, table, level.marginal)
        for level, table in zip(levels, tables, strict=True)
    )
    return changed, priced
