"""The command that installs this very program again, wherever it came from."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from types import SimpleNamespace

import pytest

from halton_meter import __version__, installed

COMMIT = "0f" * 20


def came_from(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    distribution = SimpleNamespace(read_text=lambda name: text)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: distribution)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"url": "file:///tmp/my%20wheels/a.whl", "archive_info": {}}, "/tmp/my wheels/a.whl"),
        ({"url": "file:///src/meter", "dir_info": {"editable": True}}, "/src/meter"),
        ({"url": "https://example.org/a.whl", "archive_info": {}}, "https://example.org/a.whl"),
        (
            {"url": "https://example.org/m.git", "vcs_info": {"vcs": "git", "commit_id": COMMIT}},
            f"halton-meter @ git+https://example.org/m.git@{COMMIT}",
        ),
    ],
    ids=["wheel", "folder", "address", "repository"],
)
def test_it_is_installed_from_where_it_came(
    monkeypatch: pytest.MonkeyPatch, document: dict[str, object], expected: str
) -> None:
    """An index may have another program of the same name: PyPI does."""
    came_from(monkeypatch, json.dumps(document))
    assert shlex.split(installed.requirement()) == [expected]
    assert installed.for_root().endswith(f"/bin/pip install {shlex.quote(expected)}")


@pytest.mark.parametrize("text", [None, "", "{}", "no JSON", "[]", '{"url": "x", "vcs_info": 1}'])
def test_from_an_index_it_is_the_same_version(
    monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    came_from(monkeypatch, text)
    assert installed.requirement() == f"halton-meter=={__version__}"


def test_without_a_distribution_it_is_name_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", none)
    assert installed.requirement() == f"halton-meter=={__version__}"
