"""A browser by packets and its key log: Chromium, whose network service is a process of its own."""

from __future__ import annotations

import html
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.lab.conftest import assert_metered, stored_events
from tests.lab.real_clients.test_chromium import FLAGS, FOLDER, PAGE, copied, trusted_key
from tests.lab.test_key_log import home as home
from tests.lab.test_key_log import run
from tests.support.lab.lab import Lab

pytestmark = [
    pytest.mark.lab,
    pytest.mark.slow,
    pytest.mark.skipif(not (FOLDER / "chromium").exists(), reason="needs Debian's chromium"),
]


# Takes what comes and answers nothing, so that a client goes on sending its hello.
SILENT = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
    server.bind(("127.0.0.1", 443))
    print("listens", flush=True)
    while True:
        server.recv(65535)
"""


def chromium_argv(lab: Lab, home: Path, flags: Sequence[str]) -> list[str]:
    """Chromium on a page that asks providers, trusting the lab's server."""
    chromium, page = _copy(lab), lab.folder / "fetch.html"
    page.write_bytes(PAGE.read_bytes())
    page.chmod(0o644)
    profile = home / "profile"
    profile.mkdir()
    os.chown(profile, lab.user.uid, lab.user.gid)
    trust = f"--ignore-certificate-errors-spki-list={trusted_key(lab)}"
    return [str(chromium), *flags, trust, f"--user-data-dir={profile}", page.as_uri()]


def _copy(lab: Lab) -> Path:
    made = lab.folder / "programs" / "chromium" / "chromium"
    return made if made.exists() else copied(lab)


def test_chromium_s_quic_is_counted_by_host_and_program(lab: Lab, home: Path) -> None:
    """Its hello is cut over several packets, in pieces of no order."""
    flags = [flag for flag in FLAGS if flag != "--disable-quic"]
    flags += ["--enable-quic", "--origin-to-force-quic-on=api.anthropic.com:443"]
    server = lab.popen([sys.executable, "-c", SILENT], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "listens\n"
        done, told = run(lab, home, *chromium_argv(lab, home, flags))
    finally:
        server.kill()
        server.wait()
    [quic] = [row for row in told["unmetered"] if row["cause"] == "quic"]
    assert (quic["host"], quic["program"].rpartition("/")[2]) == ("api.anthropic.com", "chromium")
    assert "to api.anthropic.com" in done.stderr
    assert "QUIC (HTTP/3) is not metered. Use: halton-meter run --via proxy" in done.stderr


def test_chromium_is_metered(lab: Lab, home: Path) -> None:
    skip = len(lab.ledger())
    done, told = run(lab, home, *chromium_argv(lab, home, FLAGS))
    assert done.returncode == 0, done.stderr
    assert html.unescape(done.stdout).count("<200>") == 6
    assert_metered(lab.ledger()[skip:], stored_events(lab, home / "data"), "keylog")
    assert told["losses"] == {}
