"""Every border between our processes: whatever the lesser one says, the other lives and answers.

Each border has its grammar here (which message, which fields); hypothesis puts anything into each
field, and anything at all in place of a message. After every one an honest message must be heard.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture import protocol
from capture.functions.finder_protocol import library_from_json, library_json
from capture.functions.library import Library, Probe
from capture.functions.stacks import PROGRAMS, Stack
from capture.helper.files.searches import Finder
from capture.helper.handover import Hold
from capture.helper.loop import COMMANDS_BYTES_MAX, Helper
from capture.helper.main import first_command
from capture.helper.relay.spool import SPOOL_BYTES, Receipt, Spool
from capture.helper.scope import Refused
from halton_meter import privileges, untrusted
from halton_meter.accounts import Account
from halton_meter.live.control import REQUEST_BYTES_MAX, Answering, Client, Control
from halton_meter.live.flushing import Flusher
from halton_meter.live.probes import supervisor
from halton_meter.live.probes.service import _checked
from halton_meter.live.proxy import service as proxy_service
from halton_meter.live.proxy.worker import Job as WorkerJob
from halton_meter.live.totals import Totals
from halton_meter.settings.config import Config, ConfigError
from halton_meter.untrusted import Lines, parsed

ANN = Account(1000, 1000, "ann", Path("/home/ann"), "/bin/sh")
quick = settings(max_examples=80, deadline=None)

# --- anything -------------------------------------------------------------------------------------

NUMBERS = ["1e400", "-1e400", "Infinity", "NaN", "1e308", "-0.0", "9" * 400, "9" * 5000, "-1"]
NUMBERS += [str(2**63), str(2**64), "1e-400", "true", "null"]
TEXTS = ['""', '"\\ud800"', '"\\u0000\\u001b[2J"', '"x"', '"' + "y" * 5000 + '"']
DEEP = [
    opened * depth + "1" + closed * depth
    for depth in (20, 900, 3000)
    for opened, closed in (("[", "]"), ('{"a":', "}"))
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
raw_values = st.sampled_from([*NUMBERS, *TEXTS, *DEEP]) | json_values.map(json.dumps)


def raw_message(fields: list[str]) -> st.SearchStrategy[bytes]:
    """A line: some of the grammar's fields, twice perhaps, each with anything in it."""
    pairs = st.lists(st.tuples(st.sampled_from(fields), raw_values), min_size=1, max_size=4)
    return pairs.map(
        lambda found: ("{" + ",".join(f"{json.dumps(n)}:{v}" for n, v in found) + "}\n").encode(
            "utf-8", "surrogatepass"
        )
    )


def anything(fields: list[str]) -> st.SearchStrategy[bytes]:
    return (
        raw_message(fields)
        | st.binary(max_size=200).map(lambda data: data + b"\n")
        | st.sampled_from([b"[" * 4000 + b"\n", b"\n" * 500, b"{\n" * 500, b"{}\n" * 500])
        | raw_values.map(lambda value: value.encode("utf-8", "surrogatepass") + b"\n")
    )


# --- the reader -----------------------------------------------------------------------------------


@given(anything(["a"]), st.integers(1, 400))
@quick
def test_lines_never_raise_and_read_what_follows(raw: bytes, piece: int) -> None:
    lines = Lines()
    for at in range(0, len(raw), 1 + len(raw) // piece):
        lines.feed(raw[at : at + 1 + len(raw) // piece])
    for message in lines.messages():
        json.dumps(message, allow_nan=False)
    lines.feed(b'{"honest": 1}\n')
    assert list(lines.messages()) == [{"honest": 1}]


def test_a_line_without_end_holds_no_more_than_a_line() -> None:
    lines = Lines(bytes_max=1000)
    for _ in range(100):
        lines.feed(b"x" * 900)
        assert len(lines._rest) <= 1000
    lines.feed(b'","a": 1}\n{"b": 2}\n')
    assert list(lines.messages()) == [{"b": 2}]
    assert lines.refused == 1


@pytest.mark.parametrize(
    "line",
    [b"[1]", b'{"a":1e400}', b'{"a":NaN}', b'{"a":Infinity}', b'{"a":"\xff"}', b"{'a':1}", b""]
    + [b'{"a":' + value.encode() + b"}" for value in DEEP],
)
def test_what_is_no_message(line: bytes) -> None:
    assert parsed(line) is None


def test_what_is_shown_moves_no_cursor_and_breaks_no_encoding() -> None:
    message = parsed(
        b'{"a": "\\u001b[2J\\ud800\\u202e\\u0085ok", "n": true, "m": -1, "c": {"x": 1.5}}'
    )
    assert message is not None
    assert untrusted.text(message, "a") == "?[2J???ok"
    assert untrusted.whole_number(message, "n") is None
    assert untrusted.whole_number(message, "m") is None
    assert untrusted.counts(message, "c") == {}
    assert untrusted.counts({"c": {"x": 10**30, "y": 0}}, "c") == {"x": untrusted.COUNT_MAX}


# --- metering process -> root supervisor ----------------------------------------------------------

TOTALS = Totals().as_json()
METERING = ["ready", "stop", "totals", "storing", "final", "losses", "held", "owed", "coverage"]
METERING += ["store_error", "unavailable", "refused", "loader", "capture_losses", "outages"]


def plan(home: Path) -> supervisor.Plan:
    return supervisor.Plan(ANN, home, Config(), (), service=True)


@contextlib.contextmanager
def worker(raw: bytes) -> Iterator[supervisor.Worker]:
    """A metering process that says `raw` and ends."""
    made = supervisor.Worker.__new__(supervisor.Worker)
    made._lines = Lines(supervisor.LINE_BYTES_MAX)
    read_fd, write_fd = os.pipe()
    os.set_blocking(read_fd, False)
    stdout = SimpleNamespace(fileno=lambda: read_fd)
    made._process = SimpleNamespace(stdout=stdout)  # type: ignore[assignment]
    os.set_blocking(write_fd, False)
    view = memoryview(raw)

    def more() -> None:
        nonlocal view
        with contextlib.suppress(BlockingIOError):
            while view:
                view = view[os.write(write_fd, view) :]

    made.write = more  # type: ignore[attr-defined]
    try:
        yield made
    finally:
        os.close(read_fd)
        os.close(write_fd)


def heard(watched: supervisor.Supervisor, raw: bytes) -> None:
    with worker(raw) as made:
        watched._worker = made
        for _ in range(2 + len(raw) // supervisor.MESSAGES_BYTES_MAX):
            made.write()  # type: ignore[attr-defined]
            watched.attend()
        watched._worker = None


@given(anything(METERING))
@quick
def test_nothing_that_a_metering_process_says_ends_its_supervisor(raw: bytes) -> None:
    watched = supervisor.Supervisor(plan(Path("/nonexistent")))
    heard(watched, raw)
    honest = {"ready": True, "losses": {"ring_full_bytes": 7}, "held": 2, "owed": {}}
    heard(watched, json.dumps(honest).encode() + b"\n")
    assert watched._ready
    assert watched._losses.total()["ring_full_bytes"] == 7
    for line in raw.splitlines():
        if (message := parsed(line)) is not None:
            problem = supervisor._problems(message)[0]
            assert isinstance(problem.what + problem.fix, str)
    losses = watched._losses
    next_job = watched._plan.job(lost_before=losses.before, owed=losses.owed)
    json.dumps(dataclasses.asdict(next_job), allow_nan=False)
    result = dataclasses.asdict(watched.result)
    json.dumps([result["coverage"], result["store_error"], result["losses"]], allow_nan=False)
    str(watched._current.as_json()).encode()
    watched.selector.close()


@given(
    st.dictionaries(st.sampled_from(sorted(TOTALS)), raw_values, min_size=1, max_size=3), raw_values
)
@quick
def test_totals_of_anybody_are_totals_or_refused(changed: dict[str, str], value: str) -> None:
    line = {"requests": 1, "input_tokens": 1, "output_tokens": 1, "unpriced": 0}
    line |= {"list_usd": "0.1", "marginal_usd": "0.1"}
    for name in line:
        fields = ",".join(f'"{n}":{value if n == name else json.dumps(line[n])}' for n in line)
        told = {name: json.dumps(each) for name, each in TOTALS.items()} | changed
        told["models"] = '{"m":{' + fields + "}}"
        text = ",".join(f'"{name}":{each}' for name, each in told.items())
        message = parsed(f"{{{text}}}".encode("utf-8", "surrogatepass"))
        if message is None:
            continue
        with contextlib.suppress(ValueError):
            assert len(json.dumps(Totals.of_json(message).as_json())) < 10_000


def test_a_vast_exponent_costs_no_memory() -> None:
    line = {"requests": 1, "input_tokens": 0, "output_tokens": 0, "unpriced": 0}
    vast = {**line, "list_usd": "1e999999999", "marginal_usd": "0"}
    with pytest.raises(ValueError, match="not totals"):
        Totals.of_json({**TOTALS, "models": {"m": vast}})


# --- client -> metering process -------------------------------------------------------------------


class Served:
    """A control socket with a selector of its own, turned by hand."""

    def __init__(self, home: Path, answer: Callable[..., Any]) -> None:
        self.selector = selectors.DefaultSelector()
        self.gone = 0
        self.answering = Answering(home, self.selector, answer, self._on_gone)
        self.home = home

    def _on_gone(self, client: Client) -> None:
        self.gone += 1

    def turn(self) -> None:
        while ready := self.selector.select(0):
            for key, _ in ready:
                key.data()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    def answer(client: Client, request: dict[str, Any]) -> dict[str, Any] | None:
        if request.get("ask") == "watch":
            request["pid"] + 1  # whatever a handler may stumble over
        return {"asked": request.get("ask") == "status"}

    return Served(tmp_path_factory.mktemp("served"), answer)


@given(anything(["ask", "pid"]))
@quick
def test_nothing_that_a_client_asks_ends_who_is_asked(served: Served, raw: bytes) -> None:
    control = Control(served.home, timeout_s=5)
    control._socket.setblocking(False)
    view = memoryview(raw)
    while view:
        served.turn()
        try:
            view = view[control._socket.send(view) :]
        except BlockingIOError:
            continue
        except OSError:
            break  # it was rude, and was dropped
    served.turn()
    control.close()
    served.turn()
    honest = Control(served.home, timeout_s=5)
    honest._socket.sendall(b'{"ask":"status"}\n')
    served.turn()
    assert b'"asked": true' in honest._socket.makefile("rb").readline()
    honest.close()
    served.turn()
    assert served.answering._clients == 0


def test_who_takes_no_answers_is_waited_for_once_and_dropped(served: Served) -> None:
    waits: list[int] = []

    class Slow:
        """A connection whose other end reads nothing."""

        def __init__(self) -> None:
            self.near, self.far = socket.socketpair()

        def recv(self, size: int) -> bytes:
            return b'{"ask":"x"}\n' * 100

        def sendall(self, data: bytes) -> None:
            waits.append(1)
            raise TimeoutError

        def fileno(self) -> int:
            return self.near.fileno()

        def close(self) -> None:
            self.near.close()
            self.far.close()

    slow: Any = Slow()
    client = Client(slow)
    served.selector.register(slow, selectors.EVENT_READ)
    served.answering._clients += 1
    gone = served.gone
    served.answering._on_request(client)
    assert len(waits) == 1
    assert served.gone == gone + 1


def test_a_handler_that_stumbles_is_counted_and_its_client_dropped(served: Served) -> None:
    before = served.answering.refused
    control = Control(served.home, timeout_s=5)
    control._socket.sendall(b'{"ask":"watch","pid":"x"}\n')
    served.turn()
    assert control._socket.makefile("rb").readline() == b""
    assert served.answering.refused == before + 1


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user: needs root")
def test_outside_of_the_folder_another_user_is_nobody(tmp_path: Path) -> None:
    """Where there is no folder to listen in, no mode of a file keeps others away."""
    home = tmp_path / "nothing" / "here"
    asked: list[Any] = []

    def answer(client: Client, request: dict[str, Any]) -> dict[str, Any]:
        asked.append(request)
        return {"ok": True}

    served = Served(home, answer)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.setresuid(65534, 65534, 65534)
            Control(home, timeout_s=5)._socket.sendall(b'{"ask":"status"}\n')
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    served.turn()
    assert asked == []
    ours = Control(home, timeout_s=5)
    ours._socket.sendall(b'{"ask":"status"}\n')
    served.turn()
    assert b"ok" in ours._socket.makefile("rb").readline()
    ours.close()


# --- metering process -> root helper --------------------------------------------------------------


class Commanded:
    """The helper's command loop on a real socket, its kernel side left out."""

    def __init__(self) -> None:
        self.near, far = socket.socketpair()
        self.near.setblocking(False)
        far.setblocking(False)
        ring: Any = SimpleNamespace(
            produced=lambda: 0, position=0, records=lambda: iter(()), skip_discarded=lambda: None
        )
        kernel: Any = SimpleNamespace(
            ring=ring,
            process_ring=ring,
            connections=SimpleNamespace(all_keys=list),
            programs={},
            maps=dict.fromkeys(
                ("name_locations", "proofs", "sockets", "addresses", "pausing", "paused"), -1
            ),
        )
        tree = SimpleNamespace(watch=lambda pid: None, include=lambda pid: [])
        scope: Any = SimpleNamespace(
            check_owner=self._check,
            set_hosts=self._hosts,
            tree=tree,
            restricted=False,
            reader=os.getuid(),
            in_scope=lambda pid: True,
        )
        relay = Spool.new(SPOOL_BYTES), Receipt.new()
        self.helper = made = Helper(far, Hold(), kernel, relay, scope, Finder())
        made._forwarder.connect(far)
        made.report = lambda: made._forwarder.put(  # type: ignore[method-assign]
            protocol.encode_message(protocol.REPORT, {"x": "y" * 10_000})
        )

    @staticmethod
    def _check(pid: int) -> None:
        if pid != 7:
            raise Refused(f"process {pid} belongs to another user")

    @staticmethod
    def _hosts(hosts: list[str]) -> None:
        for host in hosts:
            host.strip().encode("ascii")

    def turn(self) -> bool:
        try:
            self.helper._read_commands()
        except ConnectionError:
            return False
        self.helper._forwarder.flush()
        return True

    def replies(self) -> list[Any]:
        frames, found = protocol.FrameBuffer(), []
        with contextlib.suppress(BlockingIOError):
            while data := self.near.recv(1 << 20):
                found += [
                    protocol.decode_message(f) for k, f in frames.feed(data) if k == protocol.REPLY
                ]
                self.turn()
        return found

    def close(self) -> None:
        self.near.close()
        assert self.helper._sock is not None
        self.helper._sock.close()


@given(
    anything(["id", "do", "pid", "hosts", "from", "on", "goes_on"]),
    st.sampled_from(
        ["root", "watch", "search", "hosts", "report", "barrier", "read", "pause", "answer", ""]
    ),
)
@quick
def test_nothing_that_its_reader_says_ends_the_helper(raw: bytes, do: str) -> None:
    commanded = Commanded()
    if raw.startswith(b"{") and do:
        raw = b'{"do":"%s",' % do.encode() + raw[1:]
    view = memoryview(raw)
    while view:
        with contextlib.suppress(BlockingIOError):
            view = view[commanded.near.send(view) :]
        assert commanded.turn()
    deadline = time.monotonic() + 60
    while commanded.helper._commands.waiting and time.monotonic() < deadline:
        assert commanded.turn()
        commanded.replies()
    commanded.helper._forwarder._barriers.clear()
    commanded.near.send(protocol.encode_command({"do": "read", "from": 0, "id": 4}))
    commanded.near.send(protocol.encode_command({"do": "watch", "pid": 7, "id": 5}))
    replies: list[Any] = []
    while {"id": 5} not in replies and time.monotonic() < deadline:
        assert commanded.turn()
        replies += commanded.replies()
    assert {"id": 5} in replies
    commanded.close()


def test_who_asks_without_listening_is_not_read_from_any_more() -> None:
    """A million questions whose answers nobody takes: the helper holds one answer, not all."""
    commanded = Commanded()
    commanded.near.send(protocol.encode_command({"do": "read", "from": 0, "id": 4}))
    flood = b'{"do":"report","id":1}\n' * 10_000
    taken = 0
    for _ in range(2000):
        with contextlib.suppress(BlockingIOError):
            taken += commanded.near.send(flood)
        assert commanded.turn()
    assert commanded.helper._forwarder.waiting
    assert len(commanded.helper._forwarder._own) <= 3
    assert taken < 4 << 20, "the socket's own buffer, and no more"
    held = commanded.helper._commands
    assert sum(map(len, held._waiting)) + len(held._rest) <= 2 * COMMANDS_BYTES_MAX
    commanded.close()


def test_no_byte_behind_the_first_command_is_read_with_it() -> None:
    near, far = socket.socketpair()
    with near, far:
        near.sendall(b'{"hosts": ["a"]}\n{"do": "stop"}\n')
        assert first_command(far) == {"hosts": ["a"]}
        assert far.recv(100) == b'{"do": "stop"}\n'


# --- finder -> helper -----------------------------------------------------------------------------

LIBRARY = json.loads(library_json(Library(Stack.OPENSSL, (Probe("enter_read", 9),), "id")))


@given(st.sampled_from(sorted(LIBRARY)), raw_values)
@quick
def test_a_finder_says_a_library_or_nothing(name: str, value: str) -> None:
    fields = ",".join(f'"{n}":{value if n == name else json.dumps(LIBRARY[n])}' for n in LIBRARY)
    for text in (f"{{{fields}}}", value):
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            library = library_from_json(text)
            if library is not None:
                assert len(json.dumps(dataclasses.asdict(library), default=str)) < 20_000
                assert all(0 <= probe.offset < 2**64 for probe in library.probes)


@given(raw_values, raw_values, raw_values)
@quick
def test_a_finder_says_probes_or_nothing(program: str, offset: str, at_return: str) -> None:
    told = LIBRARY | {"probes": "PROBES"}
    text = json.dumps(told).replace('"PROBES"', f"[[{program},{offset},{at_return}]]")
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        library = library_from_json(text)
        assert library is None or library.probes[0].program in PROGRAMS


# --- proxy worker -> proxy service, client -> proxy service ---------------------------------------

WORKER = ["ready", "port", "accepted", "unavailable", "pong", "refused", "status", "serial"]
WORKER += ["final", "lost", "losses", "held", "owed", "totals", "events", "store_error"]


@given(anything(WORKER))
@quick
def test_nothing_that_a_worker_says_ends_the_edge(raw: bytes) -> None:
    async def scene() -> None:
        service = proxy_service.ProxyService(WorkerJob("/nonexistent", False), {})
        stream = asyncio.StreamReader()
        stream.feed_data(raw)
        stream.feed_data(b'{"ready":true,"port":1,"accepted":["api.x.ai"]}\n')
        stream.feed_data(b'{"lost":{"losses":{"a":1},"held":2,"owed":{}}}\n')
        stream.feed_eof()
        await service._read_messages(stream)
        assert service._state == "ready"
        assert service.losses.total()["a"] == 1
        service._state = "waiting"  # nobody to ask
        json.dumps(await service.status(), allow_nan=False)

    asyncio.run(scene())


@given(anything(["ask"]))
@quick
def test_nothing_that_a_client_asks_ends_the_proxys_service(raw: bytes) -> None:
    async def scene() -> None:
        service = proxy_service.ProxyService(WorkerJob("/nonexistent", True), {})
        for said in (raw, b'{"ask":"forget"}\n'):
            near, far = socket.socketpair()
            reader, writer = await asyncio.open_connection(sock=far, limit=REQUEST_BYTES_MAX)
            theirs, out = await asyncio.open_connection(sock=near)
            talking = asyncio.ensure_future(service._control.converse(reader, writer))
            out.write(said)
            out.write_eof()
            told = b""
            with contextlib.suppress(ConnectionError):  # hung up on, unread
                told = await theirs.read()
            await talking
            out.close()
        assert b"forgotten" in told

    asyncio.run(scene())


# --- a child with the account's rights -> its root parent -----------------------------------------


@given(raw_values | st.binary(max_size=100).map(lambda raw: raw.decode("latin-1")))
@quick
def test_a_configuration_from_anybody_is_one_or_refused(value: str) -> None:
    sound = dataclasses.asdict(Config())
    for name in sound:
        fields = ",".join(f'"{n}":{value if n == name else json.dumps(sound[n])}' for n in sound)
        for text in (f'{{"it":[{{{fields}}},["api.x.ai"]]}}', f'{{"it":{value}}}'):
            message = parsed(text.encode("utf-8", "surrogatepass"))
            if message is None:
                continue
            with contextlib.suppress(ConfigError):
                config, hosts = _checked(message["it"], ANN)
                assert isinstance(config.all_users, bool)
                assert set(hosts) <= {"api.x.ai"}


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user: needs root")
@pytest.mark.parametrize(
    "said", [b"", b"[" * 50_000, b"\xff", b"x" * (5 << 20), b'{"result": 1e400}', b"[1, null]"]
)
def test_a_child_that_says_nonsense_is_a_problem_and_no_crash(
    said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def instead(content: Any) -> str:
        return said.decode("latin-1")

    monkeypatch.setattr(privileges.json, "dumps", instead)
    monkeypatch.setattr(privileges, "become", lambda account: None)
    with pytest.raises(ConfigError, match="cannot act as ann"):
        privileges.as_account(ANN, lambda: None)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user: needs root")
def test_a_child_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privileges, "become", lambda account: None)
    monkeypatch.setattr(privileges, "ANSWER_S_MAX", 0.2)
    with pytest.raises(ConfigError, match="cannot act as ann"):
        privileges.as_account(ANN, lambda: time.sleep(600))


# --- flusher -> metering process ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"", None),
        (b'{"reason": "\\u001b[2Jx", "busy": true}\n', "?[2Jx"),
        (b"x" * 100_000, None),
        (b"[" * 100_000, None),
    ],
)
def test_what_a_flusher_says_is_bounded(
    said: bytes, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "says"
    (tmp_path / "said").write_bytes(said)
    script.write_text(f"#!/bin/sh\nexec cat {tmp_path / 'said'}\n")
    script.chmod(0o755)
    monkeypatch.setattr("halton_meter.live.flushing.sys.executable", str(script))
    flusher = Flusher(tmp_path)
    deadline = time.monotonic() + 60
    while (outcome := flusher.outcome()) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert outcome is not None
    assert outcome.reason == reason
