"""`halton-meter init`: have the local proxy meter what this person's programs say.

As yourself, also under sudo. Everything it changes is noted in `changes.json` before it is changed,
and `halton-meter uninstall` puts it back. Exit codes: 0 set up; 1 not, with everything undone, the
reason and the next command on stderr; 2 wrong usage.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from halton_meter.cli.drawing import harmless_lines

if TYPE_CHECKING:
    from proxy_fallback.setup.changes import Commands
    from proxy_fallback.setup.plan import Machine
    from proxy_fallback.setup.steps import Done

EXAMPLES = """
    \b
    Examples:
      halton-meter init                  terminals and apps (the same as --apps)
      halton-meter init --env-only       only what is started from a terminal
      halton-meter init --full           all that heeds the system's proxy settings, too
      halton-meter init --dry-run        every command and file change, and none of them made
"""


@click.command(epilog=EXAMPLES)
@click.option("--apps", "mode", flag_value="apps", help="Terminals and apps. This is the default.")
@click.option("--full", "mode", flag_value="full", help="Also set the system's proxy settings.")
@click.option("--env-only", "mode", flag_value="env-only", help="Terminals only.")
@click.option("--java", is_flag=True, help="Also for Java: a copy of its trust store with our CA.")
@click.option("--system-trust", is_flag=True, help="Trust the CA for all users (asks for sudo).")
@click.option(
    "--redirect",
    metavar="APPS",
    default="",
    help="macOS: also what these apps say past their proxy settings (as in Claude,Cursor). "
    "macOS asks once to allow mitmproxy's network extension, in System Settings.",
)
@click.option("--non-interactive", is_flag=True, help="Ask nothing (macOS still does).")
@click.option("--dry-run", is_flag=True, help="Show every command and file change; make none.")
@click.option("--json", "as_json", is_flag=True, help="Print the steps as one JSON object.")
@click.option("--platform", type=click.Choice(["linux", "macos"]), hidden=True)
@click.option("--keep-system-proxy", "keep", is_flag=True, hidden=True)
def init(
    *,
    mode: str | None,
    java: bool,
    system_trust: bool,
    redirect: str,
    non_interactive: bool,
    dry_run: bool,
    as_json: bool,
    platform: str | None,
    keep: bool,
) -> None:
    """Set up the local proxy for this machine's programs, without root."""
    from halton_meter.live.proxy.run import ask_service
    from proxy_fallback.setup.changes import ChangeError
    from proxy_fallback.setup.ledger import Ledger
    from proxy_fallback.setup.plan import Choice, SetupError
    from proxy_fallback.setup.steps import describe, take_steps

    machine = machine_here(platform)
    if keep:
        _keep_system_proxy(machine)
    if machine.platform != platform_here() and not dry_run:
        raise click.UsageError(f"this is not {platform}; --platform is for --dry-run")
    choice = Choice(mode or "apps", java, system_trust, redirect)
    if not (non_interactive or dry_run or as_json) and sys.stdin.isatty():
        _ask(machine, choice.mode)
    try:
        if dry_run:
            _show(describe(machine, choice, Ledger(machine.home, machine.commands)), as_json)
            return
        with Ledger.open(machine.home, machine.commands) as ledger:
            if not ledger.complete and not as_json:
                click.echo("an earlier init was interrupted: going on from there")
            steps: list[Done] = []

            def tell(done: Done) -> None:
                steps.append(done)
                if not as_json:
                    click.echo(_line(done))

            changed = take_steps(machine, choice, ledger, tell)
        ask_service(machine.home, "forget")  # trust was put right, as `status` advises
    except (SetupError, ChangeError) as error:
        fail(str(error), as_json)
    _tell_the_end(machine, choice.mode, changed, steps, as_json)


def _line(done: Done) -> str:
    detail = f": {done.detail}" if done.detail else ""
    return f"{done.number}/{done.of} ✓ {done.title}{detail}{'' if done.changed else ' (as it was)'}"


def _tell_the_end(
    machine: Machine, mode: str, changed: bool, steps: list[Done], as_json: bool
) -> None:
    if as_json:
        told = [
            {"step": each.title, "detail": each.detail, "changed": each.changed} for each in steps
        ]
        click.echo(json.dumps({"mode": mode, "changed": changed, "steps": told}))
        return
    click.echo(f"init complete, mode: {mode}" + ("" if changed else "; nothing changed"))
    if runs_from_cache():
        click.echo("  this runs from uv's cache, which may be emptied; so that the service lasts:")
        click.echo("  uv tool install halton-meter && halton-meter init")
    if changed:
        click.echo(f"  open a new terminal, or in this one: {sourced_here(machine)}")
        click.echo("  see: halton-meter doctor   take it back: halton-meter uninstall")


def in_fish() -> bool:
    """Whether the shell that we were started from is fish, which does not read sh."""
    import psutil

    processes: Any = psutil  # it ships no types
    try:
        return bool(processes.Process(os.getppid()).name() == "fish")
    except psutil.Error:
        return False


def sourced_here(machine: Machine) -> str:
    """What to type so that an open terminal has the variables, too."""
    if in_fish():
        file = machine.config_home / "fish/conf.d/halton-meter.fish"
        return f"source {shlex.quote(str(file))}"
    return f". {shlex.quote(str(machine.home / 'env.sh'))}"


def _ask(machine: Machine, mode: str) -> None:
    click.echo(
        f"This points {'terminals' if mode == 'env-only' else 'terminals and apps'} to a proxy on "
        f"127.0.0.1:{machine.port},\nwhich decrypts what goes to {len(machine.hosts)} "
        "language-model hosts and tunnels everything else untouched.\n"
        "See all of it first: halton-meter init --dry-run"
    )
    click.confirm("Go on?", default=True, abort=True)


def _show(steps: list[tuple[str, list[str]]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"steps": [{"step": title, "does": does} for title, does in steps]}))
        return
    for number, (title, does) in enumerate(steps, 1):
        click.echo(f"{number}. {title}")
        for line in does or ["nothing: as it is"]:
            click.echo(f"   {line}")


def _keep_system_proxy(machine: Machine) -> NoReturn:
    """Run the keeper until stopped; the agent or unit of `--full` does."""
    import signal

    from proxy_fallback.setup.system_proxy import Keeper, notifications

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    keeper = Keeper(
        machine.home,
        machine.commands,
        machine.platform,
        machine.port,
        machine.healthy,
        lambda text: click.echo(f"halton-meter: {text}", err=True),
    )
    for network_changed in notifications():
        keeper.look(network_changed)
    sys.exit(0)


# --- shared with uninstall and doctor -----------------------------------------------------------


def platform_here() -> str:
    """The platform's name as set-up knows it."""
    return "macos" if sys.platform == "darwin" else "linux"


def runs_from_cache() -> bool:
    """Whether this is `uvx`: the programs that a service needs may be gone tomorrow."""
    return any(part.startswith("archive-v") for part in Path(sys.prefix).parts)


def machine_here(platform: str | None = None) -> Machine:
    """The machine and person that we are on. Another `platform` than ours can only be looked at."""
    import datetime
    import socket

    import proxy_fallback
    from halton_meter import config
    from halton_meter.providers.registry import Registry
    from proxy_fallback.edge import listening
    from proxy_fallback.setup.plan import Machine

    home = config.home_folder()
    try:
        hosts = Registry(config.load(home).extra_hosts).hosts()
        proxy = config.load_proxy(home)
    except (config.ConfigError, ValueError) as error:
        fail(str(error))

    def metering() -> bool:
        from halton_meter.live.proxy.run import service_status

        return (service_status(home) or {}).get("health") in ("ok", "paused")

    def port_taken() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", proxy.port)) == 0

    return Machine(
        platform=platform or platform_here(),
        uid=os.getuid(),
        user_home=Path(os.environ.get("HOME") or Path.home()),
        home=home,
        environ=os.environ,
        commands=_commands(platform),
        python=sys.executable,
        witness=Path(str(proxy_fallback.__file__)),
        port=proxy.port,
        hosts=tuple(hosts),
        now=datetime.datetime.now(datetime.UTC),
        upstream=proxy.upstream is not None,
        healthy=lambda: listening.answers(proxy.port),
        metering=metering,
        port_taken=port_taken,
    )


def _commands(platform: str | None) -> Commands:
    from proxy_fallback.setup.changes import Commands, Unasked

    return Commands() if platform in (None, platform_here()) else Unasked()


def fail(text: str, as_json: bool = False, **more: Any) -> NoReturn:
    """End with code 1, the text on stderr (and as JSON on stdout if asked)."""
    if as_json:
        click.echo(json.dumps({"error": text, **more}))
    click.echo(harmless_lines(f"halton-meter: {text}"), err=True)
    sys.exit(1)
