"""`halton-meter init`: set metering up for this user's programs, by uprobes or the local proxy.

On Linux uprobes come first (`init_uprobes.py`): as root at once, else by sudo if the user agrees.
The proxy is set up as the user, also under sudo. Each of its changes is recorded in `changes.json`
before it is made, and `halton-meter uninstall` undoes it. Exit codes: 0 set up; 1 failed, with
everything undone, the reason and the fix on stderr; 2 wrong usage.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from halton_meter import installed
from halton_meter.cli.configured import require_sound
from halton_meter.cli.output import fail, note, print_json, say, wrong_usage
from halton_meter.problem import Problem

if TYPE_CHECKING:
    from proxy_fallback.setup.changes import Commands
    from proxy_fallback.setup.machine import Machine
    from proxy_fallback.setup.plan import Choice
    from proxy_fallback.setup.steps import StepTaken

EXAMPLES = """
    \b
    Examples:
      sudo halton-meter init             Linux: meter all programs of yours by uprobes
      halton-meter init                  the same, asking first; macOS: by the local proxy
      halton-meter init --via proxy      by the local proxy, without root
      halton-meter init --env-only       only programs that are started from a terminal
      halton-meter init --full           also every app that follows the system proxy settings
      halton-meter init --dry-run        show every command and file change, and make none
"""


@click.command(epilog=EXAMPLES)
@click.option(
    "--via",
    type=click.Choice(["auto", "uprobes", "proxy"]),
    default="auto",
    help="Capture method. auto: uprobes on Linux where root may attach them, else the proxy, which "
    "the options below choose as well.",
)
@click.option(
    "--apps", "mode", flag_value="apps", help="Proxy: terminals and apps. The proxy's default."
)
@click.option("--full", "mode", flag_value="full", help="Proxy: also set the system's settings.")
@click.option("--env-only", "mode", flag_value="env-only", help="Proxy: terminals only.")
@click.option(
    "--no-shell-rc",
    is_flag=True,
    help="Proxy: leave the start-up files of shells alone; print the line to add instead.",
)
@click.option("--java", is_flag=True, help="Also for Java: copy its trust store and add our CA.")
@click.option("--system-trust", is_flag=True, help="Trust the CA for all users (asks for sudo).")
@click.option(
    "--redirect",
    metavar="APPS",
    default="",
    help="macOS: also capture these apps when they bypass the proxy settings, e.g. Claude,Cursor. "
    "macOS asks once to allow mitmproxy's network extension, in System Settings.",
)
@click.option("--non-interactive", is_flag=True, help="Ask nothing (macOS still does).")
@click.option("--dry-run", is_flag=True, help="Show every command and file change; make none.")
@click.option("--json", "as_json", is_flag=True, help="Print the steps as one JSON object.")
@click.option("--platform", type=click.Choice(["linux", "macos"]), hidden=True)
@click.option("--keep-system-proxy", "keep", is_flag=True, hidden=True)
def init(
    *,
    via: str,
    mode: str | None,
    no_shell_rc: bool,
    java: bool,
    system_trust: bool,
    redirect: str,
    non_interactive: bool,
    dry_run: bool,
    as_json: bool,
    platform: str | None,
    keep: bool,
) -> None:
    """Set metering up for all your programs, and name what that changes before it does.

    On Linux with root, a service meters them by uprobes: nothing else changes. Without root a
    local proxy does, and your terminals and apps are pointed to it.
    """
    from proxy_fallback.setup.plan import Choice

    proxied = bool(mode or java or system_trust or redirect or no_shell_rc or platform or keep)
    if via == "uprobes" and proxied:
        wrong_usage("these options are the proxy's; uprobes need none", "leave --via uprobes out")
    interactive = not (non_interactive or dry_run or as_json) and sys.stdin.isatty()
    if sys.platform == "linux" and via != "proxy" and not proxied:
        _by_uprobes(via, interactive, dry_run, as_json)
    become_the_user()
    require_sound()
    _by_proxy(
        Choice(mode or "apps", java, system_trust, redirect, not no_shell_rc),
        interactive,
        dry_run,
        as_json,
        platform,
        keep,
    )


def _by_uprobes(via: str, interactive: bool, dry_run: bool, as_json: bool) -> None:
    """Set the uprobes service up and end the command; return where the proxy is to be instead."""
    from halton_meter import accounts
    from halton_meter.cli import init_uprobes
    from proxy_fallback.setup.ledger import LEDGER_NAME

    if via == "auto" and (accounts.home_folder() / LEDGER_NAME).exists():
        return  # set up already: `init` again renews it
    missing = init_uprobes.obstacles()
    if missing and via == "uprobes":
        fail(*missing, as_json=as_json)
    if missing:
        if interactive or accounts.is_root():
            note(f"uprobes cannot be used here: {missing[0].what}. The local proxy can.")
        return
    if dry_run and (via == "uprobes" or accounts.is_root()):
        _show(init_uprobes.steps(), as_json)
        sys.exit(0)
    if accounts.is_root():
        init_uprobes.set_up(ask=interactive, as_json=as_json)
        sys.exit(0)
    _by_sudo(via, interactive, dry_run)


def _by_sudo(via: str, interactive: bool, dry_run: bool) -> None:
    """The same without root: through sudo, where the user wants that."""
    from halton_meter.cli import init_uprobes

    tool = init_uprobes.become_root()
    if via == "uprobes" and tool is None:
        fail(Problem("uprobes need root, and there is neither sudo nor doas", "su -c …"))
    if via == "auto" and (tool is None or not interactive):
        if not dry_run:
            note("with root, uprobes need no proxy: sudo halton-meter init")
        return
    if via == "auto" and not init_uprobes.offered(machine_here().port):
        return
    assert tool is not None
    if init_uprobes.runs_from_cache():
        init_uprobes.install_for_good(sys.argv[2:], ask=interactive)
    init_uprobes.through_root(tool, ask=interactive)


def become_the_user() -> None:
    """Under sudo, what is set up for a user is set up by that user."""
    from halton_meter import privileges
    from halton_meter.settings import config

    try:
        privileges.settle(needs_root=False)
    except config.ConfigError as error:
        fail(*error.problems)


def _by_proxy(
    choice: Choice,
    interactive: bool,
    dry_run: bool,
    as_json: bool,
    platform: str | None,
    keep: bool,
) -> None:
    from halton_meter.live.proxy.refusals_file import forget
    from halton_meter.live.proxy.run import ask_service
    from proxy_fallback.setup.changes import ChangeError
    from proxy_fallback.setup.ledger import Ledger
    from proxy_fallback.setup.steps import describe, take_steps

    machine = machine_here(platform)
    if keep:
        _keep_system_proxy(machine)
    if machine.platform != platform_here() and not dry_run:
        wrong_usage(f"this is not {platform}", f"halton-meter init --dry-run --platform {platform}")
    if interactive:
        _ask(machine, choice.mode)
    try:
        if dry_run:
            _show(describe(machine, choice, Ledger(machine.home, machine.commands)), as_json)
            return
        with Ledger.open(machine.home, machine.commands) as ledger:
            if not ledger.complete and not as_json:
                say("An earlier init was interrupted. Continuing from there.")
            steps: list[StepTaken] = []

            def report(done: StepTaken) -> None:
                steps.append(done)
                if not as_json:
                    say(_line(done))

            changed = take_steps(machine, choice, ledger, report)
        forget(machine.home)  # programs that refused our CA are tried again
        ask_service(machine.home, "forget")
    except ChangeError as error:
        fail(error.problem, as_json=as_json)
    _print_result(machine, choice, changed, steps, as_json)


def _line(done: StepTaken) -> str:
    detail = f": {done.detail}" if done.detail else ""
    return f"{done.number}/{done.of} ✓ {done.title}{detail}{'' if done.changed else ' (unchanged)'}"


def _print_result(
    machine: Machine, choice: Choice, changed: bool, steps: list[StepTaken], as_json: bool
) -> None:
    from halton_meter.cli import init_uprobes

    mode = choice.mode
    if as_json:
        taken = [
            {"step": each.title, "detail": each.detail, "changed": each.changed} for each in steps
        ]
        print_json({"mode": mode, "changed": changed, "steps": taken})
        return
    say(f"init complete, mode: {mode}" + ("" if changed else "; nothing changed"))
    if init_uprobes.runs_from_cache():
        say("  warning: this runs from uv's cache, which uv may empty; then the service stops.")
        say(f"  fix: uv tool install {installed.requirement()} && halton-meter init")
    if changed:
        where = "Open a new terminal, or in this one" if choice.shell_rc else "In each terminal"
        say(f"  {where}: {sourced_here(machine)}")
        say("  Check: halton-meter doctor   Undo: halton-meter uninstall")


def in_fish() -> bool:
    """Whether fish started this command; it does not read sh syntax."""
    import psutil

    processes: Any = psutil  # it ships no types
    try:
        return bool(processes.Process(os.getppid()).name() == "fish")
    except psutil.Error:
        return False


def sourced_here(machine: Machine) -> str:
    """The command that sets the variables in a terminal that is already open."""
    if in_fish():
        file = machine.config_home / "fish/conf.d/halton-meter.fish"
        return f"source {shlex.quote(str(file))}"
    return f". {shlex.quote(str(machine.home / 'env.sh'))}"


def _ask(machine: Machine, mode: str) -> None:
    say(
        f"This points {'terminals' if mode == 'env-only' else 'terminals and apps'} to a proxy on "
        f"127.0.0.1:{machine.port}.\nThe proxy decrypts traffic to {len(machine.hosts)} "
        "language-model hosts and tunnels all other traffic unread.\n"
        "To see every change first: halton-meter init --dry-run"
    )
    click.confirm("Continue?", default=True, abort=True)


def _show(steps: list[tuple[str, list[str]]], as_json: bool) -> None:
    if as_json:
        print_json({"steps": [{"step": title, "does": does} for title, does in steps]})
        return
    for number, (title, does) in enumerate(steps, 1):
        say(f"{number}. {title}")
        for line in does or ["no change"]:
            say(f"   {line}")


def _keep_system_proxy(machine: Machine) -> NoReturn:
    """Guard the system proxy settings until stopped; the agent or unit of `--full` runs this."""
    import signal

    from proxy_fallback.setup.settings_guard import ProxySettingsGuard, notifications

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    guard = ProxySettingsGuard(
        machine.home,
        machine.commands,
        machine.platform,
        machine.port,
        machine.healthy,
        note,
    )
    for network_changed in notifications():
        guard.check(network_changed)
    sys.exit(0)


# --- shared with uninstall and doctor -----------------------------------------------------------


def platform_here() -> str:
    """The platform's name as set-up knows it."""
    return "macos" if sys.platform == "darwin" else "linux"


def machine_here(platform: str | None = None) -> Machine:
    """The machine and user of this process. With another `platform`, only a dry run is possible."""
    import datetime
    import socket

    import proxy_fallback
    from halton_meter import accounts
    from halton_meter.providers.registry import Registry
    from halton_meter.settings.config import read
    from proxy_fallback.edge import listening
    from proxy_fallback.setup.machine import Machine

    home = accounts.home_folder()
    chosen = read(home).config  # the command has said what is wrong in it
    hosts, proxy = Registry(chosen.extra_hosts).hosts(), chosen.proxy

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
