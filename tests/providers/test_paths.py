"""Explaining an answer asks the providers' own routes: nothing else lists them."""

from __future__ import annotations

import json
import re
import sys
from types import ModuleType

import pytest

from halton_meter.explain import reader
from halton_meter.explain.paths import example_path
from halton_meter.providers import Provider, registry
from halton_meter.providers.openai.text import route, text_routes
from halton_meter.providers.reading.shapes import endpoints_like

ROUTES = [(each.id, route) for each in registry.built_in() for route in each.routes]


@pytest.mark.parametrize("values", [{}, {"models": "m", "locations": "l", "projects": "p"}])
def test_every_route_of_every_provider_matches_the_path_made_from_its_pattern(values):
    wrong = [
        (name, route.path.pattern)
        for name, route in ROUTES
        if not route.path.fullmatch(example_path(route.path, values))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("pattern", "values", "path"),
    [
        (r"/v1(?:beta|alpha)?\d*/models/[^/:]+:count", {"models": "g"}, "/v1/models/g:count"),
        (r"/v1(?:/at/[^/]+)?/run", {}, "/v1/run"),
        (r"/v1(?:/at/[^/]+)?/run", {"at": "eu"}, "/v1/at/eu/run"),
        (r"/(?:models|endpoints)/[^/:]+:x", {"models": "a/b"}, "/models/b:x"),
        (r"/model/[^/]+/converse", {"model": "arn:a/b"}, "/model/arn%3Aa%2Fb/converse"),
        (r"/v[12]/chat", {}, "/v2/chat"),
    ],
)
def test_a_path_holds_what_is_known_and_leaves_out_what_is_not(pattern, values, path):
    assert example_path(re.compile(pattern), values) == path


@pytest.fixture
def newcomer(monkeypatch):
    """A provider whose file was added, and named among the modules, as is done for a new one."""
    own = route("answers", "chat", "/our/api/answers", text_routes("")[0].read)
    module = ModuleType("halton_meter.providers.newcomer")
    module.PROVIDER = Provider(
        "newcomer",
        ("api.newcomer.example",),
        (own, *text_routes("/openai")),
        models=re.compile("^newcomer-"),
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(registry, "MODULES", (*registry.MODULES, "newcomer"))
    forget()
    yield
    monkeypatch.undo()
    forget()


def forget():
    registry.built_in.cache_clear()
    reader._registry.cache_clear()


COUNTS = {"prompt_tokens": 3, "completion_tokens": 2}


@pytest.mark.parametrize("provider", ["newcomer", None])
@pytest.mark.parametrize(
    ("document", "endpoint"),
    [
        (
            {"choices": [], "usage": COUNTS},
            "chat_completions",
        ),
        ({"answer": "", "usage": COUNTS}, "chat_completions"),
        ({"object": "response", "usage": {"input_tokens": 3, "output_tokens": 2}}, "responses"),
    ],
)
def test_a_new_providers_answers_are_explained_without_an_entry_elsewhere(
    newcomer, provider, document, endpoint
):
    raw = json.dumps({"model": "newcomer-1", **document}).encode()
    (event,) = reader.events_of(raw, provider, 10**18)
    assert (event.provider, event.endpoint, event.host) == (
        "newcomer",
        endpoint,
        "api.newcomer.example",
    )
    assert (event.tokens.input, event.tokens.output) == (3, 2)


def test_what_no_shape_fits_is_read_by_the_providers_first_route_that_counts(newcomer):
    raw = json.dumps({"model": "newcomer-1", "x": {}, "usage": {"total_tokens": 5}}).encode()
    assert endpoints_like(json.loads(raw)) == ()
    (event,) = reader.events_of(raw, "newcomer", 10**18)
    assert (event.endpoint, event.tokens.input) == ("answers", 5)
