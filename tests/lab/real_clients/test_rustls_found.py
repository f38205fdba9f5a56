"""rustls is found in every build that is to be had, or refused with the reason that is kept.

`rustls_builds.json` has the builds, from PyPI and npm, and what was found in each: `make clients`
compares, `HALTON_CLIENT_RESULTS=1` writes what is found now. Where a file has symbols they must say
the same: each site in a function of rustls, and a site in each `encrypt_outgoing` and
`decrypt_incoming`. No program is run here, so that aarch64 is tried on any machine.
"""

from __future__ import annotations

import bisect
import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from capture.functions.elf import Elf
from capture.functions.finder.not_found import NotFound
from capture.functions.finder.rustls import Found, find_rustls, library
from capture.functions.rustls_layer import Kind
from capture.helper.files.placement import refusal
from tests.lab.real_clients.programs import Program, Unavailable, fetched
from tests.support.cost import within

pytestmark = [pytest.mark.lab, pytest.mark.slow]
BUILDS = Path(__file__).with_name("rustls_builds.json")
ROWS: list[dict[str, Any]] = json.loads(BUILDS.read_text())
CPU_SECONDS_MAX = 6.0
"""0.9 s for Codex on x86-64, 3.8 s on aarch64, measured on 2 busy cores."""
_OF_RUSTLS = re.compile(r"rustls.*(record_layer|common_state|conn)|6rustls")
_SITES = re.compile(r"record_layer.*(encrypt_outgoing|decrypt_incoming)")


def fetched_row(row: dict[str, Any]) -> Path:
    program = Program(row["registry"], row["package"], row["version"], row["file"], row["tag"])
    try:
        return fetched(program)
    except Unavailable as reason:
        pytest.skip(f"cannot fetch {program}: {reason}")


def said(found: Found | NotFound) -> dict[str, Any]:
    """As `rustls_builds.json` has it."""
    if isinstance(found, NotFound):
        version, _, reason = found.reason.partition(": ")
        return {"rustls": version.removeprefix("rustls "), "refused": reason}
    layer = found.layer
    sites = (*layer.sends, *layer.receives, *layer.received)
    return {
        "rustls": layer.version or "a fork",
        "sends": len(layer.sends),
        "receives": len(layer.receives),
        "stepped": sum(each.kind is not Kind.BRANCH for each in sites),
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['package']}-{row['version']}")
def test_what_is_found_is_what_was_found(row: dict[str, Any]) -> None:
    path = fetched_row(row)
    find_rustls(path)  # the file comes from the disk once
    with within(CPU_SECONDS_MAX):
        found = [
            each for each in find_rustls(path) if not (isinstance(each, NotFound) and each.absent)
        ]
    if os.environ.get("HALTON_CLIENT_RESULTS") == "1":
        row["found"] = [said(each) for each in found]
        lines = ",\n".join(json.dumps(each) for each in ROWS)
        BUILDS.write_text(f"[\n{lines}\n]\n")
    assert [said(each) for each in found] == row["found"]
    with path.open("rb") as file:
        first = library(file.fileno())
        assert first is not None
        for each in (first, *first.others):
            assert not each.probes or refusal(file.fileno(), each) is None
    for one in found:
        if isinstance(one, Found):
            assert_symbols_agree(path, one)


def assert_symbols_agree(path: Path, found: Found) -> None:
    """Where the file has a table of all its functions."""
    with Elf(path) as elf:
        functions = sorted(functions_of(elf))
        if not functions:
            return
        starts = [start for start, _ in functions]
        named = set()
        for site in (*found.layer.sends, *found.layer.receives, *found.layer.received):
            segment = next(
                s for s in elf.executables if s.offset <= site.offset < s.offset + s.size_bytes
            )
            address = site.offset - segment.offset + segment.address
            name = functions[bisect.bisect_right(starts, address) - 1][1]
            assert _OF_RUSTLS.search(name), name
            named.add(name)
        if len(find_rustls(path)) == 1:  # another copy's functions are called the same
            wanted = {name for _, name in functions if _SITES.search(name) and "rustls" in name}
            assert wanted <= named


def functions_of(elf: Elf) -> list[tuple[int, str]]:
    """(address, mangled name) of each function in .symtab."""
    table = elf.section(".symtab")
    strings = elf.section(".strtab")
    if table is None or strings is None:
        return []
    names = elf.read(strings.offset, strings.size_bytes)
    rows = struct.iter_unpack("<IBBHQQ", elf.read(table.offset, table.size_bytes // 24 * 24))
    return [
        (value, names[at : names.index(b"\0", at)].decode("utf-8", "replace"))
        for at, info, _, section, value, _ in rows
        if info & 15 == 2 and section
    ]


def test_most_of_them_are_found() -> None:
    """At least 25 files with rustls 0.23.16 or later; of those no more than three are refused."""
    answers = [(row, each) for row in ROWS for each in row["found"]]
    assert len({row["package"] for row, each in answers if "sends" in each}) >= 25
    later = [each for _, each in answers if "refused" in each and numbers(each) >= (0, 23, 16)]
    assert len(later) <= 3


def numbers(answer: dict[str, Any]) -> tuple[int, ...]:
    return tuple(int(each) for each in re.findall(r"\d+", answer["rustls"])[:3])
