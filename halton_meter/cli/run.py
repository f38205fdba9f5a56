"""`halton-meter run -- CMD…`: one command, metered; what it cost is told on stderr at its end.

The command's own output, terminal and exit code are untouched. Exit codes: the command's own
(128 + the signal that ended it); 127 when there is no such command; 1 when it could not be
metered, in which case it was not started.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from halton_meter.cli.output import count, harmless, harmless_lines, implausible_words

if TYPE_CHECKING:
    from halton_meter.live.result import RunResult
    from halton_meter.live.totals import Line
    from halton_meter.problem import Problem

MODELS_SHOWN = 10
PROCESSES_SHOWN = 5
EXAMPLES = """
    \b
    Examples:
      sudo halton-meter run -- claude -p hello        with probes: nothing to set up
      halton-meter run -- claude -p hello             no root: the service, else a local proxy
      halton-meter run --via proxy -- python app.py   through a local proxy in any case
      halton-meter run --shell                        all that is done in a shell
"""


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=EXAMPLES,
)
@click.option(
    "--via",
    type=click.Choice(["auto", "uprobes", "proxy"]),
    default="auto",
    help="How to look: probes on the TLS libraries (needs root, or the service), or a local proxy.",
)
@click.option("--shell", is_flag=True, help="Run your shell, metered, instead of a command.")
@click.option(
    "--java",
    is_flag=True,
    help="Tell Java programs of the local proxy, too: uprobes do not see their TLS, and they heed "
    "no proxy variables. Goes with --via proxy, and means it.",
)
@click.option("--quiet", is_flag=True, help="Print nothing about the run.")
@click.option(
    "--json-summary",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the summary to this file as JSON as well.",
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def run(
    *,
    command: tuple[str, ...],
    via: str,
    shell: bool,
    java: bool,
    quiet: bool,
    json_summary: Path | None,
) -> NoReturn:
    """Meter one command and print what it cost at its end, on stderr.

    Probes see every program, and need sudo or the running service (sudo halton-meter start).
    Without both, the command runs through a local proxy, as yourself.

    The command's own output, terminal and exit code are untouched. Exit codes: the command's own
    (128 + the signal that ended it); 127 when there is no such command; 1 when it could not be
    metered, in which case it was not started.
    """
    from halton_meter.accounts import invoking_account
    from halton_meter.config import ConfigError
    from halton_meter.problem import Unavailable

    if shell == bool(command):
        raise click.UsageError("say what to run, or --shell:  halton-meter run -- claude -p hello")
    if java and via == "uprobes":
        raise click.UsageError("--java goes with --via proxy: uprobes do not see Java's TLS")
    if shell:
        command = (os.environ.get("SHELL") or invoking_account().shell,)
        if not quiet:
            click.echo("halton-meter: this shell is metered; its cost is told at its end", err=True)
    try:
        if via == "proxy" or java:
            result = _through_proxy(command, java)
        else:
            result = _through_probes(command, via)
    except Unavailable as error:
        for problem in error.problems:
            text = f"halton-meter: {problem.what}\n  try: {problem.fix}"
            click.echo(harmless_lines(text), err=True)
        sys.exit(1)
    except ConfigError as error:
        click.echo(harmless_lines(f"halton-meter: {error}"), err=True)
        sys.exit(1)
    if json_summary is not None:
        _write_summary(json_summary, result)
    if not quiet:
        for line in summary_lines(result):
            click.echo(harmless(line), err=True)
    sys.exit(result.exit_code)


def _through_probes(command: Sequence[str], via: str) -> RunResult:
    from halton_meter import accounts, privileges
    from halton_meter.live import own_code
    from halton_meter.live.probes import service
    from halton_meter.live.probes.supervisor import Plan
    from halton_meter.problem import Unavailable

    if accounts.is_root() and (problems := own_code.problems()):
        raise Unavailable(problems)
    account, home = accounts.invoking_account(), accounts.home_folder()
    environment = privileges.user_environment(account, os.environ, privileges.sudo_environment())
    control = _service(home, account.uid)
    if control is not None:  # what attaches is there already: we need no root any more
        privileges.settle(needs_root=False)
        return service.run_watched(command, environment, account, control)
    if not accounts.is_root() and via == "auto":
        click.echo(
            "halton-meter: through a local proxy, as there is neither root nor the service "
            "(sudo halton-meter start)",
            err=True,
        )
        return _through_proxy(command)
    if not accounts.is_root():
        raise Unavailable([_not_root(command)])
    chosen, hosts = service.configured(account, home)
    plan = Plan(account, home, chosen, hosts, service=False)
    return service.run_command(command, environment, plan)


def _service(home: Path, uid: int) -> Any:
    """The connection to a running service that meters this user, or None."""
    from halton_meter.live.control import Control, ServiceAbsent
    from halton_meter.live.probes.service import covers

    try:
        control = Control(home, owner=uid)
        if covers(control.ask("status"), uid):
            return control
        control.close()
    except ServiceAbsent:
        return None
    return None


def _not_root(command: Sequence[str]) -> Problem:
    import shlex

    from halton_meter.problem import Problem

    typed = shlex.join(command)
    what = "metering without a proxy needs root or the running service, and there is neither"
    ways = f"sudo halton-meter run -- {typed}\n   or: sudo halton-meter start   (once)"
    ways += f"\n   or: halton-meter run --via proxy -- {typed}"
    return Problem(what, ways)


def _through_proxy(command: Sequence[str], java: bool = False) -> RunResult:
    from halton_meter import accounts, config
    from halton_meter.live.proxy.run import meter_command

    home = accounts.home_folder()
    hosts, upstream = config.load(home).extra_hosts, config.load_proxy(home).upstream
    return meter_command(command, home, os.environ, hosts, upstream, java)


# --- the summary --------------------------------------------------------------------------------


def summary_lines(result: RunResult) -> list[str]:
    """What is told at the end of a run."""
    totals = result.totals
    total = totals.total
    lines = [
        f"halton-meter: {count(total.requests, 'request')}, "
        f"{total.input_tokens:,} tokens in, {total.output_tokens:,} out, {_cost(total)}"
    ]
    models = sorted(totals.models.items(), key=lambda item: -item[1].list_usd)
    if len(models) > 1 or total.unpriced:
        lines += [_model_line(name, line) for name, line in models[:MODELS_SHOWN]]
    if len(models) > MODELS_SHOWN:
        lines.append(
            f"  and {len(models) - MODELS_SHOWN} more models: halton-meter report --by model"
        )
    lines += _troubles(result)
    return lines


def _model_line(name: str, line: Line) -> str:
    return (
        f"  {name:<32} {line.requests:>6,} {line.input_tokens:>12,} in "
        f"{line.output_tokens:>10,} out  {_cost(line)}"
    )


def _cost(line: Line) -> str:
    """Dollars by list, what is left to pay where that differs, and what has no price."""
    text = f"${line.list_usd:,.4f}"
    if line.marginal_usd != line.list_usd:
        text += f" by list, ${line.marginal_usd:,.4f} to pay"
    if line.unpriced + line.implausible == line.requests and line.requests:
        return "unpriced"
    return text + (f" + {line.unpriced:,} unpriced" if line.unpriced else "")


def _troubles(result: RunResult) -> list[str]:
    totals = result.totals
    lines = []
    if totals.gapped or totals.aborted or totals.failed:
        words = (
            (totals.gapped, "with gaps"),
            (totals.aborted, "cut off"),
            (totals.failed, "failed"),
        )
        lines.append("  of these " + ", ".join(f"{n:,} {what}" for n, what in words if n))
    if totals.total.implausible:
        lines.append(f"  {implausible_words(totals.total.implausible)}")
    for from_ns, to_ns, cause in result.outages:
        lines.append(f"  not metered for {(to_ns - from_ns) / 1e9:.1f} s: {cause}")
    lines += [f"  lost: {cause} {lost:,}" for cause, lost in result.losses.items()]
    if result.price_error:
        lines.append(f"  {result.price_error}")
    if result.store_error:
        lines.append(f"  {result.store_error}")
    unseen = [line for line in result.coverage if line.get("state") != "metered"]
    for line in unseen[:PROCESSES_SHOWN]:
        host = f" that looked up {line['host']}" if line.get("host") else ", to hosts not known"
        name = line["process"] or line["pid"]
        lines.append(f"  not metered: TLS ({line['stack']}) of {name}{host}")
        if line.get("advice"):
            lines.append(f"    {line['advice']}")
    partly = [line for line in result.coverage if line not in unseen and line.get("advice")]
    for line in partly[:PROCESSES_SHOWN]:
        name = line["process"] or line["pid"]
        lines += [f"  perhaps not all of {name} is metered:", f"    {line['advice']}"]
    return lines


def _write_summary(path: Path, result: RunResult) -> None:
    summary = result.totals.as_json() | {
        "exit_code": result.exit_code,
        "losses": result.losses,
        "gaps": [{"from_ns": a, "to_ns": b, "cause": cause} for a, b, cause in result.outages],
        "coverage": result.coverage,
        "store_error": result.store_error,
        "price_error": result.price_error,
    }
    from halton_meter import accounts, config, privileges

    try:
        # As the person: root must not write wherever a name given to sudo points.
        privileges.as_account(
            accounts.invoking_account(), lambda: path.write_text(json.dumps(summary) + "\n")
        )
    except (OSError, config.ConfigError) as error:
        click.echo(harmless(f"halton-meter: {path} cannot be written: {error}"), err=True)
