"""TLS that is not OpenSSL's: metered where its functions have names, else named with its host."""

from __future__ import annotations

import ctypes.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.lab.conftest import CLIENTS, Bench, assert_metered
from tests.lab.real_clients.results import note
from tests.lab.test_clients import anthropic_body, said_version
from tests.support.waiting import wait_until

pytestmark = pytest.mark.lab

HOST, URL = "api.anthropic.com", "https://api.anthropic.com/v1/messages"
JSON = "content-type: application/json"


def test_wget(bench: Bench) -> None:
    """Debian's has GnuTLS."""
    authority = bench.lab.environment()["SSL_CERT_FILE"]
    argv = ["wget", "-qO-", f"--ca-certificate={authority}", f"--header={JSON}"]
    seen = bench.observe([*argv, f"--post-data={anthropic_body(3)}", URL])
    assert len(seen.served) == 1
    assert_metered(seen.served, seen.events)
    note("wget", said_version(["wget", "--version"]), "GnuTLS, shared")


@pytest.mark.parametrize("version", ["1.1", "2"])
@pytest.mark.parametrize("stack", ["gnutls", "nss"])
def test_libcurl(bench: Bench, stack: str, version: str) -> None:
    library = f"libcurl-{stack}.so.4"
    if ctypes.util.find_library(f"curl-{stack}") is None:
        pytest.skip(f"{library} is not installed")
    authority = bench.lab.environment()["SSL_CERT_FILE"]
    script = [bench.python, str(CLIENTS / "libcurl.py"), library, URL, authority, "4", version]
    seen = bench.observe([*script, anthropic_body(3)])
    assert len(seen.served) == 4
    assert_metered(seen.served, seen.events)
    assert {event["pid"] for event in seen.events} == {seen.pid}


def speaks(folder: Path, *flags: str) -> Path:
    program = folder / "speaks"
    command = ["gcc", "-O1", str(CLIENTS / "speaks.c"), "-o", str(program), *flags]
    if shutil.which("gcc") is None or subprocess.run(command, check=False).returncode:
        pytest.skip("the library is not installed for development")
    return program


MBEDTLS = ("-lmbedtls", "-lmbedx509", "-lmbedcrypto")


@pytest.mark.parametrize("flags", [("-DUSE_WOLFSSL", "-lwolfssl"), MBEDTLS])
def test_a_shared_library(bench: Bench, flags: tuple[str, ...]) -> None:
    authority = bench.lab.environment()["SSL_CERT_FILE"]
    program = speaks(bench.lab.folder, *flags)
    seen = bench.observe([str(program), HOST, authority, anthropic_body(3)])
    assert len(seen.served) == 1
    assert_metered(seen.served, seen.events)


def test_what_is_linked_into_a_stripped_program_is_named_when_it_has_ended(bench: Bench) -> None:
    authority = bench.lab.environment()["SSL_CERT_FILE"]
    program = speaks(bench.lab.folder, "-s", "-Wl,-Bstatic", *MBEDTLS, "-Wl,-Bdynamic")
    seen = bench.observe([str(program), HOST, authority, anthropic_body(3)])
    assert len(seen.served) == 1
    assert seen.events == []

    def line() -> dict[str, str] | None:
        found = bench.service.status() or {"coverage": []}
        return next((each for each in found["coverage"] if each["pid"] == seen.pid), None)

    said = wait_until(line, "its line in status")
    assert (said["process"], said["host"]) == (str(program), HOST)
    assert (said["stack"], said["state"]) == ("mbedTLS", "unsupported")
    assert "run --via proxy" in said["advice"]
    assert "count this" not in json.dumps(said)
