"""Who asked: session, turn, agent, client, tries and account, as a request says it.

Clients name these in headers, in the body, or in both; `_NAMES` has a reader for each client that
names a session in a way of its own. What they say is untrusted: an id that is too long, or has a
character that no id needs, is refused, and so is what looks like a key or an e-mail address. What
names a person, a device or an account leaves this file as a keyed hash or not at all. Where no
client names a session, the process at the root of its tree stands for it; of a capture that knows
no process, the session is unknown.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from halton_meter.model import Body, Caller, Exchange, Headers, Protocol, SessionSource
from halton_meter.providers.reading.bodies import REQUEST_PARSE_BYTES_MAX
from halton_meter.providers.reading.values import Json, as_dict
from halton_meter.wire import formats
from halton_meter.wire.headers import is_secret

ID_CHARS_MAX = 128
NAME_CHARS_MAX = 64
# A client that tries more often than this says nonsense.
RETRIES_MAX = 10_000
ACCOUNT_BYTES = 8

# No @, so that no e-mail address is one.
_ID = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_.:/=+~#-]{{0,{ID_CHARS_MAX - 1}}}", re.ASCII)
_NAME = re.compile(rf"[A-Za-z0-9/_][A-Za-z0-9_.:/+ -]{{0,{NAME_CHARS_MAX - 1}}}", re.ASCII)
_VERSION = re.compile(rf"v?[0-9][A-Za-z0-9_.+-]{{0,{NAME_CHARS_MAX - 1}}}", re.ASCII)
# What names an account may have more characters: only its hash is kept.
_ACCOUNT_CHARS_MAX = 512


@dataclass(frozen=True, slots=True)
class Said:
    """What a request says: its headers, and its body's JSON object (of a turn: its message's).

    Of headers of one name the first counts.
    """

    request: Mapping[str, str]
    response: Mapping[str, str]
    body: Json
    in_turns: bool

    def header(self, *names: str) -> str | None:
        """The first of the request's headers of these names that is there."""
        for name in names:
            if value := self.request.get(name):
                return value
        return None


def caller_of(exchange: Exchange, body: Json, account_key: bytes | None) -> Caller:
    """Who asked in an exchange. `body` is the request's JSON object as far as it is known.

    `account_key` is the machine's key for hashes; without it the account stays unknown.
    """
    if not exchange.callers:
        exchange.callers.append(_caller(exchange, body, account_key))
    return exchange.callers[0]


def _caller(exchange: Exchange, body: Json, account_key: bytes | None) -> Caller:
    said = Said(
        _by_name(exchange.request.headers),
        _by_name(exchange.response.headers),
        body if _is_parsed(exchange.request.body) else {**_salvaged(exchange.request.body), **body},
        exchange.protocol is Protocol.WEBSOCKET,
    )
    named = next((found for read in _NAMES if (found := read(said)).session_id), Caller())
    client, version = client_of(said)
    found = replace(
        named,
        session_source=SessionSource.CLIENT if named.session_id else None,
        client=client,
        client_version=version,
        retry_count=_retries(said),
        account=_account(said, account_key),
    )
    process = exchange.connection.process
    if found.session_id is None and process is not None and process.root is not None:
        return replace(
            found, session_id=f"pid-{process.root}", session_source=SessionSource.PROCESS
        )
    return found


def _by_name(headers: Headers) -> Mapping[str, str]:
    return dict(reversed(headers))


def _is_parsed(body: Body) -> bool:
    return body.whole and sum(map(len, body.pieces)) <= REQUEST_PARSE_BYTES_MAX


def _salvaged(body: Body) -> Json:
    """What a damaged or huge body still says of who asks."""
    user_id = formats.salvage_scalar(body, b"user_id", last=True)
    return {
        "metadata": {"user_id": user_id},
        "prompt_cache_key": formats.salvage_scalar(body, b"prompt_cache_key", last=True),
    }


# --- what may be kept -----------------------------------------------------------------------------


def as_session_id(value: object) -> str | None:
    """`value` if it may be kept as an id that a client minted; see the top of this file."""
    return value if isinstance(value, str) and _is_harmless(_ID, value) else None


def _as_name(value: object) -> str | None:
    return value if isinstance(value, str) and _is_harmless(_NAME, value) else None


def _is_harmless(pattern: re.Pattern[str], value: str) -> bool:
    return pattern.fullmatch(value) is not None and not is_secret(value)


def _first(read: Callable[[object], str | None], *values: object) -> str | None:
    return next((found for value in values if (found := read(value)) is not None), None)


# --- clients that name a session in a way of their own --------------------------------------------

_OLD_USER_ID = re.compile(r"user_[^_]*_account_(?P<account_uuid>[^_]*)_session_(?P<session_id>.+)")
# What Claude Code asks on behalf of its main agent.
_OF_MAIN = ("main", "compaction", "side_reply")


def _claude_user(body: Json) -> Json:
    """Who asks by `metadata.user_id`: JSON, or the words of older versions."""
    text = as_dict(body.get("metadata")).get("user_id")
    if not isinstance(text, str):
        return {}
    if text.startswith("{"):
        return as_dict(formats.loads(text.encode("utf-8", "replace")))
    found = _OLD_USER_ID.fullmatch(text)
    return dict(found.groupdict()) if found else {}


def _claude_code(said: Said) -> Caller:
    user = _claude_user(said.body)
    session = _first(as_session_id, said.header("x-claude-code-session-id"), user.get("session_id"))
    kind = _as_name(said.header("x-claude-code-request-class", "x-claude-1p-request-class"))
    own_kind = "main" if kind in _OF_MAIN else kind
    return Caller(
        session_id=session,
        turn_id=as_session_id(said.header("x-claude-code-prompt-id")),
        agent=_first(_as_name, said.header("x-claude-code-agent-type"), own_kind),
        agent_id=as_session_id(said.header("x-claude-code-agent-id")),
        parent_agent_id=as_session_id(said.header("x-claude-code-parent-agent-id")),
        request_class=kind,
    )


_TURN_METADATA = "x-codex-turn-metadata"


def _codex(said: Said) -> Caller:
    """Codex says all of it in each body; over HTTP in the headers too.

    A WebSocket's headers are those of its upgrade, and of the turn in which that was made.
    """
    if not _is_codex(said):
        return Caller()
    beside = as_dict(said.body.get("client_metadata"))
    told = {**_turn_metadata(beside.get(_TURN_METADATA)), **{k: v for k, v in beside.items() if v}}
    first = _turn_metadata(said.header(_TURN_METADATA))
    if said.in_turns:
        first = {name: first.get(name) for name in ("session_id", "thread_id", "agent_name")}
    thread = _first(
        as_session_id,
        told.get("thread_id"),
        said.body.get("prompt_cache_key"),
        first.get("thread_id"),
        said.header("thread-id", "thread_id", "conversation_id"),
    )
    session = _first(
        as_session_id,
        told.get("session_id"),
        first.get("session_id"),
        said.header("session-id", "session_id"),
        thread,
    )
    told = {**first, **{name: value for name, value in told.items() if value}}
    side = _first(_as_name, told.get("x-openai-subagent"), said.header("x-openai-subagent"))
    return Caller(
        session_id=session,
        turn_id=_first(as_session_id, told.get("root_turn_id"), told.get("turn_id")),
        agent=_first(_as_name, told.get("agent_name"), side, "/root"),
        agent_id=thread,
        parent_agent_id=_first(
            as_session_id,
            told.get("x-codex-parent-thread-id"),
            told.get("parent_thread_id"),
            said.header("x-codex-parent-thread-id"),
        ),
        request_class=_as_name(told.get("request_kind")),
    )


def _is_codex(said: Said) -> bool:
    program = (said.header("originator") or said.header("user-agent") or "").lower()
    return program.startswith("codex") or said.header(_TURN_METADATA) is not None


def _turn_metadata(text: object) -> Json:
    return as_dict(formats.loads(text.encode("utf-8", "replace"))) if isinstance(text, str) else {}


def _opencode(said: Said) -> Caller:
    """A sub-agent's session is part of the one that began it."""
    own = as_session_id(said.header("x-opencode-session-id", "x-opencode-session"))
    parent = as_session_id(said.header("x-opencode-parent-session-id", "x-parent-session-id"))
    return Caller(
        session_id=own and (parent or own),
        turn_id=as_session_id(said.header("x-opencode-request")),
        agent="main" if parent is None else "subagent",
        agent_id=own,
        parent_agent_id=parent,
    )


def _code_assist(said: Said) -> Caller:
    """Gemini CLI, signed in with a Google account."""
    session = as_session_id(as_dict(said.body.get("request")).get("session_id"))
    return Caller(session_id=session, turn_id=as_session_id(said.body.get("user_prompt_id")))


# Headers by which gateways and clients group requests.
_SESSION_HEADERS = (
    "x-session-id",
    "x-session-affinity",
    "session-id",
    "helicone-session-id",
    "x-litellm-session-id",
)


def _any_client(said: Said) -> Caller:
    """A session in words that many use: headers, OpenRouter's field, OpenAI's conversations."""
    conversation: Any = said.body.get("conversation")
    if isinstance(conversation, dict):
        conversation = conversation.get("id")
    session = _first(
        as_session_id,
        *(said.header(name) for name in _SESSION_HEADERS),
        said.body.get("session_id"),
        conversation,
    )
    return Caller(session_id=session)


_NAMES = (_claude_code, _opencode, _codex, _code_assist, _any_client)


# --- the program ----------------------------------------------------------------------------------

# "OpenAI/Python 2.1.0", "AsyncAnthropic/Python 0.71.0": the SDKs that Stainless generates.
_SDK = re.compile(
    r"(?:Async)?(?P<sdk>[A-Za-z]{2,32})/(?P<language>Python|JS|Go|Java|Kotlin|Ruby|PHP|CSharp) "
    r"(?P<version>\S+)"
)
_PRODUCT = re.compile(r"(?P<name>[A-Za-z][A-Za-z0-9_.+-]{0,63})(?:/(?P<version>[^\s/;()]{1,64}))?")
# Products of every browser engine, which say nothing of the program around it.
_ENGINES = frozenset({"mozilla", "applewebkit", "gecko", "chrome", "safari", "electron", "version"})


def client_of(said: Said) -> tuple[str | None, str | None]:
    """The program and its version, as its user-agent begins; what is no version is left out."""
    agent = (said.header("user-agent") or "").strip()
    origin = _as_name(said.header("originator"))
    if origin is not None and agent.startswith(f"{origin}/"):  # a name of several words
        return origin, _version(re.split(r"[\s/]", agent[len(origin) + 1 :], maxsplit=1)[0])
    if sdk := _SDK.match(agent):
        name = f"{sdk['sdk']}-{sdk['language']}".lower()
        return name, _version(sdk["version"])
    found = _PRODUCT.match(agent)
    if found is not None and found["name"].lower() == "mozilla":
        others = [each for each in _PRODUCT.finditer(agent) if each["version"]]
        found = next((each for each in others if each["name"].lower() not in _ENGINES), found)
    if found is None or is_secret(found[0]):
        return origin, None
    return found["name"], _version(found["version"])


def _version(text: str | None) -> str | None:
    return text if text is not None and _is_harmless(_VERSION, text) else None


def _retries(said: Said) -> int | None:
    """How often it was tried before: Stainless's SDKs count retries, Amazon's attempts."""
    stated = said.header("x-stainless-retry-count")
    if stated is None:
        attempt = re.search(r"\battempt=(\d{1,5})\b", said.header("amz-sdk-request") or "")
        return max(0, int(attempt[1]) - 1) if attempt else None
    number = stated.strip()
    if not (number.isascii() and number.isdigit() and len(number) <= len(str(RETRIES_MAX))):
        return None
    return int(number) if int(number) <= RETRIES_MAX else None


# --- the account ----------------------------------------------------------------------------------

# Who is billed, as the answer says it, else as the request does.
_ACCOUNTS = ("anthropic-organization-id", "openai-organization")
_ACCOUNTS_ASKED = ("chatgpt-account-id", "openai-organization", "x-goog-user-project")


def _account(said: Said, key: bytes | None) -> str | None:
    """A keyed hash of the account: the user's where the request names it, else who is billed."""
    if key is None:
        return None
    named = (
        _claude_user(said.body).get("account_uuid"),
        said.header("chatgpt-account-id"),
        *map(said.response.get, _ACCOUNTS),
        said.header(*_ACCOUNTS_ASKED),
    )
    account = next((each for each in named if isinstance(each, str) and each), None)
    return None if account is None else account_hash(account[:_ACCOUNT_CHARS_MAX], key)


def account_hash(account: str, key: bytes) -> str:
    """16 hexadecimal digits for an account: the same on one machine, unlike on any other."""
    digest = hashlib.blake2b(account.encode("utf-8", "replace"), key=key, digest_size=ACCOUNT_BYTES)
    return digest.hexdigest()
