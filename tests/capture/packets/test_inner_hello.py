"""A connection whose real ClientHello is encrypted (ECH): the key log names a random that is not on
the wire. Made of recorded captures: record keys come of secrets alone, whatever the hello says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from capture.packets import tls
from capture.packets.keeping import CaptureWriter, Keeping
from capture.pcap import PcapSource
from halton_meter.model import TlsChunk
from tests.capture.test_live_parity import live, said
from tests.test_fixtures import CAPTURES

OTHER_RANDOM = bytes(range(32, 64))
SERVER_SECRET = re.compile(rb"(SERVER_HANDSHAKE_TRAFFIC_SECRET [0-9a-f]{64} )[0-9a-f]{8}")


def hello_of(data: bytes) -> tuple[int, bytes]:
    """Where the first ClientHello stands in a file, and its message."""
    for found in re.finditer(rb"\x16\x03[\x01\x03]..\x01\x00..\x03\x03", data, re.DOTALL):
        at = found.start() + 5
        message = data[at : at + 4 + int.from_bytes(data[at + 1 : at + 4])]
        if tls.client_hello(message) is not None:
            return at, message
    raise AssertionError("no ClientHello")


def outer(data: bytes, *, marked: bool = True) -> bytes:
    """The file with another random in its hello, which says (`marked`) that one is inside."""
    at, message = hello_of(data)
    hello = tls.client_hello(message)
    assert hello is not None
    changed = message.replace(hello.random, OTHER_RANDOM)
    if marked:  # of the supported groups, whose list's length begins with 0
        groups = re.search(rb"\x00\x0a\x00.\x00", changed, re.DOTALL)
        assert groups is not None
        changed = changed[: groups.start()] + b"\xfe\x0d" + changed[groups.start() + 2 :]
        assert changed.count(b"\xfe\x0d") == 1
    return data[:at] + changed + data[at + len(message) :]


def plaintext(source: PcapSource) -> dict[str, bytes]:
    """What was read, by direction, of all connections."""
    found: dict[str, bytes] = {}
    for item in source.items():
        if isinstance(item, TlsChunk):
            way = f"{item.connection.peer} {item.direction.value}"
            found[way] = found.get(way, b"") + item.data
    return found


def is_tls13(path: Path) -> bool:
    """Whether its first connection speaks TLS 1.3."""
    data = path.read_bytes()
    for found in re.finditer(rb"\x16\x03\x03..\x02\x00..\x03\x03", data, re.DOTALL):
        hello = tls.server_hello(data[found.start() + 5 : found.start() + 5 + 400])
        return hello is not None and hello.version == 0x0304
    return False


OF_TLS12 = "anthropic_plan_tls12_zstd"
SAMPLES = [path for path in CAPTURES if path.suffix == ".pcapng" and is_tls13(path)][:3]


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_it_is_read_by_the_keys_of_the_hello_inside(path: Path, tmp_path: Path) -> None:
    changed = tmp_path / path.name
    changed.write_bytes(outer(path.read_bytes()))
    source = PcapSource([changed])
    assert plaintext(source) == plaintext(PcapSource([path])) != {}
    assert source.findings.without_keys == {}
    items, _ = live(changed, tmp_path / "keys.log")
    assert said(items) == said(PcapSource([path]).items())


PUBLIC_NAME = b"public.example"


def behind(data: bytes, own: bytes) -> bytes:
    """The file with the name of whoever serves for many in its hello: as long, and nobody's."""
    at, message = hello_of(data)
    assert message.count(own) == 1
    other = PUBLIC_NAME.rjust(len(own), b"x")
    return data[:at] + message.replace(own, other) + data[at + len(message) :]


def name_of(path: Path) -> str:
    """The server name in a file's first hello."""
    hello = tls.client_hello(hello_of(path.read_bytes())[1])
    assert hello is not None
    assert hello.server_name is not None
    return hello.server_name


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_the_name_that_is_seen_need_not_be_a_providers(path: Path, tmp_path: Path) -> None:
    """It is that of whoever serves for many; the request's head says which provider it is."""
    own = name_of(path)

    def wanted(name: str) -> bool:
        return name == own

    changed = tmp_path / path.name
    changed.write_bytes(behind(outer(path.read_bytes()), own.encode()))
    source = PcapSource([changed], wanted=wanted)
    expected = said(PcapSource([path]).items())
    assert said(source.items()) == expected != {}
    assert source.findings.not_wanted == 0
    items, _ = live(changed, tmp_path / "keys.log", wanted)
    assert said(items) == expected


@pytest.mark.parametrize("is_asked", [True, False])
def test_it_is_kept_once_a_request_says_whose_it_is(is_asked: bool, tmp_path: Path) -> None:
    """With the secrets of the hello inside: by those of the other it would be nobody's."""
    path = SAMPLES[0]
    own = name_of(path)

    def wanted(name: str) -> bool:
        return name == own

    changed, kept = tmp_path / path.name, tmp_path / "kept.pcapng"
    changed.write_bytes(behind(outer(path.read_bytes()), own.encode()))
    keeping = Keeping(CaptureWriter(kept))
    items, source = live(changed, tmp_path / "keys.log", wanted, keeping)
    if is_asked:
        source.keep(items[0].connection.id)
    keeping.close()
    again = list(PcapSource([kept], wanted=wanted).items())
    assert said(again) == (said(items) if is_asked else {})
    assert keeping.connections == is_asked


@pytest.mark.parametrize("keys", ["of the hello that is seen", "none"])
def test_nothing_is_read_of_others_whose_hello_only_looks_so(keys: str, tmp_path: Path) -> None:
    """Browsers send what looks like a hello inside to everybody (GREASE)."""
    path = SAMPLES[0]
    data = outer(path.read_bytes())
    hello = tls.client_hello(hello_of(path.read_bytes())[1])
    assert hello is not None
    own = hello.random.hex().encode()
    if keys == "none":
        data = SERVER_SECRET.sub(rb"\g<1>00000000", data)
    else:
        data = data.replace(own, OTHER_RANDOM.hex().encode())
    changed = tmp_path / path.name
    changed.write_bytes(data)
    source = PcapSource([changed], wanted=lambda name: False)
    assert [item for item in source.items() if isinstance(item, TlsChunk)] == []
    assert source.findings.not_wanted >= 1
    assert source.findings.without_keys == {}
    items, captured = live(changed, tmp_path / "keys.log", lambda name: False)
    assert [item for item in items if isinstance(item, TlsChunk)] == []
    assert captured.losses == {}


def test_without_its_keys_it_is_told_with_the_name_that_is_seen(tmp_path: Path) -> None:
    """So is one that says nothing of a hello inside: no handshake is tried for it."""
    data = SAMPLES[0].read_bytes()
    name = tls.client_hello(hello_of(data)[1])
    assert name is not None
    unmarked = tmp_path / "unmarked.pcapng"
    unmarked.write_bytes(outer(data, marked=False))
    keyless = tmp_path / "keyless.pcapng"
    keyless.write_bytes(SERVER_SECRET.sub(rb"\g<1>00000000", outer(data)))
    for path in (unmarked, keyless):
        source = PcapSource([path])
        read = plaintext(source)
        assert source.findings.without_keys[name.server_name or ""] == 1
        assert read != plaintext(PcapSource([SAMPLES[0]]))


def test_a_server_of_tls_1_2_has_no_hello_inside(tmp_path: Path) -> None:
    """A client that would take it sends the same hello to all: without keys that is told."""
    (path,) = (each for each in CAPTURES if each.stem == OF_TLS12)
    changed = tmp_path / path.name
    changed.write_bytes(outer(path.read_bytes()))
    source = PcapSource([changed])
    assert plaintext(source) == {}
    assert source.findings.without_keys.total() == 1
    assert source.findings.losses == {}
