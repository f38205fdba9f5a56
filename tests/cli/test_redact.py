"""`redact`: a proved copy or none."""

from __future__ import annotations

import json
import socket
import struct
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from capture.packets.capfile import CaptureFile, secrets_in
from halton_meter.cli import main
from halton_meter.redaction.filler import Filler
from tests.support.recorder.packets import Packet, pcapng
from tests.support.redacting import without_secrets
from tests.test_fixtures import FOLDER

CAPTURE = FOLDER / "openai_chat_gzip.pcapng"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path / "data"))


def said(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["redact", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_a_redacted_capture_is_told_with_its_proof_and_gives_the_same(tmp_path: Path) -> None:
    target = tmp_path / "redacted.pcapng"
    text = said(str(CAPTURE), str(target))
    assert "proved: it gives the same 1 request, $0.00252 list price" in text
    replayed = CliRunner().invoke(main, ["replay", "--json", str(target)])
    (event,) = map(json.loads, replayed.output.splitlines())
    assert (event["list_usd"], event["tokens"]["output"]) == ("0.00252", 80)


def test_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "mine.pcapng"
    target.write_text("mine")
    assert "exists already" in said(str(CAPTURE), str(target), code=1)
    assert target.read_text() == "mine"


def test_a_capture_without_keys_is_refused_with_the_next_command(tmp_path: Path) -> None:
    capture, target = tmp_path / "capture.pcapng", tmp_path / "redacted.pcapng"
    capture.write_bytes(without_secrets(CAPTURE.read_bytes()))
    text = said(str(capture), str(target), code=1)
    assert "no connection could be decrypted: 1 without keys" in text
    assert f"halton-meter inspect {capture}" in text
    assert not target.exists()


def test_a_text_that_is_left_is_found_and_no_file_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(self: Filler, raw: bytes, mark: bool = False) -> bytes:
        self._removed(raw)
        return raw

    monkeypatch.setattr(Filler, "text", leave)
    target = tmp_path / "redacted.pcapng"
    text = said(str(CAPTURE), str(target), code=1)
    assert "12 bytes of a text are in" in text
    assert "boats" not in text
    assert list(tmp_path.glob("*.pcapng")) == []
    assert list(tmp_path.glob(".halton*")) == []


@pytest.mark.parametrize("lost", [15, 18, 42, 54, 66])
def test_a_capture_that_lost_a_packet_of_a_stream_is_redacted(lost: int, tmp_path: Path) -> None:
    """What was removed behind the hole, where nobody can tell, are names that stay elsewhere."""
    path = FOLDER / "openai_stream_ipv6_small_segments.pcapng"
    secrets = b"".join(map(bytes, secrets_in(path, Counter()))).decode()
    packets = [Packet(each.at_ns, each.data, True, 0) for each in CaptureFile(path).frames()]
    given = tmp_path / "given.pcapng"
    given.write_bytes(pcapng([*packets[:lost], *packets[lost + 1 :]], secrets))
    assert "proved: it gives the same 1 request" in said(str(given), str(tmp_path / "new.pcapng"))


def test_a_copy_that_gives_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halton_meter.redaction.words.is_word", lambda text: text == b"model")
    target = tmp_path / "redacted.pcapng"
    text = said(str(CAPTURE), str(target), code=1)
    assert "not redacted: request 1: " in text
    assert list(tmp_path.glob("*.pcapng")) == []


@pytest.mark.checkout
def test_the_words_that_may_stay_are_those_that_the_readers_look_for() -> None:
    from tools.redaction_words import FILE, words

    assert FILE.read_text().split() == words(), "run: python tools/redaction_words.py"


def test_a_capture_of_other_hosts_or_without_plaintext_is_told_as_what_it_is(
    tmp_path: Path,
) -> None:
    other = said(str(FOLDER / "other_host_gives_nothing.pcapng"), str(tmp_path / "new"), code=1)
    assert "all that it holds goes to hosts of no known provider" in other
    cut = tmp_path / "cut.pcapng"
    cut.write_bytes(CAPTURE.read_bytes()[:2500])
    assert "it holds no decrypted request" in said(str(cut), str(tmp_path / "new"), code=1)


def test_comments_and_names_that_a_capture_holds_beside_packets_are_left_out(
    tmp_path: Path,
) -> None:
    capture, target = tmp_path / "capture.pcapng", tmp_path / "redacted.pcapng"
    comment = b"Zqsecret"  # of interface statistics, and as an interface's name
    option = struct.pack("<HH", 1, len(comment)) + comment + bytes(4)
    statistics = struct.pack("<IQ", 0, 0) + option
    name = struct.pack("<HH", 2, len(comment)) + comment + bytes(4)
    interface = struct.pack("<HHI", 101, 0, 0) + name
    blocks = b"".join(
        struct.pack("<II", kind, len(body) + 12) + body + struct.pack("<I", len(body) + 12)
        for kind, body in ((1, interface), (5, statistics))
    )
    capture.write_bytes(CAPTURE.read_bytes() + blocks)
    assert "proved: it gives the same 1 request" in said(str(capture), str(target))
    assert comment not in target.read_bytes()
    assert socket.inet_aton("192.0.2.10") in capture.read_bytes()  # the server's address
    assert socket.inet_aton("192.0.2.10") not in target.read_bytes()
