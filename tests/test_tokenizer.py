"""Estimating tokens: by characters, by a tokenizer where one is there, and never by downloading."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest

from halton_meter.model import Basis, Certainty, Outcome
from halton_meter.providers.reading import estimate
from halton_meter.providers.registry import Registry
from halton_meter.tokenizer import PART_CHARS, Tokenizer
from pricing.book import PriceBook
from tests.support.exchanges import exchange, sse


class Words:
    """Stands in for an encoding: every word is a token."""

    def encode_ordinary(self, text):
        return text.split()


@pytest.fixture
def installed(monkeypatch):
    """A tiktoken whose vocabulary is there, or is not."""

    def install(*, vocabulary=True):
        tiktoken, load = ModuleType("tiktoken"), ModuleType("tiktoken.load")
        load.read_file = lambda blob: pytest.fail(f"{blob} was downloaded")

        def get_encoding(name):
            return Words() if vocabulary else load.read_file(f"https://example.org/{name}")

        def encoding_name_for_model(model):
            if not model.startswith("gpt-"):
                raise KeyError(model)
            return "o200k_base"

        tiktoken.get_encoding = get_encoding
        tiktoken.encoding_name_for_model = encoding_name_for_model
        monkeypatch.setitem(sys.modules, "tiktoken", tiktoken)
        monkeypatch.setitem(sys.modules, "tiktoken.load", load)

    return install


def cut_off():
    chunks = [
        {"id": "chatcmpl-0123456789", "model": "gpt-4o", "choices": [{"delta": {"content": text}}]}
        for text in ("one two", " three four five")
    ]
    return exchange(
        "https://api.openai.com/v1/chat/completions",
        {"model": "gpt-4o", "stream": True, "messages": [{"content": "a b c"}]},
        sse(*chunks),
        headers=[("content-type", "text/event-stream")],
        outcome=Outcome.ABORTED,
        complete=False,
    )


def test_without_a_tokenizer_four_characters_make_a_token():
    assert estimate.tokens_of(["hello", "wor"], "gpt-4o") == 2
    assert estimate.tokens_of([], None) == 0


def test_a_tokenizer_counts_the_whole_text_across_its_pieces(installed):
    installed()
    (event,) = Registry(counter=Tokenizer()).read(cut_off())
    assert event.parts[0].details == {"estimated_input": 3, "estimated_output": 5}
    assert (event.certainty, event.tokens.output) == (Certainty.ESTIMATED, None)
    assert PriceBook.load().price(event).basis is Basis.ESTIMATED


def test_without_the_vocabulary_nothing_is_downloaded_and_characters_are_counted(installed):
    installed(vocabulary=False)
    (event,) = Registry(counter=Tokenizer()).read(cut_off())
    assert event.parts[0].details == {"estimated_input": 2, "estimated_output": 6}


def test_without_tiktoken_the_counter_cannot_tell(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert Tokenizer()("some text", "gpt-4o") is None


def test_a_tiktoken_whose_downloads_cannot_be_stopped_is_not_used(installed):
    installed()
    del sys.modules["tiktoken.load"].read_file
    assert Tokenizer()("some text", "gpt-4o") is None


def test_long_texts_are_counted_in_parts_and_past_the_limit_by_length(installed):
    installed()
    assert Tokenizer()("ab " * PART_CHARS, "claude-opus-5-5") >= PART_CHARS
    long = estimate.TOKENIZED_CHARS_MAX
    assert estimate.tokens_of(["x" * (long + 8)], None, lambda text, model: len(text)) == long + 2


def test_strings_are_found_escaped_cut_off_and_under_their_keys_only():
    text = json.dumps({"content": 'a "quoted" é\n', "role": "assistant"}).encode()
    body = exchange("https://x", None, text[:-20] + b'"content":"cut').response.body
    assert next(estimate.texts_under(body, (b"content",))) == 'a "quoted" é\n'
    cut = exchange("https://x", None, b'{"content":"cut o').response.body
    assert list(estimate.texts_under(cut, (b"content",))) == ["cut o"]
