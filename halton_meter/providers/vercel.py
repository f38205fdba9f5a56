"""Vercel's AI Gateway: OpenAI's and Anthropic's APIs, and the one of Vercel's own AI SDK.

Peculiar to it: the SDK's API names the model in a request header only, says `inputTokens` and
`outputTokens` (once numbers, now objects), and states the gateway's charge under
`providerMetadata.gateway`, beside the maker's own usage, which is not to be counted again.
"""

from __future__ import annotations

from collections.abc import Iterator

from halton_meter.model import Exchange, Tokens, Usage, UsageEvent, header
from halton_meter.providers import Provider, Route
from halton_meter.providers.openai.media import media_routes
from halton_meter.providers.openai.text import route, text_routes
from halton_meter.providers.reading.bodies import documents
from halton_meter.providers.reading.draft import Draft, begin, failed, unanswered
from halton_meter.providers.reading.estimate import texts_under
from halton_meter.providers.reading.statements import best_of, prompt_total
from halton_meter.providers.reading.values import (
    Counts,
    Json,
    as_amount,
    as_dict,
    as_id,
    as_name,
    plus,
    verbatim,
)
from halton_meter.providers.routers import CHARGED, read_charged_messages, settle
from halton_meter.wire import formats


def _sdk_tokens(counts: Counts, usage: Json) -> Tokens:
    """The disjoint tokens of the SDK's usage, in the words of any of its versions."""
    tokens = _sides(counts, usage)
    total = counts.of(usage, "totalTokens", "tokens")
    whole = plus(prompt_total(tokens), tokens.output)
    if total is not None and total not in (whole, plus(whole, tokens.reasoning)):
        counts.mismatch = True
    return tokens


def _sides(counts: Counts, usage: Json) -> Tokens:
    of = counts.of
    came, went = usage.get("inputTokens"), usage.get("outputTokens")
    if isinstance(came, dict) or isinstance(went, dict):
        came, went = as_dict(came), as_dict(went)
        cached, written = of(came, "cacheRead"), of(came, "cacheWrite")
        uncached = of(came, "noCache")
        return Tokens(
            input=counts.rest(of(came, "total"), cached, written) if uncached is None else uncached,
            cache_read=cached,
            cache_write=written,
            output=of(went, "total"),
            reasoning=of(went, "reasoning"),
        )
    cached = of(usage, "cachedInputTokens")
    return Tokens(
        input=counts.rest(of(usage, "inputTokens", "promptTokens", "tokens"), cached),
        cache_read=cached,
        output=of(usage, "outputTokens", "completionTokens"),
        reasoning=of(usage, "reasoningTokens"),
    )


def read_sdk(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for a call of the AI SDK's own API: text, embeddings, media."""
    draft = begin(exchange, route, provider)
    headers = exchange.request.headers
    draft.request_model = as_name(
        header(headers, "ai-language-model-id") or header(headers, "ai-model-id")
    )
    draft.streaming |= header(headers, "ai-language-model-streaming") == "true"
    if not unanswered(draft):
        _fill_sdk(draft, list(documents(exchange)))
    yield draft.event()


def _fill_sdk(draft: Draft, found: list[tuple[Json, bytes]]) -> None:
    exchange = draft.exchange
    draft.fail(found[0][0] if found else None, in_stream=draft.streaming and not failed(exchange))
    named = [as_dict(value.get("response")) for value, _ in found]
    if draft.streaming:
        events = formats.first_events(exchange.response.body, 3)
        named += [as_dict(formats.loads(event.data)) for event in events]
    draft.response_id = as_id(next((v["id"] for v in named if v.get("modelId")), None))
    draft.model = as_name(next((v["modelId"] for v in named if v.get("modelId")), None))
    stated = [each for each in reversed(found) if isinstance(each[0].get("usage"), dict)]
    made = next((len(v["images"]) for v, _ in found if isinstance(v.get("images"), list)), 0)
    units = {"images": made} if made else {}
    model = draft.model or draft.request_model
    if stated:
        best, fell = best_of([value["usage"] for value, _ in stated])
        value, text = stated[best]
        draft.flags |= {"counts_fell"} if fell else set()
        counts = Counts()
        draft.parts = [Usage(model, _sdk_tokens(counts, value["usage"]), units)]
        draft.raw_usage = verbatim(text, b"usage", value["usage"]).text
        draft.flags |= counts.flags()
        _charge(draft, value, text)
    elif draft.error_class is None:
        draft.parts = [Usage(model, Tokens(), units)]
        for value, text in found:
            _charge(draft, value, text)
        if not units and draft.reported_usd is None:
            draft.usage_not_sent(texts_under(exchange.response.body, (b"text", b"delta")))


def _charge(draft: Draft, answer: Json, text: bytes) -> None:
    """Take what the gateway charged; 0 means that the user's own key paid."""
    stated = as_dict(as_dict(answer.get("providerMetadata")).get("gateway"))
    if not stated:
        return
    exact = verbatim(text, b"gateway", stated).exact
    cost = as_amount(exact.get("cost"))
    if cost is not None:
        draft.reported_usd = cost
    routing = as_dict(exact.get("routing"))
    draft.condition("upstream", routing.get("finalProvider") or routing.get("resolvedProvider"))


_SDK = r"/v\d+/ai"
ROUTES = (
    *text_routes("/v1", CHARGED),
    *media_routes("/v1", settle),
    route("messages", "chat", "/v1/messages", read_charged_messages),
    route("language_model", "chat", _SDK + "/language-model", read_sdk),
    route("embedding_model", "embedding", _SDK + "/embedding-model", read_sdk),
    route("reranking_model", "rerank", _SDK + "/reranking-model", read_sdk),
    route("image_model", "image", _SDK + "/image-model", read_sdk),
    route("video_model", "video", _SDK + "/video-model", read_sdk),
    route("speech_model", "audio", _SDK + "/speech-model", read_sdk),
    route("transcription_model", "audio", _SDK + "/transcription-model", read_sdk),
)
PROVIDER = Provider("vercel_gateway", ("ai-gateway.vercel.sh",), ROUTES, states_cost=True)
