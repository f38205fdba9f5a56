"""What a request leaves out is priced at its documented default, and the price says so."""

from __future__ import annotations

import tomllib
from decimal import Decimal
from typing import Any

import pytest

from halton_meter.model import Basis, PricedEvent
from pricing.files import BUNDLED
from tests.support.exchanges import REGISTRY, exchange
from tests.support.priced_bodies import bundled_book

GEMINI = "https://generativelanguage.googleapis.com/v1beta/models/"
VERTEX = (
    "https://us-central1-aiplatform.googleapis.com/v1/projects/p/locations/us-central1"
    "/publishers/google/models/"
)
JOB = {"name": "models/veo/operations/" + "a" * 20}
SORA = {"id": "video_" + "a" * 24, "object": "video", "status": "queued"}
IMAGE = {"created": 1, "data": [{"url": "x"}]}


def priced(url: str, request: dict[str, Any], answer: dict[str, Any]) -> PricedEvent:
    (event,) = REGISTRY.read(exchange(url, request, answer))
    return bundled_book().price(event)


def veo(model: str, root: str = GEMINI, **parameters: Any) -> PricedEvent:
    request = {"instances": [{"prompt": "x"}], "parameters": parameters}
    return priced(f"{root}{model}:predictLongRunning", request, JOB)


@pytest.mark.parametrize(
    ("found", "usd"),
    [
        (lambda: veo("veo-3.1-generate-preview"), "3.20"),  # 8 seconds of 0.40
        (lambda: veo("veo-3.1-generate-preview", sampleCount=2), "6.40"),
        (lambda: veo("veo-3.1-generate-preview", resolution="4k"), "4.80"),
        (lambda: veo("veo-3.1-fast-generate-preview"), "0.80"),
        (lambda: veo("veo-2.0-generate-001", VERTEX), "4.00"),
        (lambda: priced("https://api.openai.com/v1/videos", {"model": "sora-2"}, SORA), "0.40"),
        (lambda: priced("https://api.openai.com/v1/videos", {"model": "sora-2-pro"}, SORA), "1.20"),
    ],
)
def test_a_video_without_its_length_is_as_long_as_documented(found: Any, usd: str) -> None:
    price = found()
    assert price.list_usd == Decimal(usd)
    assert price.basis is Basis.ESTIMATED
    assert {"default_assumed", "estimated"} <= set(price.flags)
    assert "default" in (price.line_items[0].note or "")


@pytest.mark.parametrize(
    ("request_", "usd", "assumed"),
    [
        ({"model": "dall-e-3"}, "0.04", True),
        ({"model": "dall-e-3", "size": "auto", "quality": "hd"}, "0.08", True),
        ({"model": "dall-e-3", "size": "1792x1024", "quality": "standard"}, "0.08", False),
        ({"model": "dall-e-2", "size": "256x256"}, "0.016", False),
    ],
)
def test_an_image_without_its_size_has_the_documented_one(
    request_: dict[str, Any], usd: str, assumed: bool
) -> None:
    price = priced("https://api.openai.com/v1/images/generations", request_, IMAGE)
    assert (price.list_usd, price.basis) == (Decimal(usd), Basis.COMPUTED)
    assert ("default_assumed" in price.flags) == assumed


def test_what_the_request_states_is_not_assumed() -> None:
    price = veo("veo-3.1-generate-preview", durationSeconds="6", resolution="720p")
    assert (price.list_usd, price.flags) == (Decimal("2.40"), ())
    sora = {**SORA, "seconds": "8", "size": "1024x1792"}
    price = priced("https://api.openai.com/v1/videos", {"model": "sora-2-pro"}, sora)
    assert (price.list_usd, price.flags) == (Decimal("4.00"), ())


def test_an_image_model_sold_by_token_assumes_nothing() -> None:
    usage = {"input_tokens": 10, "output_tokens": 100, "total_tokens": 110}
    url = "https://api.openai.com/v1/images/generations"
    price = priced(url, {"model": "gpt-image-1"}, {**IMAGE, "usage": usage})
    assert "default_assumed" not in price.flags


@pytest.mark.parametrize(
    ("container", "assumed"),
    [({"type": "auto"}, True), ({"type": "auto", "memory_limit": "1g"}, False), ("cntr_1", True)],
)
def test_a_sandbox_without_its_memory_has_a_gigabyte(container: Any, assumed: bool) -> None:
    response = {
        "id": "resp_" + "a" * 24, "object": "response", "model": "gpt-5",
        "tools": [{"type": "code_interpreter", "container": container}],
        "output": [{"type": "code_interpreter_call", "container_id": "cntr_1"}],
        "usage": {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0},
    }  # fmt: skip
    price = priced("https://api.openai.com/v1/responses", {"model": "gpt-5"}, response)
    assert (price.list_usd, price.basis) == (Decimal("0.03"), Basis.COMPUTED)
    assert ("default_assumed" in price.flags) == assumed


def test_a_stated_cost_assumes_nothing() -> None:
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    answer = {"id": "a" * 24, "model": "sonar", "choices": [], "usage": usage}
    url = "https://api.perplexity.ai/chat/completions"
    assert "default_assumed" in priced(url, {"model": "sonar"}, answer).flags
    usage["cost"] = {"total_cost": 0.00512}  # type: ignore[assignment]
    stated = priced(url, {"model": "sonar"}, answer)
    assert (stated.basis, stated.flags) == (Basis.REPORTED, ())


def test_every_price_under_a_condition_that_a_request_may_leave_out_has_its_default() -> None:
    """A row for one size or one quality needs the default of those who name none."""
    may_be_left_out = {"image_size", "image_quality", "video_size", "search_context_size"}
    for path in sorted((BUNDLED / "overlay").glob("*.toml")):
        file = tomllib.loads(path.read_text())
        wanted = {
            (model["id"], name)
            for model in file.get("model", ())
            for row in model.get("price", ())
            for name in row.get("when", {})
            if name in may_be_left_out
        }
        for model, name in wanted:
            known = [
                rule for rule in file.get("default", ())
                if name in rule.get("conditions", {})
                and any(model.startswith(glob.rstrip("*")) for glob in rule["models"])
            ]  # fmt: skip
            assert known, (path.name, model, name)
            for rule in known:
                assert rule["source"].startswith("https://"), rule
                assert rule["checked"], rule
