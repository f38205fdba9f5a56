"""A program with OpenSSL linked into it and stripped, as C and Rust programs are shipped."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.lab.conftest import Bench
from tests.lab.real_clients.results import note
from tests.lab.real_clients.test_metered import exact, recognised
from tests.lab.test_clients import anthropic_body
from tests.support.lab.lab import Lab
from tests.support.waiting import wait_until

pytestmark = pytest.mark.lab

SOURCE = Path(__file__).parents[2] / "support" / "code" / "openssl_client.c"
HOST, PATH = "api.anthropic.com", "/v1/messages"


@pytest.fixture(scope="module")
def client(lab: Lab) -> Path:
    """Built here, with the system's libssl.a in it."""
    folder = lab.folder / "static-openssl"
    folder.mkdir(mode=0o755)
    target = folder / "openssl_client"
    command = ["gcc", "-O2", "-s", str(SOURCE), "-o", str(target)]
    command += ["-Wl,-Bstatic", "-lssl", "-lcrypto", "-Wl,-Bdynamic"]
    if shutil.which("gcc") is None or not Path("/usr/include/openssl/ssl.h").exists():
        pytest.skip("needs gcc and libssl.a: sudo apt-get install -y gcc libssl-dev")
    subprocess.run(command, check=True, timeout=120)
    return target


@pytest.mark.parametrize("how", ["plain", "ex"])
@pytest.mark.parametrize("n", [4, 5], ids=["whole", "stream"])
def test_metered_exactly(bench: Bench, client: Path, how: str, n: int) -> None:
    """Each exchange has a connection of its own; the memory of the last one is used again."""
    recognised(bench, client, str(client))
    seen = bench.observe([str(client), HOST, PATH, anthropic_body(n), "4", how])
    assert seen.output.split() == ["200"] * 4
    exact(seen, 4)
    symbols = subprocess.run(["nm", client], capture_output=True, text=True, check=False)
    assert "no symbols" in symbols.stderr
    version = subprocess.run(["openssl", "version"], capture_output=True, text=True, check=True)
    note("C program", f"OpenSSL {version.stdout.split()[1]}", "OpenSSL, static and stripped")


def test_an_altered_one_runs_on_unmetered_and_status_says_why(bench: Bench, client: Path) -> None:
    data = client.read_bytes()
    assert data.count(b"\0ssl_read_internal\0") == 1
    altered = client.with_name("altered_client")
    data = data.replace(b"\0ssl_read_internal\0", b"\0zzz_read_internal\0")
    altered.write_bytes(data + b"of another size, so not taken for the one that is known")
    altered.chmod(0o755)
    # It lives until its line is there, however long the search takes.
    body = anthropic_body(5, chunks=1_200, delay_ms=100)
    skip = len(bench.lab.ledger())
    process = bench.lab.popen(
        [str(altered), HOST, PATH, body, "1", "plain"], user=bench.lab.user, stdout=-3
    )

    def told() -> dict[str, Any] | None:
        """Its line, once the search has ended."""
        lines = (bench.service.status() or {}).get("coverage", ())
        of_it = (line for line in lines if line["pid"] == process.pid)
        return next((line for line in of_it if "searched" not in line["advice"]), None)

    try:
        line = wait_until(told, "the client in the coverage")
        assert process.poll() is None
    finally:
        process.kill()
        process.wait(60)
    assert (line["stack"], line["state"]) == ("OpenSSL", "not_recognised")
    assert line["library"] == str(altered)
    assert "0 functions may be ssl_read_internal" in line["advice"]
    assert "(build id " in line["advice"]
    assert "use `halton-meter run --via proxy`" in line["advice"]
    bench.service.settle()
    (served,) = bench.lab.ledger()[skip:]
    assert served["response_id"] not in {each["response_id"] for each in bench.service.events()}
