"""Who asked: the clients' own words, as seen on the wire, and what nobody may put there."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halton_meter.model import Body, Caller, Exchange, Process, Protocol, SessionSource
from halton_meter.providers.reading.caller import (
    ID_CHARS_MAX,
    NAME_CHARS_MAX,
    RETRIES_MAX,
    account_hash,
    caller_of,
)
from halton_meter.providers.registry import Registry
from tests.support.exchanges import exchange

KEY = b"k" * 32
REGISTRY = Registry(account_key=KEY)
ANTHROPIC = "https://api.anthropic.com/v1/messages"
OPENAI = "https://api.openai.com/v1/responses"
CHATGPT = "https://chatgpt.com/backend-api/codex/responses"
ASSIST = "https://cloudcode-pa.googleapis.com/v1internal:generateContent"
CLIENT = SessionSource.CLIENT
SESSION = "fa96ed64-ce9d-4266-9c34-64adf548a210"
THREAD = "01a226f5-c3ff-75a3-b4e4-050519b7a320"
TURN = "01a226f5-cc26-7a51-b1b1-b63c3602fa8b"
ACCOUNT = "6f1c2f0e-0000-4000-8000-1234567890ab"
DEVICE = "75fe878828c77b461688aa6fcb5115e6b42b375b7cd39db2828edd71cc357434"
PROCESS = Process(4711, 1, "/usr/bin/python3", root="4711-9f3ab2c1")


def asked(
    url: str, body: Any = None, *headers: tuple[str, str], answered: Any = (), **more: Any
) -> Exchange:
    """An exchange with that request; the answer does not matter here."""
    return exchange(
        url,
        body or {"model": "m"},
        {"id": "x" * 20},
        request_headers=headers,
        headers=answered,
        **more,
    )


def caller(this: Exchange, registry: Registry = REGISTRY) -> Caller:
    (event,) = registry.read(this)
    return event.caller


# --- clients as they are shipped -----------------------------------------------------------------

CLAUDE_HEADERS = (
    ("user-agent", "claude-cli/2.1.332 (external, sdk-cli)"),
    ("x-claude-code-session-id", SESSION),
    ("x-stainless-retry-count", "0"),
    ("x-claude-1p-request-class", "main"),
    ("x-claude-code-prompt-id", "4467f419-4095-45fa-9c0a-ddc8f6f34b38"),
    ("x-claude-code-request-class", "main"),
)
CLAUDE = Caller(
    session_id=SESSION,
    session_source=CLIENT,
    turn_id="4467f419-4095-45fa-9c0a-ddc8f6f34b38",
    agent="main",
    request_class="main",
    client="claude-cli",
    client_version="2.1.332",
    retry_count=0,
    account=account_hash(ACCOUNT, KEY),
)


def claude_body(session: str = SESSION, account: str = ACCOUNT) -> dict[str, Any]:
    user = {"device_id": DEVICE, "account_uuid": account, "session_id": session}
    return {"model": "claude-sonnet-4-5", "metadata": {"user_id": json.dumps(user)}}


def test_claude_code() -> None:
    assert caller(asked(ANTHROPIC, claude_body(), *CLAUDE_HEADERS)) == CLAUDE


def test_claude_code_on_behalf_of_a_sub_agent() -> None:
    headers = dict(CLAUDE_HEADERS) | {
        "x-claude-code-request-class": "subagent",
        "x-claude-code-agent-type": "Explore",
        "x-claude-code-agent-id": "a1",
        "x-claude-code-parent-agent-id": "a0",
    }
    assert caller(asked(ANTHROPIC, claude_body(), *headers.items())) == replace(
        CLAUDE, agent="Explore", agent_id="a1", parent_agent_id="a0", request_class="subagent"
    )


@pytest.mark.parametrize(
    ("kind", "agent"),
    [("compaction", "main"), ("side_reply", "main"), ("auxiliary", "auxiliary"), ("workflow",) * 2],
)
def test_claude_codes_other_requests(kind: str, agent: str) -> None:
    headers = dict(CLAUDE_HEADERS) | {"x-claude-code-request-class": kind}
    found = caller(asked(ANTHROPIC, claude_body(), *headers.items()))
    assert (found.agent, found.request_class) == (agent, kind)


@pytest.mark.parametrize("account", [ACCOUNT, ""])
def test_an_older_claude_code_names_its_session_in_the_body(account: str) -> None:
    body = {"metadata": {"user_id": f"user_{DEVICE}_account_{account}_session_{SESSION}"}}
    found = caller(asked(ANTHROPIC, body, ("user-agent", "claude-cli/1.0.60 (external, cli)")))
    assert found == Caller(
        session_id=SESSION,
        session_source=CLIENT,
        client="claude-cli",
        client_version="1.0.60",
        account=account_hash(account, KEY) if account else None,
    )


def test_a_damaged_body_still_names_the_session() -> None:
    sent = json.dumps(claude_body()).encode()
    this = asked(ANTHROPIC)
    halves = Body(
        (b'{"model":"claude-sonnet-4-5","messages":[', sent[sent.index(b'"metadata"') :]),
        complete=False,
    )
    this = replace(this, request=replace(this.request, body=halves))
    found = caller(this)
    assert (found.session_id, found.account) == (SESSION, account_hash(ACCOUNT, KEY))


CODEX_AGENT = "codex_exec/0.171.0 (Debian 12.0.0; x86_64) unknown (codex_exec; 0.171.0)"
CODEX = Caller(
    session_id=THREAD,
    session_source=CLIENT,
    turn_id=TURN,
    agent="/root",
    agent_id=THREAD,
    request_class="turn",
    client="codex_exec",
    client_version="0.171.0",
)


def turn_metadata(**more: Any) -> dict[str, Any]:
    return {
        "installation_id": "1e25b090-2081-4fff-8910-fba4c97372b7",
        "session_id": THREAD,
        "thread_id": THREAD,
        "agent_name": "/root",
        "turn_id": TURN,
        "window_id": f"{THREAD}:0",
        "request_kind": "turn",
        "root_turn_id": TURN,
        "workspaces": {f"/home/ada/{n}": {"associated_remote_urls": "x" * 60} for n in range(20)},
    } | more


def codex_headers(**more: Any) -> list[tuple[str, str]]:
    return [
        ("user-agent", CODEX_AGENT),
        ("originator", "codex_exec"),
        ("session-id", THREAD),
        ("thread-id", THREAD),
        ("x-codex-turn-metadata", json.dumps(turn_metadata(**more))),
    ]


def test_codex_over_http_by_its_headers_alone() -> None:
    assert caller(asked(OPENAI, None, *codex_headers())) == CODEX


def test_codex_over_a_websocket_says_each_turn_in_its_message() -> None:
    """The upgrade was made in an earlier turn, whose words its headers still have."""
    upgrade = codex_headers(turn_id="", root_turn_id="earlier", request_kind="prewarm")
    told = turn_metadata(turn_id="of-the-agent")
    message = {
        "type": "response.create",
        "model": "gpt-5-codex",
        "prompt_cache_key": THREAD,
        "client_metadata": {"turn_id": "", "x-codex-turn-metadata": json.dumps(told)},
    }
    opened = {"type": "response.created", "response": {"id": "resp_" + "1" * 20}}
    ended = {"type": "response.completed", "response": {"id": "resp_" + "1" * 20}}
    this = asked(CHATGPT, message, *upgrade, method="GET", protocol=Protocol.WEBSOCKET)
    lines = json.dumps(opened).encode() + b"\n" + json.dumps(ended).encode()
    this = replace(this, response=replace(this.response, status=101, body=Body((lines,))))
    assert caller(this) == CODEX
    lost = replace(this, request=replace(this.request, body=Body()))
    assert caller(lost) == replace(CODEX, turn_id=None, request_class=None)


def test_codexs_sub_agent_is_of_the_users_turn() -> None:
    told = turn_metadata(
        agent_name="/root/reviewer", thread_id="th-2", turn_id="tu-2", parent_thread_id=THREAD
    )
    found = caller(asked(OPENAI, {"client_metadata": told}, ("user-agent", CODEX_AGENT)))
    assert found == replace(CODEX, agent="/root/reviewer", agent_id="th-2", parent_agent_id=THREAD)


def test_an_older_codex() -> None:
    headers = [("originator", "codex_cli_rs"), ("user-agent", "codex_cli_rs/0.46.0 (x)")]
    found = caller(asked(OPENAI, {"prompt_cache_key": "th-1"}, *headers, ("session_id", "th-1")))
    assert (found.session_id, found.agent, found.agent_id) == ("th-1", "/root", "th-1")
    assert (found.client, found.client_version) == ("codex_cli_rs", "0.46.0")
    side = (("conversation_id", "th-2"), ("x-openai-subagent", "review"))
    review = caller(asked(OPENAI, None, *headers, *side))
    assert (review.session_id, review.agent) == ("th-2", "review")


@pytest.mark.parametrize("parent", [None, "ses_parent"])
def test_opencode(parent: str | None) -> None:
    """A sub-agent has a session of its own, which is part of the one that began it."""
    headers = [
        ("user-agent", "opencode/1.18.34 ai-sdk/provider-utils/4.0.46 runtime/bun/1.3.14"),
        ("x-opencode-session-id", "ses_own"),
        ("x-session-affinity", "ses_own"),
        ("x-session-id", "ses_own"),
    ]
    if parent:
        headers += [("x-opencode-parent-session-id", parent), ("x-parent-session-id", parent)]
    assert caller(asked(ANTHROPIC, None, *headers)) == Caller(
        session_id=parent or "ses_own",
        session_source=CLIENT,
        agent="subagent" if parent else "main",
        agent_id="ses_own",
        parent_agent_id=parent,
        client="opencode",
        client_version="1.18.34",
    )


def test_gemini_cli_signed_in_with_google() -> None:
    body = {
        "model": "gemini-2.5-pro",
        "user_prompt_id": f"{SESSION}########3",
        "request": {"contents": [], "session_id": SESSION},
    }
    agent = ("user-agent", "GeminiCLI-tui/0.61.0/gemini-2.5-flash (linux; x64; terminal)")
    assert caller(asked(ASSIST, body, agent)) == Caller(
        session_id=SESSION,
        session_source=CLIENT,
        turn_id=f"{SESSION}########3",
        client="GeminiCLI-tui",
        client_version="0.61.0",
    )


@pytest.mark.parametrize(
    ("url", "body", "headers"),
    [
        ("https://openrouter.ai/api/v1/chat/completions", {"session_id": "s-1"}, ()),
        (OPENAI, {"conversation": "s-1"}, ()),
        (OPENAI, {"conversation": {"id": "s-1"}}, ()),
        (OPENAI, {}, (("helicone-session-id", "s-1"),)),
        (OPENAI, {}, (("x-litellm-session-id", "s-1"),)),
    ],
)
def test_sessions_in_words_that_many_use(
    url: str, body: dict[str, Any], headers: tuple[tuple[str, str], ...]
) -> None:
    found = caller(asked(url, {"model": "m", **body}, *headers))
    assert found == Caller(session_id="s-1", session_source=CLIENT)


# --- programs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("agent", "client", "version"),
    [
        ("OpenAI/Python 2.1.0", "openai-python", "2.1.0"),
        ("AsyncAnthropic/Python 0.71.0", "anthropic-python", "0.71.0"),
        ("Anthropic/JS 0.30.1", "anthropic-js", "0.30.1"),
        ("google-genai-sdk/1.33.0 gl-python/3.11", "google-genai-sdk", "1.33.0"),
        ("python-httpx/0.28.1", "python-httpx", "0.28.1"),
        ("curl/8.5.0", "curl", "8.5.0"),
        ("node", "node", None),
        ("aws-sdk-js/3.1 ua/2.1", "aws-sdk-js", "3.1"),
        ("Mozilla/5.0 (X) AppleWebKit/5 Cursor/2.1.0 Chrome/1 Electron/3", "Cursor", "2.1.0"),
        ("Mozilla/5.0 (X11) Gecko/2010 Firefox/140.0", "Firefox", "140.0"),
        ("Mozilla/5.0 (X11) AppleWebKit/537 Chrome/1 Safari/2", "Mozilla", "5.0"),
        ("tool/ada@example.com", "tool", None),
        ("ada@example.com", "ada", None),
        ("tool/latest", "tool", None),
        ("", None, None),
        ("(nobody)", None, None),
        ("sk-ant-api03-abcdefghijkl/1.0", None, None),
    ],
)
def test_the_program_by_its_user_agent(agent: str, client: str | None, version: str | None) -> None:
    found = caller(asked(OPENAI, None, ("user-agent", agent)))
    assert (found.client, found.client_version) == (client, version)


def test_a_program_whose_name_has_a_space() -> None:
    headers = [("originator", "Codex Desktop"), ("user-agent", "Codex Desktop/0.142.0 (Mac OS 26)")]
    found = caller(asked(OPENAI, None, *headers, ("session_id", "s")))
    assert (found.client, found.client_version) == ("Codex Desktop", "0.142.0")


@pytest.mark.parametrize(
    ("header", "count"),
    [
        (("x-stainless-retry-count", "2"), 2),
        (("x-stainless-retry-count", "-1"), None),
        (("x-stainless-retry-count", "²"), None),
        (("x-stainless-retry-count", str(RETRIES_MAX + 1)), None),
        (("x-stainless-retry-count", "9" * 500), None),
        (("amz-sdk-request", "attempt=3; max=4"), 2),
        (("amz-sdk-request", "attempt=0"), 0),
        (("amz-sdk-request", "max=4"), None),
        (("x-other", "1"), None),
    ],
)
def test_tries_before_this_one(header: tuple[str, str], count: int | None) -> None:
    assert caller(asked(ANTHROPIC, None, header)).retry_count == count


# --- accounts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_headers", "answer_headers", "account"),
    [
        ((), (("anthropic-organization-id", ACCOUNT),), ACCOUNT),
        ((), (("openai-organization", "acme-corp"),), "acme-corp"),
        ((("openai-organization", "org-1"),), (), "org-1"),
        ((("chatgpt-account-id", "acc-1"),), (("openai-organization", "acme"),), "acc-1"),
        ((("x-goog-user-project", "billing"),), (), "billing"),
        ((), (), None),
    ],
)
def test_an_account_is_known_by_a_hash_that_needs_the_key(
    request_headers: Any, answer_headers: Any, account: str | None
) -> None:
    this = asked(OPENAI, None, *request_headers, answered=answer_headers)
    expected = None if account is None else account_hash(account, KEY)
    (event,) = REGISTRY.read(this)
    assert event.caller.account == expected
    again = asked(OPENAI, None, *request_headers, answered=answer_headers)
    (elsewhere,) = Registry(account_key=b"j" * 32).read(again)
    assert (elsewhere.caller.account == expected) is (expected is None)
    assert elsewhere.id == event.id  # whoever reads it, it is the same event
    without = asked(OPENAI, None, *request_headers, answered=answer_headers)
    (unknown,) = Registry().read(without)
    assert unknown.caller.account is None


def test_nothing_that_names_a_person_a_device_or_an_account_is_in_an_event() -> None:
    for this in (
        asked(ANTHROPIC, claude_body(), *CLAUDE_HEADERS),
        asked(CHATGPT, None, *codex_headers(), ("chatgpt-account-id", ACCOUNT)),
        asked(OPENAI, {"user": "ada@example.com", "safety_identifier": DEVICE, "model": "m"}),
        asked(ANTHROPIC, {"metadata": {"user_id": "ada@example.com"}}),
    ):
        (event,) = REGISTRY.read(this)
        for secret in (ACCOUNT, DEVICE, "1e25b090", "ada@example.com", "ada"):
            assert secret not in repr(event)


# --- where nobody names a session -----------------------------------------------------------------


def test_the_root_of_the_process_tree_stands_for_the_session() -> None:
    this = asked(OPENAI, None, ("user-agent", "OpenAI/Python 2.1.0"))
    live = replace(this, connection=replace(this.connection, process=PROCESS))
    assert caller(live) == Caller(
        session_id="pid-4711-9f3ab2c1",
        session_source=SessionSource.PROCESS,
        client="openai-python",
        client_version="2.1.0",
    )
    assert caller(this).session_id is None  # a capture that knows no process
    named = asked(ANTHROPIC, claude_body(), *CLAUDE_HEADERS)
    named = replace(named, connection=live.connection)
    assert caller(named) == CLAUDE


# --- what clients may not say ---------------------------------------------------------------------

BAD_IDS = [
    "",
    "x" * (ID_CHARS_MAX + 1),
    "two words",
    "line\nbreak",
    "\x1b[31mred",
    "a\0b",
    "caf\u00e9",
    "\u202egnp",
    "ada@example.com",
    "sk-ant-api03-abcdefghijkl",
    "-starts-with-a-dash",
]


@pytest.mark.parametrize("bad", BAD_IDS)
def test_an_id_that_no_client_mints_is_refused(bad: str) -> None:
    body = {
        "metadata": {"user_id": json.dumps({"session_id": bad, "account_uuid": bad})},
        "client_metadata": {"session_id": bad, "thread_id": bad, "turn_id": bad},
        "prompt_cache_key": bad,
        "session_id": bad,
        "conversation": {"id": bad},
        "user_prompt_id": bad,
        "request": {"session_id": bad},
    }
    names = (
        *("x-claude-code-session-id", "x-claude-code-prompt-id", "x-claude-code-agent-id"),
        *("session-id", "thread-id", "conversation_id", "x-opencode-session-id", "x-session-id"),
    )
    headers = [(name, bad) for name in names]
    for url in (ANTHROPIC, OPENAI, ASSIST):
        found = caller(asked(url, body, *headers, ("user-agent", "codex_exec/1.0")))
        assert (found.session_id, found.turn_id, found.agent_id) == (None, None, None)
    live = asked(OPENAI, body, *headers)
    live = replace(live, connection=replace(live.connection, process=PROCESS))
    assert caller(live).session_id == "pid-4711-9f3ab2c1"


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.sampled_from(BAD_IDS),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=8), each),
    max_leaves=6,
)
WORDS = ("metadata", "client_metadata", "prompt_cache_key", "session_id", "conversation", "request")
HEADER_NAMES = (
    *("user-agent", "originator", "x-claude-code-session-id", "x-codex-turn-metadata"),
    *("x-claude-code-agent-type", "x-opencode-session-id", "x-stainless-retry-count", "session-id"),
)


IN_BODY = ("user_id", "session_id", "turn_id", "x-codex-turn-metadata", "agent_name")
BODIES = st.dictionaries(
    st.sampled_from(WORDS), ANY_JSON | st.dictionaries(st.sampled_from(IN_BODY), ANY_JSON)
)
VALUES = st.text(max_size=200) | ANY_JSON.map(json.dumps)


@given(BODIES, st.lists(st.tuples(st.sampled_from(HEADER_NAMES), VALUES)))
def test_whatever_is_said_what_is_kept_is_short_and_printable(
    body: dict[str, Any], headers: list[tuple[str, str]]
) -> None:
    found = caller_of(asked(OPENAI, body, *headers), body, KEY)
    for each in fields(found):
        value = getattr(found, each.name)
        if isinstance(value, str):
            assert value.isascii()
            assert value.isprintable()
            assert 0 < len(value) <= max(ID_CHARS_MAX, NAME_CHARS_MAX)
            assert "@" not in value
    assert (found.session_id is None) == (found.session_source is None)
