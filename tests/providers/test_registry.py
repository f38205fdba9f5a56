"""Hosts and routes: what is a provider's and what is not; configured hosts; lost heads."""

import subprocess
import sys
from dataclasses import replace

import pytest

from halton_meter.model import Outcome, Request, UsageEvent
from halton_meter.providers.registry import Registry, UnknownFamily
from tests.support.exchanges import REGISTRY, exchange, sse

CHAT_ANSWER = {
    "id": "chatcmpl-AbCdEfGhIjKlMnOpQrSt",
    "object": "chat.completion",
    "model": "m",
    "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
}


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/v1/messages",
        "https://api.openai.com.evil.test/v1/chat/completions",
        "https://notapi.openai.com/v1/chat/completions",
        "https://localhost:8000/v1/chat/completions",
        "https://api.openai.com/v1/models",
        "https://api.openai.com/dashboard",
        "https://chatgpt.com/backend-api/conversation",
        "https://api.anthropic.com/api/oauth/profile",
        "https://openai.azure.com/openai/v1/responses",
        "https://s3.us-east-1.amazonaws.com/model/x/converse",
    ],
)
def test_host_or_route_of_no_provider_gives_nothing(url: str) -> None:
    this = exchange(url, {}, CHAT_ANSWER)
    assert REGISTRY.read(this) == []
    assert REGISTRY.interest_for(this.request) == (False, None)


@pytest.mark.parametrize(
    ("url", "provider", "endpoint"),
    [
        ("https://api.anthropic.com/v1/messages", "anthropic", "messages"),
        ("https://api.openai.com/v1/responses", "openai", "responses"),
        ("https://chatgpt.com/backend-api/codex/responses", "openai", "responses"),
        ("https://api.groq.com/openai/v1/chat/completions", "groq", "chat_completions"),
        ("https://api.x.ai/v1/messages", "xai", "messages"),
        ("https://openrouter.ai/api/v1/chat/completions", "openrouter", "chat_completions"),
        ("https://me.openai.azure.com/openai/v1/responses", "azure_openai", "responses"),
        ("https://api.deepseek.com/chat/completions", "deepseek", "chat_completions"),
        ("https://api.deepseek.com/anthropic/v1/messages", "deepseek", "messages"),
        ("https://bedrock-runtime.us-east-1.amazonaws.com/model/a/converse", "bedrock", "converse"),
        (
            "https://aiplatform.googleapis.com/v1/projects/p/locations/l/publishers/google/models/g:generateContent",
            "vertex",
            "generateContent",
        ),
        ("https://api.z.ai/api/anthropic/v1/messages", "zai", "messages"),
        ("https://api.fireworks.ai/inference/v1/chat/completions", "fireworks", "chat_completions"),
    ],
)
def test_route_is_found(url: str, provider: str, endpoint: str) -> None:
    match = REGISTRY.match_exchange(exchange(url, {}))
    assert match is not None
    assert (match.provider.id, match.route.endpoint) == (provider, endpoint)


def test_path_with_odd_characters_is_matched_whole() -> None:
    assert REGISTRY.find("api.openai.com", "POST", "/v1/chat/completions\nX") is None
    assert REGISTRY.find("API.OPENAI.COM", "POST", "/v1/chat/completions") is not None
    assert REGISTRY.find("api.openai.com", "DELETE", "/v1/chat/completions") is None


def test_configured_host_is_read_as_the_family_it_names() -> None:
    registry = Registry({"localhost:8080": "openai:our-vllm", "llm.corp": "gateway"})
    (event,) = registry.read(
        exchange("http://localhost:8080/proxy/v1/chat/completions", {}, CHAT_ANSWER)
    )
    assert event.provider == "our-vllm"
    answer = {"id": "msg_0123456789abcdef", "usage": {"input_tokens": 1, "output_tokens": 2}}
    (event,) = registry.read(exchange("https://llm.corp/anthropic/v1/messages", {}, answer))
    assert (event.provider, event.tokens.input) == ("anthropic", 1)
    assert {"llm.corp", "localhost"} <= set(registry.hosts())


@pytest.mark.parametrize("host", ["127.0.0.1:11434", "litellm:4000", "[::1]:8080", "10.0.0.7"])
def test_addresses_are_metered_where_they_turn_up_but_not_watched_for(host: str) -> None:
    registry = Registry({host: "openai:local"})
    (event,) = registry.read(exchange(f"http://{host}/v1/chat/completions", {}, CHAT_ANSWER))
    assert (event.provider, event.host) == ("local", host)
    assert set(registry.hosts()) == set(REGISTRY.hosts())


def test_configured_host_of_an_unknown_family_is_named_in_the_error() -> None:
    registry = Registry({"llm.corp": "nobody"})
    with pytest.raises(UnknownFamily, match=r"llm\.corp.*nobody"):
        registry.hosts()


def test_lost_head_is_recognised_by_the_answers_shape() -> None:
    start = {"type": "message_start", "message": {"id": "msg_0123456789abcdef", "model": "m"}}
    start["message"]["usage"] = {"input_tokens": 4, "output_tokens": 1}
    last = {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 9}}
    whole = exchange("https://api.anthropic.com/v1/messages", None, sse(start, last))
    lost = replace(whole, request=Request())
    (event,) = REGISTRY.read(lost)
    assert event.tokens.output == 9
    assert "head_unknown" in event.flags
    assert event.id == REGISTRY.read(whole)[0].id
    elsewhere = replace(lost, connection=replace(lost.connection, peer="example.com"))
    assert REGISTRY.read(elsewhere) == []
    mute = replace(
        lost, response=replace(lost.response, body=replace(lost.response.body, pieces=()))
    )
    assert REGISTRY.read(mute) == []


def test_hosts_to_watch_leave_out_hosts_that_carry_much_else() -> None:
    hosts = REGISTRY.hosts()
    assert "api.anthropic.com" in hosts
    assert "*.openai.azure.com" in hosts
    assert not any("snowflake" in host or host == "*.amazonaws.com" for host in hosts)
    assert REGISTRY.find("me.snowflakecomputing.com", "POST", "/api/v2/cortex/v1/chat/completions")


def test_exchange_without_an_id_is_identified_by_its_bytes_and_time() -> None:
    url = "https://api.openai.com/v1/embeddings"
    answer = {"object": "list", "model": "m", "usage": {"prompt_tokens": 2, "total_tokens": 2}}
    one, two = exchange(url, {"input": "a"}, answer), exchange(url, {"input": "b"}, answer)
    ids = [REGISTRY.read(each)[0].id for each in (one, one, two, replace(one, started_ns=5))]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3
    named = exchange(
        url, {"input": "a"}, answer, headers=[("x-request-id", "req_0123456789abcdef")]
    )
    later = replace(named, started_ns=5)
    assert REGISTRY.read(named)[0].id == REGISTRY.read(later)[0].id


def test_short_ids_that_repeat_do_not_merge_exchanges() -> None:
    url = "https://ollama.com/v1/chat/completions"
    answer = {**CHAT_ANSWER, "id": "chatcmpl-547"}
    one, two = exchange(url, {"a": 1}, answer), exchange(url, {"a": 2}, answer)
    assert REGISTRY.read(one)[0].id != REGISTRY.read(two)[0].id


def test_importing_the_package_loads_no_reader() -> None:
    code = (
        "import sys; import halton_meter.providers.registry;"
        "heavy = [m for m in sys.modules if m.startswith('halton_meter.providers.')"
        " and not m.endswith(('.registry', '.reading', '.shapes'))"
        " or m in ('orjson', 'halton_meter.wire.formats')];"
        "print(heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("host", "provider"),
    [
        ("mars-north1-aiplatform.googleapis.com", "vertex"),
        ("bedrock-runtime.mars-north-1.amazonaws.com", "bedrock"),
        ("vpce-0a1b2c.bedrock-runtime.us-east-1.vpce.amazonaws.com", "bedrock"),
        ("bedrock-mantle.mars-north-1.api.aws", "bedrock"),
    ],
)
def test_region_opened_later_is_known_by_the_form_of_its_name(host: str, provider: str) -> None:
    assert {each.id for each in REGISTRY.of_host(host)} == {provider}
    assert host not in REGISTRY.hosts()


@pytest.mark.parametrize(
    "host",
    ["aiplatform.googleapis.com.evil.test", "x.y-aiplatform.googleapis.com", "amazonaws.com"],
)
def test_name_that_only_resembles_a_region_is_no_provider(host: str) -> None:
    assert REGISTRY.of_host(host) == ()


def test_slash_too_many_in_the_base_url_is_the_same_route() -> None:
    url = "https://me.openai.azure.com//openai/deployments/mine/chat/completions"
    (event,) = REGISTRY.read(exchange(url, {}, CHAT_ANSWER))
    assert (event.endpoint, event.request_model) == ("chat_completions", "mine")


@pytest.mark.parametrize(
    ("path", "provider"),
    [
        ("/chat/completions", "openai"),
        ("/v1/chat/completions", "openai"),
        ("/openai/chat/completions", "openai"),
        ("/openai/v1/chat/completions", "openai"),
        ("/v1beta/openai/chat/completions", "gemini"),
        ("/v1/messages", "anthropic"),
        ("/v1beta/models/g:generateContent", "gemini"),
        ("/model/a/converse", "bedrock"),
        ("/api/chat", "ollama"),
    ],
)
def test_gateway_passes_every_makers_api_on(path: str, provider: str) -> None:
    registry = Registry({"localhost:4000": "gateway"})
    match = registry.find("localhost:4000", "POST", path)
    assert match is not None
    assert match.provider.id == provider


# --- answers with holes, and answers whose request was never seen --------------------------------


def headless(host: str, body: bytes) -> list[UsageEvent]:
    """The events of an answer of which neither the request nor its own head was seen."""
    this = exchange(f"https://{host}/", None, None, pieces=(body,), complete=False)
    request = replace(this.request, method=None, path=None, host=host)
    response = replace(this.response, status=None)
    return REGISTRY.read(replace(this, request=request, response=response))


@pytest.mark.parametrize(
    ("host", "body"),
    [
        ("api.openai.com", b'{"object":"batch","usage":{"input_tokens":13,"output_tokens":1}}'),
        (
            "api.openai.com",
            b'","request_counts":{"total":2},"usage":{"input_tokens":13,"output_tokens_details":'
            b'{"reasoning_tokens":0},"output_tokens":1}}',
        ),
        ("api.anthropic.com", b'{"id":"msgbatch_1","type":"message_batch"}'),
        (
            "generativelanguage.googleapis.com",
            b'{"name":"cachedContents/x","usageMetadata":{"totalTokenCount":2048}}',
        ),
    ],
)
def test_stored_objects_read_back_are_no_calls_though_the_request_was_lost(
    host: str, body: bytes
) -> None:
    assert headless(host, body) == []


OPENAI_TAIL = b"""down"}],"type":"message","usage":{"input_tokens":77}}],"usage":{
  "input_tokens": 36, "input_tokens_details": {"cached_tokens": 6}, "output_tokens": 87,
  "output_tokens_details": {"reasoning_tokens": 7}, "total_tokens": 123}}"""


@pytest.mark.parametrize(
    ("host", "tail", "endpoint", "counts"),
    [
        ("api.openai.com", OPENAI_TAIL, "responses", (30, 87)),
        (
            "api.groq.com",
            b':"stop","index":0}],"usage":{"prompt_tokens":5,"completion_tokens":6}}',
            "chat_completions",
            (5, 6),
        ),
        (
            "api.groq.com",
            b'd."},"finish_reason":"stop"}],"usage":{"prompt_tokens":5,"completion_tokens":6}}',
            "chat_completions",
            (5, 6),
        ),
        (
            "api.openai.com",
            b'0.01,-0.2],"index":0}],"usage":{"prompt_tokens":8,"total_tokens":8}}',
            "embeddings",
            (8, None),
        ),
        (
            "api.anthropic.com",
            b'"}],"stop_reason":"end_turn","usage":{"input_tokens":3,'
            b'"cache_creation_input_tokens":0,"output_tokens":4}}',
            "messages",
            (3, 4),
        ),
        (
            "generativelanguage.googleapis.com",
            b'xt"}]}}],\n  "usageMetadata": {\n    "promptTokenCount": 2,\n'
            b'    "candidatesTokenCount": 9\n  },\n  "modelVersion": "gemini-x"\n}\n',
            "generateContent",
            (2, 9),
        ),
        (
            "generativelanguage.googleapis.com",
            b'nd"}]}}]}\n\ndata: {"usageMetadata": {"promptTokenCount": 2, '
            b'"candidatesTokenCount": 9}, "modelVersion": "gemini-x"}\n\n',
            "streamGenerateContent",
            (2, 9),
        ),
    ],
)
def test_answer_joined_in_its_middle(
    host: str, tail: bytes, endpoint: str, counts: tuple[int, int | None]
) -> None:
    (event,) = headless(host, tail)
    assert (event.endpoint, event.tokens.input, event.tokens.output) == (endpoint, *counts)
    assert "head_unknown" in event.flags


def test_id_of_something_inside_an_answer_is_not_the_answers() -> None:
    (event,) = headless("api.openai.com", b'"id":"item_0123456789abcdef","x":1},' + OPENAI_TAIL)
    assert event.response_id is None


@pytest.mark.parametrize(
    ("url", "start", "end", "wanted"),
    [
        (
            "https://generativelanguage.googleapis.com/v1beta/models/e:embedContent",
            b'{"embedding":{"values":[0.1,',
            b'0.2]},"usageMetadata":{"promptTokenCount":7}}',
            7,
        ),
        (
            "https://generativelanguage.googleapis.com/v1beta/interactions",
            b'{"id":"v1_ChdWV3NIYXNYZEc5S19x","model":"g","outputs":[{"text":"Onc',
            b'end"}],"usage":{"total_input_tokens":7,"total_output_tokens":3}}',
            7,
        ),
        (
            "https://api.cohere.com/v2/chat",
            b'{"id":"e342ea17-403f-4073-9187-a08e59b5cddc","message":{"text":"It is',
            b'"},"usage":{"billed_units":{"input_tokens":7,"output_tokens":2}}}',
            7,
        ),
    ],
)
def test_usage_behind_a_hole_counts(url: str, start: bytes, end: bytes, wanted: int) -> None:
    this = exchange(url, {}, None, pieces=(start, end), complete=False, outcome=Outcome.GAPPED)
    (event,) = REGISTRY.read(this)
    assert event.tokens.input == wanted
    assert "gapped" in event.flags
