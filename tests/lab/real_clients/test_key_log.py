"""A browser by packets and its key log: Chromium, whose network service is a process of its own."""

from __future__ import annotations

import html
import os
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


def test_chromium_is_metered(lab: Lab, home: Path) -> None:
    chromium, page = copied(lab), lab.folder / "fetch.html"
    page.write_bytes(PAGE.read_bytes())
    page.chmod(0o644)
    profile = home / "profile"
    profile.mkdir()
    os.chown(profile, lab.user.uid, lab.user.gid)
    trust = f"--ignore-certificate-errors-spki-list={trusted_key(lab)}"
    skip = len(lab.ledger())
    argv = [str(chromium), *FLAGS, trust, f"--user-data-dir={profile}", page.as_uri()]
    done, told = run(lab, home, *argv)
    assert done.returncode == 0, done.stderr
    assert html.unescape(done.stdout).count("<200>") == 6
    assert_metered(lab.ledger()[skip:], stored_events(lab, home / "data"), "keylog")
    assert told["losses"] == {}
