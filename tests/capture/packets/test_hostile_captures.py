"""Captures made to cost time or memory: four times as much of them costs some four times as much.

Costs are CPU time, of which another program on the machine takes nothing; where the work were to
grow with the square, the ratio would be sixteen.
"""

from __future__ import annotations

import itertools
import os
import signal
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from capture.packets import (
    capfile,
    input_files,
    keylog,
    opening,
    records,
    tcp,
    tcp_connections,
    tshark,
)
from capture.packets.capfile import CaptureFile, secrets_in
from capture.packets.findings import Findings
from capture.packets.input_files import InputFile
from capture.packets.keylog import KeyLog, read_key_log
from capture.pcap import PcapSource
from halton_meter.cli import main
from halton_meter.cli.replay import replay as replay_command
from tests.support import evil
from tests.support.cost import proportionate
from tests.support.quick import slow
from tests.support.recorder.packets import SYN, write

RATIO_MAX = 8.0  # of the cost of four times as much; some 4 when all is well, 16 for a square
FIXTURE = Path(__file__).parents[3] / "fixtures" / "pcaps" / "anthropic_message.pcapng"

CAPTURES: list[tuple[Callable[[int], bytes], int]] = [
    (evil.gaps_in_one_connection, 1_500),
    (evil.gaps_that_fill_backwards, 1_500),
    (evil.overlaps_behind_a_gap, 1_500),
    (evil.a_gap_in_every_connection, 2_500),
    (evil.connections_never_closed, 1_000),
    (evil.a_server_that_speaks_first, 2_000),
    (evil.handshakes_of_nothing, 1_000),
    (evil.empty_records, 60),
    (evil.heads_that_lie, 60),
    (evil.connections_joined_late, 150),
    (evil.marks_between_blocks, 40_000),
    (evil.spoilt_and_sound_blocks, 2_500),
    (evil.interfaces, 8_000),
    (evil.options_without_end, 100_000),
    (evil.secrets_in_many_blocks, 2_500),
    (evil.zeros_between_packets, 6_000),
    (evil.one_block_in_small_pieces, 3 << 20),
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path / "home"))


def read(path: Path, *keys: Path) -> Findings:
    source = PcapSource([path], keys)
    for _ in source.items():
        pass
    return source.findings


def replay(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["replay", *map(str, arguments)])


@pytest.mark.parametrize(
    ("make", "count"),
    [
        pytest.param(make, count, id=make.__name__, marks=[pytest.mark.slow] if number % 6 else [])
        for number, (make, count) in enumerate(CAPTURES)
    ],
)
def test_four_times_as_much_costs_four_times_as_much(
    make: Callable[[int], bytes], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "TRIALS_MAX", 50_000)
    small, large = (write(tmp_path / str(n), make(n)) for n in (count, 4 * count))
    proportionate(lambda: read(small), lambda: read(large), times_max=RATIO_MAX, least_s=0.03)


@pytest.mark.parametrize(
    ("make", "count"), [(evil.lines_without_end, 2 << 20), (evil.key_log_of, 3_000)]
)
def test_key_logs_cost_what_they_are_long(
    make: Callable[[int], bytes], count: int, tmp_path: Path
) -> None:
    small, large = (write(tmp_path / str(n), make(n)) for n in (count, 4 * count))
    proportionate(
        lambda: read_key_log(small, KeyLog()),
        lambda: read_key_log(large, KeyLog()),
        times_max=RATIO_MAX,
        least_s=0.03,
    )


# --- TCP ------------------------------------------------------------------------------------------


def test_what_waits_in_all_connections_together_is_bounded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tcp, "WAITING_BYTES_MAX", 20_000)
    most = 0
    began = tcp.Reassembly._after

    def after(self: tcp.Reassembly, *arguments: object) -> None:
        nonlocal most
        began(self, *arguments)  # type: ignore[arg-type]
        waits = (half.pending for half in self._halves.values() if half.pending)
        most = max(most, sum(each.cost_bytes for each in waits))

    monkeypatch.setattr(tcp.Reassembly, "_after", after)
    findings = read(write(tmp_path / "a.pcap", evil.a_gap_in_every_connection(800)))
    assert 15_000 < most <= 20_000
    assert findings.losses["tcp_gaps_given_up_early"] > 500
    # Every byte that is missing is told of, early or late.
    assert findings.losses["tcp_bytes_missing"] == 20 * (496 + 38)


def test_segments_that_wait_are_counted_as_well_as_their_bytes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tcp, "REORDER_SEGMENTS_MAX", 50)
    lengths = []
    began = tcp.Reassembly._after

    def after(self: tcp.Reassembly, *arguments: object) -> None:
        began(self, *arguments)  # type: ignore[arg-type]
        lengths.extend(len(half.pending or ()) for half in self._halves.values())

    monkeypatch.setattr(tcp.Reassembly, "_after", after)
    read(write(tmp_path / "a.pcap", evil.gaps_in_one_connection(300)))
    assert max(lengths) == 50


# --- records --------------------------------------------------------------------------------------


def test_what_connections_hold_back_is_bounded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tcp_connections, "KEPT_BYTES_MAX", 10_000)
    packets = []
    for number in range(60):
        client = struct.pack("!I", 0x0B000000 + number)
        packets.append(evil.segment(1, flags=SYN, client=client))
        packets.append(evil.segment(7, bytes(500), sent=False, client=client))
    held: list[int] = []
    began = tcp_connections.TcpConnections.received

    def received(self: tcp_connections.TcpConnections, *arguments: object) -> None:
        began(self, *arguments)  # type: ignore[arg-type]
        held.append(self._held_bytes)

    monkeypatch.setattr(tcp_connections.TcpConnections, "received", received)
    assert read(write(tmp_path / "a.pcap", evil.pcap_of(packets))).connections == 60
    assert 9_000 < max(held) <= 10_000


def test_unfinished_records_are_bounded_and_those_given_up_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(records, "KEPT_BYTES_MAX", 10_000)
    begun = b"\x16\x03\x03\x40\x00\x01" + bytes(900)
    packets = [
        evil.packet(evil.segment(1, begun, client=struct.pack("!I", 0x0B000000 + number)))
        for number in range(60)
    ]
    kept: list[int] = []
    began = tcp_connections.TcpConnections.received

    def received(self: tcp_connections.TcpConnections, *arguments: object) -> None:
        began(self, *arguments)  # type: ignore[arg-type]
        kept.append(self._cutter._kept_bytes)

    monkeypatch.setattr(tcp_connections.TcpConnections, "received", received)
    findings = read(write(tmp_path / "a.pcapng", evil.pcapng_of(packets)))
    assert 9_000 < max(kept) <= 10_000
    assert findings.losses["tls_records_given_up_early"] == 49


def test_empty_handshake_messages_do_not_pile_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept: list[int] = []
    began = tcp_connections.TcpConnections.received

    def received(self: tcp_connections.TcpConnections, *arguments: object) -> None:
        began(self, *arguments)  # type: ignore[arg-type]
        kept.append(self._cutter._kept_bytes)

    monkeypatch.setattr(tcp_connections.TcpConnections, "received", received)
    read(write(tmp_path / "a.pcap", evil.handshakes_of_nothing(50)))
    assert len(kept) > 50
    assert max(kept) < 2 * records.BATCH_BYTES_MAX


def test_a_server_name_that_is_none_reaches_no_terminal(tmp_path: Path) -> None:
    name = b"api.\x1b[2Jopenai.com"
    extension = struct.pack("!HHHBH", 0, len(name) + 5, len(name) + 3, 0, len(name)) + name
    body = b"\x03\x03" + bytes(32) + b"\0" + b"\0\x02\x13\x01" + b"\x01\0"
    body += struct.pack("!H", len(extension)) + extension
    hello = b"\x01" + len(body).to_bytes(3) + body
    record = b"\x16\x03\x01" + struct.pack("!H", len(hello)) + hello
    path = write(tmp_path / "a.pcap", evil.pcap_of([evil.segment(1, record)]))
    result = replay(path)
    assert "without keys, to 10.0.0.2\n" in result.stderr
    assert "\x1b" not in result.output


# --- files ----------------------------------------------------------------------------------------


def _peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that Python's objects took meanwhile."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _bomb(piece: bytes) -> Iterator[bytes]:
    yield evil.pcapng_of([])
    yield from itertools.repeat(piece * 200, 200)
    yield evil.packet(evil.segment(1, flags=SYN))


@pytest.mark.parametrize(
    "piece",
    [
        evil.interface(),
        evil.secrets_block(evil.key_lines(3).encode()),
        evil.packet(evil.segment(1, b"x" * 500)),
        b"\x06\0\0\0" * 16,
        bytes(64),
    ],
    ids=["interfaces", "secrets", "packets", "marks", "zeros"],
)
def test_a_gzip_is_read_up_to_a_multiple_of_its_size(
    piece: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(input_files, "UNPACKED_BYTES_FREE", 1 << 18)
    monkeypatch.setattr(capfile, "RESYNC_BYTES_MAX", 1 << 18)
    monkeypatch.setattr(input_files, "_READ_BYTES", 1 << 14)
    path = write(tmp_path / "bomb.pcapng.gz", evil.packed(_bomb(piece)))
    file = InputFile(path)
    while file.have(1):
        file.skip(1 << 14)
    assert file.refused
    assert file._unpacked_bytes < max(1 << 18, 100 * path.stat().st_size) + 2 * (1 << 14)
    findings: list[Findings] = []
    assert _peak_bytes(lambda: findings.append(read(path))) < 2 << 20
    assert len(findings[0].errors) == 1


def test_a_gzip_that_unpacks_too_far_is_named_and_read_when_told_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(input_files, "UNPACKED_BYTES_FREE", 1 << 18)
    monkeypatch.setattr(input_files, "_READ_BYTES", 1 << 14)
    path = write(tmp_path / "far.pcap.gz", evil.packed(_far()))
    result = replay(path, FIXTURE)
    assert result.exit_code == 1
    assert "1 request in 2 files" in result.stdout  # the other file's
    assert f"halton-meter: {path}: the last" in result.stderr
    assert "more than 100 times its size" in result.stderr
    assert "--unpack-ratio 1000" in result.stderr
    (option,) = [each for each in replay_command.params if each.name == "unpack_ratio"]
    assert option.default == input_files.UNPACK_RATIO_MAX
    again = replay(path, FIXTURE, "--unpack-ratio", 1000)
    assert again.exit_code == 0, again.output


def _far() -> Iterator[bytes]:
    whole = evil.pcap_of([evil.segment(1_001, b"GET " + bytes(900))])
    yield whole[:24]
    yield from itertools.repeat(whole[24:], 4_000)


@pytest.mark.parametrize("damage", [b"", b"\xff" * 9, evil.packet(b"")[:-4]])
def test_a_sparse_file_is_left_alone_after_a_while(damage: bytes, tmp_path: Path) -> None:
    hello = evil.segment(1, flags=SYN)
    for name, head in (
        ("a.pcap", evil.pcap_of([hello])),
        ("b.pcapng", evil.pcapng_of([evil.packet(hello)])),
    ):
        path = write(tmp_path / name, head + damage)
        os.truncate(path, 1 << 40)
        findings = read(path)
        assert findings.connections == 1
        assert findings.losses["capture_bytes_not_read"] > (1 << 40) - (40 << 20)
        (error,) = findings.errors
        assert error.startswith(f"{path}: the last 1,099,")


def test_no_frame_is_larger_than_any_is(tmp_path: Path) -> None:
    """Queues behind count frames, not bytes."""
    size = capfile.FRAME_BYTES_MAX
    simple = evil.block(3, struct.pack("<I", size + 4) + bytes(size + 4))
    blocks = [evil.packet(bytes(size)), evil.packet(bytes(size + 4)), simple]
    file = CaptureFile(write(tmp_path / "a.pcapng", evil.pcapng_of(blocks)))
    assert [len(frame.data) for frame in file.frames()] == [size, size]
    assert file.losses == {"capture_file_garbage": 1, "packets_without_a_time": 1}


def test_packets_behind_a_hole_in_a_pcap_are_read(tmp_path: Path) -> None:
    whole = evil.pcap_of([evil.segment(1, flags=SYN)])
    data = whole + bytes(16 * 50_000) + whole[24:] + bytes(7)
    file = CaptureFile(write(tmp_path / "a.pcap", data))
    assert [frame.data for frame in file.frames()] == [evil.segment(1, flags=SYN)] * 2
    assert file.losses == {"capture_file_garbage": 1, "capture_file_cut_short": 1}


@pytest.mark.parametrize("resolution", [0, 1, 6, 9, 20, 127, 128, 129, 200, 255])
@pytest.mark.parametrize("ticks", [0, 1, evil.AT_NS, 2**63, 2**64 - 1])
def test_no_time_is_one_that_dates_cannot_say(resolution: int, ticks: int, tmp_path: Path) -> None:
    data = evil.pcapng_of([evil.packet(b"x", ticks)], resolution)
    path = write(tmp_path / "a.pcapng", data)
    os.utime(path, ns=(-(10**18), -(10**18)))
    file = CaptureFile(path)
    ((at_ns, *_),) = file.frames()
    assert 0 <= at_ns <= capfile.TIME_NS_MAX
    base, exponent = (2, resolution & 127) if resolution & 128 else (10, resolution)
    true_ns = ticks * 10**9 // base**exponent
    counted = file.losses["packets_with_an_impossible_time"]
    assert counted == 1 if true_ns > capfile.TIME_NS_MAX else at_ns == true_ns


@pytest.mark.parametrize("ticks", [2**64 - 1, 253_402_300_800_000_000, 9_300_000_000_000_000])
@pytest.mark.parametrize("arguments", [("--store",), slow(()), slow(("--json",))])
def test_an_impossible_date_does_not_end_the_run(
    ticks: int, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    """Microseconds of the years 586524, 10000 and 2264."""
    data = evil.pcapng_of([evil.packet(each, ticks) for each in plain_call()], 6)
    result = replay(write(tmp_path / "a.pcapng", data), FIXTURE, *arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.exit_code == 0, result.output
    assert "claude-sonnet-4-5" in result.stdout
    assert "gpt-4o" in result.stdout
    if "--json" not in arguments:
        assert "6 packets with an impossible time; the file's was used" in result.stdout


def plain_call() -> list[bytes]:
    """An unencrypted call to a provider, as packets."""
    asked = b"POST /v1/chat/completions HTTP/1.1\r\nHost: api.openai.com\r\n"
    asked += b'Content-Length: 18\r\n\r\n{"model":"gpt-4o"}'
    told = b'{"id":"chatcmpl-t","model":"gpt-4o","usage":{"prompt_tokens":1,"completion_tokens":2}}'
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(told) + told
    done, heard = 1_001 + len(asked), 5_001 + len(answer)
    return [
        evil.segment(1_000, flags=SYN),
        evil.segment(5_000, flags=SYN | 16, sent=False, ack=1_001),
        evil.segment(1_001, asked, ack=5_001),
        evil.segment(5_001, answer, sent=False, ack=done),
        evil.segment(heard, flags=17, sent=False, ack=done),
        evil.segment(done, flags=17, ack=heard + 1),
    ]


def test_pipes_devices_and_folders_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.pcap"
    os.mkfifo(pipe)
    signal.alarm(60)  # what waits in `open` waits for ever
    try:
        result = replay(pipe, "/dev/zero", FIXTURE)
    finally:
        signal.alarm(0)
    assert result.exit_code == 1
    assert (
        f"halton-meter: {pipe}: is a pipe, not a file; write what comes through it" in result.stderr
    )
    assert "halton-meter: /dev/zero: is a device, not a file" in result.stderr
    assert "1 request in 1 file" in result.stdout


def test_names_that_cannot_be_looked_at_are_named(tmp_path: Path) -> None:
    result = replay("x" * 5_000, FIXTURE)
    assert result.exit_code == 1
    assert "File name too long" in result.stderr
    assert "1 request in 1 file" in result.stdout


def test_a_file_that_is_gone_when_its_turn_comes_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pcap", evil.pcap_of([evil.segment(1, flags=SYN)]))
    source = PcapSource([path, FIXTURE])
    path.unlink()
    assert list(source.items())
    assert source.findings.errors == [f"{path}: No such file or directory"]


def test_a_fault_in_one_file_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.pcap", evil.pcap_of([evil.segment(1, b"BANG")]))
    feed = tcp.Reassembly.feed

    def fail(self: tcp.Reassembly, at_ns: int, linktype: int, frame: bytes, size: int) -> None:
        if frame.endswith(b"BANG"):
            raise KeyError
        feed(self, at_ns, linktype, frame, size)

    monkeypatch.setattr(tcp.Reassembly, "feed", fail)
    result = replay(path, FIXTURE)
    assert result.exit_code == 1
    assert f"{path}: a fault of Halton Meter ended its reading: KeyError" in result.stderr
    assert "1 request in 2 files" in result.stdout


# --- secrets --------------------------------------------------------------------------------------


def test_secrets_past_the_budget_are_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(capfile, "SECRETS_BYTES_MAX", 10_000)
    text = evil.key_lines(25).encode()  # 3,825 bytes
    path = write(tmp_path / "a.pcapng", evil.pcapng_of([evil.secrets_block(text)] * 5))
    losses: Counter[str] = Counter()
    assert [bytes(each) for each in secrets_in(path, losses)] == [text] * 2
    assert losses["tls_secret_bytes_not_read"] >= 3 * len(text)


def test_a_key_log_keeps_what_it_may_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(keylog, "SECRETS_MAX", 20)
    keys = KeyLog()
    trouble = read_key_log(write(tmp_path / "keys.log", evil.key_lines(25).encode()), keys)
    assert trouble == "5 secrets were not read: only 20 are kept"
    assert len(keys) == 20


def test_long_lines_in_a_key_log_cost_themselves_only(tmp_path: Path) -> None:
    lines = evil.key_lines(2).encode()
    text = b"#" * (3 << 20) + b"\n" + lines + b"x" * (2 << 20) + lines[:-1] + b"\n" + lines
    keys = KeyLog()
    assert read_key_log(write(tmp_path / "keys.log", text), keys) is None
    assert len(keys) == 2


def test_a_key_log_of_any_size_takes_little_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "keys.log", evil.key_lines(1).encode())
    os.truncate(path, 64 << 20)
    assert _peak_bytes(lambda: read_key_log(path, KeyLog())) < 8 << 20


def test_key_logs_without_end_are_read_for_a_while(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(keylog, "KEY_LOG_BYTES_MAX", 8 << 20)
    path = write(tmp_path / "keys.log", evil.key_lines(1).encode())
    os.truncate(path, 1 << 40)
    result = replay(FIXTURE, "--keys", path)
    assert result.exit_code == 1
    assert f"halton-meter: {path}: was read for its first 8 MB only" in result.stderr
    assert "1 request in 1 file" in result.stdout


def test_a_key_log_may_be_a_pipe_but_not_one_that_is_silent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(keylog, "PIPE_SECONDS_MAX", 0.1)
    pipe = tmp_path / "keys.pipe"
    os.mkfifo(pipe)
    keys = KeyLog()
    trouble = read_key_log(pipe, keys)
    assert trouble == "is a pipe through which nothing came for 0 s"
    reading, writing = os.pipe()
    os.write(writing, evil.key_lines(3).encode())
    os.close(writing)
    assert read_key_log(Path(f"/dev/fd/{reading}"), keys) is None
    assert len(keys) == 3
    os.close(reading)
    assert read_key_log(Path("/dev/zero"), keys) == "is a device, not a file"


# --- tshark ---------------------------------------------------------------------------------------


def _fake_tshark(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    path = folder / "bin" / "tshark"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")


ENDLESS = "exec python3 -c '\nimport sys, struct\nout = sys.stdout.buffer\nwhile True: {}'"
_LOW = r'out.write(struct.pack("=II", 6, 40) + bytes(12) + struct.pack("=I", 8) + bytes(16))'


@pytest.mark.parametrize(
    "script",
    [
        "exec sleep 1000",
        "exec cat >/dev/null",
        "exec sh -c 'cat >/dev/null; exec sleep 1000'",
        ENDLESS.format(_LOW),
        ENDLESS.format(r'out.write(struct.pack("=II", 5, 1 << 30) + bytes(1000))'),
        ENDLESS.format(r'out.write(struct.pack("=II", 6, 0) + bytes(1000))'),
        "exec yes",
        "exit 3",
    ],
    ids="silent,mute,unending,much,huge,none,text,failing".split(","),
)
def test_a_tshark_gone_wrong_is_done_without(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tshark, "TSHARK_SILENT_SECONDS_MAX", 0.4)
    monkeypatch.setattr(tshark, "OUTPUT_BYTES_FREE", 1 << 20)
    monkeypatch.setattr(tshark, "_EXIT_SECONDS_MAX", 0.5)
    monkeypatch.setattr(tshark, "QUEUED_MAX", 4)
    _fake_tshark(tmp_path, monkeypatch, script)
    result = replay(FIXTURE)
    assert "1 request in 1 file: $0.002655" in result.stdout  # read by ourselves
    if script != "exec cat >/dev/null":  # which ends when its input does, as a tshark should
        assert "1 run of tshark failed" in result.stdout
