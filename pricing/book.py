"""The price book: a usage event in, a priced event out, exactly and explained line by line.

    book = PriceBook.load(home)
    priced = book.price(event)

Order of authority: the cost the provider states; the user's override; our overlay; the compiled
rates; else unpriced, which is None and never 0. The price in force at the request's start (UTC)
counts. One dimension of an event that has no rate leaves the whole event unpriced. `price` never
raises, whatever the event holds. This file refuses to know providers' wire formats, clocks and
stores. Read `tariff.py` next for how rates are chosen, `names.py` for how models are found.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping
from dataclasses import fields
from decimal import Decimal, DecimalException
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

from halton_meter.model import Basis, Certainty, LineItem, PricedEvent, Usage, UsageEvent
from pricing import overrides as override_file
from pricing.files import Model, Shelf
from pricing.names import canonical_provider
from pricing.overrides import Override
from pricing.rates import EXACT, UNCONFIRMED, Level, Rate, Row, in_force
from pricing.rates import rate as rate_of
from pricing.tariff import PRICED_CONDITIONS, TOKEN_DIMENSIONS, Tariff, tariff_for

_TARIFFS_MAX = 8192  # tariffs kept, a few kB each; beyond it all are dropped and made again
_NS_PER_MINUTE = 60_000_000_000
_MINUTES_PER_DAY = 1440
_ZERO = Decimal(0)
_FREE_TOOL_TOKENS = rate_of(
    _ZERO,
    1_000_000,
    "https://ai.google.dev/gemini-api/docs/pricing",
    note="tool-use tokens are not billed when Google Search or Maps grounded the answer",
)
_DECLINED = rate_of(
    _ZERO,
    1_000_000,
    "https://platform.claude.com/docs/en/build-with-claude/refusals-and-fallback",
    note="declined before any output: reported, not billed",
)
_REFUSED = Tariff("refusal", (Level(0, dict.fromkeys(TOKEN_DIMENSIONS, _DECLINED)),))
_WRITES = ("cache_write", "cache_write_5m", "cache_write_1h", "cache_write_12h")
_WRITTEN = attrgetter(*_WRITES)
_NOTHING_WRITTEN = (None,) * len(_WRITES)
_CACHED_MODALITIES = ("cached_audio_input", "cached_image_input", "cached_video_input")
# Units that describe what the tokens were: passed over where the same part's tokens are billed.
_DESCRIPTIVE_UNITS = frozenset(
    {"audio_seconds", "video_seconds", "images", "input_images", "characters", "pages"}
)
# Units billed only where a row has a rate for them: facts about a call more than things sold.
_SELDOM_BILLED_UNITS = frozenset({"cache_storage_tokens", "requests"})


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
        if event.free is not None:
            return self._free(event)
        try:
            items, flags, total = self._computed(event)
        except (DecimalException, TypeError, ValueError, AttributeError, OverflowError):
            items, flags, total = [], ["bad_usage", "unpriced:usage"], None
        basis = Basis.COMPUTED
        if total is None:
            basis = Basis.UNPRICED
        elif event.certainty is Certainty.ESTIMATED or "estimated" in flags:
            basis = Basis.ESTIMATED
            flags.append("estimated")
        reported = _stated(event)
        if reported is not None:
            if not reported.is_finite() or reported < 0:
                flags.append("bad_reported_cost")
            else:
                items = _reconciled(items, total, reported, event)
                basis, total = Basis.REPORTED, reported
                flags = [flag for flag in flags if not flag.startswith("unpriced:")]
        unique = tuple(dict.fromkeys(flags)) if flags else ()
        priced: Any = _PricedDraft(event, total, basis, tuple(items), unique, self.version)
        priced.__class__ = PricedEvent
        return cast(PricedEvent, priced)

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
        return sum(len(f) for k in ("data", "overlay") if (f := self._shelf.file(k, provider)))

    def models(self, provider: str, at_ns: int) -> Iterator[tuple[Model, Row]]:
        """Each model of `provider` with the standard row in force at `at_ns`."""
        moment = _moment(at_ns)
        for kind in ("data", "overlay"):
            file = self._shelf.file(kind, canonical_provider(provider))
            for model in file.models() if file else ():
                row = in_force(model.rows, moment)
                if row is not None:
                    yield model, row

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
        if part.label == "advisor" and tariff.missing and tariff.missing.startswith("speed="):
            # The speed is the answering model's: an advisor that has no fast mode ran at its own.
            slow = {name: value for name, value in event.conditions.items() if name != "speed"}
            return self.tariff(event.provider, model, slow, event.at_ns)
        return tariff

    def _free(self, event: UsageEvent) -> PricedEvent:
        return PricedEvent(
            event, _ZERO, _ZERO, event.reported_usd, Basis.FREE, (), (), self.version
        )

    def _computed(self, event: UsageEvent) -> tuple[list[LineItem], list[str], Decimal | None]:
        items: list[LineItem] = []
        flags: list[str] = []
        total = _ZERO
        known = bool(event.parts)
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
            bill = _Bill(tariff, model, part, flags)
            if event.conditions.get("cache_ttl_asked") == "1h":
                bill.unstated_write = "cache_write_1h"
            bill.tokens(bool(event.conditions.get("grounding")))
            if part.units or "requests" in bill.rates:
                bill.units(per_request=index == 0)
            if bill.empty:
                flags.append("unpriced:usage")
                known = False
            known = known and not bill.missing
            flags += [f"unpriced:{name}" for name in bill.missing]
            items += bill.items
            total = EXACT.add(total, bill.total) if total else bill.total
        if not event.parts:
            flags.append("unpriced:usage")
        if event.conditions.get("traffic_type") == "PROVISIONED_THROUGHPUT":
            flags.append("provisioned_throughput")
        return items, flags, total if known else None


# Providers whose prices depend on the time of day (DeepSeek's off-peak hours).
_PROVIDERS_BY_THE_HOUR = frozenset({"deepseek", "azure_openai"})


class _Bill:
    """The lines of one part of an event at one tariff."""

    __slots__ = (
        "_flags", "_model", "_part", "_tariff",
        "empty", "items", "missing", "rates", "total", "unstated_write",
    )  # fmt: skip

    def __init__(self, tariff: Tariff, model: str, part: Usage, flags: list[str]) -> None:
        self._tariff = tariff
        self._model = model
        self._part = part
        self._flags = flags
        self.rates: Mapping[str, Rate] = tariff.levels[0].rates
        self.items: list[LineItem] = []
        self.missing: list[str] = []
        self.empty = False
        self.total = _ZERO
        self.unstated_write = "cache_write"  # the rate of writes whose lifetime is not stated

    def tokens(self, grounded: bool) -> None:
        """Lines for every token: disjoint buckets, then modalities cut out of them."""
        count, details, tokens = self._count, self._part.details, self._part.tokens
        fresh, out = tokens.input, tokens.output
        if details:
            fresh, out = self._estimated(fresh, out)
        read = count(tokens.cache_read)
        if details:
            read = max(0, read - count(details.get("unbilled_cache_read")))
        stated = _WRITTEN(tokens)
        writes = (
            [(n, count(w)) for n, w in zip(_WRITES, stated, strict=True) if w is not None]
            if stated != _NOTHING_WRITTEN
            else []
        )
        self.empty = not (self._part.units or writes) and (
            fresh is None and out is None and tokens.cache_read is None
        )
        fresh, out = count(fresh), count(out)
        if self._part.units and self._sold_by_unit():
            return
        if len(self._tariff.levels) > 1:
            prompt = fresh + read + sum(written for _, written in writes)
            level = self._level(prompt)
            if level is not None and level.marginal:
                fresh = self._beyond(level, fresh, prompt)
        if details or tokens.audio_input or tokens.image_input or tokens.tool_use_input:
            self._input(fresh, grounded)
        elif fresh:
            self._line("input", fresh, self.rates.get("input"))
        if read:
            self._read(read)
        for name, written in writes:
            if written:
                self._line(name, written, self._write_rate(name))
        if out:
            self._output(out)
        if details.get("citation") and "citation" in self.rates:
            self._line("citation", count(details["citation"]), self.rates["citation"])

    def units(self, *, per_request: bool) -> None:
        """Lines for what is billed other than by token."""
        rates, units = self.rates, self._part.units
        for name, quantity in units.items():
            amount = self._quantity(quantity)
            rate = rates.get(name)
            if not amount:
                continue
            if rate is None and name in _SELDOM_BILLED_UNITS:
                if name == "cache_storage_tokens":  # billed by the hour, which no response states
                    self._flags.append("cache_storage_not_priced")
                continue
            if rate is None:
                if name not in _DESCRIPTIVE_UNITS or not self.items:
                    self.missing.append(name)
                continue
            least = self._tariff.minimums.get(name, _ZERO)
            if amount < least:
                amount, rate = least, rate._replace(note=f"at least {least} {name} are billed")
            self._line(name, amount, rate)
        if per_request and "requests" in rates and "requests" not in units:
            self._line("requests", 1, rates["requests"])

    # --- tokens ---

    def _estimated(self, fresh: int | None, out: int | None) -> tuple[int | None, int | None]:
        """The counts, ours from the text seen standing in for those the provider did not send."""
        details = self._part.details
        if fresh is None and (guess := details.get("estimated_input")) is not None:
            fresh = guess
            self._flags.append("estimated")
        if out is None and (guess := details.get("estimated_output")) is not None:
            out = guess
            self._flags.append("estimated")
        return fresh, out

    def _sold_by_unit(self) -> bool:
        """True where the model has a price by second, image or page, and none by token."""
        rates = self.rates
        return (
            "input" not in rates
            and "output" not in rates
            and any(name in rates for name in self._part.units)
        )

    def _level(self, prompt: int) -> Level | None:
        """Take the rates for a prompt of this many tokens; the level where it is a long one."""
        chosen = None
        for level in self._tariff.levels[1:]:
            if prompt > level.above:
                chosen = level
        if chosen is not None and not chosen.marginal:
            self.rates = chosen.rates
        return chosen

    def _beyond(self, level: Level, fresh: int, prompt: int) -> int:
        """Bill what is beyond a marginal threshold; the uncached end of a prompt comes last."""
        excess = min(fresh, prompt - level.above)
        self._line("input", excess, level.rates.get("input"))
        return fresh - excess

    def _input(self, fresh: int, grounded: bool) -> None:
        details, tokens, rates = self._part.details, self._part.tokens, self.rates
        tool = tokens.tool_use_input
        if tool and (grounded or "tool_use_input" in rates):
            part = self._part_of("tool_use_input", tool, fresh)
            rate = _FREE_TOOL_TOKENS if grounded else rates["tool_use_input"]
            self._line("tool_use_input", part, rate)
            fresh -= part
        for name, stated in (
            ("audio_input", tokens.audio_input),
            ("image_input", tokens.image_input),
            ("video_input", details.get("video_input")),
        ):
            if stated and name in rates:
                cached = self._count(details.get(f"cached_{name}"))
                part = self._part_of(name, max(0, self._count(stated) - cached), fresh)
                self._line(name, part, rates[name])
                fresh -= part
        if fresh:
            self._line("input", fresh, rates.get("input"))

    def _read(self, read: int) -> None:
        rates = self.rates
        for name in _CACHED_MODALITIES if self._part.details else ():
            stated = self._part.details.get(name)
            if stated and name in rates:
                part = self._part_of(name, self._count(stated), read)
                self._line(name, part, rates[name])
                read -= part
        rate = rates.get("cache_read")
        if read and rate is None and "input" in rates:
            # No discount is published for this model, so a cached token is an input token.
            rate = rates["input"]._replace(note="no cached rate published: billed as input")
            self._flags.append("cache_read_at_input_rate")
        if read:
            self._line("cache_read", read, rate)

    def _write_rate(self, name: str) -> Rate | None:
        rates = self.rates
        if name == "cache_write_5m":
            return rates.get(name) or rates.get("cache_write")
        if name == "cache_write":  # lifetime not stated: as asked for, else the default's rate
            return rates.get(self.unstated_write) or rates.get("cache_write_5m")
        return rates.get(name)

    def _output(self, out: int) -> None:
        tokens, rates, details = self._part.tokens, self.rates, self._part.details
        for name, stated in (
            (
                ("audio_output", tokens.audio_output),
                ("image_output", tokens.image_output),
                ("video_output", details.get("video_output")),
                ("reasoning", tokens.reasoning),
            )
            if details or tokens.audio_output or tokens.image_output or "reasoning" in rates
            else ()
        ):
            if stated and name in rates:
                part = self._part_of(name, self._count(stated), out)
                self._line(name, part, rates[name])
                out -= part
        if out:
            self._line("output", out, rates.get("output"))

    # --- lines ---

    def _line(self, what: str, quantity: int | Decimal, rate: Rate | None) -> None:
        if not quantity:
            return
        if rate is None:
            self.missing.append(what)
            return
        amount = Decimal(quantity)
        usd = EXACT.multiply(rate.each_usd, amount) if rate.exact else rate.amount_usd(amount)
        self.total = EXACT.add(self.total, usd) if self.items else usd
        if (label := self._part.label) != "message":
            what = f"{label}:{what}"
        self.items.append(_line_item(what, amount, usd, self._model, rate))

    def _count(self, value: object) -> int:
        """A token count as billed; what is no count is 0 and flagged."""
        if value is None:
            return 0
        if type(value) is int and value >= 0:
            return value
        self._flags.append("bad_usage")
        return 0

    def _quantity(self, value: object) -> Decimal:
        if isinstance(value, (int, Decimal)) and not isinstance(value, bool):
            amount = Decimal(value)
            if amount.is_finite() and amount >= 0:
                return amount
        self._flags.append("bad_usage")
        return _ZERO

    def _part_of(self, name: str, part: object, whole: int) -> int:
        """A part of a bucket, never more than the bucket."""
        count = self._count(part)
        if count <= whole:
            return count
        self._flags.append(f"clamped:{name}")
        return whole


# A frozen dataclass sets its fields through object.__setattr__, which for a bill of four lines is
# half of what a price may take (10 of 20 µs). So lines and prices are filled in as plain objects of
# the same slots, which costs a fifth, and become the frozen types by their class.
class _LineDraft:
    __slots__ = tuple(each.name for each in fields(LineItem))

    def __init__(self, what: str, quantity: Decimal, usd: Decimal, model: str, rate: Rate) -> None:
        self.what = what
        self.quantity = quantity
        self.rate_usd = rate.each_usd
        self.usd = usd
        self.model = model
        self.source = rate.source
        self.dated = rate.dated
        self.note = rate.note


class _PricedDraft:
    __slots__ = tuple(each.name for each in fields(PricedEvent))

    def __init__(
        self,
        usage: UsageEvent,
        list_usd: Decimal | None,
        basis: Basis,
        line_items: tuple[LineItem, ...],
        flags: tuple[str, ...],
        price_book: str,
    ) -> None:
        self.usage = usage
        self.list_usd = list_usd
        self.marginal_usd = _marginal(usage, list_usd)
        self.reported_usd = usage.reported_usd
        self.basis = basis
        self.line_items = line_items
        self.flags = flags
        self.price_book = price_book


def _line_item(what: str, quantity: Decimal, usd: Decimal, model: str, rate: Rate) -> LineItem:
    """`LineItem(what, quantity, rate.each_usd, usd, model, source, dated, note)`, only faster."""
    item: Any = _LineDraft(what, quantity, usd, model, rate)
    item.__class__ = LineItem
    return cast(LineItem, item)


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
