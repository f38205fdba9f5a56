"""What of a head may enter the program, and what may not."""

from __future__ import annotations

import pytest

from halton_meter.wire.headers import host_name, kept_headers, split_target


@pytest.mark.parametrize(
    "name",
    [
        "Authorization",
        "Proxy-Authorization",
        "X-Api-Key",
        "api-key",
        "x-goog-api-key",
        "Cookie",
        "Set-Cookie",
        "sec-websocket-protocol",
        "x-amz-security-token",
        "x-openai-actor-authorization",
        "x-claude-gateway-user-email",
        "x-anything-else",
    ],
)
def test_credentials_and_strangers_are_dropped(name):
    assert kept_headers([(name, "v"), (name.lower(), "v")]) == ()


@pytest.mark.parametrize(
    "value",
    [
        "sk-ant-api03-abcdefghijkl",
        "prefix sk-proj-abcdefghijkl",
        "gsk_abcdefghijkl",
        "Bearer abcdefghijkl",
        "AIzaSyA1234567890abcdefghijklmnop",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjMifQ.sig",
    ],
)
def test_a_key_in_an_allowed_place_is_dropped_too(value):
    assert kept_headers([("user-agent", value), ("x-request-id", value)]) == ()
    assert split_target(f"/v1/x?model={value.replace(' ', '%20')}") == ("/v1/x", ())


@pytest.mark.parametrize(
    "name",
    [
        "content-type",
        "request-id",
        "x-request-id",
        "anthropic-ratelimit-unified-overage-in-use",
        "x-codex-plan-type",
        "x-gemini-service-tier",
        "x-amzn-bedrock-input-token-count",
        "x-ratelimit-remaining-tokens",
        "retry-after",
        "cf-ray",
    ],
)
def test_what_prices_and_identity_need_is_kept(name):
    assert kept_headers([(name.title(), "value")]) == ((name, "value"),)


def test_an_overlong_value_is_dropped():
    assert kept_headers([("user-agent", "x" * 100_000)]) == ()


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        ("/v1/x", "/v1/x", ()),
        ("/v1/x?key=AIza&alt=sse&access_token=t", "/v1/x", (("alt", "sse"),)),
        ("/v1/x?api-version=2&%24alt=json", "/v1/x", (("api-version", "2"), ("$alt", "json"))),
        ("https://h.example/v1/x?stream=true#f", "/v1/x", (("stream", "true"),)),
        ("/v1/x?", "/v1/x", ()),
        ("*", "*", ()),
        ("/v1/x?" + "&".join(f"a{n}=1" for n in range(500)), "/v1/x", ()),
    ],
)  # fmt: skip
def test_a_target_keeps_only_harmless_parameters(target, path, query):
    assert split_target(target) == (path, query)


@pytest.mark.parametrize(
    ("authority", "host"),
    [
        ("API.Example.com", "api.example.com"),
        ("api.example.com:443", "api.example.com"),
        ("user:pass@api.example.com", "api.example.com"),
        ("api.example.com.", "api.example.com"),
        ("localhost:8080", "localhost:8080"),
        ("[::1]:443", "[::1]"),
        (" api.example.com ", "api.example.com"),
    ],
)
def test_host_names(authority, host):
    assert host_name(authority) == host
