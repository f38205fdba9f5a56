"""Chromium, and with it Electron: BoringSSL in a network service, a process of its own.

Debian's Chromium runs headless in the lab, as a copy with a profile of its own. No registry ships
an Electron program, so that none is run here.
"""

from __future__ import annotations

import base64
import hashlib
import html
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from capture.functions.finder.boringssl import Found, find_boringssl
from tests.lab.conftest import Bench, assert_metered
from tests.lab.real_clients.results import note
from tests.lab.real_clients.test_metered import recognised
from tests.support.lab.lab import Lab

FOLDER = Path("/usr/lib/chromium")
PAGE = Path(__file__).with_name("fetch.html")
pytestmark = [
    pytest.mark.lab,
    pytest.mark.slow,
    pytest.mark.skipif(not (FOLDER / "chromium").exists(), reason="needs Debian's chromium"),
]
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
    --disable-background-networking --disable-component-update --disable-sync
    --disable-web-security --virtual-time-budget=20000 --dump-dom""".split()


def test_it_is_recognised_by_structure() -> None:
    found = find_boringssl(FOLDER / "chromium")
    assert isinstance(found, Found), found
    assert set(found.functions) == {"SSL_read", "SSL_write", "SSL_set_tlsext_host_name"}


def copied(lab: Lab) -> Path:
    """A copy of the program, which nobody else runs; what it only reads stays where it is."""
    folder = lab.folder / "programs" / "chromium"
    if (folder / "chromium").exists():
        return folder / "chromium"
    folder.mkdir(parents=True)
    for each in FOLDER.iterdir():
        if each.name == "chromium":
            shutil.copy2(each, folder)
        else:
            (folder / each.name).symlink_to(each)
    for each in (folder, folder.parent):
        each.chmod(0o755)
    return folder / "chromium"


def trusted_key(lab: Lab) -> str:
    """The server's public key, as Chromium wants to be told of one that it shall trust."""
    certificate = x509.load_pem_x509_certificate((lab.folder / "leaf.pem").read_bytes())
    key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(hashlib.sha256(key).digest()).decode()


def test_what_a_page_fetches_is_metered(bench: Bench) -> None:
    lab = bench.lab
    chromium = copied(lab)
    recognised(bench, chromium)
    page = lab.folder / "fetch.html"
    page.write_bytes(PAGE.read_bytes())
    page.chmod(0o644)
    profile = lab.user.home / "profile"
    profile.mkdir()
    os.chown(profile, lab.user.uid, lab.user.gid)
    trust = f"--ignore-certificate-errors-spki-list={trusted_key(lab)}"
    argv = [str(chromium), *FLAGS, trust, f"--user-data-dir={profile}", page.as_uri()]
    seen = bench.observe(argv)
    assert html.unescape(seen.output).count("<200>") == 6
    assert len(seen.served) == 6
    assert {line["http"] for line in seen.served} == {"http/2"}
    assert_metered(seen.served, seen.events)
    (pid,) = {event["pid"] for event in seen.events}
    assert pid != seen.pid
    for event in seen.events:
        assert "network.mojom.NetworkService" in " ".join(event["argv"])
        assert event["project"] == "acme"
    said = subprocess.run([chromium, "--version"], capture_output=True, text=True, check=True)
    version = re.search(r"[\d.]+", said.stdout)
    assert version is not None
    note("Chromium", version[0], "BoringSSL, static and stripped")
