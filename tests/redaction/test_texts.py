"""JSON, codings and header blocks without their texts: as long as they were, and nothing left."""

from __future__ import annotations

import json
import random
import re
import string
import zlib
from typing import Any

import brotli
import pytest
import zstandard
from hpack import Decoder, Encoder
from hypothesis import given
from hypothesis import strategies as st

from halton_meter.redaction import heads, hpack
from halton_meter.redaction.codings import coded
from halton_meter.redaction.filler import Filler
from halton_meter.redaction.json_text import redacted_fragment, redacted_json
from halton_meter.redaction.proof import traces
from halton_meter.wire.codings import decoder

# Texts of users, which no protocol has a word for.
SECRET = st.text(min_size=4, max_size=40).map(lambda text: f"Zq{text}")
SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), SECRET)
USER_JSON = st.recursive(
    SCALAR,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(SECRET, inner, max_size=4)
    ),
    max_leaves=12,
)
USAGE = st.fixed_dictionaries(
    {
        "input_tokens": st.integers(0, 10**9),
        "output_tokens": st.integers(0, 10**9),
        "cache_read_input_tokens": st.integers(0, 10**9),
    }
)


@st.composite
def answers(draw: st.DrawFn) -> dict[str, Any]:
    """An answer with users' texts at every place where one may stand."""
    return {
        "id": "msg_" + draw(st.text("0123456789abcdef", min_size=20, max_size=20)),
        "type": "message",
        "model": "claude-sonnet-4-5",
        "content": draw(st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": SECRET}))),
        "metadata": draw(USER_JSON),
        "tools": [{"name": draw(SECRET), "input_schema": draw(USER_JSON)}],
        "Zqown": draw(USER_JSON),
        "usage": draw(USAGE),
    }


def _secrets(value: Any) -> set[str]:
    if isinstance(value, str):
        return {value} if value.startswith("Zq") else set()
    if isinstance(value, dict):
        return set().union(*map(_secrets, value), *map(_secrets, value.values()))
    return set().union(*map(_secrets, value)) if isinstance(value, list) else set()


def _shape(value: Any) -> Any:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return [_shape(item) for item in value]
    return type(value)


@given(answers(), st.booleans(), st.booleans())
def test_an_answer_keeps_shape_length_and_usage_and_no_text(
    answer: dict[str, Any], ascii_only: bool, mark: bool
) -> None:
    text = json.dumps(answer, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    new = redacted_json(text, Filler(), mark)
    assert len(new) == len(text)
    read = json.loads(new)
    assert read["usage"] == answer["usage"]
    assert (read["model"], read["type"]) == (answer["model"], "message")
    assert read["id"] != answer["id"]
    assert len(read["id"]) == len(answer["id"])
    assert list(read)[:6] == list(answer)[:6]
    assert _shape(read["content"]) == _shape(answer["content"])
    assert [len(block["text"]) for block in read["content"]] == [
        len(block["text"]) for block in answer["content"]
    ]
    assert b"Zq" not in new
    assert not any(each in json.dumps(read, ensure_ascii=False) for each in _secrets(answer))


@given(answers(), st.data())
def test_an_answer_cut_anywhere_keeps_its_length_and_no_text(
    answer: dict[str, Any], data: st.DataObject
) -> None:
    text = json.dumps(answer).encode()
    cut = data.draw(st.integers(0, len(text)))
    for new, old in (
        (redacted_json(text[:cut], Filler()), text[:cut]),
        (redacted_fragment(text[cut:], Filler()), text[cut:]),
    ):
        assert len(new) == len(old)
        assert b"Zq" not in new


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_keep_their_length(data: bytes, mark: bool) -> None:
    assert len(redacted_json(data, Filler(), mark)) == len(data)
    assert len(redacted_fragment(data, Filler(), mark)) == len(data)


def test_what_stands_behind_a_hole_keeps_usage_and_model_only() -> None:
    text = rb'lo \"secret\" world"}],"model":"claude-sonnet-4-5","usage":{"input_tokens":12}}'
    new = redacted_fragment(text, Filler())
    assert new.endswith(b'"model":"claude-sonnet-4-5","usage":{"input_tokens":12}}')
    assert b"secret" not in new
    assert b"world" not in new


def test_a_number_that_a_user_wrote_is_replaced_and_a_count_is_not() -> None:
    text = (
        b'{"messages":[{"role":"user","content":"4111111111111111"},{"content":4111}],'
        b'"usage":{"prompt_tokens":"1200","completion_tokens":80}}'
    )
    assert redacted_json(text, Filler()) == (
        b'{"messages":[{"role":"user","content":"xxxxxxxxxxxxxxxx"},{"content":1111}],'
        b'"usage":{"prompt_tokens":"1200","completion_tokens":80}}'
    )


def test_what_a_fine_tuned_model_is_called_is_replaced() -> None:
    text = b'{"model":"ft:gpt-4o-mini-2024-07-18:acme-corp:support:AbC123"}'
    assert redacted_json(text, Filler()) == (
        b'{"model":"ft:gpt-4o-mini-2024-07-18:xxxx-xxxx:xxxxxxx:xxxxxx"}'
    )


# --- codings ------------------------------------------------------------------------------------


def _original(coding: str, text: bytes) -> bytes:
    if coding == "gzip":
        engine = zlib.compressobj(6, zlib.DEFLATED, 31)
        return engine.compress(text) + engine.flush()
    if coding == "br":
        return bytes(brotli.compress(text))
    if coding == "zstd":
        return zstandard.ZstdCompressor().compress(text)
    return zlib.compress(text)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
@given(st.lists(st.text(string.ascii_lowercase + " ", min_size=5), min_size=2), st.data())
def test_a_coded_text_is_replaced_by_one_of_its_size(
    coding: str, texts: list[str], data: st.DataObject
) -> None:
    old = json.dumps([{"text": text} for text in texts]).encode()
    wire = _original(coding, old)
    ended = data.draw(st.booleans())
    if not ended:
        wire = wire[: data.draw(st.integers(1, len(wire) - 1))]
    given_: list[bytes] = []
    chain = decoder(coding)
    assert chain is not None
    chain.feed(wire, given_.append)
    plain = b"".join(given_)
    new = re.sub(rb"[a-z ]", b"x", plain)
    found = coded(coding, new, len(wire), chain.ended(), wire[:2])
    if found is None:  # a text that shrinks less than what it was: nothing is made of it
        return
    back: list[bytes] = []
    again = decoder(coding)
    assert again is not None
    again.feed(found, back.append)
    assert (len(found), b"".join(back), again.ended()) == (len(wire), new, chain.ended())


# --- HTTP/2 header blocks -----------------------------------------------------------------------


@given(st.integers(0, 2**32))
def test_header_blocks_keep_their_size_and_both_ends_agree(seed: int) -> None:
    chance = random.Random(seed)
    filler = Filler()
    blocks = hpack.Blocks(
        lambda name: heads.shown_name(name, filler),
        lambda name, value: heads.shown_value(name, value, filler),
    )
    encoder, end = Encoder(), Decoder()
    for _ in range(5):
        key = "".join(chance.choices(string.ascii_letters + string.digits, k=40))
        fields = [
            (":method", "POST"),
            (":path", f"/v1/messages?key={key}"),
            ("authorization", f"Bearer {key}"),
            ("x-" + "".join(chance.choices(string.ascii_lowercase, k=8)), key),
            ("cookie", "".join(chance.choices(string.printable[:95], k=chance.randint(0, 60)))),
            ("request-id", f"req_{key}"),
            ("content-type", "application/json"),
        ]
        block = encoder.encode(fields, huffman=chance.random() < 0.8)
        new, read = blocks.redacted(block)
        assert len(new) == len(block)
        assert read == [(name.encode(), value.encode()) for name, value in fields]
        back = end.decode(new, raw=True)
        assert [len(value) for _, value in back] == [len(value) for _, value in fields]
        assert (b"content-type", b"application/json") in back
        assert not any(key.encode() in value for _, value in back)
        assert back[1][1].startswith(b"/v1/messages?key=")


def test_names_that_stay_are_no_trace_of_a_text_that_was_removed_behind_a_hole() -> None:
    filler = Filler()
    filler.keep(b"gpt-4o-2024-08-06")
    filler.id(b"chatcmpl-Zk3hVq9f2")
    chunk = b'{"id":"chatcmpl-000000000001","model":"gpt-4o-2024-08-06","choices":[]}'
    for at in range(len(chunk)):
        filler.text(chunk[at:])
    assert traces(filler, chunk) == []
    filler.text(b"gpt-4o sold boats")
    assert traces(filler, chunk) == []
    assert traces(filler, chunk + b" gpt-4o sold boats") == ["12 bytes of a text are in it at 72"]
