"""`halton-meter daemon --foreground`: the service itself, as systemd and launchd run it.

With `--via proxy` it is the local proxy: the edge on 127.0.0.1 and its worker, as the user.

Exit codes: 0 stopped when asked to; 1 could not start (the reason and the next command on
stderr); 2 wrong usage.
"""

from __future__ import annotations

import os
import sys
import time

import click

from halton_meter.cli.drawing import harmless_lines

# The keeper gives up on a daemon that fails so often in a row.
STARTS_MAX = 5
KEPT_HEALTHY_S = 60.0
KEPT_WAIT_S_MAX = 10.0


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
    if keep:
        sys.exit(_keep_proxy(port) if via == "proxy" else _keep())
    if not foreground:
        raise click.UsageError(
            "say --foreground; to run it in the background: sudo halton-meter start"
        )
    from halton_meter.config import ConfigError
    from halton_meter.supervisor import Unavailable

    try:
        if via == "proxy":
            _serve_proxy(port)
        else:
            _serve(owner, all_users, users, cgroup)
    except Unavailable as error:
        for what, mend in error.problems:
            click.echo(harmless_lines(f"halton-meter: {what}\n  try: {mend}"), err=True)
        sys.exit(1)
    except ConfigError as error:
        click.echo(harmless_lines(f"halton-meter: {error}"), err=True)
        sys.exit(1)


def _serve(owner: str | None, all_users: bool, users: tuple[str, ...], cgroup: str | None) -> None:
    from halton_meter import config, own_code, supervisor
    from halton_meter import daemon as root

    if not config.is_root():
        raise supervisor.Unavailable([("attaching probes needs root", "sudo halton-meter start")])
    if problems := own_code.problems():
        raise supervisor.Unavailable(problems)
    account = config.account_named(owner) if owner else config.invoking_account()
    home = config.home_folder(account=account)

    def say(text: str) -> None:
        click.echo(f"halton-meter: {text}", err=True)

    plan = root.service_plan(
        account, home, all_users=all_users, users=users, cgroup=cgroup, say=say
    )
    root.serve(plan, say)


def _serve_proxy(port: int | None) -> None:
    from halton_meter import config, proxied
    from halton_meter.supervisor import Unavailable

    def say(text: str) -> None:
        click.echo(f"halton-meter: {text}", err=True)

    try:
        proxied.serve(config.home_folder(), port, say)
    except proxied.ProxyUnavailable as error:
        what, _, mend = str(error).partition("\n")
        raise Unavailable([(what, mend.strip().removeprefix("try: "))]) from None


def _keep_proxy(port: int | None) -> int:
    """Where there is neither systemd nor launchd: hold the socket, and run the edge on it again
    whenever it dies. Clients that come meanwhile wait in the socket's queue.
    """
    import signal

    from halton_meter import config, own_code
    from proxy_fallback import listening

    try:
        listener = listening.listen(port or config.load_proxy(config.home_folder()).port)
    except (listening.EdgeError, config.ConfigError) as error:
        click.echo(harmless_lines(f"halton-meter: {error}"), err=True)
        return 1
    arguments = [argument for argument in sys.argv[1:] if argument != "--keep"]
    command = own_code.python("halton_meter", *arguments)
    child, stopping, failures = 0, False, 0

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        if child:
            os.kill(child, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    while True:
        began = time.monotonic()
        child = listening.spawn_on(listener, command)
        _, status = os.waitpid(child, 0)
        code, child = os.waitstatus_to_exitcode(status), 0
        if code == 0 or stopping:
            return 0
        failures = 0 if time.monotonic() - began > KEPT_HEALTHY_S else failures + 1
        time.sleep(min(0.1 * 2**failures, KEPT_WAIT_S_MAX))


def _keep() -> int:
    """Where there is no systemd: run the daemon, and again when it is killed."""
    import signal
    import subprocess

    from halton_meter import own_code

    arguments = [argument for argument in sys.argv[1:] if argument != "--keep"]
    command = own_code.python("halton_meter", *arguments)
    failures = 0
    while failures < STARTS_MAX:
        began = time.monotonic()
        child = subprocess.Popen(command)
        stopping = _pass_on(child, signal.SIGTERM)
        code = child.wait()
        if code in (0, 1) or stopping:
            return code
        failures = 0 if time.monotonic() - began > KEPT_HEALTHY_S else failures + 1
        time.sleep(0.2 * 2**failures)
    return 1


def _pass_on(child: object, number: int) -> list[int]:
    """Hand a signal to the child, and remember it."""
    import signal
    import subprocess

    assert isinstance(child, subprocess.Popen)
    seen: list[int] = []

    def handler(received: int, frame: object) -> None:
        seen.append(received)
        child.send_signal(received)

    signal.signal(number, handler)
    return seen
