"""The maintainers' scripts: the compiler on a snapshot of two models, the check on three keys."""

from __future__ import annotations

import datetime as dt
import importlib.util
import json
import subprocess
import sys
import tomllib
from decimal import Decimal
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from pricing.files import PriceFile

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "prices"


def upstream_model(name, prices, *, variants=()):
    match = SimpleNamespace(equals=name)
    return SimpleNamespace(id=name, match=match, prices=prices, price_variants=variants)


class Snapshot:
    """A provider of the upstream package, as far as the compiler looks at one."""

    id = "newcomer"
    pricing_urls = ("https://newcomer.example/prices",)

    def __init__(self, *models):
        self.models = models

    def find_model(self, name):
        return next((model for model in self.models if model.id == name), None)


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """The script, with two models in the place of genai-prices, and a folder of its own."""
    tiered = SimpleNamespace(
        base=Decimal(2), tiers=[SimpleNamespace(start=200_000, price=Decimal(4))]
    )
    plain = SimpleNamespace(input_mtok=Decimal("0.50"), output_mtok=Decimal(1))
    dated = [
        SimpleNamespace(constraint=None, prices=SimpleNamespace(input_mtok=tiered)),
        SimpleNamespace(
            constraint=SimpleNamespace(start_date=dt.date(2026, 3, 1)),
            prices=SimpleNamespace(input_mtok=Decimal(1)),
        ),
    ]
    half = SimpleNamespace(
        when={"processing": "batch"},
        constraint=None,
        prices=SimpleNamespace(input_mtok=Decimal("0.25")),
    )
    data = ModuleType("genai_prices.data")
    data.providers = [
        Snapshot(upstream_model("small", plain, variants=[half]), upstream_model("large", dated))
    ]
    monkeypatch.setitem(sys.modules, "genai_prices", ModuleType("genai_prices"))
    monkeypatch.setitem(sys.modules, "genai_prices.data", data)
    found = importlib.util.spec_from_file_location("compile_prices", TOOLS / "compile.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "version", lambda name: "0")
    (tmp_path / "pricing" / "data").mkdir(parents=True)
    return module


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["compile.py", "--today", "2026-11-24", *arguments])
    return module.main()


def test_the_compiler_writes_a_snapshot_as_a_price_file(compiler, monkeypatch, tmp_path, capsys):
    path = tmp_path / "pricing" / "data" / "newcomer.toml"
    assert run(compiler, monkeypatch) == 0
    assert not path.exists()
    assert run(compiler, monkeypatch, "--write") == 0
    assert "newcomer small: new, input $0.5, output $1" in capsys.readouterr().out
    text = path.read_text()
    small, large = tomllib.loads(text)["model"]
    checked = {"checked": dt.date(2026, 11, 24)}
    assert small["price"] == [
        {"input": "0.5", "output": "1", **checked},
        {"when": {"batch": "true"}, "input": "0.25", **checked},
    ]
    assert large["price"] == [
        {"input": "2", "tiers": [{"above": 200_000, "input": "4"}], **checked},
        {"from": dt.date(2026, 3, 1), "input": "1", **checked},
    ]
    assert len(list(PriceFile("newcomer", text, by_hand=False).models())) == 2


def test_the_compiler_refuses_to_rewrite_history(compiler, monkeypatch, tmp_path, capsys):
    path = tmp_path / "pricing" / "data" / "newcomer.toml"
    run(compiler, monkeypatch, "--write")
    recorded = path.read_text().replace('input = "0.5"', 'input = "0.6"')
    path.write_text(recorded)
    assert run(compiler, monkeypatch, "--write") == 1
    assert "REFUSED newcomer small" in capsys.readouterr().out
    assert path.read_text() == recorded


def test_the_cross_check_names_what_nobody_has_decided(tmp_path):
    entry = {"litellm_provider": "openai", "mode": "chat"}
    listed = {
        "gpt-4o": {**entry, "input_cost_per_token": 2.5e-06, "output_cost_per_token": 0.5},
        "gpt-unheard-of": {**entry, "input_cost_per_token": 1e-06},
        "claude-in-a-cloud": {"litellm_provider": "some_reseller", "mode": "chat"},
    }
    path = tmp_path / "litellm.json"
    path.write_text(json.dumps(listed))
    done = subprocess.run(
        [sys.executable, TOOLS / "cross_check.py", path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "UNDECIDED openai/gpt-4o/output: ours $10, litellm $500000",
        "0 disagreements decided, 1 undecided",
    ]
    assert done.returncode == 1
