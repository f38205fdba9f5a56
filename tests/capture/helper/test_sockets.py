"""What was metered of the connections that sockets show: by number, by thread, and why not."""

from __future__ import annotations

import os
from dataclasses import replace
from socket import create_server
from typing import Any

import pytest

from capture import protocol
from capture.helper.sockets import HANDSHAKE_BYTES_MAX, ROWS_MAX, Cause, Sockets, is_used
from capture.protocol import Birth, Record, Socket, SocketFlag
from halton_meter.model import Process

HOST, PID = "api.openai.com", 77
LOCAL = b"\x7f\0\0\1".ljust(16, b"\0")
FOLLOWED = SocketFlag.FOLLOWED


def socket(**more: Any) -> Socket:
    made = Socket(
        opened_ns=5,
        birth=Birth(1, uid=0),
        sent=1000,
        received=2000,
        hello_sent=500,
        used_ns=9,
        linked=0,
        tgid=PID,
        run=0,
        port=443,
        family=2,
        address=b"\1\2\3\4".ljust(16, b"\0"),
        is_seen=True,
        flags=FOLLOWED,
        comm="x",
        host=HOST,
    )
    return replace(made, **more)


class Table:
    """A kernel's map."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}

    def get(self, key: bytes) -> bytes | None:
        return self.values.get(key)

    def all_keys(self) -> list[bytes]:
        return list(self.values)

    def put(self, number: int, made: Socket) -> None:
        birth = made.birth
        fields = (made.opened_ns, birth.at_ns, made.sent, made.received, made.hello_sent)
        fields += (made.used_ns, made.linked, 0, birth.left_ns, birth.parent_ns)
        fields += (made.tgid, birth.uid, made.run, made.port)
        above = (birth.parent, birth.program)
        names = (made.comm.encode(), made.host.encode())
        self.values[number.to_bytes(8, "little")] = protocol.SOCKET.pack(
            *fields, made.family, made.address, 1, 1, int(made.flags), 0, *above, *names
        )


class Place:
    """The count, with what the kernel tells it."""

    def __init__(self) -> None:
        self.table, self.addresses = Table(), Table()
        table: Any = self.table
        addresses: Any = self.addresses
        self.sockets = Sockets(
            table,
            addresses,
            lambda made: Process(
                pid=made.tgid,
                started_ns=0,
                exe=f"/bin/{made.tgid}",
                parents=((made.birth.parent, "parent"),) if made.birth.parent else (),
            ),
            lambda pid, at_ns: Cause("stack_not_probed", "rustls"),
            lambda pid, connection: "rustls" if connection & protocol.RUSTLS_ID else "OpenSSL",
        )

    def opens(self, number: int, made: Socket) -> None:
        self.table.put(number, made)
        self.sockets.take(_record(protocol.SOCKET_SEEN, number, made))

    def ends(self, number: int, made: Socket) -> None:
        self.table.values.pop(number.to_bytes(8, "little"), None)
        self.sockets.take(_record(protocol.SOCKET_ENDED, number, made))

    def uses(
        self,
        host: str = HOST,
        *,
        pid: int = PID,
        joined: bool = False,
        parent: int = 0,
        program: int = 0,
    ) -> None:
        """A TLS connection sends its first plaintext through a probe."""
        fields = (protocol.USED, 0, int(joined), pid, 0, 99, 5, 6, 1, 0)
        self.sockets.take(Record(*fields, host=host, birth=Birth(1, parent, 0, program)))

    def sums(self) -> list[tuple[Any, ...]]:
        return _short(self.sockets.take_sums())

    def open(self) -> list[tuple[Any, ...]]:
        return _short(self.sockets.open_sums())


def _record(kind: int, number: int, made: Socket) -> Record:
    return Record(kind, 0, 0, made.tgid, 0, number, made.opened_ns, 9, 1, 0, socket=made)


def _short(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["host"], row["stack"], row["cause"], row["connections"]) for row in rows]


@pytest.fixture
def place() -> Place:
    return Place()


METERED = (HOST, "OpenSSL", None)
NOT_PROBED = (HOST, "rustls", "stack_not_probed")


def test_as_many_are_metered_as_sent_plaintext_through_a_probe(place: Place) -> None:
    for number in range(4):
        place.opens(number, socket())
    for _ in range(3):
        place.uses()
    for number in range(4):
        place.ends(number, socket())
    assert place.sums() == [(*METERED, 3), (*NOT_PROBED, 1)]
    assert place.sums() == []


@pytest.mark.parametrize("end_is", ["to come", "not told yet", "told"])
def test_what_a_child_sends_on_its_parent_s_connection_is_the_parent_s(
    place: Place, end_is: str
) -> None:
    """The child is gone when this is heard, and the parent has closed the connection, too."""
    place.opens(1, socket())
    if end_is == "not told yet":
        place.table.values.clear()
    elif end_is == "told":
        place.opens(2, socket(host="other.test"))  # so that the end is not judged at once
        place.table.values.clear()
        place.ends(1, socket())
    place.uses(pid=PID + 1, parent=PID)
    if end_is != "told":
        place.ends(1, socket())
    place.table.put(2, socket(host="other.test"))
    assert (*METERED, 1) in place.sums()


def test_what_a_fork_of_a_fork_sends_is_whose_connection_it_is(place: Place) -> None:
    """The one between has ended: of its own parents the fork shows none that has a connection."""
    place.opens(1, socket())
    place.uses(pid=PID + 2, parent=PID + 1, program=PID)
    place.ends(1, socket())
    assert place.sums() == [(*METERED, 1)]


def test_which_ones_the_thread_shows_where_it_does(place: Place) -> None:
    for number in range(2):
        place.opens(number, socket())
    place.uses()
    place.table.put(1, socket(linked=99))  # this one is still open, and has it
    place.ends(0, socket(sent=7000))
    place.ends(1, socket(linked=99))
    (unmetered, metered) = place.sockets.take_sums()
    assert (unmetered["cause"], unmetered["bytes"]) == ("stack_not_probed", 9000)
    assert (metered["cause"], metered["bytes"]) == (None, 3000)


def test_what_is_open_is_told_as_it_is_now_and_again_when_it_ends(place: Place) -> None:
    place.opens(1, socket())
    place.opens(2, socket(used_ns=0))
    place.uses()
    assert place.open() == place.open() == [(*METERED, 1)]
    assert place.sums() == []
    place.ends(1, socket())
    assert place.sums() == [(*METERED, 1)]
    assert place.open() == []


def test_another_process_or_host_has_a_number_of_its_own(place: Place) -> None:
    place.uses(pid=78)
    place.uses("api.anthropic.com")
    place.ends(1, socket())
    assert place.sums() == [(*NOT_PROBED, 1)]


def test_without_a_name_it_is_that_of_the_plaintext(place: Place) -> None:
    place.uses("api.anthropic.com")
    place.ends(1, socket(host="", flags=FOLLOWED | SocketFlag.NO_NAME))
    place.ends(2, socket(host="", flags=FOLLOWED | SocketFlag.NO_NAME))
    assert place.sums() == [
        ("api.anthropic.com", "OpenSSL", None, 1),
        (None, None, "no_server_name", 1),
    ]


@pytest.mark.parametrize(
    ("made", "cause"),
    [
        (socket(linked=9, flags=FOLLOWED | SocketFlag.LATE), "probed_late"),
        (socket(flags=FOLLOWED | SocketFlag.ECH), "ech"),
        (socket(flags=FOLLOWED | SocketFlag.ASKED_PROXY, address=LOCAL), "through_local_proxy"),
        (socket(flags=FOLLOWED | SocketFlag.ASKED_PROXY), "stack_not_probed"),
        (socket(address=LOCAL), "stack_not_probed"),
    ],
)
def test_causes(place: Place, made: Socket, cause: str) -> None:
    place.ends(1, made)
    ((_, _, found, _),) = place.sums()
    assert found == cause


def test_what_seems_encrypted_and_passed_probes_led_to_no_provider(place: Place) -> None:
    """Chrome's GREASE, to another host at a provider's address."""
    place.sockets._cause_of = lambda pid, at_ns: Cause("nothing_passed", "unknown")
    made = socket(flags=FOLLOWED | SocketFlag.ECH)
    place.opens(1, made)
    assert place.open() == []
    place.ends(1, made)
    assert place.sums() == []
    place.ends(2, socket())
    assert place.sums() == [(HOST, "unknown", "nothing_passed", 1)]


def test_which_of_two_that_end_together_was_metered_the_thread_tells(place: Place) -> None:
    """A process exits: both are gone in the kernel before either end is told."""
    place.uses()
    metered, other = socket(linked=9), socket()
    place.opens(1, metered)
    place.opens(2, other)
    place.table.values.clear()
    place.ends(2, other)
    place.ends(1, metered)
    assert sorted(place.sums(), key=str) == sorted([(*METERED, 1), (*NOT_PROBED, 1)], key=str)


def test_an_end_that_is_never_told_holds_back_no_other(place: Place) -> None:
    place.opens(1, socket())
    place.opens(2, socket())
    place.table.values.clear()
    place.ends(2, socket())
    assert place.sums() == [(*NOT_PROBED, 1)]


def test_what_seems_encrypted_takes_no_metered_one_from_a_connection_that_is_named(
    place: Place,
) -> None:
    place.sockets._cause_of = lambda pid, at_ns: Cause("nothing_passed", "unknown")
    place.uses()
    place.opens(1, socket())
    seems = socket(flags=FOLLOWED | SocketFlag.ECH)
    place.opens(2, seems)
    place.ends(2, seems)
    place.ends(1, socket())
    assert place.sums() == [(*METERED, 1)]


def test_one_that_the_probes_saw_late_lends_its_place_to_no_other(place: Place) -> None:
    place.uses()
    late = socket(linked=99, flags=FOLLOWED | SocketFlag.LATE)
    for number, made in enumerate((late, socket())):
        place.opens(number, made)
    assert place.open() == [(HOST, None, "probed_late", 1), (*NOT_PROBED, 1)]
    for number, made in enumerate((late, socket())):
        place.ends(number, made)
    assert place.sums() == [(HOST, None, "probed_late", 1), (*NOT_PROBED, 1)]


SEEMS_ENCRYPTED = socket(flags=FOLLOWED | SocketFlag.ECH)


def test_one_that_has_ended_untold_keeps_its_place_in_a_report(place: Place) -> None:
    """A report comes between the kernel's end of a metered connection and the news of it."""
    place.sockets._cause_of = lambda pid, at_ns: Cause("nothing_passed", "unknown")
    place.uses()
    metered = socket(linked=99)
    place.opens(1, metered)
    place.opens(2, SEEMS_ENCRYPTED)
    place.opens(3, socket(used_ns=0))
    place.table.put(3, socket(used_ns=0, opened_ns=6))  # its place was taken, and nobody was told
    place.ends(2, SEEMS_ENCRYPTED)
    del place.table.values[(1).to_bytes(8, "little")]
    assert place.open() == [(*METERED, 1)]
    assert place.sums() == []
    place.ends(1, metered)
    assert place.sums() == [(*METERED, 1)]


def test_an_end_that_waits_in_the_ring_is_taken_before_the_report(place: Place) -> None:
    """Here the number alone would have the other connection for the metered one."""
    place.uses()
    metered, other = socket(linked=99), socket()
    place.opens(1, metered)
    place.opens(2, other)
    place.opens(3, other)
    del place.table.values[(3).to_bytes(8, "little")]  # so that the next end is not judged at once
    place.ends(2, other)
    del place.table.values[(1).to_bytes(8, "little")]
    place.sockets.take_news = lambda: place.ends(1, metered)
    assert place.open() == [(*NOT_PROBED, 1)]
    assert place.sums() == [(*METERED, 1), (*NOT_PROBED, 1)]


def test_of_those_that_end_together_what_seems_encrypted_comes_last(place: Place) -> None:
    place.sockets._cause_of = lambda pid, at_ns: Cause("nothing_passed", "unknown")
    place.uses()
    place.opens(1, SEEMS_ENCRYPTED)
    place.opens(2, socket())  # metered, though no thread showed it
    place.table.values.clear()
    place.ends(1, SEEMS_ENCRYPTED)
    place.ends(2, socket())
    assert place.sums() == [(*METERED, 1)]


def test_a_search_that_ends_before_the_report_is_told(place: Place) -> None:
    known = iter([Cause("no_probes_yet", None), Cause("stack_not_probed", "rustls")])
    place.sockets._cause_of = lambda pid, at_ns: next(known)
    place.ends(1, socket())
    assert place.sums() == [(*NOT_PROBED, 1)]


def test_older_ones_are_named_once_their_address_is_known(place: Place) -> None:
    place.sockets.note_older(1, [LOCAL, b"\x09" * 16])  # process 1 is always there
    assert place.open() == []
    place.addresses.values[LOCAL] = HOST.encode()
    assert place.open() == [(HOST, None, "older_than_probes", 1)]
    fields = (protocol.USED, 0, protocol.FLAG_JOINED, 1, 0, 99, 5, 6, 0, 0)
    place.sockets.take(Record(*fields, host=HOST))
    assert place.open() == []
    ((host, stack, cause, count),) = place.sums()
    assert (host, stack, cause, count) == (*METERED, 1)


@pytest.mark.parametrize(
    ("made", "used"),
    [
        (socket(used_ns=0), False),
        (socket(used_ns=0, linked=9), True),
        (socket(used_ns=0, flags=SocketFlag.UNREAD), False),
        (socket(used_ns=0, flags=SocketFlag.UNREAD, sent=501 + HANDSHAKE_BYTES_MAX), True),
        (socket(used_ns=0, flags=SocketFlag.UNREAD, sent=2000, hello_sent=0), False),
        (socket(used_ns=0, flags=SocketFlag.UNREAD, sent=20_000, hello_sent=0), True),
    ],
)
def test_a_request_was_sent_on_it_or_not(made: Socket, used: bool) -> None:
    assert is_used(made) is used


def test_sums_are_bounded_and_what_is_over_is_counted(place: Place) -> None:
    for number in range(ROWS_MAX + 3):
        place.ends(1, socket(tgid=number + 1))
    assert len(place.sums()) == ROWS_MAX
    assert place.sockets.overlooked == 3


def test_what_our_own_proxy_opens_counts_nowhere_and_what_leads_to_it_beside_the_ratio(
    place: Place,
) -> None:
    """This process is the edge: it listens, and a worker of ours is its child."""
    worker = ("python", "-m", "halton_meter.live.proxy.worker")
    parents = ((os.getpid(), "python"),)
    name: Any = lambda made: (  # noqa: E731
        Process(pid=made.tgid, started_ns=0, argv=worker, parents=parents)
        if made.tgid == 78
        else Process(pid=made.tgid, started_ns=0)
    )
    place.sockets._name = name
    with create_server(("127.0.0.1", 0)) as edge, create_server(("127.0.0.1", 0)) as strangers:
        ports = (edge.getsockname()[1], strangers.getsockname()[1])
        flags = FOLLOWED | SocketFlag.ASKED_PROXY
        clients = [socket(port=port, address=LOCAL, flags=flags, linked=99) for port in ports]
        strangers.close()
        for number, client in enumerate(clients):
            place.opens(number, client)
            place.uses()
        place.opens(9, socket(tgid=78))
        place.uses(pid=78)
        place.sockets.name_new()
        assert (HOST, "OpenSSL", "through_local_proxy", 1) in place.open()
        place.ends(9, socket(tgid=78))
        for number, client in enumerate(clients):
            place.ends(number, client)
    assert place.sums() == [(HOST, "OpenSSL", "through_local_proxy", 1), (*METERED, 1)]
