"""The way of `init` that meters by uprobes: what it would do, the choice, and doing it.

With uprobes nothing of a user's is changed: no shell file, no certificate, no proxy. Root installs
one service, as `start` does, and `uninstall` removes it. `init.py` asks here first; the local proxy
is the way where uprobes cannot work, and where there is no root.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from halton_meter import installed
from halton_meter.cli import systemd_unit
from halton_meter.cli.output import count, fail, note, print_json, say
from halton_meter.problem import Problem

SUDO = ("sudo", "doas")


def obstacles() -> list[Problem]:
    """What keeps uprobes from working on this machine, root or not; nothing where they can."""
    from capture.environment import NEEDS_ROOT, check_environment

    return [each for each in check_environment() if each.what != NEEDS_ROOT]


def become_root() -> str | None:
    """The program that makes this user root: sudo or doas; None where there is none."""
    return next((name for name in SUDO if shutil.which(name)), None)


def steps() -> list[tuple[str, list[str]]]:
    """What `set_up` does: titles, and what of each changes on the machine."""
    from halton_meter import accounts
    from halton_meter.providers.registry import Registry

    account, home = accounts.invoking_account(), accounts.home_folder()
    hosts = len(Registry({}).hosts())
    if systemd_unit.has_systemd():
        install = [
            f"write {systemd_unit.UNIT_PATH}",
            f"systemctl enable {systemd_unit.UNIT_NAME}",
            f"systemctl restart {systemd_unit.UNIT_NAME}",
        ]
        title = "install the service, which starts now and at boot"
    else:
        install = ["start a process in the background, as root; without systemd not at boot"]
        title = "start the service"
    return [
        (title, install),
        (
            f"meter the programs of {account.name}, by probes on their TLS libraries",
            [
                f"read connections to {hosts} hosts of AI providers; all others stay unread",
                "change no program, shell file, certificate or proxy setting",
            ],
        ),
        (f"keep what is metered in {home}", ["readable by its owner alone"]),
    ]


def told() -> str:
    """The same as lines for people."""
    lines = ["init will, as root:"]
    for number, (title, does) in enumerate(steps(), 1):
        lines.append(f"  {number}. {title}")
        lines += [f"       {each}" for each in does]
    lines.append("Undo it all: sudo halton-meter uninstall")
    return "\n".join(lines)


def set_up(*, ask: bool, as_json: bool) -> None:
    """Install and start the service, as root; it meters when this returns."""
    from halton_meter import accounts
    from halton_meter.cli.start import start_probes
    from halton_meter.live.control import ask_service

    if ask:
        say(told())
        click.confirm("Continue?", default=True, abort=True)
    if runs_from_cache():
        note(
            "this runs from uv's cache, which uv may empty; then the service stops. "
            f"Later: uv tool install {installed.requirement()} && halton-meter init"
        )
    account, home = accounts.invoking_account(), accounts.home_folder()
    ran = ask_service(home, "status", owner=account.uid) is not None
    start_probes(quiet=as_json)
    found = ask_service(home, "status", owner=account.uid) or {}
    if as_json:
        taken = [{"step": title, "detail": "; ".join(does)} for title, does in steps()]
        print_json({"mode": "uprobes", "changed": not ran, "steps": taken})
        return
    seen = len({line["pid"] for line in found.get("coverage", ()) if line["state"] == "metered"})
    now = f", {count(seen, 'running program')} among them" if seen else ""
    say(f"init complete: every program of {account.name} is metered from now on{now}")
    say("  Use any AI tool, then: halton-meter report --today")
    say(
        "  What is metered and what is not: halton-meter status   Undo: sudo halton-meter uninstall"
    )


# --- without root ---------------------------------------------------------------------------------


def offered(port: int) -> bool:
    """Let the user choose between uprobes and the local proxy; whether it is uprobes."""
    say(
        "There are two ways to meter your programs:\n"
        "  1. uprobes: no program, shell or certificate is changed. A service of root's reads\n"
        "     connections to AI providers at the TLS libraries. Needs root once.\n"
        f"  2. a local proxy, without root: terminals and apps are pointed to 127.0.0.1:{port},\n"
        "     with a certificate authority of your own for AI providers only."
    )
    chosen = click.prompt("Which?", type=click.Choice(["1", "2"]), default="1")
    return bool(chosen == "1")


def through_root(tool: str, *, ask: bool) -> None:
    """Run the same `init` as root, by `tool`, and end with its exit code."""
    if ask:
        say(told())
        say(f"{tool} may ask for your password.")
        click.confirm("Continue?", default=True, abort=True)
    # The same Python and package, wherever they are: root's PATH need not have them.
    command = [tool, sys.executable, "-I", "-m", "halton_meter", "init", "--via", "uprobes"]
    try:
        code = subprocess.call([*command, "--non-interactive"])
    except OSError as error:
        fail(Problem(f"{tool} cannot be run: {error.strerror}", "sudo halton-meter init"))
    sys.exit(code)


# --- from uv's cache ------------------------------------------------------------------------------


def runs_from_cache() -> bool:
    """Whether `uvx` runs this: its cache, and with it the service's program, may be deleted."""
    return any(part.startswith("archive-v") for part in Path(sys.prefix).parts)


def install_for_good(arguments: Sequence[str], *, ask: bool) -> None:
    """From uv's cache (`uvx`), which may be emptied under a service: install, and go on there.

    Where that cannot be done, a line says so and this goes on from the cache.
    """
    uv = shutil.which("uv")
    what = installed.requirement()
    command, words = [uv or "uv", "tool", "install", *shlex.split(what)], f"uv tool install {what}"
    if uv is None:
        note(
            "this runs from uv's cache, which uv may empty; then the service stops. Later: " + words
        )
        return
    say(f"This runs from uv's cache, which uv may empty. It is installed for good first: {words}")
    if ask and not click.confirm("Install it?", default=True):
        return
    if subprocess.call(command) != 0:
        note(f"it could not be installed; going on from the cache. Later: {words}")
        return
    program = _installed_program(uv)
    if program is None:
        note(f"uv installed it, but not where it says: {words}")
        return
    os.execv(program, [str(program), "init", *arguments])  # noqa: S606 (our own program)


def _installed_program(uv: str) -> Path | None:
    done = subprocess.run((uv, "tool", "dir", "--bin"), capture_output=True, text=True, check=False)
    program = Path(done.stdout.strip()) / "halton-meter"
    return program if done.returncode == 0 and program.exists() else None
