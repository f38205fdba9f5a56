"""`halton-meter daemon --foreground`: the service itself, as systemd and launchd run it.

With `--via proxy` it is the local proxy: the edge on 127.0.0.1 and its worker, as the user.

Exit codes: 0 stopped when asked to; 1 could not start (the reason and the next command on
stderr); 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import click

from halton_meter.cli.output import harmless_lines

# A keeper waits ever longer before it starts again what dies at once, and never gives up: a disk
# that is full now has room some day. Clients wait in the edge's queue meanwhile, so not for long.
KEPT_HEALTHY_S = 60.0
KEPT_WAIT_S_MIN = 0.2
KEPT_WAIT_S_MAX, EDGE_WAIT_S_MAX = 60.0, 10.0
KEPT_LOOK_S = 0.2


def say(text: str) -> None:
    """One line for the log; a log that takes nothing, as its disk is full, ends no service."""
    with contextlib.suppress(OSError):
        click.echo(harmless_lines(f"halton-meter: {text}"), err=True)


class _Log(io.FileIO):
    """A file that drops what its disk does not take."""

    def write(self, data: Any, /) -> int:
        with contextlib.suppress(OSError):
            written = super().write(data)
            if written is not None:
                return written
        return memoryview(data).nbytes


def log_on(stream: TextIO) -> TextIO:
    """The same stream, but what its file does not take is dropped and never raises.

    Python keeps what could not be written and tries again when it ends: then with exit code 120.
    """
    try:
        log = io.BufferedWriter(_Log(stream.fileno(), "w", closefd=False))
    except (AttributeError, OSError, ValueError):  # None, closed, or no file
        return stream
    return io.TextIOWrapper(log, stream.encoding, "backslashreplace", line_buffering=True)


EXAMPLES = """
    \b
    Examples:
      sudo halton-meter daemon --foreground                  with probes, for this user
      sudo halton-meter daemon --foreground --all-users      … for everybody
      halton-meter daemon --foreground --via proxy           the local proxy, as yourself
"""


@click.command(epilog=EXAMPLES)
@click.option("--foreground", is_flag=True, help="Stay in the foreground (what systemd wants).")
@click.option("--keep", is_flag=True, hidden=True, help="Start again what dies, without systemd.")
@click.option(
    "--via",
    type=click.Choice(["uprobes", "proxy"]),
    default="uprobes",
    help="Probes on the TLS libraries (needs root), or the local proxy (as yourself).",
)
@click.option("--port", type=click.IntRange(1, 65535), help="The proxy's port; else config.toml's.")
@click.option("--owner", hidden=True, help="Whose service this is, where sudo does not tell.")
@click.option("--all-users", is_flag=True, help="Meter everybody's processes.")
@click.option("--user", "users", multiple=True, help="Meter this user's processes.")
@click.option("--cgroup", help="Only processes in this cgroup (a path as in /proc/PID/cgroup).")
def daemon(
    *,
    foreground: bool,
    keep: bool,
    via: str,
    port: int | None,
    owner: str | None,
    all_users: bool,
    users: tuple[str, ...],
    cgroup: str | None,
) -> None:
    """Run the meter in the foreground, as systemd and launchd do, until Ctrl-C.

    In the background it runs by: sudo halton-meter start
    """
    sys.stdout, sys.stderr = log_on(sys.stdout), log_on(sys.stderr)
    if keep:
        sys.exit(_keep_proxy(port) if via == "proxy" else _keep())
    if not foreground:
        raise click.UsageError(
            "say --foreground; to run it in the background: sudo halton-meter start"
        )
    from halton_meter.config import ConfigError
    from halton_meter.problem import Unavailable

    try:
        if via == "proxy":
            _serve_proxy(port)
        else:
            _serve(owner, all_users, users, cgroup)
    except Unavailable as error:
        for problem in error.problems:
            say(f"{problem.what}\n  try: {problem.fix}")
        sys.exit(1)
    except ConfigError as error:
        say(str(error))
        sys.exit(1)
    except Exception as error:  # a fault of ours; Python says where
        say(f"the service ends: {type(error).__name__}: {error}")
        raise


def _serve(owner: str | None, all_users: bool, users: tuple[str, ...], cgroup: str | None) -> None:
    from halton_meter import accounts
    from halton_meter.live import own_code
    from halton_meter.live.probes import service
    from halton_meter.problem import Problem, Unavailable

    if not accounts.is_root():
        raise Unavailable([Problem("attaching probes needs root", "sudo halton-meter start")])
    if problems := own_code.problems():
        raise Unavailable(problems)
    account = accounts.account_named(owner) if owner else accounts.invoking_account()
    home = accounts.home_folder(account=account)
    plan = service.service_plan(
        account, home, all_users=all_users, users=users, cgroup=cgroup, say=say
    )
    service.serve(plan, say)


def _serve_proxy(port: int | None) -> None:
    from halton_meter import accounts
    from halton_meter.live.proxy import run

    run.serve(accounts.home_folder(), port, say)


def _keep_proxy(port: int | None) -> int:
    """Where there is neither systemd nor launchd: hold the socket, and run the edge on it again
    whenever it dies. Clients that come meanwhile wait in the socket's queue.
    """
    from halton_meter import accounts, config
    from proxy_fallback.edge import listening

    try:
        listener = listening.listen(port or config.load_proxy(accounts.home_folder()).port)
    except (listening.EdgeError, config.ConfigError) as error:
        say(str(error))
        return 1
    command = _kept_command()
    return _keep_alive(lambda: listening.spawn_on(listener, command), EDGE_WAIT_S_MAX, final=(0,))


def _keep() -> int:
    """Where there is no systemd: run the daemon, and again when it dies."""
    command = _kept_command()
    # One that cannot start at all has said why, and whoever started it waits for that.
    spawn = lambda: os.posix_spawn(command[0], command, os.environ)  # noqa: E731
    return _keep_alive(spawn, KEPT_WAIT_S_MAX, final=(0, 1))


def _kept_command() -> list[str]:
    from halton_meter.live import own_code

    arguments = [argument for argument in sys.argv[1:] if argument != "--keep"]
    return own_code.python("halton_meter", *arguments)


def kept_wait_s(failures: int, wait_s_max: float) -> float:
    """How long to wait before the next start, after so many failures in a row."""
    return float(min(KEPT_WAIT_S_MIN * 2 ** min(failures, 16), wait_s_max))


def _keep_alive(spawn: Callable[[], int], wait_s_max: float, final: tuple[int, ...]) -> int:
    """Run what `spawn` starts (it gives the pid) until it ends as asked; our exit code.

    The first one may also end with any code of `final`; later ones are started again but for 0.
    """
    import signal

    child, stopping, failures = 0, False, 0

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        if child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    while True:
        began = time.monotonic()
        try:
            child = spawn()
            if stopping:
                stop()
            _, status = os.waitpid(child, 0)
            code, child = os.waitstatus_to_exitcode(status), 0
            why = f"ended with code {code}" if code >= 0 else f"was killed by signal {-code}"
        except OSError as error:
            code, why = -1, f"could not be started: {error.strerror}"
        if code in final or stopping:
            return max(code, 0)
        final = (0,)
        failures = 0 if time.monotonic() - began > KEPT_HEALTHY_S else failures + 1
        wait_s = kept_wait_s(failures, wait_s_max)
        say(f"the service {why}; it is started again in {wait_s:g} s")
        due = time.monotonic() + wait_s
        while (left_s := due - time.monotonic()) > 0:
            time.sleep(min(left_s, KEPT_LOOK_S))
            if stopping:
                return 0
