"""The schema of price files: it is up to date, every bundled file keeps to it, mistakes do not."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest

from pricing.files import BUNDLED

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((BUNDLED / "schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
FILES = sorted(BUNDLED.glob("*/*.toml"))
MODEL = '[[model]]\nid = "m"\n[[model.price]]\ninput = "1"\n'


def faults(text: str) -> list[str]:
    document = json.loads(json.dumps(tomllib.loads(text), default=str))  # dates as text
    return [each.message for each in VALIDATOR.iter_errors(document)]


@pytest.mark.checkout  # the script writes into the checkout
def test_the_schema_is_what_the_vocabulary_makes_it():
    script = ROOT / "tools" / "prices" / "schema.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", FILES, ids=[f"{p.parent.name}/{p.stem}" for p in FILES])
def test_every_bundled_price_file_keeps_to_the_schema(path):
    assert faults(path.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        MODEL,
        MODEL + 'cache_write = "1.25"\naudio_hours = "0.1"\nweb_search_requests_k = "10"\n',
        MODEL + 'from = 2026-01-01\nhours = ["16:30", "00:30"]\nwhen = { batch = "true" }\n',
        MODEL + '[[model.price.tiers]]\nabove = 200000\ninput = "2"\n',
        '[[factor]]\nmodels = ["gpt-*"]\nwhen = { service_tier = "flex" }\nfactor = "0.5"\n',
        '[[override]]\nmodel = "gpt-5*"\ndiscount = "20%"\n',
        '[[override]]\nmodel = "m"\nprovider = "openai"\nfrom = 2026-11-01\n'
        'rates = { input = "1", images_each = 0.04, cache_write = "1" }\n',
    ],
)
def test_what_the_book_reads_keeps_to_it(text):
    assert faults(text) == []


@pytest.mark.parametrize(
    "text",
    [
        MODEL + 'inptu = "1"\n',
        MODEL + 'output = "free"\n',
        MODEL + 'output = "-1"\n',
        MODEL + 'pages_hours = "1"\n',
        MODEL + "when = { batch = true }\n",
        '[[model]]\nnames = ["m"]\n',
        '[[factor]]\nwhen = { batch = "true" }\n',
        '[[override]]\nmodel = "m"\n',
        '[[override]]\nmodel = "m"\nfactor = "0.5"\ndiscount = "5%"\n',
        '[[override]]\nfactor = "0.5"\n',
    ],
)
def test_a_mistake_does_not(text):
    assert faults(text)
