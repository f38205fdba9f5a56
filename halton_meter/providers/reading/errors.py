"""Errors in whichever of the providers' shapes: that there is one, its code, and its class.

The contract's classes are few: `rate_limit`, `server_error`, `bad_request`, `auth`, `timeout`,
`network`, `unknown`. The HTTP status decides where it says so, the provider's own words where the
error came on a 200. Messages are never kept.
"""

from __future__ import annotations

from halton_meter.providers.reading.values import Json, as_code, as_dict


def error_object(document: object) -> Json | None:
    """The error that a document states, in whichever of the providers' shapes; None if none."""
    if isinstance(document, list):
        document = document[0] if len(document) == 1 else None
    if not isinstance(document, dict):
        return None
    error = document.get("error")
    if isinstance(error, dict):
        return error
    if isinstance(error, str) and error:
        return {"code": document.get("code"), "type": document.get("type")}
    if document.get("type") == "error" or document.get("object") == "error":
        return document
    return None


def error_code(document: object) -> str | None:
    """The provider's own code of the error that a document states; never its message."""
    error = error_object(document)
    if error is None:
        error = as_dict(document)
    for name in ("code", "status", "type", "__type"):
        value = error.get(name)
        if isinstance(value, str) and (code := as_code(value)) and not code.isdigit():
            return code
    return as_code(error.get("code"))


_WORDS_OF_CLASS = (
    ("rate_limit", ("rate", "quota", "exhausted", "throttl", "too_many", "toomany", "limit_exce")),
    ("timeout", ("timeout", "timed_out", "deadline")),
    ("auth", ("auth", "permission", "forbidden", "accessdenied", "api_key")),
    (
        "server_error",
        ("overloaded", "server", "internal", "unavailable", "api_error", "streamerror", "notready"),
    ),
    (
        "bad_request",
        (
            "invalid",
            "filter",
            "bad_request",
            "not_found",
            "notfound",
            "validation",
            "failed_precondition",
            "tool_use_failed",
            "context_length",
            "policy",
            "unsupported",
            "too_large",
        ),
    ),
)


def error_class_of_status(status: int) -> str | None:
    """The contract's class of an HTTP status; None when it is no error."""
    if status < 400:
        return None
    if status == 429:
        return "rate_limit"
    if status in (401, 403):
        return "auth"
    if status in (408, 504):
        return "timeout"
    return "server_error" if status >= 500 else "bad_request"


def error_class_of(document: object) -> str:
    """The contract's class of an error that came without an HTTP status of its own."""
    error = error_object(document) or {}
    for name in ("status_code", "code", "status", "http_code"):
        number = error.get(name)
        if isinstance(number, str) and number.isdigit() and len(number) == 3:
            number = int(number)
        if isinstance(number, int) and not isinstance(number, bool) and 400 <= number < 600:
            return error_class_of_status(number) or "unknown"
    words = " ".join(
        value.lower() for name in ("code", "status", "type") if (value := as_code(error.get(name)))
    )
    for name, parts in _WORDS_OF_CLASS:
        if any(part in words for part in parts):
            return name
    return "unknown"
