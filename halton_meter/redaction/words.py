"""What may stay in a redacted capture: words of the providers' protocols. All else is replaced.

An allow-list: `words.txt` holds the words that our own readers look for (written by
`tools/redaction_words.py`), and here are those that only people look for. Nothing of it is what a
user wrote.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources

from halton_meter.wire.headers import is_secret

_STRUCTURE = (
    "assistant user system developer tool content_block content_block_start content_block_delta "
    "content_block_stop message_start message_delta message_stop text_delta input_json_delta "
    "thinking_delta signature_delta tool_use server_tool_use tool_result web_search_tool_result "
    "max_tokens max_completion_tokens max_output_tokens temperature top_p top_k tool_choice "
    "stop_sequence stop_sequences finish_reason finishReason stop_reason stopReason end_turn "
    "system_fingerprint logprobs refusal annotations function_call function name description "
    "previous_response_id include_usage stream_options input_text output_text reasoning summary "
    "output_index content_index sequence_number generationConfig maxOutputTokens safetySettings "
    "promptFeedback index encoding_format float base64 dimensions store truncation verbosity "
    "effort text format created created_at completed_at messages choices delta logprobs ws google "
    "ai parts inlineData mimeType turnComplete generationComplete interrupted safetyRatings "
    "citationMetadata systemInstruction functionDeclarations toolConfig responseModalities "
    "response.output_text.delta response.output_item.added response.output_item.done "
    "response.content_part.added response.content_part.done response.output_text.done "
    "parallel_tool_calls reasoning_effort max_tool_calls incomplete_details background prompts "
    "top_logprobs presence_penalty frequency_penalty seed stop user n cache_control message_id "
    "chat_get_completion json_object auto none low medium high ping completion_tokens "
    # tiers, conditions and errors, as answers name them
    "standard priority flex batch scale fast global not_available enabled disabled searching "
    "starting adaptive open_page visit logs eos_token computer container_upload "
    "bash_code_execution_tool_result advisor_redacted_result interaction.status_update "
    "authentication_error permission_denied invalid_argument resource_exhausted unauthenticated "
    "deadline_exceeded unavailable aborted unimplemented cancelled already_exists not_found "
    "failed_precondition unknown_parameter guardrail_intervened unsupported missing required "
    "validation throttling access insufficient quota exceeded billing hard organization "
    "account deactivated context length content policy violation "
    # windows of rates, and what SDKs say of themselves
    "allowed rejected warning minute hour day week month second req characters query audio "
    "renewalperiod abusepenalty active guardrailidentifier guardrailversion stainless arch lang "
    "os package version runtime helper method custom handler helper-method"
)
# Programs and libraries that name themselves in a User-Agent.
CLIENTS = frozenset(
    b"curl Wget python requests httpx aiohttp urllib node undici axios got Go http client okhttp "
    b"OpenAI AsyncOpenAI Anthropic AsyncAnthropic Python JS Go Java Mozilla claude cli "
    b"claude-cli codex opencode google genai sdk gl api litellm langchain external".split()
)
# Under these names stands a word of the protocol, one of many.
NAMED = frozenset(
    b"type role object event stop_reason finish_reason finishReason stopReason status code "
    b"service_tier serviceTier modality speed geo inference_geo token_type plan_type "
    b"error_class quality size resolution provider".split()
)
# Under these names stands a model.
MODELS = frozenset(
    b"model modelId model_id modelVersion model_version request_model invokedModelId "
    b"modelName".split()
)
# Objects that users fill: of what is inside not even a key stays.
THEIRS = frozenset(
    b"metadata arguments args parameters input_schema inputSchema schema properties $defs "
    b"definitions json_schema response_schema responseSchema labels client_metadata "
    b"partial_json toolCall logit_bias headers environment env variables".split()
)
# The same where it is an object; elsewhere the protocol's own.
THEIRS_AS_OBJECT = frozenset((b"input", b"output"))
_ID_KEY = re.compile(rb"(?:.*[_.-])?(?:id|uuid)|[a-z]\w*I[dD]|id_\w+", re.DOTALL)

_NAME = re.compile(rb"[A-Za-z][A-Za-z0-9_.:-]{0,63}")
_MODEL = re.compile(rb"[A-Za-z0-9@][A-Za-z0-9_.:/@+~%-]{0,127}")
# Counts and sizes as text, times, durations.
_FIGURE = re.compile(
    rb"-?\d{1,18}(?:\.\d{1,18})?(?:ms|[smhd%])?|\d{2,5}x\d{2,5}"
    rb"|\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d{1,9})?)?(?:Z|[+-]\d\d:?\d\d)?)?"
)

_FIGURE_KEY = re.compile(
    rb"(?i)token|count|cost|price|usd|amount|second|duration|size|time|created|_at$|ticks|quantity"
    rb"|unit|limit|remaining|reset|balance|percent|total|charge|credit|rate|dimension|character|^n$|_n$|_ms$|ttl"
)
# Numbers under these names are what somebody said.
SAID = frozenset(
    b"text content data value values embedding user name title description input prompt query "
    b"instructions message".split()
)
# Under other names that hold no figures, a number of more digits may be a phone's or a card's.
_DIGITS_MAX = 6
_LONG = re.compile(rb"-?\d{%d}" % (_DIGITS_MAX + 1))
_PART = re.compile(rb"[A-Z]?[a-z]+|[A-Z]+")
_PART_LETTERS_MAX = 2  # shorter than any word that says something


@cache
def _words() -> frozenset[bytes]:
    read = resources.files(__package__).joinpath("words.txt").read_bytes().split()
    return frozenset(read) | frozenset(_STRUCTURE.encode().split()) | NAMED | MODELS | THEIRS


def all_words() -> frozenset[bytes]:
    """Every word of the protocols."""
    return _words()


def is_word(text: bytes) -> bool:
    """Whether it is a word of the protocols."""
    return text in _words()


@cache
def _parts() -> frozenset[bytes]:
    return frozenset(part.lower() for word in _words() for part in _PART.findall(word))


def is_name(text: bytes) -> bool:
    """Whether it has the form of a protocol's word: one, short, its parts of words known."""
    return _NAME.fullmatch(text) is not None and all(
        len(part) <= _PART_LETTERS_MAX or part.lower() in _parts() for part in _PART.findall(text)
    )


def is_count(key: bytes, number: bytes) -> bool:
    """Whether a number under this name is the protocol's."""
    if not is_word(key) or key in SAID or key in THEIRS or is_id_key(key):
        return False
    return holds_figures(key) or _LONG.match(number) is None


def holds_figures(key: bytes) -> bool:
    """Whether under this name a figure written as a text is the protocol's: a count, cost, time.

    Under others it may be what a user wrote, such as the number of a card.
    """
    return is_word(key) and _FIGURE_KEY.search(key) is not None


def is_figure(text: bytes) -> bool:
    """Whether it is a number, size, time or duration."""
    return _FIGURE.fullmatch(text) is not None


def is_id_key(key: bytes) -> bool:
    """Whether an identifier stands under this name."""
    return len(key) <= 64 and _ID_KEY.fullmatch(key) is not None


# A mail address, a path on somebody's disk.
_NO_MODEL = re.compile(rb"@[A-Za-z0-9-]+\.[A-Za-z]|\A[A-Za-z]:/")
_TUNED = re.compile(rb"(ft:[A-Za-z0-9_.-]+:|[A-Za-z0-9_.-]+:ft-)(.*)", re.DOTALL)
_ACCOUNT = re.compile(rb"(arn:[a-z-]*:bedrock:[a-z0-9-]*:)(\d{12})(:[a-z-]+/)(.*)", re.DOTALL)


def shown_model(text: bytes) -> bytes | None:
    """A model's name as it may stay, of the same length; None where it is none.

    Of a fine-tuned model what its owner called it is replaced, of an ARN the account.
    """
    if (arn := _ACCOUNT.fullmatch(text)) is not None and _MODEL.fullmatch(arn.group(4)):
        rest = arn.group(4)
        if not arn.group(3).startswith((b":foundation-model/", b":inference-profile/")):
            rest = b"0" * len(rest)
        return arn.group(1) + b"0" * 12 + arn.group(3) + rest
    if _MODEL.fullmatch(text) is None or _NO_MODEL.search(text) or is_secret(text.decode()):
        return None
    if (tuned := _TUNED.fullmatch(text)) is not None:
        return tuned.group(1) + re.sub(rb"[A-Za-z0-9]", b"x", tuned.group(2))
    if text.startswith((b"http", b"/", b"~")) or b"//" in text:
        return None
    return text
