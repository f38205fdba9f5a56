"""A command line as it may be kept: which program with which options, never what was said.

People pass prompts and keys as arguments (`claude -p "…"`, `curl -H "x-api-key: …" -d '{…}'`), and
neither may reach an event. So an argument stays only where it is plainly a name, a path, a number
or an option; everything else becomes REDACTED. It errs on the side of hiding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

REDACTED = "[redacted]"
ARGUMENTS_MAX = 64
ARGUMENT_CHARS_MAX = 256

# Options whose value is a prompt, a body or a credential, whatever it looks like.
_TELLING = frozenset(
    "-p --print --prompt -d --data --data-raw --data-binary --data-ascii --data-urlencode --json "
    "-F --form -H --header -u --user -b --cookie -A -e --eval -c --command --input --message "
    "--system --system-prompt --append-system-prompt --instructions --api-key --apikey --key "
    "--token --auth --auth-token --password --secret --oauth2-bearer --proxy-user".split()
)
_PLAIN = re.compile(r"[\w@%+:,./~^-]*")
_OPTION = re.compile(r"--?[A-Za-z0-9][\w.-]*")
_URL = re.compile(r"([a-z][a-z0-9+.-]*://)(?:[^/@\s]*@)?([\w.:\[\]-]+)(/[\w@%+:,./~-]*)?(\?.*)?")
# Words that name a secret, and runs too long and too mixed to be a name.
_SECRET = re.compile(r"(?i)secret|passw|bearer|token|api[_-]?key|\b(sk|pk|xai|gsk|AIza|ghp|hf)[-_]")
_RANDOM = re.compile(r"(?=\S*\d)(?=\S*[A-Za-z])[A-Za-z0-9_+-]{32,}")


def without_secrets(argv: Sequence[str]) -> tuple[str, ...]:
    """`argv` with prompts, bodies and credentials replaced, cut to ARGUMENTS_MAX arguments."""
    kept = [part[:ARGUMENT_CHARS_MAX] for part in argv[:1]]
    before = ""
    for argument in argv[1:ARGUMENTS_MAX]:
        kept.append(_kept(argument, before))
        before = argument
    return tuple(kept)


def _kept(argument: str, before: str) -> str:
    name, equals, value = argument.partition("=")
    if equals and _OPTION.fullmatch(name):
        hidden = name in _TELLING or _SECRET.search(name) or not _is_plain(value)
        return f"{name}={REDACTED}" if hidden else argument
    if _OPTION.fullmatch(argument) and not _RANDOM.search(argument):
        return argument[:ARGUMENT_CHARS_MAX]
    if before in _TELLING or (before.startswith("-") and _SECRET.search(before)):
        return REDACTED
    url = _URL.fullmatch(argument)
    if url is not None and not _RANDOM.search(url.group(3) or ""):
        query = f"?{REDACTED}" if url.group(4) else ""
        return f"{url.group(1)}{url.group(2)}{url.group(3) or ''}{query}"
    return argument if _is_plain(argument) else REDACTED


def _is_plain(text: str) -> bool:
    if len(text) > ARGUMENT_CHARS_MAX or not _PLAIN.fullmatch(text):
        return False
    last = text.rpartition("/")[2]
    return not _SECRET.search(last) and not _RANDOM.search(last)
