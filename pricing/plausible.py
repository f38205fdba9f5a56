"""What one request can have used and cost at most; more is a broken or hostile answer's word.

A server may write any number into its answer, and one of them would spoil every sum it is in. So
each event is judged as it is priced: one with an amount beyond these limits is flagged
`implausible`, keeps what was stated, and has no price and no part in a sum. The limits lie well
above anything a provider can serve, so that an honest giant is never among them. This file refuses
to know rates; `book.py` asks it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal
from operator import attrgetter

from halton_meter.model import TOKEN_NAMES, UsageEvent

# The largest context windows hold 10 million tokens. Ten such requests in one: agents and deep
# research that a provider runs within one call read their context again for each step.
TOKENS_MAX = 100_000_000
# Searches, tool calls, images, pages and the like: what one request may ask for is hundreds, and
# thousands of documents to be ranked.
UNITS_MAX = 100_000
UNITS_MAX_BY_NAME: Mapping[str, int] = {
    # A day of audio is 86,400 seconds; jobs that are billed by their running time take days.
    "audio_seconds": 1_000_000,
    "video_seconds": 1_000_000,
    "compute_seconds": 1_000_000,
    # What text is cut into, so as many as there may be tokens.
    "characters": TOKENS_MAX,
    "cache_storage_tokens": TOKENS_MAX,
}
# A full context at the dearest rate there is (1 M tokens of $600 each million) costs $600.
REQUEST_USD_MAX = Decimal(10_000)
# A provider's own account of the cost may hold fees that no rate of ours knows, never this much.
TIMES_COMPUTED_MAX = 100
# Small costs differ by much: an answer of a few tokens with an image in it.
TIMES_COMPUTED_FROM_USD = Decimal(1)

_counts_of = attrgetter(*TOKEN_NAMES)


def implausible_amounts(event: UsageEvent) -> list[str]:
    """The names of the counts in an event that no request can have; of several parts, their sum."""
    found: list[str] = []
    in_doubt = has_units = False
    most = TOKENS_MAX // len(event.parts) if event.parts else 0
    for part in event.parts:
        # The sum takes as long as a price may, and few events need it.
        for count in _counts_of(part.tokens):
            if count is not None and count > most:
                in_doubt = True
        if part.details:
            found += _beyond(part.details.items(), {}, TOKENS_MAX)
        has_units = has_units or bool(part.units)
    if in_doubt:
        tokens = event.tokens
        found += [name for name in TOKEN_NAMES if (getattr(tokens, name) or 0) > TOKENS_MAX]
    if has_units:
        found += _beyond(event.units.items(), UNITS_MAX_BY_NAME, UNITS_MAX)
    return found


def is_implausible_usd(stated: Decimal | None, computed: Decimal | None) -> bool:
    """Whether no request costs that much: what is stated, or else what its counts come to.

    `computed` is what the provider's own counts come to at known rates, None where that is not
    known: then what is stated is all there is to go by. Zero is known: no tokens, or a free model.
    """
    if stated is None:
        return computed is not None and computed > REQUEST_USD_MAX
    if stated > REQUEST_USD_MAX:
        return True
    if computed is None or stated <= TIMES_COMPUTED_FROM_USD:
        return False
    return stated > computed * TIMES_COMPUTED_MAX


def _beyond(
    amounts: Iterable[tuple[str, int | Decimal]], limits: Mapping[str, int], otherwise: int
) -> list[str]:
    return [name for name, amount in amounts if amount > limits.get(name, otherwise)]
