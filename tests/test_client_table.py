"""The table of clients in docs/capture.md shows what the tests of real clients proved."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from halton_meter.live.unmetered import CAUSES
from tests.lab.real_clients.results import WAYS
from tests.lab.real_clients.table import EXACT, TABLE, Client

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("client_table", ROOT / "tools" / "client_table.py")
assert _spec is not None
assert _spec.loader is not None
tool: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tool)


def row(client: str, version: str, way: str = "uprobes", result: str = "exact") -> dict[str, str]:
    return {"client": client, "version": version, "stack": "S", "way": way, "result": result}


def test_the_document_shows_the_committed_results() -> None:
    made = tool.table(json.loads(tool.RESULTS.read_text()))
    text = tool.DOCUMENT.read_text()
    assert tool.with_table(text, made) == text, "run: python tools/client_table.py"


@pytest.mark.parametrize("client", TABLE, ids=str)
def test_the_results_are_those_that_the_table_of_clients_expects(client: Client) -> None:
    """In each way that was tried: `test_table.py` fails where a client does otherwise."""
    kept = [each for each in json.loads(tool.RESULTS.read_text()) if each["client"] == client.name]
    expected = (client.uprobes, client.key_log, client.proxy)
    for way, cause in zip(WAYS, expected, strict=True):
        found = {each["result"] for each in kept if each["way"] == way}
        if cause:
            assert found <= {EXACT if cause == EXACT else f"named: {CAUSES[cause]}"}, way


def test_versions_of_a_client_share_a_line() -> None:
    made = tool.table([row("Bun", "1.10.0"), row("Bun", "1.9.0"), row("ant", "1")])
    assert made.splitlines()[2:] == [
        "| ant | 1 | S | exact |  |  |",
        "| Bun | 1.9.0, 1.10.0 | S | exact |  |  |",
    ]


def test_a_way_tried_with_some_versions_names_them() -> None:
    rows = [row("Bun", "1.9"), row("Bun", "1.10"), row("Bun", "1.10", "proxy")]
    assert tool.table(rows).splitlines()[2] == "| Bun | 1.9, 1.10 | S | exact |  | exact (1.10) |"


def test_what_does_not_work_is_shown() -> None:
    rows = [row("Codex", "1", result="not probed"), row("Codex", "1", "proxy")]
    assert tool.table(rows).splitlines()[2] == "| Codex | 1 | S | not probed |  | exact |"


def test_a_document_without_the_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match="lacks the markers"):
        tool.with_table("# Title\n", "")
