"""The price book: a usage event in, a priced event out, exactly and explained line by line.

    book = PriceBook.load(home)
    priced = book.price(event)

Order of authority: the cost the provider states; the user's override; our overlay; the compiled
rates; else unpriced, which is None and never 0. The price in force at the request's start (UTC)
counts. One dimension of an event that has no rate leaves the whole event unpriced, and so does an
amount that no request can have (`plausible.py`). `price` never raises, whatever the event holds.
This file refuses to know providers' wire formats, clocks and stores. Read `tariff.py` next for how
rates are chosen, `names.py` for how models are found.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping
from dataclasses import replace
from decimal import Decimal, DecimalException, getcontext, setcontext
from pathlib import Path

from halton_meter.model import (
    IMPLAUSIBLE,
    Basis,
    Certainty,
    LineItem,
    PricedEvent,
    Usage,
    UsageEvent,
)
from halton_meter.vocabulary import PRICED_CONDITIONS, TOKEN_DIMENSIONS
from pricing import overrides as override_file
from pricing.bill import Bill
from pricing.files import Model, PriceFile, Shelf
from pricing.names import canonical_provider
from pricing.overrides import Override
from pricing.plausible import implausible_amounts, is_implausible_usd
from pricing.rates import EXACT, UNCONFIRMED, Level
from pricing.rates import rate as rate_of
from pricing.tariff import Tariff, tariff_for

_TARIFFS_MAX = 8192  # tariffs kept, a few kB each; beyond it all are dropped and made again
_NS_PER_MINUTE = 60_000_000_000
_MINUTES_PER_DAY = 1440
_ZERO = Decimal(0)
_DECLINED = rate_of(
    _ZERO,
    1_000_000,
    "https://platform.claude.com/docs/en/build-with-claude/refusals-and-fallback",
    note="declined before any output: reported, not billed",
)
_REFUSED = Tariff("refusal", (Level(0, dict.fromkeys(TOKEN_DIMENSIONS, _DECLINED)),))
# Parts that another model than the answering one took.
_HELPERS = ("advisor", "image_generation", "transcription")


class PriceBook:
    """Dated prices, overrides included. Safe to share between threads that only price."""

    def __init__(self, shelf: Shelf, overrides: tuple[Override, ...], version: str) -> None:
        self._shelf = shelf
        self._overrides = overrides
        self._tariffs: dict[tuple[object, ...], Tariff] = {}
        self.version = version

    @classmethod
    def load(cls, home: Path | None = None) -> PriceBook:
        """The bundled prices, `home`'s refreshed ones and overrides. Raises PriceError."""
        shelf, digest = Shelf.read(home)
        overrides = override_file.read(home)
        version = f"{shelf.file_date()}-{digest}"
        if overrides:
            version += f"+{override_file.digest(overrides)}"
        return cls(shelf, overrides, version)

    @property
    def overrides(self) -> tuple[Override, ...]:
        """The user's overrides in the order written."""
        return self._overrides

    def price(self, event: UsageEvent) -> PricedEvent:
        """What the event costs, by list and at the margin."""
        theirs = getcontext()
        setcontext(EXACT)
        try:
            if beyond := implausible_amounts(event):
                return self._implausible(event, beyond)
            if event.free is not None:
                return self._free(event)
            items, flags, total, saved = self._computed(event)
        except (DecimalException, TypeError, ValueError, AttributeError, OverflowError):
            items, flags, total, saved = [], ["bad_usage", "unpriced:usage"], None, None
        finally:
            setcontext(theirs)
        basis = Basis.COMPUTED
        if total is None:
            basis = Basis.UNPRICED
        elif event.certainty is Certainty.ESTIMATED or "estimated" in flags:
            basis = Basis.ESTIMATED
            flags.append("estimated")
        reported = _stated(event)
        if reported is not None and (not reported.is_finite() or reported < 0):
            flags.append("bad_reported_cost")
            reported = None
        if is_implausible_usd(reported, None if reported and basis is Basis.ESTIMATED else total):
            return self._implausible(event, ["usd"])
        if reported is not None:
            items = _reconciled(items, total, reported, event)
            basis, total = Basis.REPORTED, reported
            flags = [flag for flag in flags if not flag.startswith(_OF_OUR_PRICE)]
        unique = tuple(dict.fromkeys(flags)) if flags else ()
        return PricedEvent(
            event,
            total,
            _marginal(event, total),
            event.reported_usd,
            basis,
            tuple(items),
            unique,
            self.version,
            saved,
        )

    def tariff(
        self, provider: str, model: str, conditions: Mapping[str, str], at_ns: int
    ) -> Tariff:
        """The rates of `model` under `conditions` at `at_ns`, cached by the minute of the day."""
        if provider == "huggingface" and (served := conditions.get("upstream")):
            provider = f"huggingface_{served}"  # it passes on each provider's own price
        minutes = at_ns // _NS_PER_MINUTE
        # Rows that change by the hour are rare; a key by the minute would fill the cache for all.
        clock = minutes if provider in _PROVIDERS_BY_THE_HOUR else minutes // _MINUTES_PER_DAY
        key: tuple[object, ...] = (provider, model, clock)
        for name in conditions:
            if name in PRICED_CONDITIONS:
                key += (name, conditions[name])
        found = self._tariffs.get(key)
        if found is None:
            if len(self._tariffs) >= _TARIFFS_MAX:
                self._tariffs.clear()
            moment = _moment(at_ns)
            found = tariff_for(self._shelf, self._overrides, provider, model, conditions, moment)
            self._tariffs[key] = found
        return found

    def providers(self) -> list[str]:
        """Every provider with prices."""
        return self._shelf.providers()

    def model_count(self, provider: str) -> int:
        """How many models the compiled prices and the overlay of `provider` hold."""
        data, overlay = self._files(provider)
        count = len(data) if data else 0
        return count + sum(data is None or model.id.lower() not in data for model in overlay)

    def models(self, provider: str, at_ns: int) -> Iterator[tuple[Model, Tariff]]:
        """Each model of `provider` with its standard tariff at `at_ns`, overrides included.

        The model has the names and rows of both the compiled prices and the overlay.
        """
        owner = canonical_provider(provider)
        data, overlay = self._files(owner)
        added = {model.id.lower(): model for model in overlay}
        listed = [*(data.models() if data else ())]
        listed += [model for name, model in added.items() if data is None or name not in data]
        for model in listed:
            tariff = self.tariff(owner, model.id, {}, at_ns)
            if tariff.missing is None:
                other = added.get(model.id.lower(), model)
                names = tuple(dict.fromkeys((*model.names, *other.names)))
                yield replace(model, names=names, rows=(*model.rows, *other.rows)), tariff

    def _files(self, provider: str) -> tuple[PriceFile | None, tuple[Model, ...]]:
        """The compiled prices of a provider, and the models of its overlay."""
        overlay = self._shelf.file("overlay", provider)
        models = tuple(overlay.models()) if overlay else ()
        return self._shelf.file("data", provider), models

    def unconfirmed(self) -> Iterator[tuple[str, str, str]]:
        """(provider, model or rule, note) of what was not read at the vendor's own page."""
        for provider in self.providers():
            file = self._shelf.file("overlay", provider)
            if file is None:
                continue
            for model in file.models():
                notes = [r.note for row in model.rows for r in row.all_rates() if r.note]
                doubt = next((note for note in notes if UNCONFIRMED in note), None)
                if doubt is not None:
                    yield provider, model.id, doubt
            for rule in file.rules:
                notes = [rule.note, *(r.note for r in rule.rates.values() if r.note)]
                doubt = next((note for note in notes if UNCONFIRMED in note), None)
                if doubt is not None:
                    yield provider, ", ".join(rule.models), doubt

    # --- one event ---

    def _tariff_of(self, part: Usage, event: UsageEvent, model: str) -> Tariff:
        if part.label == "refusal":
            return _REFUSED
        tariff = self.tariff(event.provider, model, event.conditions, event.at_ns)
        if part.label in _HELPERS and tariff.missing:
            # Speed and tier are the answering model's: a helper without them ran at its own.
            asked = tariff.missing.partition("=")[0]
            if asked in ("speed", "service_tier"):
                own = {name: value for name, value in event.conditions.items() if name != asked}
                return self.tariff(event.provider, model, own, event.at_ns)
        return tariff

    def _free(self, event: UsageEvent) -> PricedEvent:
        if is_implausible_usd(event.reported_usd, None):
            return self._implausible(event, ["usd"])
        return PricedEvent(
            event, _ZERO, _ZERO, event.reported_usd, Basis.FREE, (), (), self.version
        )

    def _implausible(self, event: UsageEvent, beyond: list[str]) -> PricedEvent:
        """No price: of an answer that is wrong in one amount, none is believed."""
        flags = (IMPLAUSIBLE, *(f"{IMPLAUSIBLE}:{name}" for name in beyond))
        return PricedEvent(event, None, None, None, Basis.UNPRICED, (), flags, self.version)

    def _computed(
        self, event: UsageEvent
    ) -> tuple[list[LineItem], list[str], Decimal | None, Decimal | None]:
        """The lines of all parts, flags, their sum, and what caching saved of it."""
        saved: Decimal | None = None
        items: list[LineItem] = []
        flags: list[str] = []
        total = _ZERO
        known = bool(event.parts)
        conditions = event.conditions
        grounded = bool(conditions.get("grounding"))
        asks_for_an_hour = conditions.get("cache_ttl_asked") == "1h"
        for index, part in enumerate(event.parts):
            model = part.model or event.model or event.request_model
            if not model:
                flags.append("unpriced:model")
                known = False
                continue
            tariff = self._tariff_of(part, event, model)
            if tariff.missing:
                flags.append(f"unpriced:{tariff.missing}")
                known = False
                continue
            bill = Bill(tariff, model, part, flags)
            if asks_for_an_hour:
                bill.assumed_write_rate = "cache_write_1h"
            bill.tokens(grounded)
            if part.units or "requests" in bill.rates:
                bill.units(per_request=index == 0)
            if bill.empty:
                flags.append("unpriced:usage")
                known = False
            if bill.missing:
                known = False
                flags += [f"unpriced:{name}" for name in bill.missing]
            items += bill.items
            total = total + bill.total if index else bill.total
            if bill.saved is not None:
                saved = bill.saved if saved is None else saved + bill.saved
        if not event.parts:
            flags.append("unpriced:usage")
        if conditions.get("traffic_type") == "PROVISIONED_THROUGHPUT":
            flags.append("provisioned_throughput")
        return items, flags, total if known else None, saved if known else None


# What is said of a price that we compute, not of one that the provider states.
_OF_OUR_PRICE = ("unpriced:", "default_assumed")
# Providers whose prices depend on the time of day (DeepSeek's off-peak hours).
_PROVIDERS_BY_THE_HOUR = frozenset({"deepseek", "azure_openai"})


def _moment(at_ns: int) -> dt.datetime:
    try:
        return dt.datetime.fromtimestamp(at_ns // 1_000_000_000, dt.UTC)
    except (OverflowError, ValueError, OSError):
        return dt.datetime.max.replace(tzinfo=dt.UTC)


def _stated(event: UsageEvent) -> Decimal | None:
    """The cost the provider states.

    With the user's own key a router states only its own fee: the call costs that and what the
    upstream charged, or is computed where the router does not say.
    """
    reported = event.reported_usd
    if event.conditions.get("byok") != "true":
        return reported
    try:
        upstream = Decimal(event.conditions["upstream_cost_usd"])
    except (KeyError, DecimalException):
        return None
    return EXACT.add(upstream, reported or _ZERO)


def _marginal(event: UsageEvent, total: Decimal | None) -> Decimal | None:
    """What the call added to the bill: nothing where a plan or reserved capacity paid for it."""
    conditions = event.conditions
    if conditions.get("traffic_type") == "PROVISIONED_THROUGHPUT":
        return _ZERO
    if "plan" in conditions and conditions.get("overage") != "true":
        return _ZERO
    return total


def _reconciled(
    items: list[LineItem], total: Decimal | None, reported: Decimal, event: UsageEvent
) -> list[LineItem]:
    """Lines that add up to the stated cost: the computed ones, and what is left over."""
    source = "the response"
    if total is None:
        one = Decimal(1)
        return [LineItem("reported_cost", one, reported, reported, event.model, source)]
    difference = EXACT.subtract(reported, total)
    if not difference:
        return items
    note = f"computed {total}, the provider states {reported}"
    return [
        *items,
        LineItem(
            "difference_to_reported_cost", Decimal(1), difference, difference, event.model, source,
            note=note,
        ),
    ]  # fmt: skip
