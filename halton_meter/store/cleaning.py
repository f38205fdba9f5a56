"""Command lines that an earlier version stored, cut by the rules of `processes/arguments.py`.

Up to schema version 3, and in journal lines without a form, more was kept than identifies a
program: values joined to an option, words that an unknown option was given, one-word prompts.
"""

from __future__ import annotations

from typing import Any

from halton_meter.store.rows import dumps, loads

# The form of a journal line, its second field. What has no form is of a version before it.
LINE_FORM = 2
_FORM_MARK = b',"form":%d,' % LINE_FORM


def is_older(line: bytes) -> bool:
    """Whether a sound journal line is of an earlier version."""
    return not line[line.find(b",") :].startswith(_FORM_MARK)


def cleaned_line(line: bytes) -> bytes | None:
    """A journal line of an earlier version as it may be stored, None for one that tells nothing."""
    try:
        values = loads(line.decode())
        document = values.get("usage_document")
        process = document.get("process") if document else None
        if process:
            process["argv"] = cleaned(process["argv"])
    except (ValueError, AttributeError, KeyError, TypeError):
        return None
    return dumps(values) + b"\n"


def cleaned(argv: Any) -> tuple[str, ...]:
    """`argv` as it stood in a document, cut to what may be kept."""
    from capture.processes.arguments import without_secrets

    words = argv if isinstance(argv, list) else []
    return without_secrets([word if isinstance(word, str) else "" for word in words])
