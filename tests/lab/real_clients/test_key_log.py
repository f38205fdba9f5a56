"""A browser by packets and its key log: Chromium, whose network service is a process of its own."""

from __future__ import annotations

import html
import os
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


# Over QUIC to this host from its first request on.
QUIC_FLAGS = [flag for flag in FLAGS if flag != "--disable-quic"]
QUIC_FLAGS += ["--enable-quic", "--origin-to-force-quic-on=api.anthropic.com:443"]


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


def test_chromium_s_http3_is_metered(lab: Lab, home: Path) -> None:
    """Its hello is cut over several packets, in pieces of no order."""
    skip = len(lab.ledger())
    done, told = run(lab, home, *chromium_argv(lab, home, QUIC_FLAGS))
    assert done.returncode == 0, done.stderr
    assert html.unescape(done.stdout).count("<200>") == 6
    served = lab.ledger()[skip:]
    assert "http/3" in {line["http"] for line in served}
    events = stored_events(lab, home / "data")
    assert_metered(served, events, "keylog")
    assert {event["process"].rpartition("/")[2] for event in events} == {"chromium"}
    assert told["losses"] == {}


def test_chromium_s_http3_without_keys_is_named(lab: Lab, home: Path) -> None:
    keyless = ["env", "-u", "SSLKEYLOGFILE", *chromium_argv(lab, home, QUIC_FLAGS)]
    done, told = run(lab, home, *keyless)
    assert done.returncode == 0, done.stderr
    # Its process may have ended before it is looked for.
    found = {(row["host"], row["cause"]) for row in told["unmetered"]}
    assert found == {("api.anthropic.com", "no_keys")}
    assert told["connections"]["metered"] == 0


def test_chromium_is_metered(lab: Lab, home: Path) -> None:
    skip = len(lab.ledger())
    done, told = run(lab, home, *chromium_argv(lab, home, FLAGS))
    assert done.returncode == 0, done.stderr
    assert html.unescape(done.stdout).count("<200>") == 6
    assert_metered(lab.ledger()[skip:], stored_events(lab, home / "data"), "keylog")
    assert told["losses"] == {}
