"""`halton-meter doctor --pid PID`: which of the three ways can meter a running process, and why.

Read are the files that it maps, and of its environment the variables that say where keys go, which
proxy is used and what is trusted; no value of another one is looked at or shown.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halton_meter.accounts import is_root
from halton_meter.problem import Problem, Unavailable
from proxy_fallback.setup.variables import VARIABLES, Holds

if TYPE_CHECKING:
    from capture.functions.library import Library
    from halton_meter.model import Process

FILES_MAX = 200
SEARCHED_MAX = 12  # of these, those that are searched by what their code does
SEARCHED_BYTES_MIN = 1_000_000
ENVIRONMENT_BYTES_MAX = 1 << 20
SYSTEM_FOLDERS = ("/usr/lib", "/lib")

_JAVA, _ERLANG = "JSSE", "Erlang ssl"
# By a part of a program's name, or of a library's that it maps: what reads SSLKEYLOGFILE.
_READ_BY_PROGRAM: Mapping[str, str] = {
    "python": "Python",
    "pypy": "Python",
    "curl": "curl",
    "chrom": "Chromium",
    "firefox": "Firefox",
}
_READ_BY_LIBRARY: Mapping[str, str] = {
    "libcurl": "libcurl",
    "libgnutls": "GnuTLS",
    "libssl3.so": "NSS",
    "libnss3": "NSS",
}
# Of stacks that read nothing by themselves.
_SILENT: Mapping[str, str] = {
    "Go crypto/tls": "Go writes keys only where the program sets KeyLogWriter",
    _JAVA: "Java writes none without an agent",
    _ERLANG: "Erlang's ssl writes none without an option of the program's",
    "rustls": "rustls writes keys only where the program asks it to",
    "BoringSSL": "BoringSSL writes keys only where the program asks it to",
    "OpenSSL": "OpenSSL writes keys only where the program asks it to",
}
_TRUST = tuple(each.name for each in VARIABLES if each.holds in (Holds.BUNDLE, Holds.EXTRA_ROOTS))
# Those of plain http:// lead no provider's connection.
_PROXY = tuple(
    each.name
    for each in VARIABLES
    if each.holds is Holds.PROXY and each.name.lower() != "http_proxy"
)
_KEYS, _NODE_KEYS = "SSLKEYLOGFILE", "--tls-keylog"


@dataclass(frozen=True, slots=True)
class Way:
    """One way to meter: `can` is True now, None after a restart of the process, False not at all.

    `why` says so, `next` is the command.
    """

    name: str
    can: bool | None
    why: str
    next: str


def ways(
    pid: int, proxy_url: str, ca_folder: Path, keys_read: Sequence[str] = ()
) -> tuple[Process, list[Way]]:
    """The process, and the ways to meter it; `keys_read` are the places of a service that runs.

    Raises Unavailable.
    """
    from capture.processes.proc import read_process

    process = read_process(pid)
    if process is None:
        raise Unavailable([Problem(f"there is no process {pid}", "ps -e")])
    paths, environment = _paths(pid), _environment(pid)
    if paths is None or environment is None:
        user = process.user or f"uid {process.uid}"
        if is_root():
            what = f"process {pid} is {user}'s, and the system does not let even root look into it"
            raise Unavailable([Problem(what, "name another process: ps -e")])
        what = f"process {pid} is {user}'s, whose programs you may not look into"
        fix = f"sudo -u {user} halton-meter doctor --pid {pid}"
        if process.uid == 0:  # by sudo from a user, root would become that user
            fix = f"su -c 'halton-meter doctor --pid {pid}'"
        raise Unavailable([Problem(what, fix)])
    libraries = list(_libraries(pid, paths))
    return process, [
        _by_uprobes(pid, paths, libraries),
        _by_key_log(process, paths, libraries, environment, keys_read),
        _by_proxy(process, paths, libraries, environment, proxy_url, ca_folder),
    ]


def _paths(pid: int) -> list[str] | None:
    """The files that it maps executable, its program first."""
    from capture.processes.mappings import executable_mappings

    try:
        program = os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return None
    found = executable_mappings(pid)
    if found is None:
        return None
    paths = [each.path for each in found if each.path.startswith("/")]
    return list(dict.fromkeys((program.removesuffix(" (deleted)"), *paths)))[:FILES_MAX]


def _environment(pid: int) -> dict[str, str] | None:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            lines = file.read(ENVIRONMENT_BYTES_MAX).split(b"\0")
    except OSError:
        return None
    known = (_KEYS, "NODE_OPTIONS", *_PROXY, *_TRUST)
    pairs = (line.partition(b"=") for line in lines)
    values = {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}
    return {name: value for name, value in values.items() if name in known and value}


def _libraries(pid: int, paths: list[str]) -> Iterator[tuple[str, Library]]:
    """What TLS there is in these files, by a process that is confined."""
    from capture.functions.asking import FINDER, Question, libraries_in
    from halton_meter.live import own_code

    root = f"/proc/{pid}/root"
    questions, left = {}, SEARCHED_MAX
    for number, path in enumerate(paths):
        name = f"/proc/{pid}/exe" if number == 0 else root + path
        thoroughly = left > 0 and (number == 0 or _may_hide_tls(name, path))
        left -= thoroughly
        questions[name] = path, thoroughly
    asked = [Question(name, thoroughly) for name, (_, thoroughly) in questions.items()]
    for name, library in libraries_in(own_code.python(FINDER), asked):
        if not library.is_linker:
            yield questions[name][0], library


def _may_hide_tls(name: str, path: str) -> bool:
    """Whether a library is none of the system's, and as large as one with TLS in it."""
    if path.startswith(SYSTEM_FOLDERS) and "-packages/" not in path:
        return False
    with contextlib.suppress(OSError):
        return os.stat(name).st_size >= SEARCHED_BYTES_MIN
    return False


# --- uprobes --------------------------------------------------------------------------------------


def _by_uprobes(pid: int, paths: list[str], libraries: list[tuple[str, Library]]) -> Way:
    from capture.environment import NEEDS_ROOT, check_environment

    every = [(path, each) for path, first in libraries for each in (first, *first.others)]
    known = [f"{each.stack.value} in {path}" for path, each in every if each.probes]
    refused = [
        f"{each.stack.value} in {path}: {each.reason or 'its functions are not known'}"
        for path, each in every
        if not each.probes
    ]
    # Who asks need not be root: the next command is.
    if missing := [each for each in check_environment() if each.what != NEEDS_ROOT]:
        return Way("uprobes", False, f"this machine cannot: {missing[0].what}", missing[0].fix)
    if any(os.path.basename(path) == "libjvm.so" for path in paths):
        return Way("uprobes", False, "Java's own TLS is not probed", f"kill {pid}; {_RUN_JAVA}")
    if known:
        rest = f"; not {'; '.join(refused)}" if refused else ""
        return Way("uprobes", True, f"found {' and '.join(known)}{rest}", "sudo halton-meter start")
    if refused:
        return Way("uprobes", False, f"refused: {'; '.join(refused)}", _RUN_PROXY)
    what = "no TLS was found in the files that it maps; it may load some when it connects"
    return Way("uprobes", None, what, "sudo halton-meter start   (then: halton-meter status)")


# --- the key log ----------------------------------------------------------------------------------

_RUN_PROXY = "halton-meter run --via proxy -- CMD"
_RUN_JAVA = "halton-meter run --java -- CMD"
_SERVE_KEYS = "sudo halton-meter start --via keylog"
_RUN_KEYS = "sudo halton-meter run --via keylog -- CMD"


def _by_key_log(
    process: Process,
    paths: list[str],
    libraries: list[tuple[str, Library]],
    environment: Mapping[str, str],
    keys_read: Sequence[str],
) -> Way:
    reads = _reader_of_keys(process, paths)
    is_node = _name(process).startswith("node")
    option = any(word.startswith(_NODE_KEYS) for word in process.argv) or (
        _NODE_KEYS in environment.get("NODE_OPTIONS", "")
    )
    if is_node:
        if option:
            return Way("key log", True, "Node writes its keys, by --tls-keylog", _SERVE_KEYS)
        return Way("key log", None, "Node writes keys with --tls-keylog=FILE", _RUN_KEYS)
    file = environment.get(_KEYS)
    if file and reads and any(place in (file, os.path.dirname(file)) for place in keys_read):
        what = f"{reads} writes keys to {file}, which the key log service reads"
        return Way("key log", True, what, "halton-meter status")
    if file and reads:
        serve = f"sudo halton-meter daemon --foreground --via keylog --keys {shlex.quote(file)}"
        return Way("key log", True, f"{reads} writes keys to {file}, by {_KEYS}", serve)
    if reads:
        return Way("key log", None, f"{reads} writes keys, but it has no {_KEYS}", _RUN_KEYS)
    stacks = [each.stack.value for _, first in libraries for each in (first, *first.others)]
    silent = next((_SILENT[stack] for stack in stacks if stack in _SILENT), None)
    silent = silent or f"nothing that it maps is known to read {_KEYS}"
    if file:
        return Way("key log", None, f"it has {_KEYS}, but {silent}", f"ls -l {shlex.quote(file)}")
    return Way("key log", False, silent, _RUN_PROXY)


def _reader_of_keys(process: Process, paths: list[str]) -> str | None:
    name = _name(process)
    by_program = (said for part, said in _READ_BY_PROGRAM.items() if part in name)
    names = [os.path.basename(path) for path in paths]
    by_library = (
        said
        for part, said in _READ_BY_LIBRARY.items()
        if any(each.startswith(part) for each in names)
    )
    return next(itertools.chain(by_program, by_library), None)


def _name(process: Process) -> str:
    return os.path.basename(process.exe or "")


# --- the proxy ------------------------------------------------------------------------------------


def _by_proxy(
    process: Process,
    paths: list[str],
    libraries: list[tuple[str, Library]],
    environment: Mapping[str, str],
    proxy_url: str,
    ca_folder: Path,
) -> Way:
    used = next((environment[name] for name in _PROXY if name in environment), "")
    trusted = any(ca_folder in Path(environment.get(name, "")).parents for name in _TRUST)
    if used.rstrip("/") == proxy_url and trusted:
        return Way("proxy", True, "it has our proxy and trusts it", "halton-meter status")
    if used.rstrip("/") == proxy_url:
        what = "it has our proxy, and no variable by which it trusts our certificate"
        return Way("proxy", None, what, "halton-meter init, then restart the program")
    if any(os.path.basename(path) == "libjvm.so" for path in paths):
        return Way("proxy", None, "Java uses the proxy when it is told to", _RUN_JAVA)
    stacks = {each.stack.value for _, first in libraries for each in (first, *first.others)}
    if stacks == {_ERLANG}:
        what = "Erlang reads no proxy variable; the program must set its own proxy option"
        return Way("proxy", False, what, "halton-meter init, then that option")
    other = "it has another proxy" if used else "it has no proxy variables"
    what = f"{other}; started by us it gets ours and our certificate, which it must heed"
    return Way("proxy", None, what, _RUN_PROXY)


# --- for people and scripts -----------------------------------------------------------------------


def lines(process: Process, found: list[Way]) -> list[str]:
    """The ways for people."""
    marks = {True: "✓", False: "✗", None: "-"}
    said = [f"process {process.pid}: {process.exe or 'a program'}"]
    for each in found:
        said += [f"{marks[each.can]} {each.name}: {each.why}", f"    next: {each.next}"]
    return said


def as_json(process: Process, found: list[Way]) -> dict[str, Any]:
    """The same for scripts; `can` is null where the process must be started again first."""
    listed = [{"way": w.name, "can": w.can, "why": w.why, "next": w.next} for w in found]
    return {"pid": process.pid, "program": process.exe, "ways": listed}
