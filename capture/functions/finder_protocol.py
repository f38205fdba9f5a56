"""What root asks the finder's process, and how the answers come back: JSON, one `Library` each.

The finder may have been taken over by a file that it read. So nothing of an answer is believed but
its shape, which is checked here; that it is true of its file, `helper/files/placement.py` checks.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from capture.functions.library import Function, Library, Probe, Proof
from capture.functions.rustls_layer import (
    DISPLACEMENT_MAX,
    SITES_MAX,
    Kind,
    Pointer,
    Receive,
    Received,
    RecordLayer,
    Send,
    ServerName,
)
from capture.functions.stacks import AT_RETURN, PROGRAMS, Stack
from halton_meter import untrusted

INSPECT, LINKER, SEARCH = b"inspect", b"linker", b"search"
"""The questions about a file: its TLS functions by symbol, a dynamic linker's hook, everything."""
QUICK, HURRIED, IDLE = b"quick", b"hurried", b"idle"
"""Kinds of children: for files by symbol, for one search, for one search that nobody waits for."""
LAST = b"last"
"""Follows a child's last answer: ask another child."""
NOTHING, NO_ANSWER = "null", "no answer"
"""Answers: there is no TLS in the file; nobody knows, ask again later."""

STRUCTURE_FILE_BYTES_MIN = 1_000_000
"""Files below this are not searched by structure: no executable with a stripped TLS stack is."""
PROBES_MAX = 256
FUNCTIONS_MAX = 64
OTHERS_MAX = 8
"""Stacks in one file beside the first."""


def library_json(library: Library | None) -> str:
    """An answer, as the finder sends it."""
    return json.dumps(None if library is None else _said(library))


def _said(library: Library) -> dict[str, Any]:
    return {
        "stack": library.stack.value,
        "probes": library.probes,
        "build_id": library.build_id,
        "reason": library.reason,
        "cookie": library.cookie,
        "unproved": library.unproved,
        "beside": library.beside.value if library.beside else None,
        "functions": [(each[0], each[1].value, *each[2:]) for each in library.functions],
        "layer": None if library.layer is None else _layer_said(library.layer),
        "others": [_said(each) for each in library.others],
    }


def _layer_said(layer: RecordLayer) -> dict[str, Any]:
    sites = (layer.sends, layer.receives, layer.received)
    return {
        "version": layer.version,
        "offsets": (layer.encrypter, layer.decrypter, layer.write_seq, layer.read_seq),
        "ok_tag": layer.ok_tag,
        "server_name": layer.server_name,
        "sites": [[(each[0], each[1].value, *each[2:]) for each in kind] for kind in sites],
    }


def library_from_json(text: str) -> Library | None:
    """The inverse. Raises ValueError, KeyError or TypeError on anything else."""
    if text.strip() == NOTHING:
        return None
    content = untrusted.parsed(text.encode("utf-8", "replace"))
    if content is None:
        raise ValueError("not what a search found")
    others = content["others"]
    if len(others) > OTHERS_MAX or any(other["others"] for other in others):
        raise ValueError("not the other libraries of a file")
    return replace(_library(content), others=tuple(map(_library, others)))


def _library(content: dict[str, Any]) -> Library:
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
        None if content["layer"] is None else _layer(content["layer"]),
    )


def _layer(content: dict[str, Any]) -> RecordLayer:
    sends, receives, received = content["sites"]
    if max(len(sends), len(receives), len(received)) > SITES_MAX:
        raise ValueError("more sites than any rustls has")
    name = content["server_name"]
    return RecordLayer(
        untrusted.text(content, "version", 40),
        *_offsets(content["offsets"]),
        _number(content["ok_tag"], 255),
        None if name is None else _server_name(name),
        tuple(
            Send(
                *_site(offset, kind, function), _pointer(layer), _pointer(message), counted is True
            )
            for offset, kind, function, layer, message, counted in sends
        ),
        tuple(
            Receive(*_site(offset, kind, function), _pointer(layer))
            for offset, kind, function, layer in receives
        ),
        tuple(
            Received(*_site(offset, kind, function), _pointer(result), _number(receive))
            for offset, kind, function, result, receive in received
        ),
    )


def _offsets(found: Any) -> tuple[int, int, int, int]:
    one, two, three, four = (_number(offset, DISPLACEMENT_MAX) for offset in found)
    return one, two, three, four


def _server_name(found: Any) -> ServerName:
    state, name = (_number(offset, DISPLACEMENT_MAX) for offset in found)
    return ServerName(state, name)


def _site(offset: Any, kind: Any, function: Any) -> tuple[int, Kind, int]:
    return _number(offset), Kind(kind), _number(function)


def _pointer(found: Any) -> Pointer:
    register, displacement = found
    return Pointer(
        _number(register, 31), _number(displacement, DISPLACEMENT_MAX, -DISPLACEMENT_MAX)
    )


def _number(found: Any, most: int = 2**64 - 1, least: int = 0) -> int:
    number = untrusted.whole_number({"it": found}, "it", most, least)
    if number is None:
        raise ValueError("not a probe's number")
    return number
