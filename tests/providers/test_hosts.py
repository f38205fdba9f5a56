"""Every host of the vendors' lists of base URLs is a provider's, and its paths are read."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from halton_meter.providers.registry import built_in
from tests.support.exchanges import REGISTRY, exchange

BASES = tomllib.loads((Path(__file__).parent / "base_urls.toml").read_text())
CHAT = {"id": "chatcmpl-AbCdEfGhIjKlMnOpQrSt", "object": "chat.completion", "model": "m"}
CHAT |= {"usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}}
MESSAGE = {"id": "msg_0123456789abcdefghij", "type": "message", "model": "m"}
MESSAGE |= {"usage": {"input_tokens": 9, "output_tokens": 2}}
ANSWERS = {"chat": ("/chat/completions", CHAT), "messages": ("/v1/messages", MESSAGE)}


def bases(api: str) -> list[tuple[str, str]]:
    return [(name, base) for name, urls in BASES[api].items() for base in urls]


@pytest.mark.parametrize("api", sorted(ANSWERS))
def test_every_documented_base_url_leads_to_its_provider(api: str) -> None:
    path, answer = ANSWERS[api]
    wrong = []
    for name, base in bases(api):
        events = REGISTRY.read(exchange(base + path, {"model": "m"}, answer))
        found = [(event.provider, event.tokens.input, event.tokens.output) for event in events]
        if found != [(name, 9, 2)]:
            wrong.append((base, found))
    assert wrong == []


def test_every_provider_of_the_table_of_compatible_hosts_is_in_the_list() -> None:
    listed = {name for api in ANSWERS for name in BASES[api]}
    module = "halton_meter.providers.listed"
    here = {each.id for each in __import__(module, fromlist=["PROVIDERS"]).PROVIDERS}
    assert here - listed == set()
    assert listed <= {each.id for each in built_in()}


@pytest.mark.parametrize(
    ("url", "plan"),
    [
        ("https://api.z.ai/api/coding/paas/v4/chat/completions", "zai_coding"),
        ("https://api.z.ai/api/paas/v4/chat/completions", None),
        ("https://api.kimi.com/coding/v1/chat/completions", "kimi_coding"),
        ("https://api.moonshot.ai/v1/chat/completions", None),
        ("https://coding-intl.dashscope.aliyuncs.com/v1/chat/completions", "alibaba_plan"),
        ("https://ark.cn-beijing.volces.com/api/coding/v3/chat/completions", "ark_plan"),
        ("https://ark.cn-beijing.volces.com/api/v3/chat/completions", None),
        ("https://token-plan-sgp.xiaomimimo.com/v1/chat/completions", "xiaomi_plan"),
        ("https://api.lkeap.cloud.tencent.com/coding/v3/chat/completions", "tencent_plan"),
        ("https://api.stepfun.ai/step_plan/v1/chat/completions", "step_plan"),
        ("https://opencode.ai/zen/go/v1/chat/completions", "opencode_go"),
        ("https://opencode.ai/zen/v1/chat/completions", None),
        ("https://portal.qwen.ai/v1/chat/completions", "qwen_code"),
        ("https://cli-chat-proxy.grok.com/v1/chat/completions", "grok_build"),
        ("https://app.factory.ai/api/llm/o/v1/chat/completions", "factory"),
        ("https://ampcode.com/api/provider/openai/v1/chat/completions", None),
    ],
)
def test_subscriptions_are_told_from_pay_as_you_go_by_their_place(url: str, plan: str) -> None:
    (event,) = REGISTRY.read(exchange(url, {"model": "m"}, CHAT))
    assert event.conditions.get("plan") == plan


@pytest.mark.parametrize(
    ("host", "region"),
    [
        ("api.openai.com", None),
        ("kr.api.openai.com", "kr"),
        ("api.mistral.ai", None),
        ("api.eu.mistral.ai", "eu"),
        ("api.x.ai", None),
        ("us.api.x.ai", "us"),
    ],
)
def test_region_of_a_host_is_a_condition(host: str, region: str | None) -> None:
    (event,) = REGISTRY.read(exchange(f"https://{host}/v1/chat/completions", {"model": "m"}, CHAT))
    assert event.conditions.get("region") == region


CACHED = {**CHAT, "model": "qwen3-max"}


@pytest.mark.parametrize(
    ("details", "cache"),
    [
        ({}, None),
        ({"cached_tokens": 0}, None),
        ({"cached_tokens": 5}, "implicit"),
        ({"cached_tokens": 5, "cache_type": "ephemeral"}, "ephemeral"),
        ({"cached_tokens": 5, "cache_creation": {"ephemeral_5m_input_tokens": 3}}, "ephemeral"),
        ({"cached_tokens": 0, "cache_creation_input_tokens": 4}, "ephemeral"),
    ],
)
def test_answer_of_alibaba_tells_which_cache_was_read(details: dict, cache: str | None) -> None:
    usage = {**CHAT["usage"], "prompt_tokens_details": details}
    for path in ("/compatible-mode/v1/chat/completions", "/api/v1/services/aigc/generation"):
        url = f"https://dashscope-intl.aliyuncs.com{path}"
        (event,) = REGISTRY.read(exchange(url, {"model": "qwen3-max"}, {**CACHED, "usage": usage}))
        assert event.conditions.get("cache_type") == cache


@pytest.mark.parametrize("asked", [True, False])
def test_messages_at_alibaba_tell_it_by_the_request(asked: bool) -> None:
    content = {"type": "text", "text": "a"}
    content |= {"cache_control": {"type": "ephemeral"}} if asked else {}
    request = {"model": "qwen3-max", "messages": [{"role": "user", "content": [content]}]}
    usage = {"input_tokens": 4, "cache_read_input_tokens": 5, "output_tokens": 2}
    url = "https://dashscope.aliyuncs.com/apps/anthropic/v1/messages"
    (event,) = REGISTRY.read(exchange(url, request, {**MESSAGE, "usage": usage}))
    assert event.conditions["cache_type"] == ("ephemeral" if asked else "implicit")
