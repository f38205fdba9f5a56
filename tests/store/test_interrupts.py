"""Ctrl-C while DuckDB works ends the command as Python would, never the process by SIGABRT."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from halton_meter.store import Store
from halton_meter.store.interrupts import held_back
from tests.support.made import made
from tests.support.waiting import WAIT_SECONDS_MAX

# Some seconds of work for DuckDB, however fast the machine is.
LONG = "SELECT count(*) FROM range(400000) a, range(400000) b WHERE a.range * b.range % 7 = 3"
CHILD = f"""
import sys
from pathlib import Path
from halton_meter.store import Store
with Store(Path(sys.argv[1])).reading() as reader:
    try:
        print("reading", flush=True)
        reader.rows({LONG!r})
    except KeyboardInterrupt:
        print("interrupted", reader.rows("SELECT 1"), flush=True)
        sys.exit(7)
"""


def test_a_long_query_is_ended_and_the_next_one_works(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    store.append([made("a")])
    store.flush()
    command = [sys.executable, "-c", CHILD, str(store.home)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "reading\n"
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while child.poll() is None and time.monotonic() < deadline:
            child.send_signal(signal.SIGINT)  # one that comes just before the query ends none
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.5)
        child.kill()
        said = child.stdout.read()
    assert (child.returncode, said) == (7, "interrupted [(1,)]\n")


def test_an_interrupt_comes_behind_the_call() -> None:
    done = []

    def call() -> None:
        with held_back():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("the call")

    with pytest.raises(KeyboardInterrupt):
        call()
    assert done == ["the call"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_stays_the_error_it_is() -> None:
    with pytest.raises(ValueError, match="ours"), held_back():
        raise ValueError("ours")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_hears_signals_himself_still_does() -> None:
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    try:
        with held_back():
            os.kill(os.getpid(), signal.SIGINT)
        assert heard == [1]
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_hold_nothing_back() -> None:
    found = []

    def look() -> None:
        with held_back():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]
