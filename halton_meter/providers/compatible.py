"""Providers whose API is OpenAI's, give or take: one row each, and the few that differ more.

Peculiar here: Ollama, watsonx and Replicate have answers of their own. To add a provider that
differs in nothing, add its row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial

from halton_meter.model import Exchange, Tokens, Usage, UsageEvent
from halton_meter.providers import Provider, Reader, Route
from halton_meter.providers.anthropic import message_event, read_messages
from halton_meter.providers.openai.media import media_routes
from halton_meter.providers.openai.text import read_chat, route, text_routes
from halton_meter.providers.openai.usage import Dialect, cost_of, usage_tokens
from halton_meter.providers.reading.bodies import documents
from halton_meter.providers.reading.counts import read_count
from halton_meter.providers.reading.draft import Draft, begin, failed, unanswered
from halton_meter.providers.reading.estimate import texts_under
from halton_meter.providers.reading.statements import (
    all_of,
    counts_among,
    counts_tokens,
    most_complete,
    usages_in,
)
from halton_meter.providers.reading.values import (
    Counts,
    Json,
    Verbatim,
    as_amount,
    as_dict,
    as_id,
    as_name,
    dicts,
    plus,
    verbatim,
)
from halton_meter.wire import formats

_PLAIN = Dialect()
_CHARGED = Dialect(finish=cost_of)
_ANY = r"(?:/[^?]+)?"


# --- Ollama -------------------------------------------------------------------------------------


def read_ollama(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for Ollama's own generate, chat and embed: NDJSON, counts in the last line."""
    draft = begin(exchange, route, provider)
    draft.streaming = draft.request.get("stream", True) is not False and route.kind == "chat"
    if not unanswered(draft):
        lines = [as_dict(value) for value in formats.ndjson(exchange.response.body)]
        lines = lines or [value for value, _ in documents(exchange)]
        last: Json = lines[-1] if lines else {}
        draft.fail(last, in_stream=len(lines) > 1)
        draft.model = as_name(last.get("model"))
        counted = [line for line in lines if counts_tokens(line)][-_COUNTED_LINES_MAX:]
        if counted:
            _fill_whole(draft, _ollama_tokens, counted)
        elif draft.error_class is None:
            draft.usage_not_sent(
                texts_under(exchange.response.body, (b"response", b"content", b"thinking"))
            )
    yield draft.event()


# A server of Ollama's counts in the last line; of what imitates it the last that count matter.
_COUNTED_LINES_MAX = 64


def _ollama_tokens(counts: Counts, line: Json) -> Tokens:
    """The tokens of a line; what was served from a cache is part of the prompt."""
    cached = counts.of(line, "prompt_eval_cached_count")
    return Tokens(
        input=counts.rest(counts.of(line, "prompt_eval_count"), cached),
        cache_read=cached,
        output=counts.of(line, "eval_count"),
    )


def _fill_whole(
    draft: Draft, read: Callable[[Counts, Json], Tokens], holders: Sequence[Json]
) -> None:
    """Fill a draft from objects that count at their top level, the last that has most of it."""
    counts = Counts()
    tokens, _, fell = most_complete((read(counts, each), {}) for each in holders)
    draft.parts = [Usage(draft.model or draft.request_model, tokens)]
    kept = (verbatim(b"", b"", counts_among(each)).text for each in holders)
    draft.raw_usage = all_of(kept)
    draft.flags |= counts.flags()
    if fell:
        draft.flags.add("counts_fell")


# --- watsonx ------------------------------------------------------------------------------------


def read_watsonx(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for watsonx's text generation, whose results count their own tokens."""
    draft = begin(exchange, route, provider)
    draft.request_model = draft.request_model or as_name(draft.request.get("model_id"))
    if not unanswered(draft):
        found = [value for value, _ in documents(exchange, 5)]
        draft.fail(found[0] if found else None)
        # A stream counts its input in the first event alone, its output in each.
        events = formats.first_events(exchange.response.body, 4) if draft.streaming else ()
        found += [as_dict(formats.loads(event.data)) for event in events][::-1]
        answers = [value for value in reversed(found) if _watsonx_counts(value)]
        draft.model = as_name(next((v["model_id"] for v in found if v.get("model_id")), None))
        if answers:
            _fill_whole(draft, _watsonx_tokens, [_watsonx_counts(value) for value in answers])
        elif draft.error_class is None:
            draft.usage_not_sent()
    yield draft.event()


def _watsonx_counts(answer: Json) -> Json:
    """The counts of an answer's results, summed, or of an answer itself (embeddings).

    The later events of a stream say that their input is 0, which is no count of it.
    """
    results = dicts(answer.get("results"))
    counts = Counts()
    names = ("input_token_count", "generated_token_count")
    sums = {name: plus(*(counts.of(each, name) for each in results or [answer])) for name in names}
    return {
        name: count
        for name, count in sums.items()
        if count or (count == 0 and name == "generated_token_count")
    }


def _watsonx_tokens(counts: Counts, stated: Json) -> Tokens:
    return Tokens(
        input=counts.of(stated, "input_token_count"),
        output=counts.of(stated, "generated_token_count"),
    )


# --- Replicate ----------------------------------------------------------------------------------


def read_prediction(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for a prediction: pending when it starts, its usage when it is first seen."""
    draft = begin(exchange, route, provider)
    draft.streaming = draft.request.get("stream") is True
    path = exchange.request.path or ""
    if "/models/" in path:
        draft.request_model = path.partition("/models/")[2].rpartition("/predictions")[0] or None
    answer, text = next(documents(exchange), ({}, b""))
    metrics = answer.get("metrics")
    done = isinstance(metrics, dict) and answer.get("status") in ("succeeded", "failed", "canceled")
    if exchange.request.method == "GET" and not done:
        return
    if not unanswered(draft):
        if failed(exchange):
            draft.fail(answer)
        draft.response_id = as_id(answer.get("id"))
        draft.model = as_name(answer.get("model"))
        if done and isinstance(metrics, dict):
            counts = Counts()
            tokens = Tokens(
                input=counts.of(metrics, "input_token_count"),
                output=counts.of(metrics, "output_token_count"),
            )
            raw = verbatim(text, b"metrics", metrics)
            seconds = as_amount(raw.exact.get("predict_time"))
            units = {"compute_seconds": seconds} if seconds is not None else {}
            draft.parts = [Usage(draft.model or draft.request_model, tokens, units)]
            draft.raw_usage = raw.text
            draft.flags |= counts.flags()
        elif draft.error_class is None:
            draft.pending()
    yield draft.event()


# --- answers with their usage elsewhere ---------------------------------------------------------


def read_inner(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for an answer wrapped in `result` (Cloudflare), the model being in the path."""
    draft = begin(exchange, route, provider)
    named = (exchange.request.path or "").partition("/ai/run/")[2]
    draft.request_model = draft.request_model or as_name(named)
    if not unanswered(draft):
        found = list(documents(exchange))
        draft.fail(found[0][0] if found else None)
        for answer, text in found:
            inner = as_dict(answer.get("result")) or answer
            usage, name = next(usages_in(inner), (None, "usage"))
            if usage is not None:
                counts = Counts()
                tokens, details = usage_tokens(counts, usage)
                draft.parts = [Usage(draft.request_model, tokens, {}, details)]
                draft.raw_usage = verbatim(text, name.encode(), usage).text
                draft.flags |= counts.flags()
                break
        else:
            if draft.error_class is None:
                draft.usage_not_sent()
    yield draft.event()


def read_aleph(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
    """One event for Aleph Alpha, whose counts stand at the answer's top level."""
    draft = begin(exchange, route, provider)
    if not unanswered(draft):
        answer, _ = next(documents(exchange), ({}, b""))
        draft.fail(answer)
        _fill_whole(draft, _aleph_tokens, [answer])
    yield draft.event()


def _aleph_tokens(counts: Counts, answer: Json) -> Tokens:
    return Tokens(
        input=counts.of(answer, "num_tokens_prompt_total"),
        output=counts.of(answer, "num_tokens_generated"),
    )


def _anthropic(prefix: str) -> tuple[Route, ...]:
    return (
        route("messages", "chat", prefix + "/v1/messages", read_messages),
        route("count_tokens", "count", prefix + "/v1/messages/count_tokens", read_count),
    )


# Where a provider's subscriptions are used, by host and path; pay-as-you-go goes elsewhere.
_PLANS = (
    ("zai", re.compile(r"[^/]+/.*/coding/.*"), "zai_coding"),
    ("moonshot", re.compile(r"api\.kimi\.(?:com|ai)/coding/.*"), "kimi_coding"),
    ("alibaba", re.compile(r"(?:coding|coding-intl|token-plan)\..*"), "alibaba_plan"),
    ("alibaba", re.compile(r"portal\.qwen\.ai/.*"), "qwen_code"),
    ("volcengine", re.compile(r"[^/]+/api/(?:coding|plan)/.*"), "ark_plan"),
    ("xiaomi", re.compile(r"token-plan-.*"), "xiaomi_plan"),
    ("tencent", re.compile(r"[^/]+/(?:coding|plan)/.*"), "tencent_plan"),
    ("stepfun", re.compile(r"[^/]+/step_plan/.*"), "step_plan"),
    ("opencode", re.compile(r"[^/]+/zen/go/.*"), "opencode_go"),
)


def _with_plan(name: str, read: Reader) -> Reader:
    """`read`, with the subscription that the host and path of a provider's request belong to."""
    plans = [(pattern, plan) for provider, pattern, plan in _PLANS if provider == name]

    def reading(exchange: Exchange, route: Route, provider: Provider) -> Iterator[UsageEvent]:
        host = exchange.request.host or exchange.connection.peer or ""
        where = host.lower() + (exchange.request.path or "")
        plan = next((plan for pattern, plan in plans if pattern.fullmatch(where)), None)
        for event in read(exchange, route, provider):
            if plan is None:
                yield event
            else:
                yield replace(event, conditions={**event.conditions, "plan": plan})

    return reading


# --- Alibaba: a hit in a cache that the request made costs less than one in its own -------------

_EXPLICIT = "ephemeral"


def _cache_type(draft: Draft, answer: Json, usage: Verbatim) -> None:
    """Tell the two caches apart: an answer names the type of an explicit one only."""
    tokens = draft.parts[0].tokens if draft.parts else Tokens()
    if tokens.cache_read or tokens.cache_write:
        details = as_dict(usage.exact.get("prompt_tokens_details"))
        details = details or as_dict(usage.exact.get("input_tokens_details"))
        stated = as_name(details.get("cache_type"))
        written = tokens.cache_write or as_dict(details.get("cache_creation"))
        draft.conditions["cache_type"] = stated or (_EXPLICIT if written else "implicit")


_ALIBABA = Dialect(finish=_cache_type)


def read_alibaba_messages(
    exchange: Exchange, route: Route, provider: Provider
) -> Iterator[UsageEvent]:
    """One event for Anthropic's API at Alibaba, where the request says which cache it uses."""
    draft = begin(exchange, route, provider)
    message_event(draft)
    if any(part.tokens.cache_read or part.tokens.cache_write for part in draft.parts):
        explicit = any(b'"cache_control"' in piece for piece in exchange.request.body.pieces)
        draft.conditions["cache_type"] = _EXPLICIT if explicit else "implicit"
    yield draft.event()


OLLAMA_ROUTES = (
    route("generate", "chat", "/api/generate", read_ollama),
    route("chat", "chat", "/api/chat", read_ollama),
    route("embed", "embedding", "/api/(?:embed|embeddings)", read_ollama),
    *text_routes("/v1"),
    *_anthropic(""),
)

_ROWS: tuple[tuple[str, tuple[str, ...], Dialect], ...] = (
    ("together", ("api.together.xyz", "api.together.ai"), _PLAIN),
    ("fireworks", ("api.fireworks.ai",), _PLAIN),
    ("cerebras", ("api.cerebras.ai",), _PLAIN),
    ("avian", ("api.avian.io",), _CHARGED),
    ("crusoe", ("api.inference.crusoecloud.com",), _PLAIN),
    ("writer", ("api.writer.com",), _PLAIN),
    ("voyage", ("api.voyageai.com", "ai.mongodb.com"), _PLAIN),
    ("jina", ("api.jina.ai", "deepsearch.jina.ai"), _PLAIN),
    ("maritaca", ("chat.maritaca.ai",), _PLAIN),
    ("nvidia", ("integrate.api.nvidia.com",), _PLAIN),
    ("sambanova", ("api.sambanova.ai",), _PLAIN),
    ("hyperbolic", ("api.hyperbolic.xyz",), _PLAIN),
    (
        "nebius",
        (
            "api.studio.nebius.com",
            "api.studio.nebius.ai",
            "api.tokenfactory.nebius.com",
            "api.tokenfactory.us-central1.nebius.com",
        ),
        _PLAIN,
    ),
    ("novita", ("api.novita.ai",), _PLAIN),
    ("deepinfra", ("api.deepinfra.com",), _PLAIN),
    ("baseten", ("inference.baseten.co",), _PLAIN),
    ("inception", ("api.inceptionlabs.ai",), _PLAIN),
    ("friendli", ("api.friendli.ai",), _PLAIN),
    ("upstage", ("api.upstage.ai",), _PLAIN),
    ("ai21", ("api.ai21.com",), _PLAIN),
    ("heroku", ("us.inference.heroku.com", "eu.inference.heroku.com"), _PLAIN),
    ("ovhcloud", ("oai.endpoints.kepler.ai.cloud.ovh.net",), _PLAIN),
    ("scaleway", ("api.scaleway.ai",), _PLAIN),
    ("siliconflow", ("api.siliconflow.com", "api.siliconflow.cn"), _PLAIN),
    (
        "volcengine",
        (
            "ark.cn-beijing.volces.com",
            "ark.ap-southeast.bytepluses.com",
            "ark.eu-west.bytepluses.com",
        ),
        _PLAIN,
    ),
    ("venice", ("api.venice.ai",), _PLAIN),
    (
        "moonshot",
        ("api.moonshot.ai", "api.moonshot.cn", "api.kimi.com", "api.kimi.ai"),
        _PLAIN,
    ),
    (
        "minimax",
        ("api.minimax.io", "api.minimaxi.com", "api.minimax.chat", "api-uw.minimax.io"),
        _PLAIN,
    ),
    (
        "alibaba",
        (
            "dashscope.aliyuncs.com",
            "dashscope-intl.aliyuncs.com",
            "dashscope-us.aliyuncs.com",
            "cn-hongkong.dashscope.aliyuncs.com",
            "portal.qwen.ai",
            "coding.dashscope.aliyuncs.com",
            "coding-intl.dashscope.aliyuncs.com",
            # A workspace's own host, the trial host, those of plans: NAME.REGION.maas….
            "*.maas.aliyuncs.com",
        ),
        _ALIBABA,
    ),
    ("zai", ("api.z.ai", "open.bigmodel.cn"), _PLAIN),
    (
        "github_copilot",
        (
            "api.githubcopilot.com",
            "api.individual.githubcopilot.com",
            "api.business.githubcopilot.com",
            "api.enterprise.githubcopilot.com",
            "proxy.individual.githubcopilot.com",
            "proxy.business.githubcopilot.com",
            "proxy.enterprise.githubcopilot.com",
        ),
        _PLAIN,
    ),
    (
        "requesty",
        tuple(f"router.{place}requesty.ai" for place in ("", "eu.", "us.", "ap.")),
        _CHARGED,
    ),
    ("baidu", ("qianfan.baidubce.com",), _PLAIN),
)

# Those that sell others' models and bill in US dollars: a cost that they state is what is paid.
# The rest make their models or bill in another currency; none of them is known to state a cost.
_RESELLERS_IN_USD = frozenset(
    (
        "together fireworks cerebras avian crusoe nvidia sambanova hyperbolic nebius novita "
        "deepinfra baseten friendli heroku venice requesty"
    ).split()
)

# Paths that a row's provider reads otherwise, and those that it has besides OpenAI's.
_FIRST_ROUTES = {
    "alibaba": (route("messages", "chat", _ANY + "/v1/messages", read_alibaba_messages),),
}
_OWN_ROUTES = {
    "writer": (route("chat", "chat", "/v1/chat", read_chat),),
    "alibaba": (
        route("services", "chat", "/api/v1/services/.+", partial(read_chat, dialect=_ALIBABA)),
    ),
    "voyage": (
        route("embeddings", "embedding", "/v1/(?:multimodal|contextualized)embeddings", read_chat),
    ),
}


def compatible(
    name: str,
    hosts: tuple[str, ...],
    dialect: Dialect = _PLAIN,
    *,
    captured: bool = True,
    states_cost: bool = False,
) -> Provider:
    """A provider that speaks OpenAI's API, or Anthropic's, under any path of its hosts."""
    routes = (*_FIRST_ROUTES.get(name, ()), *_shared(dialect), *_OWN_ROUTES.get(name, ()))
    if any(provider == name for provider, _, _ in _PLANS):
        routes = tuple(replace(each, read=_with_plan(name, each.read)) for each in routes)
    return Provider(name, hosts, routes, captured, states_cost=states_cost)


@cache
def _shared(dialect: Dialect) -> tuple[Route, ...]:
    """The routes of all who speak a dialect, made once: there are some two hundred of them."""
    return (
        *text_routes(_ANY, dialect),
        *media_routes(_ANY),
        *_anthropic(_ANY),
        route("rerank", "rerank", _ANY + "/rerank", partial(read_chat, dialect=dialect)),
    )


PROVIDERS = (
    Provider(
        "deepseek",
        ("api.deepseek.com",),
        (*text_routes("(?:/v1|/beta)?"), *_anthropic("/anthropic")),
        models=re.compile(r"^deepseek-(?:chat|reasoner|v)"),
    ),
    *(
        compatible(name, hosts, dialect, states_cost=name in _RESELLERS_IN_USD)
        for name, hosts, dialect in _ROWS
    ),
    Provider("ollama", ("ollama.com",), OLLAMA_ROUTES),
    Provider(
        "watsonx",
        ("*.ml.cloud.ibm.com",),
        (
            route("generate", "chat", r"/ml/v1[^/]*/text/generation(?:_stream)?", read_watsonx),
            route("generate", "chat", r"/ml/v1[^/]*/generation/text(?:_stream)?", read_watsonx),
            route(
                "generate",
                "chat",
                r"/ml/v1[^/]*/deployments/[^/]+/text/generation(?:_stream)?",
                read_watsonx,
            ),
            route("chat", "chat", r"/ml/v1[^/]*/text/chat(?:_stream)?", read_chat),
            route("embeddings", "embedding", r"/ml/v1[^/]*/text/embeddings", read_watsonx),
        ),
    ),
    Provider(
        "replicate",
        ("api.replicate.com",),
        (
            route(
                "predictions",
                "chat",
                r"/v1(?:/models/[^/]+/[^/]+|/deployments/[^/]+/[^/]+)?/predictions",
                read_prediction,
            ),
            route("predictions", "chat", r"/v1/predictions/[^/]+", read_prediction, ("GET",)),
        ),
    ),
    Provider(
        "aleph_alpha",
        ("api.aleph-alpha.com",),
        (route("complete", "chat", "/(?:complete|embed|semantic_embed)", read_aleph),),
    ),
    # Hosts that carry much else: read from captures, never asked of the kernel unless configured.
    Provider(
        "cloudflare",
        ("api.cloudflare.com",),
        (
            route("run", "chat", "/client/v4/accounts/[^/]+/ai/run/.+", read_inner),
            *text_routes("/client/v4/accounts/[^/]+/ai/v1"),
        ),
        captured=False,
    ),
    Provider(
        "snowflake",
        ("*.snowflakecomputing.com",),
        (
            *text_routes("/api/v2/cortex/v1"),
            *_anthropic("/api/v2/cortex"),
            route("complete", "chat", "/api/v2/cortex/inference:complete", read_chat),
        ),
        captured=False,
    ),
)
