"""Capture files, key logs and TLS messages made of any bytes whatever."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.packets import tls
from capture.packets.capfile import CaptureFile, Frame, NotACapture, secrets_in
from capture.packets.keylog import KeyLog
from tests.support.recorder.packets import Packet, pcap, pcapng

PACKETS = [
    Packet(1_795_424_400_000_000_000 + n * 1_000, bytes((n,)) * 60, True, 0) for n in range(9)
]
SECRET = "CLIENT_TRAFFIC_SECRET_0 " + "ab" * 32 + " " + "cd" * 32 + "\n"


def frames(data: bytes) -> tuple[list[Frame], dict[str, int]]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        list(secrets_in(Path(file.name), Counter()))
        capture = CaptureFile(Path(file.name))
        found = list(capture.frames())
        capture.close()
        return found, dict(capture.losses)


@pytest.mark.parametrize("make", [pcap, pcapng])
def test_frames_and_their_times(make: object) -> None:
    assert callable(make)
    found, losses = frames(make(PACKETS))
    assert [(f.at_ns, f.data, f.linktype) for f in found] == [
        (p.at_ns, p.frame, 1) for p in PACKETS
    ]
    assert losses == {}


@settings(max_examples=80, deadline=None)
@given(end=st.integers(0, 900))
def test_a_file_cut_anywhere_gives_the_frames_before(end: int) -> None:
    data = pcapng(PACKETS)
    cut = data[: len(data) - end]
    if len(cut) < 4:
        return
    found, losses = frames(cut)
    assert [f.data for f in found] == [p.frame for p in PACKETS][: len(found)]
    assert len(found) >= (len(cut) - 60) // 92 - 1
    assert set(losses) <= {"capture_file_cut_short"}


@settings(max_examples=150, deadline=None)
@given(head=st.sampled_from([b"", pcap([]), pcapng([]), b"\x1f\x8b"]), rest=st.binary(max_size=400))
def test_any_bytes_give_frames_or_one_named_error(head: bytes, rest: bytes) -> None:
    with contextlib.suppress(NotACapture):
        frames(head + rest)


@settings(max_examples=100, deadline=None)
@given(at=st.integers(60, 800), noise=st.binary(min_size=1, max_size=40))
def test_noise_in_a_pcapng_costs_its_neighbours_only(at: int, noise: bytes) -> None:
    data = pcapng(PACKETS)
    found, _ = frames(data[:at] + noise + data[at:])
    mine = {p.frame for p in PACKETS}
    assert len([f for f in found if f.data in mine]) >= len(PACKETS) - 2


def test_a_key_log_reads_lines_and_passes_over_the_rest() -> None:
    keys = KeyLog()
    text = f"# comment\n{SECRET.strip()}\r\nCLIENT_RANDOM {'01' * 32} {'02' * 48}\nnonsense\n"
    assert keys.add(text.encode()) == 2
    assert keys.secret(bytes.fromhex("ab" * 32), "CLIENT_TRAFFIC_SECRET_0") == b"\xcd" * 32
    assert keys.secret(b"\x01" * 32, "CLIENT_RANDOM") == b"\x02" * 48
    assert bytes.fromhex("ff" * 32) not in keys


def test_a_key_log_does_not_show_its_secrets() -> None:
    keys = KeyLog()
    keys.add(SECRET.encode())
    assert repr(keys) == "KeyLog(1 handshakes)"


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_as_hellos_and_key_logs(data: bytes) -> None:
    KeyLog().add(data)
    for kind in (1, 2):
        tls.client_hello(bytes((kind,)) + data)
        tls.server_hello(bytes((kind,)) + data)


def test_record_keys_are_those_of_rfc_8448() -> None:
    # RFC 8448, section 3: the server's application traffic secret and its key and iv.
    secret = bytes.fromhex("a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643")
    assert tls.expand_label(secret, b"key", 16).hex() == "9f02283b6c9c07efc26bb9f2ac92e356"
    assert tls.expand_label(secret, b"iv", 12).hex() == "cf782b88dd83549aadf1e984"
