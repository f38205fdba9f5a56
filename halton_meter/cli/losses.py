"""Capture losses in words: what was lost, and what to do about it where something can be done.

Counters that only a maintainer can read (places where parsing went on behind missing bytes, and the
like) are left out here; `--json` has every one by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from halton_meter.cli.output import count


class _Loss(NamedTuple):
    """One counter: its noun, what happened to it, the fix."""

    noun: str
    what: str
    fix: str = ""


_LOSSES = {
    # recorded captures
    "tcp_bytes_missing": _Loss(
        "TCP byte", "missing", "record with a larger buffer: tcpdump -B 65536"
    ),
    "frames_cut_by_snap_length": _Loss(
        "packet", "recorded in part", "record whole packets: tcpdump -s 0"
    ),
    "capture_file_cut_short": _Loss("capture file", "cut short: the end is missing"),
    "capture_bytes_not_read": _Loss("capture byte", "not read"),
    "ip_fragments": _Loss("IP fragment", "not reassembled"),
    "packets_without_a_time": _Loss("packet", "without a time; the file's was used"),
    "packets_with_an_impossible_time": _Loss(
        "packet", "with an impossible time; the file's was used"
    ),
    "tls_records_undecryptable": _Loss(
        "TLS record", "not decrypted", "give the client's whole key log: --keys sslkeys.log"
    ),
    "tls_secret_bytes_not_read": _Loss(
        "byte", "of TLS secrets not read", "keep the secrets in a file: --keys sslkeys.log"
    ),
    "tshark_failed": _Loss(
        "run", "of tshark failed; its work was done without it", "tshark --version"
    ),
    "connections_evicted": _Loss("connection", "closed early: too many were open"),
    "packets_dropped": _Loss("packet", "dropped: the kernel's buffer was full"),
    "quic_stream_bytes_missing": _Loss(
        "byte", "of HTTP/3 missing", "turn HTTP/3 off in the program"
    ),
    # uprobes
    "ring_full_bytes": _Loss("byte", "lost: the capture buffer was full"),
    "copy_failed_bytes": _Loss("byte", "that the kernel could not copy"),
    "call_too_long_bytes": _Loss("byte", "of calls too long to copy whole"),
    "lost_between_readers_bytes": _Loss("byte", "lost while the worker was away"),
    "request_cut_bytes": _Loss("byte", "of long requests not copied"),
    "connection_table_full": _Loss("connection", "not followed: too many were open"),
    "socket_table_full": _Loss("connection", "left out of coverage: too many at once"),
    "ran_as_another_user": _Loss(
        "program",
        "of a run ran as another user, not metered",
        "sudo halton-meter start --user NAME",
    ),
    "records_missed": _Loss("connection", "taken up anew: some of its TLS records were not seen"),
    "thread_table_full": _Loss("call", "not followed: too many threads"),
    "notices_lost": _Loss("message", "about processes lost"),
    "process_ring_full": _Loss("message", "about processes lost: the buffer was full"),
    "heads_without_host": _Loss("request", "without a host"),
    "http2_without_name": _Loss("HTTP/2 connection", "to an unknown host"),
    "processes_ahead_of_probes": _Loss(
        "program", "started before probes: first requests may be missing", "restart it"
    ),
    "not_http": _Loss("connection", "that is not HTTP"),
    "files_over_limit": _Loss("program file", "without probes: too many files"),
    # metering and the store
    "answers_not_recognised": _Loss("answer", "not recognised: its request was lost"),
    "early_dropped": _Loss("answer", "dropped: its request was lost"),
    "decode_failed": _Loss("body", "that could not be decompressed"),
    "decoded_over_limit": _Loss("body", "read in part: it grew too much when decompressed"),
    "conversations_evicted": _Loss("connection", "closed early: too many were open"),
    "conversations_over_budget": _Loss("connection", "closed early: memory limit"),
    "bodies_over_budget": _Loss("body", "read in part: memory limit"),
    "events_over_limit": _Loss("request", "dropped: limit reached"),
    "exchanges_over_limit": _Loss("request", "dropped: the queue was full"),
    "limit_values_refused": _Loss("value", "in limit headers ignored: no server means it"),
    "flows_over_limit": _Loss("request", "not followed: too many at once"),
    "journal_full": _Loss("request", "not stored: the journal was full"),
    "unstored_events": _Loss("request", "not stored: the worker ended while the disk was full"),
}
_PLURALS = {"body": "bodies"}
# Counters whose name ends with the Python error that stopped us.
_FAULTS = {
    "tls_records_unreadable_": _Loss("part", "of TLS connections not read"),
    "exchange_unreadable_": _Loss("request", "not read"),
    "limits_unreadable_": _Loss("answer", "of which the limits were not read"),
    "pricing_": _Loss("request", "not priced"),
}


def sightings_in_words(
    seen_again: int, told_apart: int, stored_before: int = 0, stored_as_one: int = 0
) -> list[str]:
    """What was seen more than once, and what was told apart though its id is another's."""
    lines = []
    if seen_again:
        lines.append(f"{count(seen_again, 'sighting')} of requests seen before, not counted again")
    if stored_before:
        known = "1 request is" if stored_before == 1 else f"{stored_before:,} requests are"
        lines.append(f"{known} in the store already: counted once")
    if stored_as_one:
        one = stored_as_one == 1
        same = "is the same as another" if one else "are the same as others"
        lines.append(f"{count(stored_as_one, 'request')} {same} of these: stored once")
    if told_apart:
        share = "shares" if told_apart == 1 else "share"
        lines.append(f"{count(told_apart, 'request')} {share} another's response id, each counted")
    return lines


def is_capture_loss(cause: str) -> bool:
    """Whether a counter is of what was lost; connections past the proxy are coverage's to say."""
    return not cause.startswith("unmetered_")


def other_calls_in_words(requests: int, other_calls: int) -> list[str]:
    """That a provider was asked, where no request says so."""
    if requests or not other_calls:
        return []
    are = "call that is" if other_calls == 1 else "calls that are"
    return [f"{other_calls:,} {are} no model request, not counted"]


def losses_in_words(losses: Mapping[str, int]) -> list[tuple[str, str]]:
    """What was lost and its fix ("" for none), such as ("892 TCP bytes missing", "record …")."""
    said = [
        (f"{count(losses[cause], loss.noun, _PLURALS.get(loss.noun))} {loss.what}", loss.fix)
        for cause, loss in _LOSSES.items()
        if losses.get(cause)
    ]
    for begin, loss in _FAULTS.items():
        for cause, number in losses.items():
            if cause.startswith(begin) and number:
                fault = f"a fault of Halton Meter ({cause.removeprefix(begin)})"
                said.append((f"{count(number, loss.noun)} {loss.what}: {fault}", ""))
    return said


def loss_lines(losses: Mapping[str, int]) -> list[str]:
    """All of them for `status` and `run`, with the names that docs/troubleshooting.md has."""
    lines, others = [], []
    for cause, number in losses.items():
        words = losses_in_words({cause: number})
        for what, fix in words:
            lines.append(f"  {what} ({cause}){f'; {fix}' if fix else ''}")
        if number and not words:
            others.append(f"{cause} {number:,}")
    return lines + ([f"  other counters: {', '.join(others)}"] if others else [])
