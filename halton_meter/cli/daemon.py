"""`halton-meter daemon --foreground`: the service itself, as systemd and launchd run it.

With `--via proxy` it is the local proxy: the edge on 127.0.0.1 and its worker, as the user. With
`--via keylog` it opens a packet socket as root and then becomes the user. The hidden `--keep` runs
the same command again whenever it dies, where there is no systemd or launchd.

Exit codes: 0 stopped when asked to; 1 could not start (the reason and the next command on
stderr); 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from halton_meter.cli.named import FilePath
from halton_meter.cli.number import Whole
from halton_meter.cli.output import note, problem_text, wrong_usage
from halton_meter.live.restarts import Restarts, cause_of_death
from halton_meter.problem import Problem

if TYPE_CHECKING:
    from halton_meter.live.probes.supervisor import Plan

# A keeper never gives up: a disk that is full now has room some day. Clients wait in the edge's
# queue meanwhile, so it restarts the proxy sooner.
KEPT_HEALTHY_S = 60.0
KEPT_BACKOFF_S = (0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2, 60.0)
EDGE_BACKOFF_S = (*KEPT_BACKOFF_S[:5], 10.0)
KEPT_LOOK_S = 0.2
EXAMPLES = """
    \b
    Examples:
      sudo halton-meter daemon --foreground                 uprobes, for your processes
      sudo halton-meter daemon --foreground --all-users     uprobes, for every user's processes
      halton-meter daemon --foreground --via proxy          the local proxy, as yourself
      sudo halton-meter daemon --foreground --via keylog    packets, and keys that programs write
"""


def say(text: str) -> None:
    """One line for the log, with its time where that is a file: systemd's journal has its own.

    A full disk, which refuses it, must not end the service.
    """
    at = f"{time.strftime('%Y-%m-%d %H:%M:%S')} " if _is_file(sys.stderr) else ""
    with contextlib.suppress(OSError):
        note(text, at)


def _is_file(stream: TextIO) -> bool:
    with contextlib.suppress(AttributeError, OSError, ValueError):  # None, closed, or no file
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    return False


class _Log(io.FileIO):
    """A file that drops what its disk refuses."""

    def write(self, data: Any, /) -> int:
        with contextlib.suppress(OSError):
            written = super().write(data)
            if written is not None:
                return written
        return memoryview(data).nbytes


def log_on(stream: TextIO) -> TextIO:
    """The same stream, except that what its file refuses is dropped and never raises.

    Python would keep what could not be written, try again at exit, and end with code 120.
    """
    try:
        log = io.BufferedWriter(_Log(stream.fileno(), "w", closefd=False))
    except (AttributeError, OSError, ValueError):  # None, closed, or no file
        return stream
    return io.TextIOWrapper(log, stream.encoding, "backslashreplace", line_buffering=True)


@click.command(epilog=EXAMPLES)
@click.option("--foreground", is_flag=True, help="Run in the foreground; required.")
@click.option("--keep", is_flag=True, hidden=True, help="Restart what dies, without systemd.")
@click.option(
    "--via",
    type=click.Choice(["uprobes", "proxy", "keylog"]),
    default="uprobes",
    help="Capture method: uprobes on the TLS libraries (root), a local proxy (as yourself), or "
    "packets with the TLS keys that programs write (root opens the socket).",
)
@click.option(
    "--port",
    type=Whole(1, 65535),
    help="Port of the proxy; default: the one in config.toml, else 8081.",
)
@click.option(
    "--keys",
    type=FilePath(path_type=Path),
    multiple=True,
    help="A key log file, or a folder of them, that your programs write (keylog); default: keys "
    "in the data folder, where what was read is wiped.",
)
@click.option("--interface", help="Capture on this network interface only (keylog).")
@click.option("--owner", hidden=True, help="Whose service this is, where sudo does not say.")
@click.option("--all-users", is_flag=True, help="Meter every user's processes (uprobes).")
@click.option("--user", "users", multiple=True, help="Meter this user's processes (uprobes).")
@click.option("--cgroup", help="Meter this cgroup only; a path as in /proc/PID/cgroup (uprobes).")
def daemon(
    *,
    foreground: bool,
    keep: bool,
    via: str,
    port: int | None,
    keys: tuple[Path, ...],
    interface: str | None,
    owner: str | None,
    all_users: bool,
    users: tuple[str, ...],
    cgroup: str | None,
) -> None:
    """Run the metering service in the foreground until Ctrl-C.

    This is what systemd and launchd run. To run it in the background: sudo halton-meter start
    """
    from halton_meter.problem import Unavailable
    from halton_meter.settings.config import ConfigError

    if not foreground:
        way = "add --foreground, or start the service: sudo halton-meter start"
        wrong_usage("daemon runs in the foreground only", way)
    if via != "keylog" and (keys or interface):
        option = "--keys" if keys else "--interface"
        wrong_usage(f"{option} goes with --via keylog", "halton-meter daemon --help")
    if via == "keylog" and (all_users or users or cgroup):
        way = "sudo halton-meter daemon --foreground --via keylog"
        wrong_usage("--via keylog meters the processes of one user", way)
    sys.stdout, sys.stderr = log_on(sys.stdout), log_on(sys.stderr)
    try:
        if keep:
            sys.exit(_keep(via, port))
        if via == "proxy":
            _serve_proxy(port)
        elif via == "keylog":
            sys.exit(_serve_key_log(owner, keys, interface))
        else:
            _serve(owner, all_users, users, cgroup)
    except Unavailable as error:
        for problem in error.problems:
            say(problem_text(problem))
        sys.exit(1)
    except ConfigError as error:
        for problem in error.problems:
            say(problem_text(problem))
        sys.exit(1)
    except Exception as error:  # a fault of ours; Python says where
        say(f"the service ends: {type(error).__name__}: {error}")
        raise


def _serve(owner: str | None, all_users: bool, users: tuple[str, ...], cgroup: str | None) -> None:
    from halton_meter import accounts
    from halton_meter.live import own_code
    from halton_meter.live.probes import service
    from halton_meter.problem import Unavailable

    if not accounts.is_root():
        raise Unavailable([Problem("attaching probes needs root", "sudo halton-meter start")])
    if problems := own_code.problems():
        raise Unavailable(problems)
    account = accounts.account_named(owner) if owner else accounts.invoking_account()
    home = accounts.home_folder(account=account)

    def planned(goes_on: bool) -> Plan:
        return service.service_plan(
            account,
            home,
            all_users=all_users,
            users=users,
            cgroup=cgroup,
            say=say,
            goes_on=goes_on,
        )

    # `start` has checked the configuration; with an owner named, it may be a restart.
    service.serve(planned(owner is not None), say, lambda: planned(True))


def _serve_key_log(owner: str | None, keys: tuple[Path, ...], interface: str | None) -> int:
    from halton_meter import accounts, privileges
    from halton_meter.cli.configured import require_sound
    from halton_meter.live import own_code
    from halton_meter.live.keylog import service
    from halton_meter.live.keylog.connectors import start_connectors
    from halton_meter.live.keylog.run import HTTPS, start_capture
    from halton_meter.problem import Unavailable

    if accounts.is_root() and (problems := own_code.problems()):
        raise Unavailable(problems)
    account = accounts.account_named(owner) if owner else accounts.invoking_account()
    fix = "sudo halton-meter daemon --foreground --via keylog"
    link = start_capture([HTTPS], interface, fix=fix)
    connectors = start_connectors(account.uid, account.gid, [HTTPS])
    privileges.become_for_good(account)  # what captures is there already
    if owner is None:
        require_sound()
    try:
        return service.serve(accounts.home_folder(), keys, link, connectors, say)
    except OSError as error:
        raise Unavailable(
            [Problem(f"the service cannot begin: {error}", "halton-meter doctor")]
        ) from None


def _serve_proxy(port: int | None) -> None:
    from halton_meter import accounts
    from halton_meter.live.proxy import run
    from halton_meter.settings import config

    home = accounts.home_folder()
    for line in config.read(home).notes:
        say(line)
    run.serve(home, port, say)


# --- the keeper -----------------------------------------------------------------------------------


def _keep(via: str, port: int | None) -> int:
    """Without systemd and launchd: run the service, and again whenever it dies; our exit code."""
    from halton_meter.live import own_code

    arguments = [argument for argument in sys.argv[1:] if argument != "--keep"]
    command = own_code.python("halton_meter", *arguments)
    if via == "proxy":
        return _keep_alive(_proxy_spawner(port, command), EDGE_BACKOFF_S, final=(0,))
    # One that cannot start at all has said why, and `start` waits for that.
    spawn = lambda: os.posix_spawn(command[0], command, os.environ)  # noqa: E731
    return _keep_alive(spawn, KEPT_BACKOFF_S, final=(0, 1))


def _proxy_spawner(port: int | None, command: list[str]) -> Callable[[], int]:
    """Starts the proxy on a socket that we hold: while it is dead, clients wait in its queue."""
    from halton_meter import accounts
    from halton_meter.problem import Unavailable
    from halton_meter.settings import config
    from proxy_fallback.edge import listening

    try:
        listener = listening.listen(port or config.load(accounts.home_folder()).proxy.port)
    except listening.EdgeError as error:
        raise Unavailable([Problem(error.what, error.fix)]) from None
    return lambda: listening.spawn_on(listener, command)


def _keep_alive(
    spawn: Callable[[], int], backoff_s: tuple[float, ...], final: tuple[int, ...]
) -> int:
    """Run what `spawn` starts (it returns the pid) until it ends as asked; our exit code.

    The first process may also end with any code of `final`; later ones end the keeper only with 0.
    """
    import signal

    child, stopping, restarts = 0, False, Restarts(backoff_s, KEPT_HEALTHY_S)

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        if child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    while True:
        restarts.begun()
        try:
            child = spawn()
            if stopping:
                stop()
            _, status = os.waitpid(child, 0)
            code, child = os.waitstatus_to_exitcode(status), 0
            why = cause_of_death("the service", code)
        except OSError as error:
            code, why = -1, f"the service could not be started: {error.strerror}"
        if code in final or stopping:
            return max(code, 0)
        final = (0,)
        say(f"{why}; restart in {restarts.died():g} s")
        while not restarts.is_due():
            time.sleep(min(restarts.left_s(), KEPT_LOOK_S))
            if stopping:
                return 0
