"""`halton-meter run -- CMD…`: meters one command and prints on stderr what it cost.

The command's output, terminal and exit code stay its own. Exit codes: the command's own (128 + the
signal that ended it); 127 when there is no such command; 126 when it cannot be run; 1 when it could
not be metered, in which case it was not started; 2 wrong usage.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from halton_meter.budget import END, STOP
from halton_meter.cli.coverage import coverage_lines, losses_beside
from halton_meter.cli.losses import (
    is_capture_loss,
    loss_lines,
    other_calls_in_words,
    sightings_in_words,
)
from halton_meter.cli.money import Dollars
from halton_meter.cli.named import FilePath
from halton_meter.cli.output import (
    cost_text,
    count,
    fail,
    implausible_words,
    note,
    shown,
    sum_words,
    wrong_usage,
)
from halton_meter.cli.summary_file import refusal, write_summary
from halton_meter.cli.unpriced import set_price_lines
from halton_meter.contract import usd_text
from halton_meter.coverage import connections_ratio
from halton_meter.live.result import RunLimit
from halton_meter.problem import Problem

if TYPE_CHECKING:
    from halton_meter.live.result import RunResult
    from halton_meter.live.totals import Line, Totals

MODELS_SHOWN = 10
PROCESSES_SHOWN = 5
GOES_ON = "this run goes on without it"
# Beside budget.STOP and END. Nothing was left to be held; requests without a price may be over it.
PASSED, NOT_KNOWN = "passed", "not_known"
_NOT_RUN = (126, 127)  # exit codes of a command that never ran
EXAMPLES = """
    \b
    Examples:
      sudo halton-meter run -- claude -p hello        uprobes: nothing to set up
      halton-meter run -- claude -p hello             the running service, else a local proxy
      halton-meter run --via proxy -- python app.py   always a local proxy
      sudo halton-meter run --via keylog -- curl …    packets and the command's TLS key log
      halton-meter run --max-usd 2 -- claude          stop it at two dollars
      halton-meter run --shell                        everything that you run in a shell
"""


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog=EXAMPLES,
)
@click.option(
    "--via",
    type=click.Choice(["auto", "uprobes", "proxy", "keylog"]),
    default="auto",
    help="Capture method: uprobes on the TLS library (root, or the running service), a local "
    "proxy, or packets with the TLS keys that the command writes (root). auto: uprobes where "
    "available.",
)
@click.option("--shell", is_flag=True, help="Run your shell, metered, instead of a command.")
@click.option(
    "--java",
    is_flag=True,
    help="Also configure JVMs to use the proxy (implies --via proxy). Java ignores proxy "
    "variables, and uprobes cannot see its TLS.",
)
@click.option(
    "--max-usd",
    type=Dollars(),
    metavar="USD",
    help="Stop the command once it has spent so much, at list price: at the answer that crosses "
    "the limit. Through the proxy its next request is refused instead.",
)
@click.option(
    "--at-limit",
    type=click.Choice([STOP, END]),
    help="What follows at the limit of --max-usd. stop (default): the command waits for "
    "`halton-meter budget resume`, or for Ctrl-C; end: it is ended.",
)
@click.option("--quiet", is_flag=True, help="Print no summary.")
@click.option(
    "--json-summary",
    type=FilePath(dir_okay=False, allow_dash=True),
    metavar="FILE",
    help='Also write the summary to this file, as JSON; "-" is standard output.',
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def run(
    *,
    command: tuple[str, ...],
    via: str,
    shell: bool,
    java: bool,
    max_usd: Decimal | None,
    at_limit: str | None,
    quiet: bool,
    json_summary: str | None,
) -> NoReturn:
    """Meter one command and print what it cost.

    The summary goes to stderr; output, terminal and exit code stay the command's own. Uprobes need
    sudo or the running service (sudo halton-meter start). Without both, the command runs through a
    local proxy, as yourself.

    Exit codes: the command's own (128 + the signal that ended it); 127 when there is no such
    command; 126 when it cannot be run; 1 when it could not be metered, in which case it was not
    started.
    """
    from halton_meter.accounts import invoking_account
    from halton_meter.live.servers import asked_servers
    from halton_meter.problem import Unavailable
    from halton_meter.settings.config import ConfigError

    if shell == bool(command):
        example = "halton-meter run -- claude -p hello   (or: halton-meter run --shell)"
        wrong_usage("run needs either a command or --shell", example)
    if java and via in ("uprobes", "keylog"):
        wrong_usage(
            f"--java does not go with --via {via}, which cannot see Java's TLS",
            "use --via proxy --java",
        )
    if at_limit is not None and max_usd is None:
        wrong_usage(
            f"--at-limit {at_limit} needs a limit", f"add it: --max-usd 2 --at-limit {at_limit}"
        )
    if via == "keylog" and max_usd is not None:
        wrong_usage(
            "--max-usd does not go with --via keylog, which stops nothing",
            "use --via uprobes or proxy",
        )
    if json_summary is not None and (refused := refusal(json_summary)) is not None:
        wrong_usage(*refused)
    if shell:
        command = (os.environ.get("SHELL") or invoking_account().shell,)
        if not quiet:
            note("this shell is metered; when it ends, the summary follows")
    servers = asked_servers(command, invoking_account().uid)
    limit = RunLimit(usd_text(max_usd), at_limit or STOP)
    try:
        if via == "proxy" or java:
            result = through_proxy(command, limit, java)
        elif via == "keylog":
            result = through_key_log(command)
        else:
            result = _through_probes(command, via, limit)
    except Unavailable as error:
        fail(*error.problems)
    except ConfigError as error:
        fail(*error.problems)
    result.not_followed = servers
    if result.held is None:
        result.held = reached(limit, result)
    if json_summary is not None:
        write_summary(json_summary, _as_json(result))
    if not quiet:
        note("\n".join(summary_lines(result)))
    sys.exit(result.exit_code)


def _through_probes(command: Sequence[str], via: str, limit: RunLimit) -> RunResult:
    from halton_meter import accounts, privileges
    from halton_meter.cli.configured import told
    from halton_meter.live import own_code
    from halton_meter.live.control import Control
    from halton_meter.live.probes import service
    from halton_meter.live.probes.supervisor import Plan
    from halton_meter.live.probes.watched_run import run_watched
    from halton_meter.problem import Unavailable
    from halton_meter.settings import config

    if accounts.is_root() and (problems := own_code.problems()):
        raise Unavailable(problems)
    account, home = accounts.invoking_account(), accounts.home_folder()
    environment = privileges.user_environment(account, os.environ, privileges.sudo_environment())
    control = _service(home, account.uid)
    if control is not None:  # what attaches is there already: we need no root any more
        privileges.settle(needs_root=False)
        told(config.read(home), GOES_ON)
        return run_watched(command, environment, account, control, lambda: Control(home), limit)
    if not accounts.is_root() and via == "auto":
        note(
            "not root and no service running: using a local proxy "
            "(for uprobes: sudo halton-meter start)"
        )
        return through_proxy(command, limit)
    if not accounts.is_root():
        raise Unavailable([_not_root(command)])
    found, hosts = service.read_configuration(account, home)
    told(found, GOES_ON)
    plan = Plan(account, home, found.config, hosts, service=False, limit=limit)
    return service.run_command(command, environment, plan)


def through_own_probes(command: Sequence[str], record_fd: int, fix: str) -> RunResult:
    """Run a command metered by probes of its own, also beside a service; keep its plaintext.

    From its end on we are the user, for good. `fix` is the call that has the right to. Raises
    Unavailable.
    """
    from halton_meter import accounts, privileges
    from halton_meter.cli.configured import told
    from halton_meter.live import own_code
    from halton_meter.live.probes import service
    from halton_meter.live.probes.supervisor import Plan
    from halton_meter.problem import Unavailable

    if not accounts.is_root():
        raise Unavailable([Problem("probes need root", fix)])
    if problems := own_code.problems():
        raise Unavailable(problems)
    account, home = accounts.invoking_account(), accounts.home_folder()
    environment = privileges.user_environment(account, os.environ, privileges.sudo_environment())
    found, hosts = service.read_configuration(account, home)
    told(found, GOES_ON)
    plan = Plan(account, home, found.config, hosts, service=False, record_fd=record_fd)
    try:
        return service.run_command(command, environment, plan)
    finally:
        privileges.settle(needs_root=False)


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

    typed = shlex.join(command)
    what = "uprobes need root or the running service, and there is neither"
    ways = f"sudo halton-meter run -- {typed}\nor: sudo halton-meter start   (once)"
    ways += f"\nor: halton-meter run --via proxy -- {typed}"
    return Problem(what, ways)


def through_proxy(
    command: Sequence[str], limit: RunLimit, java: bool = False, record_fd: int | None = None
) -> RunResult:
    """Run a command metered by a local proxy of its own, as the user; maybe keep its exchanges."""
    from halton_meter import accounts
    from halton_meter.cli.configured import told
    from halton_meter.live.proxy.run import meter_command
    from halton_meter.settings import config

    home = accounts.home_folder()
    found = config.read(home)
    told(found, GOES_ON)
    hosts, upstream = found.config.extra_hosts, found.config.proxy.upstream
    return meter_command(command, home, os.environ, hosts, upstream, java, limit, record_fd)


def through_key_log(
    command: Sequence[str], record: Callable[[], Path] | None = None, fix: str | None = None
) -> RunResult:
    """Run a command metered by its packets. Raises Unavailable.

    `record` names a new file for them; it is asked as the user, when nothing more needs root. `fix`
    is the call that has the right to capture, where it is none of `run`.
    """
    from capture.packets.keeping import CaptureWriter, Keeping
    from halton_meter import accounts, privileges
    from halton_meter.cli.configured import told
    from halton_meter.live import own_code
    from halton_meter.live.keylog.connectors import start_connectors
    from halton_meter.live.keylog.run import HTTPS, RUN_FIX, meter_command, start_capture
    from halton_meter.live.result import Recorded
    from halton_meter.problem import Unavailable
    from halton_meter.settings import config

    if accounts.is_root() and (problems := own_code.problems()):
        raise Unavailable(problems)
    account, home = accounts.invoking_account(), accounts.home_folder()
    environment = privileges.user_environment(account, os.environ, privileges.sudo_environment())
    link = start_capture([HTTPS], fix=fix or RUN_FIX)
    connectors = start_connectors(account.uid, account.gid, [HTTPS])
    privileges.settle(needs_root=False)  # what captures is there already
    found = config.read(home)
    told(found, GOES_ON)
    hosts = found.config.extra_hosts
    if record is None:
        return meter_command(command, home, environment, hosts, link, connectors=connectors)
    keeping = Keeping(CaptureWriter(record()))
    try:
        result = meter_command(command, home, environment, hosts, link, keeping, connectors)
    finally:
        keeping.close()
    written = keeping.connections, keeping.packets
    result.recorded = Recorded(*written, keeping.error, keeping.without_beginning)
    return result


# --- the summary --------------------------------------------------------------------------------


def summary_lines(result: RunResult) -> list[str]:
    """The summary at the end of a run."""
    totals = result.totals
    total = totals.total
    lines = [f"{count(total.requests, 'request')}, {_tokens(total)}, {_cost(total)}"]
    if not total.requests and _is_more_than_metered(result):
        lines = ["no request was metered; what the command spent is not known"]
    models = sorted(totals.models.items(), key=lambda item: -item[1].list_usd)
    if total.estimated or (total.unknown and not total.unpriced):
        flag = "estimated" if total.estimated else "usage_not_sent"
        lines.append(f"  which and why: halton-meter events --flag {flag}")
    if len(models) > 1 or total.unpriced:
        lines += [_model_line(name, line) for name, line in models[:MODELS_SHOWN]]
    if len(models) > MODELS_SHOWN:
        more = count(len(models) - MODELS_SHOWN, "more model")
        lines.append(f"  and {more}: halton-meter report --by model")
    lines += _set_price(totals)
    lines += _limit_lines(result)
    lines += _troubles(result)
    return lines


def reached(limit: RunLimit, result: RunResult) -> dict[str, Any] | None:
    """The limit that a command reached, or may have reached, though nothing held it."""
    total = result.totals.total
    if limit.max_usd is None:
        return None
    is_over = total.list_usd >= Decimal(limit.max_usd)
    if not is_over and not total.unpriced:
        return None
    text = f"{cost_text(total.list_usd)} spent of {cost_text(Decimal(limit.max_usd))}"
    return {
        "name": None,
        "text": text,
        "holds": PASSED if is_over else NOT_KNOWN,
        "limit_usd": limit.max_usd,
        "spent_usd": usd_text(total.list_usd),
        "at_least": bool(total.unpriced),
        "in_flight": 0,
        "in_flight_usd": None,
        "times": 0,
    }


def _limit_lines(result: RunResult) -> list[str]:
    """That a limit held the command or was passed, and how far it got over it."""
    held = result.held
    if held is None:
        return []
    limit_usd, spent_usd = Decimal(held["limit_usd"] or 0), Decimal(held["spent_usd"] or 0)
    if held["holds"] == NOT_KNOWN:
        why = f"({count(result.totals.total.unpriced, 'request')} unpriced)"
        return [f"  limit of {cost_text(limit_usd)}: nobody knows whether it was reached {why}"]
    did = {END: "it ended", PASSED: "the last answers reached it,"}.get(held["holds"], "it stopped")
    if result.refused:
        did = (
            f"{count(result.refused, 'request')} {'was' if result.refused == 1 else 'were'} refused"
        )
    over = ""
    if spent_usd > limit_usd:
        over = f", {cost_text(spent_usd - limit_usd)} over it"
    at = "at no less than" if held["at_least"] else "at"
    if held["in_flight"] and not result.refused:
        over += f"; {count(held['in_flight'], 'request')} under way"
    return [f"  limit of {cost_text(limit_usd)}: {did} {at} {cost_text(spent_usd)}{over}"]


def _is_more_than_metered(result: RunResult) -> bool:
    """Whether a provider was asked, or may have been, past all that was metered."""
    seen = result.connections
    missed = seen is not None and seen.metered.connections < seen.seen.connections
    others = any(result.losses.get(cause) for cause in _OTHER_USERS)
    return bool(missed or result.unmetered or result.outages or result.still_running or others)


_REFUSED_OTHERS = "of another user's program refused by the proxy, which serves you and root alone"
# Losses of a run, in words of its own: what a command did as another user.
_OTHER_USERS = {
    "ran_as_another_user": ("program", "of the command ran as another user: not metered"),
    "refused_other_user": ("connection", _REFUSED_OTHERS),
}


def _other_users_lines(losses: Mapping[str, int]) -> list[str]:
    return [
        f"{count(losses[cause], noun)} {what}. Use: sudo halton-meter start --user NAME"
        for cause, (noun, what) in _OTHER_USERS.items()
        if losses.get(cause)
    ]


def _set_price(totals: Totals) -> list[str]:
    """The command that gives the first model without a price one, as `report` has it."""
    if not totals.without_price:
        return []
    from halton_meter.report import set_price_command

    return set_price_lines(
        set_price_command(where, model) for model, where in totals.without_price.items()
    )


def _model_line(name: str, line: Line) -> str:
    return (
        f"  {name:<32} {line.requests:>6,} {line.input_tokens:>12,} in "
        f"{line.output_tokens:>10,} out  {_cost(line)}"
    )


def _tokens(line: Line) -> str:
    """The tokens that are known, and of how many requests they are not."""
    if line.unknown == line.requests and line.requests:
        return "tokens not known"
    known = f"{line.input_tokens:,} tokens in, {line.output_tokens:,} out"
    return known + (f" (of {count(line.unknown, 'request')} not known)" if line.unknown else "")


def _cost(line: Line) -> str:
    """The list price, what is billed where that differs, and how many requests have no price."""
    if line.unpriced + line.implausible == line.requests and line.requests:
        return "unpriced"
    text = sum_words(line.list_usd, line.unpriced, cost_text(line.list_usd))
    if line.estimated:
        every = line.estimated == line.requests
        text += " (estimated)" if every else f" ({count(line.estimated, 'request')} estimated)"
    if line.marginal_usd != line.list_usd:
        text += f", {cost_text(line.marginal_usd)}{'+' if line.unpriced else ''} billed"
    return text


def _troubles(result: RunResult) -> list[str]:
    from halton_meter.live.servers import lines as server_lines
    from halton_meter.live.unmetered import lines as unmetered_lines

    totals = result.totals
    lines = []
    if totals.gapped or totals.aborted or totals.failed:
        words = (
            (totals.gapped, "incomplete (bytes lost)"),
            (totals.aborted, "interrupted"),
            (totals.failed, "failed"),
        )
        lines.append("  " + ", ".join(f"{n:,} {what}" for n, what in words if n))
    lines += [f"  {each}" for each in sightings_in_words(totals.seen_again, totals.told_apart)]
    calls = other_calls_in_words(totals.total.requests, totals.other_calls)
    lines += [f"  {each}" for each in calls]
    if totals.total.implausible:
        lines.append(f"  {implausible_words(totals.total.implausible)}")
    for from_ns, to_ns, cause in result.outages:
        lines.append(f"  outage: nothing metered for {(to_ns - from_ns) / 1e9:.1f} s: {cause}")
    # What passed the proxy unmetered has lines of its own below.
    losses = losses_beside(result.losses, result.connections)
    lines += [f"  {line}" for line in _other_users_lines(losses)]
    losses = {cause: n for cause, n in losses.items() if cause not in _OTHER_USERS}
    lost = {cause: n for cause, n in losses.items() if is_capture_loss(cause)}
    lines += loss_lines(lost)
    lines += [f"  {line}" for line in server_lines(result.not_followed)]
    lines += _still_running_lines(result)
    said = unmetered_lines(result.unmetered, PROCESSES_SHOWN)
    lines += [f"  {line}" for line in said]
    if result.keys_error:
        lines.append(f"  {shown(result.keys_error, 300)}. Use: unset SSLKEYLOGFILE")
    if result.price_error:
        lines.append(f"  {result.price_error}")
    if result.waited_ms:
        lines.append(f"  waited {result.waited_ms / 1000:.1f} s for the search in a new program")
    if result.store_error:
        lines.append(f"  {result.store_error}")
    # Of a proxied run the rest is said already.
    coverage = coverage_lines(result.connections, requests=totals.total.requests)
    if result.unseen_ms and result.connections and connections_ratio(result.connections) is None:
        shorter = f"one shorter than {result.unseen_ms:,} ms, or by QUIC, may have been missed"
        coverage = [f"coverage: no connection past the proxy was seen; {shorter}"]
    if result.exit_code in _NOT_RUN and not (result.connections and result.connections.parts):
        coverage = []
    lines += [f"  {line}" for line in (coverage[:1] if said else coverage)]
    counted = {part.program for part, _ in result.connections.rests()} if result.connections else ()
    unseen = [
        line
        for line in result.coverage
        if line.get("state") != "metered" and line["process"] not in counted
    ]
    for line in unseen[:PROCESSES_SHOWN]:
        host = f"looked up {line['host']}" if line.get("host") else "destination unknown"
        name = line["process"] or line["pid"]
        lines.append(f"  not metered: {name} ({line['stack']}); {host}")
        if line.get("advice"):
            lines.append(f"    {line['advice']}")
    partly = [
        line
        for line in result.coverage
        if line.get("state") == "metered" and line.get("advice") and line["process"] not in counted
    ]
    for line in partly[:PROCESSES_SHOWN]:
        name = line["process"] or line["pid"]
        lines += [f"  {name} may be only partly metered:", f"    {line['advice']}"]
    return lines


def _still_running_lines(result: RunResult) -> list[str]:
    """What of the command goes on without being metered, or without the proxy that it was told."""
    programs = result.still_running
    if not programs:
        return []
    named = list(dict.fromkeys(programs))
    names = ", ".join(named[:PROCESSES_SHOWN])
    if len(named) > PROCESSES_SHOWN:
        names += f" and {len(named) - PROCESSES_SHOWN:,} more"
    many = len(programs) > 1
    what = f"  {count(len(programs), 'process', 'processes')} of the command still"
    if result.unseen_ms is None:
        verbs = "run and are" if many else "runs and is"
        return [f"{what} {verbs} no longer metered: {names}. Use: sudo halton-meter start"]
    verb = "run" if many else "runs"
    why = "without the proxy, which ended with this run"
    return [f"{what} {verb} {why}: {names}. Use: let the command wait for what it starts"]


def _as_json(result: RunResult) -> dict[str, Any]:
    """The summary as JSON."""
    outages = [{"from_ns": a, "to_ns": b, "cause": cause} for a, b, cause in result.outages]
    return result.totals.as_json() | {
        "exit_code": result.exit_code,
        "losses": result.losses,
        "outages": outages,
        "gaps": outages,  # their name in earlier versions
        "coverage": result.coverage,
        "not_followed": result.not_followed,
        "still_running": result.still_running,
        "connections": result.connections and result.connections.as_json(),
        "unseen_ms": result.unseen_ms,
        "unmetered": [each.as_json() for each in result.unmetered],
        "limit": result.held,
        "refused_requests": result.refused,
        "store_error": result.store_error,
        "price_error": result.price_error,
        "keys_error": result.keys_error,
    }
