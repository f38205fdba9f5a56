"""`halton-meter metrics`: the figures for Prometheus, printed, as a file, or served on loopback.

Exit codes: 0 done, or ended by Ctrl-C; 1 the store cannot be read, the file not written, or the
port is taken; 2 wrong usage.
"""

from __future__ import annotations

import sys

import click

from halton_meter.cli.configured import Configured
from halton_meter.cli.named import FilePath
from halton_meter.cli.number import Whole
from halton_meter.cli.output import count, fail, look_at, say, wrong_usage
from halton_meter.problem import Problem

PORT = 9464


@click.command(
    cls=Configured,
    epilog="""\b
Examples:
  halton-meter metrics                                print them
  halton-meter metrics --output halton.prom           for node_exporter's textfile collector
  halton-meter metrics --serve 9464                   serve them to a Prometheus on this machine
""",
)
@click.option(
    "--output",
    type=FilePath(dir_okay=False, allow_dash=True),
    help='Write them into this file, whole or not at all; "-" is standard output.',
)
@click.option(
    "--serve",
    "port",
    type=Whole(0, 65535),
    metavar="PORT",
    help=f"Serve them on 127.0.0.1:PORT until Ctrl-C, to who has the token. For example {PORT}.",
)
def metrics(output: str | None, port: int | None) -> None:
    """Print what was spent, limits and budgets as Prometheus metrics.

    Sums are over all that is stored, by provider, model and project. Nothing is sent anywhere:
    Prometheus, or node_exporter, on this machine reads it. Names of projects are labels.
    """
    if output is not None and port is not None:
        wrong_usage("--output and --serve exclude each other", "halton-meter metrics --serve 9464")
    if port is not None:
        _serve(port)
    elif output is not None:
        _write(output)
    else:
        say(_rendered().decode().rstrip("\n"))


def _render() -> bytes:
    """All metrics. Raises StoreError."""
    from halton_meter.cli.budget_sums import configured, is_there, sums_of
    from halton_meter.cli.selection import now_ns
    from halton_meter.metrics.exposition import exposition
    from halton_meter.spending import ledger, status_file, stops
    from halton_meter.store import Store

    home, budgets = configured()
    at_ns = now_ns()
    entries = []
    if budgets:
        sums, stale = sums_of(home, budgets, at_ns)
        held = stops.read(home / ledger.FOLDER_NAME)
        holding = {each.budget for each in held.stops if each.budget and is_there(each)}
        if stale is None:  # else what was spent is not known, and has no sample
            entries = status_file.entries(sums, at_ns, holding)
    return exposition(Store(home), at_ns, entries)


def _rendered() -> bytes:
    from halton_meter.cli.selection import store_problems

    with store_problems():
        return _render()


def _write(named: str) -> None:
    from halton_meter.cli.named import file_of, stream_of
    from halton_meter.cli.streams import names_stdout
    from halton_meter.spending.ledger import write_whole

    text = _rendered()
    if names_stdout(named):
        say(text.decode().rstrip("\n"))
        return
    path = file_of(named)
    try:
        if (stream := stream_of(named)) is not None:
            with stream:
                stream.write(text)
        else:
            write_whole(path, [text])
            # The collector is another user; the folder says who may read it.
            path.chmod(0o644)
    except OSError as error:
        fail(Problem(f"cannot write {named}: {error.strerror}", look_at(error, path.parent)))
    samples = sum(not line.startswith(b"#") for line in text.splitlines())
    say(f"{named}: {count(samples, 'sample')} written")


def _serve(port: int) -> None:
    from halton_meter.accounts import home_folder
    from halton_meter.metrics.server import ADDRESS, PATH, TOKEN_NAME, MetricsServer, token_of

    home = home_folder()
    try:
        token = token_of(home)
    except OSError as error:
        path = home / TOKEN_NAME
        fail(Problem(f"{path}: {error.strerror}", f"rm {path}"))
    try:
        server = MetricsServer(_render, token, port)
    except OSError as error:
        what = f"cannot listen on {ADDRESS}:{port}: {error.strerror}"
        fail(Problem(what, "halton-meter metrics --serve 0   (on any free port)"))
    where = f"{ADDRESS}:{server.server_port}"
    try:
        say(
            f"http://{where}{PATH} is served until Ctrl-C. For prometheus.yml:\n"
            "scrape_configs:\n"
            "  - job_name: halton-meter\n"
            f"    authorization: {{ credentials_file: {home / TOKEN_NAME} }}\n"
            f'    static_configs: [ {{ targets: ["{where}"] }} ]'
        )
        sys.stdout.flush()
        server.serve_forever()
    except KeyboardInterrupt:
        click.echo()
    finally:
        server.server_close()
