"""Answers that bill nothing by themselves: tokens counted, and batches handed in.

Most providers have both, in much the same words, so these readers serve them all.
"""

from __future__ import annotations

from collections.abc import Iterator

from halton_meter.model import Exchange, Usage, UsageEvent
from halton_meter.providers import Provider, Route
from halton_meter.providers.reading.bodies import documents
from halton_meter.providers.reading.draft import begin, unanswered
from halton_meter.providers.reading.values import Counts, Json, as_id, dicts


def read_count(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One free event for a count of tokens, or for text cut into tokens, which counts them too."""
    draft = begin(exchange, route, provider)
    if not unanswered(draft):
        answer: Json = next((value for value, _ in documents(exchange)), {})
        draft.fail(answer)
        draft.free = "error" if draft.error_class else "count"
        counted = _counted(answer)
        details = {"counted": counted} if counted is not None and not draft.error_class else {}
        draft.parts = [Usage(draft.request_model, details=details)]
    yield draft.event()


def _counted(answer: Json) -> int | None:
    stated = Counts().of(answer, "input_tokens", "inputTokens", "totalTokens", "total_tokens")
    if stated is not None:
        return stated
    # Vertex lists the tokens of each text, Cohere and xAI those of the one.
    texts = dicts(answer.get("tokensInfo")) or [answer]
    lists = [text.get(name) for text in texts for name in ("tokens", "token_ids")]
    known = [len(each) for each in lists if isinstance(each, list)]
    return sum(known) if known else None


def read_batch_created(
    exchange: Exchange, route: Route, provider: Provider
) -> Iterator[UsageEvent]:
    """One event for handing in a batch; what its requests use is seen in the results."""
    draft = begin(exchange, route, provider)
    if not unanswered(draft):
        answer: Json = next((value for value, _ in documents(exchange)), {})
        draft.fail(answer)
        if draft.error_class is None:
            draft.response_id = as_id(answer.get("id")) or as_id(answer.get("name"))
            draft.pending()
    yield draft.event()
