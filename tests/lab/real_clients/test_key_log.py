"""Real clients by their packets and key logs: exact, or named as who writes no TLS keys.

The clients of `clients.toml` are run this way by `test_table.py`; here are those whose other ways
have tests of their own. Chromium's network service is a process of its own.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from halton_meter.live.unmetered import CAUSES
from tests.lab.conftest import CLIENTS, HALTON_METER, assert_metered, stored_events
from tests.lab.real_clients.programs import BUN, CLAUDE, CODEX, GEMINI, NODE, OPENCODE, Program
from tests.lab.real_clients.results import note
from tests.lab.real_clients.table import CLIENT_SECONDS_MAX, EXACT
from tests.lab.real_clients.test_chromium import FLAGS, FOLDER, PAGE, copied, trusted_key
from tests.lab.real_clients.test_codex import EXEC, OWN_PROVIDER
from tests.lab.real_clients.test_go import toolchain
from tests.lab.real_clients.test_metered import script_beside
from tests.lab.real_clients.test_proxied import installed_with_all
from tests.lab.test_clients import PACKAGES, anthropic_body, curl, said_version, version_of
from tests.lab.test_key_log import as_sudo, run
from tests.lab.test_key_log import home as home
from tests.support.lab.lab import Lab

pytestmark = [pytest.mark.lab, pytest.mark.slow]
NEEDS_CHROMIUM = pytest.mark.skipif(
    not (FOLDER / "chromium").exists(), reason="needs Debian's chromium"
)
Install = Callable[[Program], Path]
NO_KEYS = "no_keys"


def by_key_log(
    lab: Lab, home: Path, argv: Sequence[str], expected: str = EXACT, **environment: str | None
) -> str:
    """Runs a client so; what it must come to did, as the table of clients has it.

    A variable that is None is left out. What writes no keys is named with its host, and counted.
    """
    skip, summary = len(lab.ledger()), home / "summary.json"
    command = [*HALTON_METER, "run", "--via", "keylog", "--json-summary", str(summary), "--"]
    given = as_sudo(lab, home) | environment
    told_to = {name: value for name, value in given.items() if value is not None}
    done = lab.run([*command, *argv], env=told_to, timeout_s=CLIENT_SECONDS_MAX)
    assert done.returncode == 0, done.stderr
    served = [line for line in lab.ledger()[skip:] if line["state"] == "done"]
    told = json.loads(summary.read_text())
    assert served, done.stderr
    if expected == EXACT:
        assert_metered(served, stored_events(lab, home / "data"), "keylog")
        assert "not metered" not in done.stderr, done.stderr
        return EXACT
    assert told["requests"] == 0
    parts: list[dict[str, Any]] = told["connections"]["parts"]
    assert {part["cause"] for part in parts} == {expected}, parts
    hosts = {line["host"] for line in served}
    assert hosts <= {part["host"] for part in parts}, (hosts, parts)
    assert f"{CAUSES[expected]}. Use: sudo halton-meter run -- CMD" in done.stderr
    return f"named: {CAUSES[expected]}"


@pytest.mark.parametrize(
    ("client", "modes"),
    [
        ("anthropic", "sync,async-stream"),
        ("openai", "sync,async-stream"),
        ("groq", "sync,async-stream"),
        ("gemini", "sync,async-stream"),
        ("requests", "sync,stream"),
        ("aiohttp", "async,async-stream"),
        ("httpx2", "async,async-stream"),
    ],
)
def test_python_client(lab: Lab, home: Path, python: str, client: str, modes: str) -> None:
    argv = [python, str(CLIENTS / "sdk.py"), client, modes, "1", "4"]
    result = by_key_log(lab, home, argv)
    package = PACKAGES.get(client, client)
    version = version_of(lab, python, package)
    note(f"{package} (Python)", version, "OpenSSL, shared", "key log", result)


@pytest.mark.parametrize(
    ("who", "package"), [("xai", "xai-sdk"), ("gemini", "google-ai-generativelanguage")]
)
def test_grpc(lab: Lab, home: Path, python: str, who: str, package: str) -> None:
    """gRPC writes keys where its program asks for it; the SDKs do not."""
    client = lab.folder / "grpc_client.py"
    client.write_bytes(Path(__file__).with_name("grpc_client.py").read_bytes())
    client.chmod(0o644)
    trust = str(lab.folder / "ca.pem")
    argv = [python, str(client), who, "3", "whole"]
    result = by_key_log(lab, home, argv, NO_KEYS, GRPC_DEFAULT_SSL_ROOTS_FILE_PATH=trust)
    version = version_of(lab, python, package)
    note(f"{package} (gRPC)", version, "BoringSSL of grpcio, stripped", "key log", result)


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_curl(lab: Lab, home: Path, version: str) -> None:
    result = by_key_log(lab, home, [*curl(version), "-d", anthropic_body(3)])
    note("curl", said_version(["curl", "--version"]), "OpenSSL, shared", "key log", result)


def test_wget(lab: Lab, home: Path) -> None:
    """Debian's has GnuTLS, which writes keys for whoever uses it."""
    words = [f"--ca-certificate={lab.folder}/ca.pem", "--header=content-type: application/json"]
    url = "https://api.anthropic.com/v1/messages"
    argv = ["wget", "-qO-", *words, f"--post-data={anthropic_body(3)}", url]
    result = by_key_log(lab, home, argv)
    note("wget", said_version(["wget", "--version"]), "GnuTLS, shared", "key log", result)


@pytest.mark.parametrize("client", ["fetch", "https"])
@pytest.mark.parametrize("program", [None, *NODE], ids=str)
def test_node(
    lab: Lab, home: Path, installed: Install, program: Program | None, client: str
) -> None:
    node = "node" if program is None else str(installed(program))
    result = by_key_log(lab, home, [node, str(CLIENTS / "node.mjs"), client, "1", "6", "stream"])
    if program is None:
        note("Node.js", said_version(["node", "--version"]), "OpenSSL", "key log", result)
    else:
        stack = "OpenSSL, static with symbols"
        note("Node.js", program.version, stack, "key log", result)


@pytest.mark.parametrize("program", GEMINI, ids=str)
def test_gemini_prompt(lab: Lab, home: Path, program: Program) -> None:
    gemini = installed_with_all(lab, program, 1)
    command = ["node", str(gemini), "--skip-trust", "--model", "gemini-2.5-flash"]
    # Node writes its keys some 100 ms later, and none when it has ended before: an answer takes as
    # long as a real one.
    result = by_key_log(lab, home, [*command, "-p", "say lab[n=5&chunks=6&delay_ms=300]"])
    note("Gemini CLI", program.version, "OpenSSL in Node", "key log", result)


STRIPPED = "BoringSSL, static and stripped"


@pytest.mark.parametrize("program", BUN[-1:], ids=str)
def test_bun_fetch(lab: Lab, home: Path, installed: Install, program: Program) -> None:
    bun = installed(program)
    argv = [str(bun), str(script_beside(bun)), "1", "6"]
    result = by_key_log(lab, home, argv, NO_KEYS)
    note("Bun", program.version, STRIPPED, "key log", result)


@pytest.mark.parametrize("program", CLAUDE[-1:], ids=str)
def test_claude_print(lab: Lab, home: Path, installed: Install, program: Program) -> None:
    argv = [str(installed(program)), "-p", "say lab[n=5&chunks=6]", "--model", "claude-sonnet-4-5"]
    result = by_key_log(lab, home, argv, NO_KEYS)
    note("Claude Code", program.version, STRIPPED, "key log", result)


@pytest.mark.parametrize("program", OPENCODE[-1:], ids=str)
def test_opencode_run(lab: Lab, home: Path, installed: Install, program: Program) -> None:
    argv = [
        str(installed(program)),
        "run",
        "--model",
        "anthropic/claude-sonnet-4-5",
        "say lab[n=7]",
    ]
    result = by_key_log(lab, home, argv, NO_KEYS)
    note("opencode", program.version, STRIPPED, "key log", result)


@pytest.mark.usefixtures("trusted_by_the_system")
@pytest.mark.parametrize("way", ["HTTPS", "HTTPS by rustls", "WebSocket"])
@pytest.mark.parametrize("program", CODEX[-1:], ids=str)
def test_codex_exec(lab: Lab, home: Path, program: Program, way: str) -> None:
    codex = installed_with_all(lab, program, 1)
    own_provider = () if way == "WebSocket" else OWN_PROVIDER
    argv = [str(codex), *EXEC, *own_provider, "say lab[n=5&chunks=6]"]
    trust = lab.environment()["SSL_CERT_FILE"]
    untold = {name: None for name, value in lab.environment().items() if value == trust}
    less = {} if way == "HTTPS by rustls" else untold
    result = by_key_log(lab, home, argv, NO_KEYS, CODEX_API_KEY="made-up", **less)
    stack = {
        "HTTPS": "OpenSSL, static and stripped",
        "HTTPS by rustls": "rustls",
        "WebSocket": "rustls, static and stripped",
    }[way]
    version = program.version.partition("-")[0]
    note(f"Codex CLI, {way}", version, stack, "key log", result)


def test_a_go_client(lab: Lab, home: Path) -> None:
    used = toolchain(None)
    program = used.build(lab.folder / "programs" / "go-by-key-log" / "client", "stripped")
    for path in (program, program.parent, program.parents[1]):
        path.chmod(0o755)
    body = {"model": "claude-haiku-4-5", "messages": [{"role": "user", "content": "lab[n=3]"}]}
    url, trust = "https://api.anthropic.com/v1/messages", str(lab.folder / "ca.pem")
    result = by_key_log(lab, home, [str(program), url], NO_KEYS, CA=trust, BODY=json.dumps(body))
    version = used.run(Path("go_client"), "env", "GOVERSION").removeprefix("go")
    note("Go net/http", version, "crypto/tls, stripped", "key log", result)


@pytest.mark.skipif(shutil.which("keytool") is None, reason="needs a JDK 17")
def test_java_http_client(lab: Lab, home: Path) -> None:
    """Keys would need an agent in the process."""
    store = home / "trust.p12"
    trust = [
        "keytool",
        "-importcert",
        "-noprompt",
        "-keystore",
        str(store),
        "-storepass",
        "made-up",
    ]
    done = lab.run([*trust, "-file", str(lab.folder / "ca.pem")])
    assert done.returncode == 0, done.stderr
    store.chmod(0o644)
    options = f"-Djavax.net.ssl.trustStore={store} -Djavax.net.ssl.trustStorePassword=made-up"
    argv = ["java", str(CLIENTS / "Ask.java"), "1", "6"]
    result = by_key_log(lab, home, argv, NO_KEYS, JAVA_TOOL_OPTIONS=options)
    said = subprocess.run(["java", "-version"], capture_output=True, text=True, check=True).stderr
    version = re.search(r'version "([^"]+)"', said)
    assert version is not None
    note("Java HttpClient", version[1], "JSSE", "key log", result)


# Over QUIC to this host from its first request on.
QUIC_FLAGS = [flag for flag in FLAGS if flag != "--disable-quic"]
QUIC_FLAGS += ["--enable-quic", "--origin-to-force-quic-on=api.anthropic.com:443"]


def chromium_argv(lab: Lab, home: Path, flags: Sequence[str]) -> list[str]:
    """Chromium on a page that asks providers, trusting the lab's server."""
    chromium, page = copied(lab), lab.folder / "fetch.html"
    page.write_bytes(PAGE.read_bytes())
    page.chmod(0o644)
    profile = home / "profile"
    profile.mkdir()
    os.chown(profile, lab.user.uid, lab.user.gid)
    trust = f"--ignore-certificate-errors-spki-list={trusted_key(lab)}"
    return [str(chromium), *flags, trust, f"--user-data-dir={profile}", page.as_uri()]


@NEEDS_CHROMIUM
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


@NEEDS_CHROMIUM
def test_chromium_s_http3_without_keys_is_named(lab: Lab, home: Path) -> None:
    keyless = ["env", "-u", "SSLKEYLOGFILE", *chromium_argv(lab, home, QUIC_FLAGS)]
    done, told = run(lab, home, *keyless)
    assert done.returncode == 0, done.stderr
    # Its process may have ended before it is looked for.
    found = {(row["host"], row["cause"]) for row in told["unmetered"]}
    assert found == {("api.anthropic.com", "no_keys")}
    assert told["connections"]["metered"] == 0


@NEEDS_CHROMIUM
def test_chromium_is_metered(lab: Lab, home: Path) -> None:
    skip = len(lab.ledger())
    done, told = run(lab, home, *chromium_argv(lab, home, FLAGS))
    assert done.returncode == 0, done.stderr
    assert html.unescape(done.stdout).count("<200>") == 6
    assert_metered(lab.ledger()[skip:], stored_events(lab, home / "data"), "keylog")
    assert told["losses"] == {}
    asked = [FOLDER / "chromium", "--version"]
    said = subprocess.run(asked, capture_output=True, text=True, check=True)
    version = re.search(r"[\d.]+", said.stdout)
    assert version is not None
    note("Chromium", version[0], STRIPPED, "key log")
