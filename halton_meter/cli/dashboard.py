"""`halton-meter dashboard`: the local web page, until interrupted.

Exit codes: 0 ended by Ctrl-C; 1 could not listen (the reason and the next command on stderr).
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

import click

from halton_meter.cli.configured import Configured
from halton_meter.cli.number import Whole
from halton_meter.cli.output import fail
from halton_meter.problem import Problem

if TYPE_CHECKING:
    from halton_meter.coverage import Coverage
    from halton_meter.dashboard.server import Dashboard


@click.command(
    cls=Configured,
    epilog="""\b
Examples:
  halton-meter dashboard                 print the page's address and serve it
  halton-meter dashboard --open          also open it in the web browser
  halton-meter dashboard --port 9000     on a port of your choice
""",
)
@click.option(
    "--port",
    type=Whole(0, 65535),
    default=0,
    help="Port; default: any free one.",
)
@click.option("--open", "open_browser", is_flag=True, help="Open the page in the web browser.")
def dashboard(port: int, open_browser: bool) -> None:
    """Show what was spent on a local web page, until Ctrl-C.

    It listens on 127.0.0.1 only and serves only the browser that opens the address first. Press
    Enter for a new address, for example for another browser.
    """
    from halton_meter.accounts import home_folder
    from halton_meter.dashboard.server import Dashboard
    from halton_meter.store import Store

    try:
        server = Dashboard(Store(home_folder()), time.time_ns, port, _said)
    except OSError as error:
        what = f"cannot listen on 127.0.0.1:{port}: {error.strerror}"
        fail(Problem(what, "halton-meter dashboard   (on any free port)"))
    try:
        url = server.new_url()
        click.echo(f"{url}\nThe address works once. Enter: a new address. Ctrl-C: stop.")
        _offer_more(server)
        if open_browser:
            click.launch(url)
        server.serve_forever()
    except KeyboardInterrupt:
        click.echo()
    finally:
        server.server_close()


def _said(found: Coverage) -> list[str]:
    """What `report` says of the connections that were seen; nothing where none was."""
    from halton_meter.cli.coverage import coverage_lines

    return coverage_lines(found) if found.parts else []


def _offer_more(server: Dashboard) -> None:
    """Print a new address each time that Enter is pressed."""
    if not sys.stdin.isatty():
        return
    # A job in the background must not be stopped for reading the terminal; the read fails then.
    signal.signal(signal.SIGTTIN, signal.SIG_IGN)

    def listen() -> None:
        with contextlib.suppress(OSError):
            for _ in sys.stdin:
                click.echo(server.new_url())

    threading.Thread(target=listen, daemon=True).start()
