"""macOS's ways of naming a socket's owner, read from outputs of its commands."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from capture.processes.arguments import REDACTED, without_secrets
from capture.processes.roots import name_of_root, root_name_by
from proxy_fallback.edge.client_socket import ClientSocket
from proxy_fallback.mitm.owner_macos import (
    arguments_in,
    folder_in_lsof,
    pid_in_lsof,
    process_of,
    processes_in_ps,
)

CLIENT = ClientSocket("127.0.0.1", 52341, 8081)
# The proxy's end of the connection is listed, too, and other connections to it.
LSOF = """p812
f11
n127.0.0.1:8081->127.0.0.1:52341
p4711
f23
n127.0.0.1:52341->127.0.0.1:8081
p4712
f9
n127.0.0.1:5234->127.0.0.1:52341
"""
LSOF_IPV6 = "p4711\nf23\nn[::1]:52341->[::1]:8081\n"
CWD = "p4711\nfcwd\nn/Users/ada/src/my app\n"
PS = """    1     0     0 root             Mon Nov 23 08:01:02 2026     /sbin/launchd
  640     1   501 ada              Mon Nov 23 08:05:00 2026     /Applications/My Term.app/Terminal
  700   640   501 ada              Tue Nov  3 09:00:00 2026     -zsh
 4711   700   501 ada              Tue Nov 24 05:00:09 2026     /Users/ada/.local/bin/claude
a line of noise
"""
EXE = b"/Users/ada/.local/bin/claude"
ARGV = [b"claude", b"-p", b"say hello to Bob", b"--model", b"opus"]
ENVIRONMENT = [b"PATH=/bin", b"ANTHROPIC_API_KEY=secret", b"HALTON_PROJECT=harbour"]


def procargs(argv: list[bytes], environment: list[bytes]) -> bytes:
    """As KERN_PROCARGS2 lays it out: a count, the path, padding, strings, and what follows them."""
    strings = b"".join(word + b"\0" for word in (*argv, *environment))
    count = len(argv).to_bytes(4, "little")
    return count + EXE + b"\0\0\0\0\0" + strings + b"\0executable_path=x\0"


def test_the_clients_end_is_told_from_the_proxys() -> None:
    assert pid_in_lsof(LSOF, CLIENT) == 4711
    assert pid_in_lsof(LSOF, ClientSocket("127.0.0.1", 8081, 52341)) == 812
    assert pid_in_lsof(LSOF_IPV6, ClientSocket("::1", 52341, 8081)) == 4711


def test_a_port_that_two_sockets_share_names_the_one_connected_to_the_edge() -> None:
    shared = "p812\nf14\nn127.0.0.1:52341->127.0.0.1:60001\n" + LSOF
    assert pid_in_lsof(shared, CLIENT) == 4711
    assert pid_in_lsof(shared, ClientSocket("127.0.0.1", 52341, 60001)) == 812


@pytest.mark.parametrize("output", ["", "p12\n", "n127.0.0.1:52341->1.2.3.4:5\n", "px\nfoo"])
def test_no_such_connection_is_nobodys(output: str) -> None:
    assert pid_in_lsof(output, CLIENT) is None


def test_a_folder_with_a_space() -> None:
    assert folder_in_lsof(CWD) == "/Users/ada/src/my app"
    assert folder_in_lsof("") is None


def test_ps_with_paths_that_have_spaces_and_lines_that_are_none() -> None:
    found = processes_in_ps(PS)
    assert list(found) == [1, 640, 700, 4711]
    assert found[640].exe == "/Applications/My Term.app/Terminal"
    assert (found[4711].parent, found[4711].uid, found[4711].user) == (700, 501, "ada")
    assert found[4711].started_ns - found[640].started_ns == (21 * 3600 - 5 * 60 + 9 - 0) * 10**9


def test_arguments_with_spaces_stay_whole() -> None:
    exe, argv, project = arguments_in(procargs(ARGV, ENVIRONMENT))
    assert exe == EXE.decode()
    assert argv == tuple(word.decode() for word in ARGV)
    assert project == "harbour"


@pytest.mark.parametrize("raw", [b"", b"\1", b"\xff\xff\xff\xffx\0y\0", b"\5\0\0\0/x\0a\0"])
def test_arguments_that_may_not_be_read_are_none(raw: bytes) -> None:
    assert arguments_in(raw)[1:] == ((), None)


def answers(asked: Sequence[str]) -> str:
    if asked[0] == "/bin/ps":
        return PS
    return CWD if "cwd" in asked else LSOF


def test_all_of_it_gives_the_process_without_what_was_said() -> None:
    found = process_of(
        CLIENT,
        without_secrets,
        root_name_by,
        answers,
        lambda pid: procargs(ARGV, ENVIRONMENT) if pid == 4711 else b"",
    )
    assert found is not None
    assert (found.pid, found.exe, found.user, found.uid) == (4711, EXE.decode(), "ada", 501)
    assert found.argv == ("claude", "-p", REDACTED, "--model", "opus")
    assert found.cwd == "/Users/ada/src/my app"
    assert found.parents == ((700, "-zsh"), (640, "Terminal"), (1, "launchd"))
    assert found.project_hint == "harbour"
    started_ns = processes_in_ps(PS)[4711].started_ns
    assert found.root == name_of_root(4711, started_ns)  # what is above it is a shell
    assert "secret" not in repr(found)
    assert "Bob" not in repr(found)


def test_a_client_that_is_gone_is_nobody() -> None:
    nobody = process_of(CLIENT, without_secrets, root_name_by, lambda asked: "", lambda pid: b"")
    assert nobody is None
