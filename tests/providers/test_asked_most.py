"""How long a request lets its answer be, whatever dialect says so."""

from __future__ import annotations

import json

import pytest

from halton_meter.model import Body
from halton_meter.providers.reading.asked_most import output_tokens_max


@pytest.mark.parametrize(
    ("request_body", "most"),
    [
        ({"model": "m", "max_tokens": 100}, 100),
        ({"max_completion_tokens": 2000, "n": 3}, 6000),
        ({"max_output_tokens": 77}, 77),
        ({"generationConfig": {"maxOutputTokens": 64, "candidateCount": 2}}, 128),
        ({"inferenceConfig": {"maxTokens": 12}}, 12),
        ({"messages": [{"content": 'say {"max_tokens": 5}'}]}, None),
        ({"max_tokens": None}, None),
        ({"max_tokens": 1.5}, None),
        ({}, None),
    ],
)
def test_what_a_request_says(request_body: dict[str, object], most: int | None) -> None:
    text = json.dumps(request_body).encode()
    assert output_tokens_max(Body((text,))) == most
    assert output_tokens_max(Body((json.dumps(request_body, indent=1).encode(),))) == most
    assert output_tokens_max(Body(())) is None
