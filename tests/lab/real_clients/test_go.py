"""Go programs, run in the lab under the service: Debian's Go, and the toolchains of five years.

The client is built here by each toolchain. What changed between them: Conn's fields (1.21), where
the function table's addresses count from (1.26), and the table's magic (1.20).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from capture.functions.elf import Elf
from capture.functions.finder.golang import PACKAGE, READ, WRITE, Found, ServerName, find_go_tls
from tests.lab.conftest import HALTON_METER, Bench
from tests.lab.real_clients.programs import TOOLCHAINS, Program, Unavailable, fetched
from tests.lab.real_clients.results import note
from tests.lab.real_clients.test_metered import exact, recognised
from tests.support.go_programs import as_fork
from tests.support.lab.lab import Lab
from tests.support.quick import slow

pytestmark = pytest.mark.lab

CODE = Path(__file__).parents[2] / "support" / "code"
BUILD_SECONDS_MAX = 600
WAYS = {
    "plain": ((), {}),
    "stripped": (("-ldflags=-s -w",), {}),
    "pie": (("-buildmode=pie", "-ldflags=-s -w"), {}),
    "ld": (("-ldflags=-s -w -linkmode=external",), {"CGO_ENABLED": "1"}),
    "ld-pie": (("-buildmode=pie", "-ldflags=-s -w -linkmode=external"), {"CGO_ENABLED": "1"}),
    "arm": (("-ldflags=-s -w",), {"GOARCH": "arm64", "CGO_ENABLED": "0"}),
    "arm-pie": (("-buildmode=pie", "-ldflags=-s -w"), {"GOARCH": "arm64", "CGO_ENABLED": "0"}),
}


class Toolchain(NamedTuple):
    """A `go` command, and what its environment must be."""

    go: str
    environment: dict[str, str]

    def run(self, folder: Path, *arguments: str, **environment: str) -> str:
        """What `go ARGUMENTS` in a folder prints."""
        done = subprocess.run(
            [self.go, *arguments],
            cwd=CODE / folder,
            env={**os.environ, **self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS_MAX,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def build(self, target: Path, way: str) -> Path:
        """The client, built in one of the ways."""
        flags, environment = WAYS[way]
        self.run(Path("go_client"), "build", *flags, "-o", str(target), ".", **environment)
        return target


def toolchain(program: Program | None) -> Toolchain:
    """Debian's, or one that is fetched."""
    environment = {"GOFLAGS": "-mod=mod", "GOTOOLCHAIN": "local"}
    if program is None:
        found = shutil.which("go")
        if found is None:
            pytest.skip("needs Go")
        return Toolchain(found, environment)
    try:
        go = fetched(program)
    except Unavailable as reason:
        pytest.skip(f"cannot fetch {program}: {reason}")
    return Toolchain(str(go), environment | {"GOROOT": str(go.parents[1])})


def metered(
    bench: Bench, used: Toolchain, way: str, mode: tuple[str, ...], forked: bool = False
) -> None:
    """Three exchanges of a client built that way are exact."""
    version = used.run(Path("go_client"), "env", "GOVERSION").removeprefix("go")
    kind = "fork" if forked else "go"
    folder = bench.lab.folder / "programs" / "-".join((kind, version, way, *mode))
    program = used.build(folder / "client", way)
    if forked:
        program = as_fork(program, folder / "fork")
    for path in (program, folder, folder.parent):
        path.chmod(0o755)
    recognised(bench, program)
    body = {"model": "claude-haiku-4-5", "max_tokens": 9, "messages": [
        {"role": "user", "content": "lab[n=3&chunks=6&delay_ms=30]"}]}  # fmt: skip
    lab = bench.lab.environment(CA=str(bench.lab.folder / "ca.pem"), BODY=json.dumps(body))
    argv = [str(program), "https://api.anthropic.com/v1/messages", *mode]
    seen = bench.observe(argv, env=lab)
    exact(seen, 3)
    assert {line["http"] for line in seen.served} == {"http/2" if mode else "http/1.1"}
    if not forked:
        note("Go net/http", version, "crypto/tls, stripped")


@pytest.mark.parametrize("mode", [(), ("http2",)], ids=["http1", "http2"])
@pytest.mark.parametrize("way", ["stripped", slow("pie")])
def test_a_go_client_is_metered(bench: Bench, way: str, mode: tuple[str, ...]) -> None:
    metered(bench, toolchain(None), way, mode)


@pytest.mark.parametrize("mode", [(), slow(("http2",))], ids=["http1", "http2"])
def test_a_client_with_a_fork_of_crypto_tls_is_metered(bench: Bench, mode: tuple[str, ...]) -> None:
    metered(bench, toolchain(None), "stripped", mode, forked=True)


@pytest.mark.slow
@pytest.mark.parametrize("program", TOOLCHAINS, ids=str)
def test_forks_of_other_versions_are_metered(bench: Bench, program: Program) -> None:
    metered(bench, toolchain(program), "stripped", ("http2",), forked=True)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "mode"), [("stripped", ("http2",)), ("ld-pie", ())])
@pytest.mark.parametrize("program", TOOLCHAINS, ids=str)
def test_clients_of_other_toolchains_are_metered(
    bench: Bench, program: Program, way: str, mode: tuple[str, ...]
) -> None:
    metered(bench, toolchain(program), way, mode)


@pytest.mark.slow
@pytest.mark.parametrize("program", TOOLCHAINS, ids=str)
def test_every_way_to_link_is_recognised(program: Program, tmp_path: Path) -> None:
    used = toolchain(program)
    plain = used.build(tmp_path / "plain", "plain")
    with Elf(plain) as elf:
        wanted = (READ, WRITE, f"{PACKAGE}.(*Conn).Close")
        named = {s.name: elf.offset_of(s.address) for s in elf.symbols(wanted)}
    found = find_go_tls(plain)
    assert isinstance(found, Found), found
    assert dict(found.functions) == named
    config, name = map(int, used.run(Path("go_offsets"), "run", ".").split())
    for way in WAYS:
        found = find_go_tls(used.build(tmp_path / way, way))
        assert isinstance(found, Found), (way, found)
        assert found.go_version == f"go{program.version}"
        assert found.server_name == ServerName(config, name)
        assert len(found.read.returns) > 3
        assert len(found.write.returns) > 3
        assert found.machine == ("aarch64" if way.startswith("arm") else "x86_64")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["uprobes", "keylog"])
def test_a_server_s_name_that_only_the_server_sees_hides_nothing(
    lab: Lab, tmp_path_factory: pytest.TempPathFactory, way: str
) -> None:
    """ECH: the hello on the wire names who serves for many; the key log, the hello inside."""
    used = toolchain(TOOLCHAINS[-1])
    home = tmp_path_factory.mktemp("hidden")
    program = home / "client"
    used.run(Path("go_ech"), "build", "-o", str(program), ".", CGO_ENABLED="0")
    named = "127.0.0.9:443 api.anthropic.com cloudflare-ech.com"
    client = f"{program} {named} ${{SSLKEYLOGFILE:-{home}/keys}}"
    environment = lab.environment(HALTON_METER_HOME=str(home))
    run = [*HALTON_METER, "run", "--via", way, "--", "sh", "-c", f"{client} && sleep 1"]
    done = lab.run(run, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "hidden: true\n" * 3
    told = lab.run([*HALTON_METER, "events", "--json"], env=environment).stdout
    events = [json.loads(line) for line in told.splitlines()]
    assert [event["tokens"]["input"] for event in events] == [10, 20, 30]
    assert {(event["host"], event["source"]) for event in events} == {("api.anthropic.com", way)}


@pytest.mark.slow
@pytest.mark.parametrize("redact", [False, True])
def test_such_a_connection_is_recorded_and_no_other_of_that_name(
    lab: Lab, tmp_path_factory: pytest.TempPathFactory, redact: bool
) -> None:
    """Its request says whose it is; what goes to another host behind the same name is left out."""
    used = toolchain(TOOLCHAINS[-1])
    home = tmp_path_factory.mktemp("hidden")
    program, capture = home / "client", home / "it.pcapng"
    used.run(Path("go_ech"), "build", "-o", str(program), ".", CGO_ENABLED="0")
    asked = [
        f"{program} 127.0.0.9:443 {host} cloudflare-ech.com $SSLKEYLOGFILE"
        for host in ("api.anthropic.com", "www.example.org")
    ]
    environment = lab.environment(HALTON_METER_HOME=str(home))
    options = ["--redact"] if redact else []
    command = ["sh", "-c", f"{asked[0]} && {asked[1]}; sleep 1"]
    record = [*HALTON_METER, "record", str(capture), *options, "--", *command]
    done = lab.run(record, env=environment)
    assert done.returncode == 0, done.stderr
    assert "hidden: true" in done.stdout
    assert "1 connection" in done.stderr, done.stderr
    told = lab.run([*HALTON_METER, "replay", "--json", str(capture)], env=environment).stdout
    lines = [json.loads(line) for line in told.splitlines()]
    events = [line for line in lines if "tokens" in line]
    assert [event["tokens"]["input"] for event in events] == [10, 20, 30]
    assert {event["host"] for event in events} == {"api.anthropic.com"}
