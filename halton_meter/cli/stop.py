"""`halton-meter stop`: ends the uprobes service, or the metering of the local proxy.

Exit codes: 0 stopped, or it did not run; 1 it could not be stopped, with the reason and the next
command on stderr; 2 wrong usage. `start.py` is the opposite.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import click

from halton_meter.cli.output import fail
from halton_meter.cli.start import VIA, proxy_start_commands
from halton_meter.cli.systemd_unit import UNIT_NAME, UNIT_PATH, has_systemd, run_quietly
from halton_meter.problem import Problem

STOP_S_MAX = 20.0
EXAMPLES = """
    \b
    Examples:
      sudo halton-meter stop            stop the uprobes service
      halton-meter stop --via proxy     stop metering through the local proxy
      halton-meter stop --via keylog    stop metering by packets and TLS keys
"""


@click.command(epilog=EXAMPLES)
@click.option("--via", type=VIA, default="auto", help="Which service; auto: each one that runs.")
def stop(via: str) -> None:
    """Stop metering in the background.

    On a machine that `halton-meter init` has set up, the proxy stays and passes everything on:
    without it, the programs that were set up to use it would lose the network.
    """
    from halton_meter import accounts, privileges
    from halton_meter.live.control import ask_service
    from halton_meter.settings import config

    account, home = accounts.invoking_account(), accounts.home_folder()
    try:
        stopped = via in ("auto", "proxy") and bool(
            privileges.as_account(account, lambda: _stop_proxy(home))
        )
        stopped |= via in ("auto", "keylog") and bool(
            privileges.as_account(account, lambda: _stop_key_log(home))
        )
    except config.ConfigError as error:
        fail(*error.problems)
    if via in ("proxy", "keylog"):
        if not stopped:
            what = "the proxy" if via == "proxy" else "the key log service"
            click.echo(f"{what} was not running")
        return
    absent = ask_service(home, "status", owner=account.uid) is None
    if stopped and absent and not accounts.is_root():
        return
    _stop_probes(home, account.uid, stopped)


def _stop_probes(home: Path, owner: int, stopped: bool) -> None:
    from halton_meter import accounts
    from halton_meter.live.control import ask_service

    if has_systemd() and UNIT_PATH.exists():
        if not accounts.is_root():
            fail(Problem("stopping the system service needs root", "sudo halton-meter stop"))
        done = run_quietly("systemctl", "disable", "--now", UNIT_NAME)
        if done.returncode:
            said = done.stderr.strip() or "systemctl disable failed"
            fail(Problem(said, f"systemctl status {UNIT_NAME}"))
        click.echo("stopped; it no longer starts at boot")
        return
    if ask_service(home, "stop", owner=owner) is None:
        if not stopped:
            click.echo("no service was running")
        return
    deadline = time.monotonic() + STOP_S_MAX
    while ask_service(home, "status", owner=owner) is not None:
        if time.monotonic() > deadline:
            find = "halton-meter status --json   # supervisor_pid is the process to end"
            fail(Problem(f"the service did not stop within {STOP_S_MAX:g} s", find))
        time.sleep(0.05)
    click.echo("stopped")


def _stop_key_log(home: Path) -> bool:
    """Stop the key log service; whether there was one."""
    from halton_meter.live.control import KEY_LOG_SOCKET_NAME, ask_service

    if ask_service(home, "stop", name=KEY_LOG_SOCKET_NAME) is None:
        return False
    deadline = time.monotonic() + STOP_S_MAX
    while ask_service(home, "status", name=KEY_LOG_SOCKET_NAME) is not None:
        if time.monotonic() > deadline:
            find = "halton-meter status --json   # keylog.pid is the process to end"
            fail(Problem(f"the key log service did not stop within {STOP_S_MAX:g} s", find))
        time.sleep(0.05)
    click.echo("the key log service stopped; programs that have SSLKEYLOGFILE still write keys")
    return True


def _stop_proxy(home: Path) -> bool:
    """Stop metering through the proxy; whether there was one."""
    from halton_meter.live.control import PROXY_SOCKET_NAME, ask_service

    found = ask_service(home, "status", name=PROXY_SOCKET_NAME)
    if found is None:
        return False
    if proxy_start_commands() is not None or _is_set_up(home):
        ask_service(home, "pause", name=PROXY_SOCKET_NAME)
        click.echo(
            "stopped metering; the proxy passes everything on, as programs are set up to use it\n"
            "  to meter again: halton-meter start --via proxy\n"
            "  to remove the proxy: halton-meter uninstall"
        )
        return True
    ask_service(home, "stop", name=PROXY_SOCKET_NAME)
    deadline = time.monotonic() + 2 * STOP_S_MAX
    # The process that keeps the proxy alive holds the socket, and ends last.
    while ask_service(home, "status", name=PROXY_SOCKET_NAME) or _answers(found["addresses"]):
        if time.monotonic() > deadline:
            find = "halton-meter status --json   # pid is the process to end"
            fail(Problem(f"the proxy did not stop within {2 * STOP_S_MAX:g} s", find))
        time.sleep(0.05)
    click.echo("the proxy stopped")
    return True


def _answers(addresses: Sequence[str]) -> bool:
    import socket

    for address in addresses:
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), 1.0).close()
        except OSError:
            continue
        return True
    return False


def _is_set_up(home: Path) -> bool:
    from proxy_fallback.setup.ledger import LEDGER_NAME

    return (home / LEDGER_NAME).exists()
