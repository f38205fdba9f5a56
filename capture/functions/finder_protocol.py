"""What root asks the finder's process, and how the answers come back: JSON, one `Library` each.

The finder may have been taken over by a file that it read. So nothing of an answer is believed but
its shape, which is checked here; that it is true of its file, `helper/files/placement.py` checks.
"""

from __future__ import annotations

import json
from typing import Any

from capture.functions.library import Function, Library, Probe, Proof
from capture.functions.stacks import AT_RETURN, PROGRAMS, Stack
from halton_meter import untrusted

INSPECT, LINKER, SEARCH = b"inspect", b"linker", b"search"
"""The questions about a file: its TLS functions by symbol, a dynamic linker's hook, everything."""
QUICK, HURRIED, IDLE = b"quick", b"hurried", b"idle"
"""Kinds of children: for files by symbol, for one search, for one search that nobody waits for."""
LAST = b"last"
"""Follows a child's last answer: ask another child."""

STRUCTURE_FILE_BYTES_MIN = 1_000_000
"""Files below this are not searched by structure: no executable with a stripped TLS stack is."""
PROBES_MAX = 256
FUNCTIONS_MAX = 16


def library_json(library: Library | None) -> str:
    """An answer, as the finder sends it."""
    if library is None:
        return "null"
    return json.dumps(
        {
            "stack": library.stack.value,
            "probes": library.probes,
            "build_id": library.build_id,
            "reason": library.reason,
            "cookie": library.cookie,
            "unproved": library.unproved,
            "beside": library.beside.value if library.beside else None,
            "functions": [(each[0], each[1].value, *each[2:]) for each in library.functions],
        }
    )


def library_from_json(text: str) -> Library | None:
    """The inverse. Raises ValueError, KeyError or TypeError on anything else."""
    if text.strip() == "null":
        return None
    content = untrusted.parsed(text.encode("utf-8", "replace"))
    if content is None:
        raise ValueError("not what a search found")
    probes = tuple(
        Probe(program, _number(offset), at_return is True)
        for program, offset, at_return in content["probes"]
    )
    for probe in probes:
        at_return = probe.program in AT_RETURN
        if probe.program not in PROGRAMS or probe.offset < 0 or probe.at_return != at_return:
            raise ValueError(f"not a probe: {probe}")
    functions = tuple(
        Function(_number(offset), Proof(proof), _number(at), _number(size))
        for offset, proof, at, size in content["functions"]
    )
    if len(probes) > PROBES_MAX or len(functions) > FUNCTIONS_MAX:
        raise ValueError(f"{len(probes)} probes in {len(functions)} functions")
    beside = content["beside"]
    return Library(
        Stack(content["stack"]),
        probes,
        untrusted.text(content, "build_id", 160),
        untrusted.text(content, "reason", 500),
        _number(content["cookie"]),
        content["unproved"] is True,
        None if beside is None else Stack(beside),
        functions,
    )


def _number(found: Any) -> int:
    number = untrusted.whole_number({"it": found}, "it", 2**64 - 1)
    if number is None:
        raise ValueError("not a probe's number")
    return number
