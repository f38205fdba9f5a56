"""The programs behind the proxy's clients: process, name, TLS library.

Read from the kernel and from /proc as the user, so what another user runs is not known. Of an
environment HALTON_PROJECT is looked at, and whether the variables that say what to trust are ours.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from proxy_fallback.setup.variables import Holds, SetBy, names

if TYPE_CHECKING:
    from halton_meter.model import Process
    from proxy_fallback.edge.client_socket import ClientSocket

# Options by which a program is told what to trust: with one, it is another program to us.
TRUST_OPTIONS = frozenset(
    {
        *("--cacert", "--capath", "--pinnedpubkey", "--proxy-cacert"),  # curl
        *("--ca-certificate", "--ca-directory", "--config", "--no-config"),  # wget
        *("--x509cafile", "--tofu", "-CAfile", "-CApath"),  # gnutls-cli, openssl
        *("--cert", "--verify", "--use-openssl-ca", "--use-bundled-ca"),  # HTTPie, Node
    }
)
# The start of the name of the folder in which a run's own files are.
RUN_FOLDER = "halton-meter-"
CERTIFICATE = "mitmproxy-ca-cert.pem"
_TRUST_VARIABLES = names(Holds.BUNDLE, Holds.EXTRA_ROOTS, Holds.WGETRC, set_by=SetBy.RUN)
_ENVIRONMENT_BYTES_MAX = 1 << 20
_REMEMBERED_MAX = 1024
# (pid, start in ns since 1970) -> the variables about trust that are not ours; None: not known.
_strange: dict[tuple[int, int], Sequence[str] | None] = {}
_INTERPRETER = re.compile(
    r"(python|pypy|node|nodejs|bun|deno|ruby|perl|php|lua|luajit|julia|java|mono|Rscript|tclsh"
    r"|sh|bash|dash|zsh|fish)[\d.]*"
)
# Names of libraries' files, and the TLS library that each holds. The first that is mapped is it.
_LIBRARIES: Mapping[str, str] = {
    "libgnutls": "GnuTLS",
    "libssl3.so": "NSS",
    "libmbedtls": "mbedTLS",
    "libwolfssl": "wolfSSL",
    "libjvm": "JSSE",
    "libssl": "OpenSSL",
    "crypto.so": "Erlang ssl",
}
_LIBRARY = re.compile("|".join(re.escape(name) for name in _LIBRARIES))


def process_of(end: ClientSocket) -> Process | None:
    """The process behind a client's socket, or None."""
    if sys.platform == "darwin":
        from capture.processes.arguments import without_secrets
        from capture.processes.roots import root_name_by
        from proxy_fallback.mitm import owner_macos

        return owner_macos.process_of(end, without_secrets, root_name_by)
    from capture.processes.proc import read_process
    from proxy_fallback.edge.owner import owner_pid

    asked_ns = time.time_ns()
    pid = owner_pid(end)
    process = None if pid is None else read_process(pid)
    # It had the socket by then: a process that began later only has the same pid.
    if process is None or process.started_ns > asked_ns:
        return None
    _remember_environment(process)
    return process


def program_of(process: Process | None) -> str | None:
    """What to call the program of a process: its file, and for an interpreter the script too.

    Each program decides which CAs it trusts, and a script decides apart from its interpreter. A
    script in a hidden folder is named without the folder. Options that say what to trust are
    named without their values.
    """
    if process is None or process.exe is None:
        return None
    return " ".join([_file_of(process), *trust_options(process)])


def client_of(process: Process | None, in_run: bool) -> str | None:
    """`program_of`; in a run also which of our variables about trust the process does not have.

    A refusal says something about programs that were told the same, and about no others. Values are
    left out: a program that names another file each time would be another one each time, and fail.
    """
    program = program_of(process)
    if program is None or process is None or not in_run:
        return program
    strange = _strange.get((process.pid, process.started_ns), ())
    if strange is None:
        return None
    if not strange:
        return program
    all_of_them = len(strange) == len(_TRUST_VARIABLES)
    return f"{program} without our {'trust variables' if all_of_them else ', '.join(strange)}"


def _remember_environment(process: Process) -> None:
    """Note which variables about trust a process does not have as `run` sets them.

    A process that refuses our certificate is gone before that is told.
    """
    if len(_strange) >= _REMEMBERED_MAX:
        _strange.pop(next(iter(_strange)), None)
    _strange[process.pid, process.started_ns] = _without(process.pid)


def _without(pid: int) -> list[str] | None:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            lines = file.read(_ENVIRONMENT_BYTES_MAX).split(b"\0")
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            if not file.read(1):  # it has just ended, and shows nothing any more
                return None
    except OSError:
        return None
    pairs = (line.partition(b"=") for line in lines)
    values = {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}
    return [name for name in _TRUST_VARIABLES if not _is_ours(values.get(name, ""))]


def _is_ours(value: str) -> bool:
    return os.path.basename(value) == CERTIFICATE or f"/{RUN_FOLDER}" in value


def trust_options(process: Process) -> list[str]:
    """The options, without their values, by which a process was told what to trust."""
    given = {word.partition("=")[0] for word in process.argv[1:]}
    return sorted(given & TRUST_OPTIONS)


def is_interpreter(exe: str) -> bool:
    """Whether a program runs scripts, so that its first argument may be one."""
    return _INTERPRETER.fullmatch(os.path.basename(exe)) is not None


def _file_of(process: Process) -> str:
    from capture.processes.arguments import REDACTED

    assert process.exe is not None
    if not is_interpreter(process.exe):
        return process.exe
    words = [word for word in process.argv[1:] if not word.startswith("-") and word != REDACTED]
    if words and words[0].startswith(f"{REDACTED}/"):
        return f"{process.exe} {words[0]}"
    script = Path(process.cwd or "/", words[0]) if words else None
    with contextlib.suppress(OSError, ValueError):
        if script is not None and script.is_file():
            return f"{process.exe} {script}"
    return process.exe


def tls_libraries(pid: int) -> frozenset[str]:
    """The TLS libraries that a process maps as files; empty where that cannot be read."""
    from capture.processes.mappings import executable_mappings

    found = set()
    for mapping in executable_mappings(pid) or ():
        match = _LIBRARY.match(os.path.basename(mapping.path))
        if match is not None:
            found.add(_LIBRARIES[match[0]])
    return frozenset(found)


def tls_library(pid: int) -> str | None:
    """The TLS library of a process, as far as files tell: None for none, or for several."""
    found = tls_libraries(pid)
    return next(iter(found)) if len(found) == 1 else None
