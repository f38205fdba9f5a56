"""`inspect`: a capture and a stored request, layer by layer, texts hidden."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from halton_meter.cli import inspect as inspect_command
from halton_meter.cli import main
from halton_meter.model import Process, Tokens, Usage
from tests.support.made import made
from tests.support.redacting import without_secrets
from tests.test_fixtures import FOLDER


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path / "data"))


def said(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, result.output
    return result.output


def document(name: str, *more: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(said("inspect", "--json", *more, str(FOLDER / name)))
    return told


def test_a_capture_shows_packets_tls_http_and_usage_side_by_side() -> None:
    told = document("openai_chat_gzip.pcapng")
    (stream,) = told["streams"]
    assert told["packets"] == stream["packets"] == 20
    assert (stream["tls_version"], stream["cipher"]) == ("TLS 1.3", "TLS_AES_256_GCM_SHA384")
    assert stream["server_name"] == "api.openai.com"
    assert stream["tls_records"] == stream["tls_records_decrypted"] == 9
    (usage,) = stream["usage"]
    assert usage["prompt_tokens"] == 1200
    ((exchange,),) = [each["exchanges"] for each in told["seen"]]
    assert (exchange["method"], exchange["status"]) == ("POST", 200)
    assert exchange["response"]["content_encoding"] == "gzip"
    assert exchange["response"]["wire_bytes"] == 343
    assert exchange["response"]["decoded_bytes"] == 596
    assert exchange["request"]["parts"] == 2
    (event,) = exchange["events"]
    assert event["tokens"]["input"] + event["tokens"]["cache_read"] == usage["prompt_tokens"]
    assert event["list_usd"] == "0.00252"


def test_texts_and_credentials_are_hidden_unless_bodies_are_asked_for() -> None:
    capture = str(FOLDER / "openai_chat_gzip.pcapng")
    text = said("inspect", capture)
    assert "authorization: (hidden)" in text
    assert "sk-not-a-key" not in text
    assert "Count the boats" not in text
    shown = said("inspect", "--show-bodies", capture)
    assert "Count the boats" in shown
    assert "sk-not-a-key" not in shown


def test_a_hole_and_lost_packets_are_shown() -> None:
    told = document("openai_http2_hole.pcapng")
    (connection,) = told["seen"]
    assert connection["holes"] == 1
    assert told["streams"][0]["lost"] == 1
    gaps = [each["gap"] for each in connection["exchanges"]]
    assert gaps == ["up to 500 response bytes lost at 3,862"] * 2


def test_without_keys_the_connection_is_shown_with_what_to_do(tmp_path: Path) -> None:
    capture = tmp_path / "capture.pcapng"
    capture.write_bytes(without_secrets((FOLDER / "openai_chat_gzip.pcapng").read_bytes()))
    text = said("inspect", str(capture))
    assert "nothing of it was read" in text
    assert "none; tshark decrypts 0 of 9 records" in text
    assert f"halton-meter inspect {capture} --keys sslkeys.log" in text


def test_a_stored_request_shows_what_the_database_has_and_its_price() -> None:
    said("replay", "--store", "--quiet", str(FOLDER / "openai_chat_gzip.pcapng"))
    (event,) = map(json.loads, said("events", "--json").splitlines())
    text = said("inspect", event["id"])
    assert f"request {event['id']}" in text
    assert "a packet capture (replay)" in text
    assert "input 176, cache_read 1,024, output 80 (reported)" in text
    assert "list price $0.00252, computed from the usage" in text
    told = json.loads(said("inspect", "--json", event["id"]))
    assert {**event, "capture": told["capture"]} == told


def test_a_request_that_was_replayed_shows_its_packets_while_the_capture_is_there(
    tmp_path: Path,
) -> None:
    capture = tmp_path / "mine.pcapng"
    capture.write_bytes((FOLDER / "anthropic_errors_keepalive.pcapng").read_bytes())
    said("replay", "--store", "--quiet", str(capture))
    event, _ = map(json.loads, said("events", "--json").splitlines())
    (seen,) = json.loads(said("inspect", "--json", event["id"]))["capture"]["seen"]
    (exchange,) = seen["exchanges"]
    assert [each["id"] for each in exchange["events"]] == [event["id"]]
    assert f"{capture}: " in said("inspect", event["id"])
    capture.unlink()
    assert str(capture) not in said("inspect", event["id"])


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("nothing.pcapng", "nothing.pcapng: no such file"),
        ("3f6c0a9d1b2e4f508192a3b4c5d6e7f8", "no such file"),
        (str(FOLDER), "is a folder"),
        (__file__, "does not start like a pcap or pcapng file"),
    ],
)
def test_what_cannot_be_inspected_is_said_with_a_fix(what: str, why: str) -> None:
    text = said("inspect", what, code=1)
    assert why in text
    assert "fix: " in text or "Try: " in text


def test_a_pipe_and_a_device_are_named_as_such(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert f"{pipe}: is a pipe, not a file" in said("inspect", str(pipe), code=1)
    assert "/dev/zero: is a device, not a file" in said("inspect", "/dev/zero", code=1)


def test_a_key_log_without_end_is_named_and_not_read() -> None:
    capture = str(FOLDER / "anthropic_message.pcapng")
    told = said("inspect", capture, "--keys", "/dev/zero")
    assert "/dev/zero: is a device, not a file" in told
    assert told.replace("  /dev/zero: is a device, not a file\n", "") == said("inspect", capture)


def test_what_is_not_known_is_no_zero_and_no_python() -> None:
    unknown = dict.fromkeys(("input", "output"))
    assert inspect_command._tokens_text(unknown) == "not stated"
    assert inspect_command._tokens_text({"input": 0, "output": None}) == "input 0"
    assert inspect_command._tokens_text({"input": 1200, "output": 0}) == "input 1,200"
    process = Process(4711, 1, "/usr/bin/curl", (), None, None, None)
    parts = (Usage(None, Tokens()),)
    event = made("a", None, process=process, model=None, request_model=None, parts=parts)
    lines = "\n".join(inspect_command._stored_lines(event))
    assert "None" not in lines
    assert "  models     asked -, answered -" in lines
    assert "(4711) of -" in lines
    assert "  usage      not stated" in lines
