"""What a run or the service has metered so far, model by model: sums that `run` and `status` show.

Unknown counts add nothing, and requests without a price are counted beside the sum, never as zero
dollars. Totals travel as JSON with exact decimals from the worker to the commands that print them.
No I/O. Sums over stored events are `report.py`'s.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from halton_meter.contract import usd_text
from halton_meter.identity import ID_REPEATED
from halton_meter.model import Basis, Certainty, Outcome, PricedEvent, Tokens
from halton_meter.sightings import is_final
from halton_meter.untrusted import COUNT_MAX, printable

MODELS_MAX = 200
MODEL_CHARACTERS_MAX = 200
USD_CHARACTERS_MAX = 100
PROVISIONAL_MAX = 1000  # events of which a better sighting may still come


@dataclass(slots=True)
class Line:
    """What one model used: known counts only; `unpriced` and `implausible` requests stand beside
    the sum, each of them in one of the two. `unknown` are requests of which no token is known,
    `estimated` those whose price is an estimate.
    """

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    list_usd: Decimal = Decimal(0)
    marginal_usd: Decimal = Decimal(0)
    unpriced: int = 0
    implausible: int = 0
    unknown: int = 0
    estimated: int = 0

    def add(self, other: Line, sign: int = 1) -> None:
        """Add another line to this one, or with -1 take it away."""
        for name in Line.__slots__:
            setattr(self, name, getattr(self, name) + sign * getattr(other, name))


@dataclass(frozen=True, slots=True)
class _Counted:
    """What one event added."""

    model: str
    line: Line
    gapped: bool
    aborted: bool
    failed: bool
    told_apart: bool


@dataclass(slots=True)
class Totals:
    """What a run or the service has metered so far."""

    total: Line = field(default_factory=Line)
    models: dict[str, Line] = field(default_factory=dict)
    gapped: int = 0
    aborted: int = 0
    failed: int = 0
    seen_again: int = 0  # sightings of requests that were counted before
    # Models that a price would help, and a provider of each.
    without_price: dict[str, str] = field(default_factory=dict)
    told_apart: int = 0  # requests to which the provider gave another one's id
    other_calls: int = 0  # to providers that are no model requests
    # Events of which more may be seen yet, such as a background response that was only queued: the
    # better sighting takes the place of the first, as in the store.
    _provisional: dict[str, _Counted] = field(default_factory=dict, compare=False, repr=False)

    def add(self, event: PricedEvent) -> None:
        """Count one event, once however often it is seen."""
        usage = event.usage
        if earlier := self._provisional.pop(usage.id, None):
            self._count(earlier, -1)
        counted = _counted(event)
        self._count(counted)
        model = usage.model or usage.request_model
        if model and counted.line.unpriced and any(map(_wants_price, event.flags)):
            self._want_price(model, usage.provider)
        if not is_final(usage):
            self._provisional[usage.id] = counted
            if len(self._provisional) > PROVISIONAL_MAX:
                self._provisional.pop(next(iter(self._provisional)))

    def _want_price(self, model: str, provider: str) -> None:
        if len(self.without_price) < MODELS_MAX:
            self.without_price.setdefault(model, provider)

    def _count(self, counted: _Counted, sign: int = 1) -> None:
        self._add_line(counted.model, counted.line, sign)
        self.gapped += sign * counted.gapped
        self.aborted += sign * counted.aborted
        self.failed += sign * counted.failed
        self.told_apart += sign * counted.told_apart

    def _add_line(self, model: str, line: Line, sign: int = 1) -> None:
        if model not in self.models and len(self.models) >= MODELS_MAX:
            model = "other models"
        kept = self.models.setdefault(model, Line())
        kept.add(line, sign)
        if not kept.requests:
            del self.models[model]
        self.total.add(line, sign)

    def merge(self, other: Totals) -> None:
        """Add what another process counted."""
        for model, line in other.models.items():
            self._add_line(model, line)
        for model, provider in other.without_price.items():
            self._want_price(model, provider)
        self.gapped += other.gapped
        self.aborted += other.aborted
        self.failed += other.failed
        self.seen_again += other.seen_again
        self.told_apart += other.told_apart
        self.other_calls += other.other_calls

    def as_json(self) -> dict[str, Any]:
        """The totals with exact decimals as text."""
        return {
            "requests": self.total.requests,
            "input_tokens": self.total.input_tokens,
            "output_tokens": self.total.output_tokens,
            "list_usd": usd_text(self.total.list_usd),
            "marginal_usd": usd_text(self.total.marginal_usd),
            "unpriced_requests": self.total.unpriced,
            "implausible_requests": self.total.implausible,
            "gapped_requests": self.gapped,
            "aborted_requests": self.aborted,
            "failed_requests": self.failed,
            "seen_again_requests": self.seen_again,
            "told_apart_requests": self.told_apart,
            "other_calls": self.other_calls,
            "without_price": dict(self.without_price),
            "models": {name: _line_json(line) for name, line in self.models.items()},
        }

    @classmethod
    def of_json(cls, table: Any) -> Totals:
        """The inverse of `as_json`, for any input. Raises ValueError for what is no totals."""
        totals = cls()
        try:
            for name, line in itertools.islice(table["models"].items(), MODELS_MAX + 1):
                counted = Line(
                    requests=_count(line["requests"]),
                    input_tokens=_count(line["input_tokens"]),
                    output_tokens=_count(line["output_tokens"]),
                    list_usd=_usd(line["list_usd"]),
                    marginal_usd=_usd(line["marginal_usd"]),
                    unpriced=_count(line["unpriced"]),
                    implausible=_count(line["implausible"]),
                    unknown=_count(line.get("unknown", 0)),
                    estimated=_count(line.get("estimated", 0)),
                )
                totals._add_line(printable(name, MODEL_CHARACTERS_MAX), counted)
            wanted = table.get("without_price", {})
            for model, provider in itertools.islice(wanted.items(), MODELS_MAX):
                totals._want_price(*(printable(x, MODEL_CHARACTERS_MAX) for x in (model, provider)))
            totals.gapped = _count(table["gapped_requests"])
            totals.aborted = _count(table["aborted_requests"])
            totals.failed = _count(table["failed_requests"])
            totals.seen_again = _count(table["seen_again_requests"])
            totals.told_apart = _count(table["told_apart_requests"])
            totals.other_calls = _count(table.get("other_calls", 0))  # new
        except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"not totals: {type(error).__name__}") from None
        return totals


def _counted(event: PricedEvent) -> _Counted:
    usage = event.usage
    line = Line(
        requests=1,
        input_tokens=_sent(event.tokens),
        output_tokens=event.tokens.output or 0,
        list_usd=event.list_usd or Decimal(0),
        marginal_usd=event.marginal_usd or Decimal(0),
        unpriced=int(event.list_usd is None and not event.implausible),
        implausible=int(event.implausible),
        unknown=int(
            usage.free is None
            and usage.certainty is not Certainty.REPORTED
            and not any(_known(event.tokens))
        ),
        estimated=int(event.list_usd is not None and event.basis is Basis.ESTIMATED),
    )
    return _Counted(
        usage.model or usage.request_model or "unknown model",
        line,
        gapped=usage.outcome is Outcome.GAPPED,
        aborted=usage.outcome is Outcome.ABORTED,
        failed=usage.error_class is not None,
        told_apart=ID_REPEATED in usage.flags,
    )


def _count(found: Any) -> int:
    if not isinstance(found, int) or not 0 <= found <= COUNT_MAX:
        raise ValueError("not totals: no count")
    return int(found)


def usd_of(found: Any) -> Decimal | None:
    """An amount that another process gave as text; None for none, and for what is no amount."""
    try:
        return _usd(found)
    except (ValueError, TypeError, ArithmeticError):
        return None


def _usd(found: Any) -> Decimal:
    """An exact amount. One with a vast exponent would take gigabytes when printed."""
    amount = Decimal(found[:USD_CHARACTERS_MAX])
    exponent = amount.as_tuple().exponent
    if not isinstance(exponent, int) or abs(exponent) > USD_CHARACTERS_MAX:
        raise ValueError("not totals: no amount")
    return amount


def _line_json(line: Line) -> dict[str, Any]:
    return dataclasses.asdict(line) | {
        "list_usd": usd_text(line.list_usd),
        "marginal_usd": usd_text(line.marginal_usd),
    }


def _wants_price(flag: str) -> bool:
    """Whether a flag says that a price is missing, and not what is to be priced."""
    return flag.startswith("unpriced:") and flag != "unpriced:usage"


def _known(tokens: Tokens) -> list[bool]:
    return [count is not None for count in (*_inputs(tokens), tokens.output)]


def _sent(tokens: Tokens) -> int:
    return sum(count or 0 for count in _inputs(tokens))


def _inputs(tokens: Tokens) -> tuple[int | None, ...]:
    return (
        tokens.input,
        tokens.cache_read,
        tokens.cache_write,
        tokens.cache_write_5m,
        tokens.cache_write_1h,
        tokens.cache_write_12h,
    )
