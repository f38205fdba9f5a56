"""The bill of one part of an event at one tariff: which tokens and units cost which rate.

Buckets are disjoint; modalities, reasoning and a tool's tokens are cut out of them where the tariff
has a rate for them, never more than the bucket holds. What has no rate is named in `missing`, and
leaves its event without a price. Amounts are multiplied and added in the thread's decimal context,
which `book.py` makes the exact one: a context's own methods cost twice as much, and a bill may have
sixteen lines. This file refuses to know how a tariff is chosen (`tariff.py`) and what becomes of a
bill.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

from halton_meter.model import LineItem, Usage
from pricing.rates import Level, Rate
from pricing.rates import rate as rate_of
from pricing.tariff import Tariff

_ZERO = Decimal(0)
_FREE_TOOL_TOKENS = rate_of(
    _ZERO,
    1_000_000,
    "https://ai.google.dev/gemini-api/docs/pricing",
    note="tool-use tokens are not billed when Google Search or Maps grounded the answer",
)
# One name, two meanings, which files and events have kept since the first version: as a count
# `cache_write` holds writes whose lifetime the answer does not state; as a rate it is the price of
# the provider's default lifetime (Anthropic's 5 minutes), with `cache_write_5m` as its other name.
_UNSTATED_LIFETIME = "cache_write"
_DEFAULT_LIFETIME_RATE = "cache_write"
_WRITES = (_UNSTATED_LIFETIME, "cache_write_5m", "cache_write_1h", "cache_write_12h")
# Nobody looked whether the provider gives a discount: at most this, and the flag says so.
_NO_CACHED_RATE_KNOWN = "no cached rate in our data: billed as input"
_CACHED_MODALITIES = ("cached_audio_input", "cached_image_input", "cached_video_input")
# Units that describe what the tokens were: passed over where the same part's tokens are billed.
_DESCRIPTIVE_UNITS = frozenset(
    {"audio_seconds", "video_seconds", "images", "input_images", "characters", "pages"}
)
# Units billed only where a row has a rate for them: facts about a call more than things sold.
_SELDOM_BILLED_UNITS = frozenset({"cache_storage_tokens", "requests"})


class Bill:
    """The lines of one part of an event at one tariff."""

    __slots__ = (
        "_flags", "_model", "_part", "_prefix", "_tariff",
        "assumed_write_rate", "empty", "items", "missing", "rates", "saved", "total",
    )  # fmt: skip

    def __init__(self, tariff: Tariff, model: str, part: Usage, flags: list[str]) -> None:
        self._tariff = tariff
        self._model = model
        self._part = part
        self._flags = flags
        self._prefix = "" if part.label == "message" else f"{part.label}:"
        self.rates: Mapping[str, Rate] = tariff.levels[0].rates
        self.items: list[LineItem] = []
        self.missing: list[str] = []
        self.empty = False
        self.total = _ZERO
        self.saved: Decimal | None = None  # by the cache, against the price of plain input
        self.assumed_write_rate = _DEFAULT_LIFETIME_RATE  # for writes of an unstated lifetime

    def tokens(self, grounded: bool) -> None:
        """Lines for every token: disjoint buckets, then modalities cut out of them."""
        count, details, tokens = self._count, self._part.details, self._part.tokens
        fresh, out = tokens.input, tokens.output
        if details:
            fresh, out = self._estimated(fresh, out)
        read = count(tokens.cache_read)
        if details:
            read = max(0, read - count(details.get("unbilled_cache_read")))
        writes = [(n, count(w)) for n in _WRITES if (w := getattr(tokens, n)) is not None]
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
        cached_from = len(self.items)
        if read:
            if details or "cache_read" not in self.rates:
                self._read(read)
            else:
                self._line("cache_read", read, self.rates["cache_read"])
        for name, written in writes:
            if written:
                self._line(name, written, self._write_rate(name))
        if len(self.items) > cached_from:
            self._save(self.items[cached_from:])
        if (
            details
            or tokens.audio_output
            or tokens.image_output
            or "reasoning" in self.rates
            or "thinking_output" in self.rates
        ):
            self._output(out)
        elif out:
            self._line("output", out, self.rates.get("output"))
        if details.get("citation") and "citation" in self.rates:
            self._line("citation", count(details["citation"]), self.rates["citation"])

    def units(self, *, per_request: bool) -> None:
        """Lines for what is billed other than by token."""
        rates, units = self.rates, self._part.units
        for stated, quantity in units.items():
            amount = self._quantity(quantity)
            if not amount:
                continue
            name, amount, assumed = self._by_default(stated, amount)
            rate = rates.get(name)
            if rate is not None and assumed:
                rate = rate._replace(note="; ".join(filter(None, (assumed, rate.note))))
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

    def _by_default(self, name: str, amount: Decimal) -> tuple[str, Decimal, str | None]:
        """A unit and its amount; where the request left them out, the documented ones, and why."""
        name_of, factor, note = self._tariff.defaults.get(name, (name, None, None))
        if factor is None or name_of in self._part.units:
            return name, amount, None
        self._flags.append("default_assumed")
        if factor != 1:
            self._flags.append("estimated")
        return name_of, amount * factor, note

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
            looked = self._tariff.no_cached_rate
            rate = rates["input"]._replace(note=looked or _NO_CACHED_RATE_KNOWN)
            self._flags.append("cache_read_at_input_rate" if looked else "cache_read_rate_unknown")
        if read:
            self._line("cache_read", read, rate)

    def _write_rate(self, name: str) -> Rate | None:
        """The rate of a count of cache writes; None where its lifetime has no price."""
        rates = self.rates
        if name == "cache_write_5m":
            return rates.get(name) or rates.get(_DEFAULT_LIFETIME_RATE)
        if name == _UNSTATED_LIFETIME:
            return rates.get(self.assumed_write_rate) or rates.get("cache_write_5m")
        return rates.get(name)

    def _output(self, out: int) -> None:
        tokens, rates, details = self._part.tokens, self.rates, self._part.details
        for name, stated in (
            ("audio_output", tokens.audio_output),
            ("image_output", tokens.image_output),
            ("video_output", details.get("video_output")),
            ("reasoning", tokens.reasoning),
        ):
            if stated and name in rates:
                part = self._part_of(name, self._count(stated), out)
                self._line(name, part, rates[name])
                out -= part
        if out:
            # Some models cost more, answer and all, where they thought before it.
            thought = rates.get("thinking_output") if tokens.reasoning else None
            self._line("output", out, thought or rates.get("output"))

    def _save(self, cached: list[LineItem]) -> None:
        """What these lines would cost more as input that nobody cached; unknown without its rate.

        Cached audio, images and video are left out: their plain rates are another matter.
        """
        plain = self.rates.get("input")
        if plain is None:
            return
        saved = _ZERO
        for item in cached:
            if item.what.removeprefix(self._prefix).startswith("cache"):
                usual = plain.each_usd * item.quantity
                saved += (usual if plain.exact else plain.amount_usd(item.quantity)) - item.usd
        self.saved = saved

    # --- lines ---

    def _line(self, what: str, quantity: int | Decimal, rate: Rate | None) -> None:
        if not quantity:
            return
        if rate is None:
            self.missing.append(what)
            return
        if what in self._tariff.assumed:
            self._flags.append("default_assumed")
        amount = Decimal(quantity)
        usd = rate.each_usd * amount if rate.exact else rate.amount_usd(amount)
        items = self.items
        self.total = self.total + usd if items else usd
        items.append(
            LineItem(
                self._prefix + what,
                amount,
                rate.each_usd,
                usd,
                self._model,
                rate.source,
                rate.dated,
                rate.note,
            )
        )

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
