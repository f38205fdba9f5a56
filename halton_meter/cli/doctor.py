"""`halton-meter doctor [--fix [--apply]]`: what is in order, what is not, and how to mend it.

It looks and changes nothing; `--fix` shows what it would run, `--fix --apply` runs that. What needs
root or a decision of yours is told, never run. Exit codes: 0 all is well (or was mended); 1
something is not; 2 wrong usage.
"""

from __future__ import annotations

import json
import os
import shlex
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from halton_meter.cli.output import harmless

if TYPE_CHECKING:
    from proxy_fallback.setup.ledger import Ledger
    from proxy_fallback.setup.plan import Machine

# A day of heavy use is some 50 MB of events.
FREE_BYTES_MIN = 500 * 1024 * 1024
EXAMPLES = """
    \b
    Examples:
      halton-meter doctor                diagnose
      halton-meter doctor --fix          what would mend it
      halton-meter doctor --fix --apply  mend it
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `ok` None: not in use, which is no fault.

    `mend` is the command to run, `automatic` whether `--apply` may run it.
    """

    what: str
    ok: bool | None
    text: str
    mend: str = ""
    automatic: bool = False


@click.command(epilog=EXAMPLES)
@click.option("--fix", is_flag=True, help="Show the commands that would mend what is amiss.")
@click.option("--apply", is_flag=True, help="With --fix: run them.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as one JSON object.")
def doctor(*, fix: bool, apply: bool, as_json: bool) -> None:
    """Diagnose, and mend what is not as it should be."""
    from halton_meter.cli.init import machine_here

    if apply and not fix:
        raise click.UsageError("--apply goes with --fix")
    machine = machine_here()
    findings = list(diagnose(machine))
    amiss = [each for each in findings if each.ok is False]
    plan = list(dict.fromkeys(each.mend for each in amiss if each.automatic))
    if as_json:
        told = {"ok": not amiss, "findings": [asdict(each) for each in findings], "plan": plan}
        click.echo(json.dumps(told))
    else:
        for line in lines(findings, fix):
            click.echo(harmless(line))
    if apply and plan:
        sys.exit(_apply(machine, plan, as_json))
    sys.exit(1 if amiss else 0)


def lines(findings: list[Finding], fix: bool) -> list[str]:
    """The findings for people."""
    marks = {True: "✓", False: "✗", None: "-"}
    said = []
    for each in findings:
        said.append(f"{marks[each.ok]} {each.what}: {each.text}")
        if each.ok is False and each.mend and not fix:
            said.append(f"    {each.mend}")
    if fix:
        amiss = [each for each in findings if each.ok is False]
        ours = dict.fromkeys(each.mend for each in amiss if each.automatic)
        yours = dict.fromkeys(each.mend for each in amiss if each.mend and not each.automatic)
        said += ["", "would run (--fix --apply does):", *(f"  {each}" for each in ours)] * bool(
            ours
        )
        said += ["", "for you to do:", *(f"  {each}" for each in yours)] * bool(yours)
        said += ["", "nothing to mend"] * (not amiss)
    return said


def _apply(machine: Machine, plan: list[str], as_json: bool) -> int:
    """Run the plan, then look again."""
    for command in plan:
        words = shlex.split(command)
        if words[0] == "halton-meter":
            words = [sys.executable, "-P", "-m", "halton_meter", *words[1:]]
        ran = machine.commands.run(words)
        if ran.code:
            click.echo(f"halton-meter: {command}: {ran.said}", err=True)
            return 1
        if not as_json:
            click.echo(f"done: {command}")
    still = [each for each in diagnose(machine) if each.ok is False and each.automatic]
    for each in still:
        click.echo(f"halton-meter: still amiss: {each.what}: {each.text}", err=True)
    return 1 if still else 0


# --- what is looked at --------------------------------------------------------------------------


def diagnose(machine: Machine) -> Iterator[Finding]:
    """Everything, in the order in which one thing rests on another."""
    from proxy_fallback.setup.changes import ChangeError
    from proxy_fallback.setup.ledger import Ledger

    yield from _installed()
    yield from _files(machine.home)
    yield _prices(machine.home)
    try:
        ledger = Ledger(machine.home, machine.commands)
    except ChangeError as error:
        yield Finding("set-up", False, str(error).partition(";")[0], str(error).rpartition(": ")[2])
        return
    if ledger.entries:
        yield from _set_up(machine, ledger)
    else:
        text = "not set up (halton-meter init), so only `run` and the service meter"
        yield Finding("proxy set-up", None, text)
    yield from _tools(machine)


def _installed() -> Iterator[Finding]:
    from halton_meter.cli.init import runs_from_cache

    if runs_from_cache():
        text = f"runs from uv's cache ({sys.prefix}), which may be emptied"
        yield Finding("installation", False, text, "uv tool install halton-meter")


def _files(home: Path) -> Iterator[Finding]:
    if not home.is_dir():
        yield Finding("data", None, f"{home}: none yet")
        return
    private = ("*.duckdb*", "*.journal*", "*.sqlite*", "config.toml", "changes.json")
    open_ones = [
        file
        for pattern in (*private, "proxy-ca/mitmproxy-ca.p*")
        for file in home.glob(pattern)
        if stat.S_IMODE(file.stat().st_mode) & 0o077
    ]
    listed = " ".join(shlex.quote(str(file)) for file in open_ones)
    if stat.S_IMODE(home.stat().st_mode) & 0o022:
        yield Finding(
            "permissions", False, f"others may write in {home}", f"chmod go-w {home}", True
        )
    elif open_ones and stat.S_IMODE(home.stat().st_mode) & 0o055:
        yield Finding("permissions", False, "others may read files", f"chmod go-rwx {listed}", True)
    else:
        yield Finding("permissions", True, f"{home} is yours alone")
    room = os.statvfs(home)
    free = room.f_bavail * room.f_frsize
    yield Finding(
        "disk space",
        free >= FREE_BYTES_MIN,
        f"{free // 1024**2:,} MB free for {home}",
        f"du -h {shlex.quote(str(home))}",
    )


def _prices(home: Path) -> Finding:
    from pricing.book import PriceBook
    from pricing.rates import PriceError

    try:
        book = PriceBook.load(home)
    except PriceError as error:
        what, _, mend = str(error).rpartition("run: ")
        text = what.partition("; ")[0] or str(error)
        return Finding("prices", False, f"{text}: bundled prices are used", mend)
    except OSError as error:
        text = f"{error.filename}: {error.strerror}: bundled prices are used"
        return Finding("prices", False, text, f"ls -l {shlex.quote(str(home))}")
    own = f", {len(book.overrides)} of your own" if book.overrides else ""
    return Finding("prices", True, f"price book {book.version}{own}")


def _set_up(machine: Machine, ledger: Ledger) -> Iterator[Finding]:
    mode = ledger.mode or "apps"
    keys = {entry.change.key.partition(":")[0] for entry in ledger.entries}
    more = "".join(f" --{each}" for each in ("java", "system-trust") if each in keys)
    again = f"halton-meter init --{mode}{more} --non-interactive"
    if not ledger.complete:
        yield Finding("proxy set-up", False, "was interrupted", again, True)
    else:
        yield Finding("proxy set-up", True, f"mode {mode}")
    yield from _authority(machine, again)
    gone = [entry.change.key for entry in ledger.entries if not ledger.in_force(entry.change)]
    if gone:
        yield Finding(
            "changes", False, "no longer as init left them: " + ", ".join(gone), again, True
        )
    else:
        yield Finding("changes", True, f"all {len(ledger.entries)} are in force")
    yield from _proxy(machine, again)
    yield _environment(machine, os.environ)


def _authority(machine: Machine, again: str) -> Iterator[Finding]:
    from proxy_fallback.setup.authority import (
        RENEW_BEFORE,
        TRUSTED_NAME,
        AuthorityError,
        accepted_hosts,
        read_authority,
    )

    folder = machine.ca_folder
    try:
        current = read_authority(folder)
        trusted = read_authority(folder, TRUSTED_NAME)
    except AuthorityError as error:
        yield Finding("CA", False, str(error).partition(";")[0], again, True)
        return
    if current is None or trusted is None:
        yield Finding("CA", False, f"there is none in {folder}", again, True)
        return
    if not current.key_file.exists():
        yield Finding("CA", False, f"{current.key_file} is gone", again, True)
        return
    if current.key_id != trusted.key_id:
        text = "its key is not the one that programs trust: nothing is metered"
        yield Finding("CA", False, text, again, True)
        return
    last = min(current.not_after, trusted.not_after)
    until = f"{last:%Y-%m-%d}"
    if not trusted.valid_at(machine.now):
        text = f"what programs trust expired on {until}: nothing is metered"
        yield Finding("CA", False, text, again, True)
    elif last - machine.now < RENEW_BEFORE:
        yield Finding("CA", False, f"expires on {until}", again, True)
    else:
        yield Finding("CA", True, f"valid until {until}")
    accepted = set(accepted_hosts(folder, machine.hosts, machine.now))
    missing = [host for host in machine.hosts if host not in accepted]
    if missing and accepted:
        text = f"does not cover {', '.join(missing[:5])}" + (" …" if len(missing) > 5 else "")
        yield Finding("CA's hosts", False, text, again, True)


def _proxy(machine: Machine, again: str) -> Iterator[Finding]:
    from halton_meter.live.proxy import run as proxied

    where = f"127.0.0.1:{machine.port}"
    if not machine.healthy():
        text = f"nobody answers at {where}"
        if machine.port_taken():
            text = f"another program has {where}"
        yield Finding("proxy", False, text, again, True)
        return
    status = proxied.service_status(machine.home) or {}
    health = str(status.get("health", "unknown"))
    text = f"answers at {where}, {health}"
    yield Finding("proxy", health in ("ok", "paused"), text, "halton-meter status")


def _environment(machine: Machine, environ: Mapping[str, str]) -> Finding:
    from halton_meter.cli.init import sourced_here

    proxy = environ.get("HTTPS_PROXY", "")
    bundle = environ.get("SSL_CERT_FILE", "")
    if proxy.rstrip("/") == machine.proxy_url and machine.ca_folder in Path(bundle).parents:
        return Finding("this shell", True, f"uses {machine.proxy_url}")
    if proxy and proxy.rstrip("/") != machine.proxy_url:
        address = proxy.partition("@")[2] or proxy
        return Finding("this shell", False, f"uses another proxy ({address})", "unset HTTPS_PROXY")
    return Finding("this shell", False, "does not use the proxy", sourced_here(machine))


def _tools(machine: Machine) -> Iterator[Finding]:
    ran = machine.commands.run(("tshark", "--version"))
    said = ran.out.splitlines()[0] if ran.out else ""
    if ran.code == 0:
        yield Finding("tshark", True, said)
    else:
        install = "brew install wireshark" if machine.platform == "macos" else "apt install tshark"
        text = f"not installed; only `replay` needs it ({install})"
        yield Finding("tshark", None, text)
    if machine.platform == "macos":
        yield Finding("probes", None, "macOS has no uprobes: the proxy meters instead")
        return
    from capture.environment import check_environment

    missing = check_environment()
    for problem in missing:
        yield Finding("probes", None, f"{problem.what} ({problem.fix})")
    if not missing:
        yield Finding("probes", True, "this machine can: sudo halton-meter start")
