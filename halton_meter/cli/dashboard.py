"""`halton-meter dashboard`: the local web page, until interrupted.

Exit codes: 0 ended by Ctrl-C; 1 could not listen (the reason and the next command on stderr).
"""

from __future__ import annotations

import sys
import time

import click


@click.command(
    epilog="""\b
Examples:
  halton-meter dashboard                 print the page's address and serve it
  halton-meter dashboard --open          … and open it in the browser
  halton-meter dashboard --port 9000     at a port of your choice
"""
)
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Default: any free port.")
@click.option("--open", "open_browser", is_flag=True, help="Open the page in the web browser.")
def dashboard(port: int, open_browser: bool) -> None:
    """Show what was spent on a local web page, until Ctrl-C.

    It listens on 127.0.0.1 only, and answers only whoever has the address with its secret.
    """
    from halton_meter.config import home_folder
    from halton_meter.dashboard.server import Dashboard
    from halton_meter.store import Store

    try:
        server = Dashboard(Store(home_folder()), time.time_ns, port)
    except OSError as error:
        click.echo(
            f"halton-meter: cannot listen on 127.0.0.1:{port}: {error.strerror}\n"
            "  try: halton-meter dashboard   (takes any free port)",
            err=True,
        )
        sys.exit(1)
    click.echo(f"{server.url}\nCtrl-C ends it.")
    if open_browser:
        click.launch(server.url)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        click.echo()
    finally:
        server.server_close()
