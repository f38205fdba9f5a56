"""`halton-meter doctor [--fix [--apply]]`: what works, what does not, and how to fix it.

Its first line is one word: healthy (nothing fails), degraded (something does, and what is to be
metered is), broken (something is not metered, or not stored). It changes nothing by itself; `--fix`
shows the commands that fix what fails, `--fix --apply` runs them. What needs root or a decision is
shown, never run. Exit codes: 0 healthy (or all was fixed); 1 degraded; 3 broken; 2 wrong usage.
"""

from __future__ import annotations

import os
import shlex
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from halton_meter import installed
from halton_meter.cli.number import Whole
from halton_meter.cli.output import complain, count, fail, print_json, say, styled, wrong_usage
from halton_meter.problem import Problem, Unavailable

if TYPE_CHECKING:
    from proxy_fallback.setup.ledger import Ledger
    from proxy_fallback.setup.machine import Machine

# A day of heavy use is some 50 MB of events.
FREE_BYTES_MIN = 500 * 1024 * 1024
# A flush keeps the database locked for less.
LOCK_SECONDS_MAX = 10.0
HEALTHY, DEGRADED, BROKEN = "healthy", "degraded", "broken"
EXIT_CODES = {HEALTHY: 0, DEGRADED: 1, BROKEN: 3}
EXAMPLES = """
    \b
    Examples:
      halton-meter doctor                diagnose
      halton-meter doctor --fix          show the commands that fix it
      halton-meter doctor --fix --apply  fix it
      halton-meter doctor --json | jq -r .health
      halton-meter doctor --pid 4711     which ways can meter that process, and why
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check. `ok` is None for what is not in use, which is no failure.

    `what` was found; `fix` is the command to run, and `automatic` whether `--apply` may run it.
    Where `breaks`, what is to be metered is not, or is not stored, as long as this fails.
    """

    check: str
    ok: bool | None
    what: str
    fix: str = ""
    automatic: bool = False
    breaks: bool = False


@click.command(epilog=EXAMPLES)
@click.option("--fix", is_flag=True, help="Show the commands that fix what fails.")
@click.option("--apply", is_flag=True, help="With --fix: run them.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as one JSON object.")
@click.option("--pid", type=Whole(1), help="Show how this running process can be metered.")
def doctor(*, fix: bool, apply: bool, as_json: bool, pid: int | None) -> None:
    """Diagnose problems and fix them.

    The first line is one word: healthy, degraded (something fails, and what is to be metered is) or
    broken (something is not metered, or not stored).

    With --pid it shows of a running process whether uprobes, a key log or the proxy can meter it
    (✓), could if it were started again (-) or cannot (✗), why, and the next command.

    Exit codes: 0 healthy, or all was fixed; 1 degraded; 3 broken. With --pid: 0; 1 no way is open.
    """
    from halton_meter.cli.init import machine_here

    if apply and not fix:
        wrong_usage("--apply needs --fix", "halton-meter doctor --fix --apply")
    machine = machine_here()
    if pid is not None:
        if fix:
            wrong_usage("--pid fixes nothing", f"halton-meter doctor --pid {pid}")
        sys.exit(_of_process(machine, pid, as_json))
    findings = list(diagnose(machine))
    failing = [each for each in findings if each.ok is False]
    plan = list(dict.fromkeys(each.fix for each in failing if each.automatic))
    word = health(findings)
    if as_json:
        listed = [asdict(each) for each in findings]
        print_json({"health": word, "ok": not failing, "findings": listed, "plan": plan})
    else:
        say(styled(word, {HEALTHY: "green", DEGRADED: "yellow"}.get(word, "red")))
        for line in lines(findings, fix):
            say(line)
    if apply and plan:
        sys.exit(_apply(machine, plan, as_json))
    sys.exit(EXIT_CODES[word])


def _of_process(machine: Machine, pid: int, as_json: bool) -> int:
    """Say how a process can be metered; the exit code."""
    from halton_meter.cli import doctor_process
    from halton_meter.live.control import KEY_LOG_SOCKET_NAME, ask_service

    if sys.platform != "linux":
        fail(Problem("a running process is looked into on Linux only", "halton-meter status"))
    try:
        told = ask_service(machine.home, "status", name=KEY_LOG_SOCKET_NAME) or {}
        places = (machine.proxy_url, machine.ca_folder, told.get("keys", ()))
        process, ways = doctor_process.ways(pid, *places)
    except Unavailable as error:
        fail(*error.problems)
    if as_json:
        print_json(doctor_process.as_json(process, ways))
    else:
        say("\n".join(doctor_process.lines(process, ways)))
    return 0 if any(way.can is not False for way in ways) else 1


def health(findings: list[Finding]) -> str:
    """One word for all findings."""
    failing = [each for each in findings if each.ok is False]
    if any(each.breaks for each in failing):
        return BROKEN
    return DEGRADED if failing else HEALTHY


def lines(findings: list[Finding], fix: bool) -> list[str]:
    """The findings for people."""
    marks = {True: "✓", False: "✗", None: "-"}
    shown = []
    for each in findings:
        shown.append(f"{marks[each.ok]} {each.check}: {each.what}")
        if each.ok is False and each.fix and not fix:
            shown.append(f"    fix: {each.fix}")
    return shown + (_fixes(findings) if fix else [])


def _fixes(findings: list[Finding]) -> list[str]:
    failing = [each for each in findings if each.ok is False]
    if not failing:
        return ["", "Nothing to fix."]
    ours = dict.fromkeys(each.fix for each in failing if each.automatic)
    yours = dict.fromkeys(each.fix for each in failing if each.fix and not each.automatic)
    shown = []
    if ours:
        shown += ["", "Fixes (run with --fix --apply):", *(f"  {each}" for each in ours)]
    if yours:
        shown += ["", "Needs you:", *(f"  {each}" for each in yours)]
    return shown


def _apply(machine: Machine, plan: list[str], as_json: bool) -> int:
    """Run the plan, then check again."""
    for command in plan:
        words = shlex.split(command)
        if words[0] == "halton-meter":
            words = [sys.executable, "-P", "-m", "halton_meter", *words[1:]]
        ran = machine.commands.run(words)
        if ran.code:
            complain(Problem(f"{command}: {ran.message}", "halton-meter doctor"))
            return 1
        if not as_json:
            say(f"done: {command}")
    still = [each for each in diagnose(machine) if each.ok is False and each.automatic]
    complain(*(Problem(f"still failing: {each.check}: {each.what}", each.fix) for each in still))
    return 1 if still else 0


# --- the checks ---------------------------------------------------------------------------------


def diagnose(machine: Machine) -> Iterator[Finding]:
    """Every check, in the order in which one depends on another."""
    home = machine.home
    yield from _installed()
    yield from _all_of("settings", _settings(home))
    yield from _all_of("data folder", _files(home))
    yield from _all_of("database", _database(home))
    yield _prices(home)
    yield from _all_of("uprobes service", _service(home))
    yield from _all_of("key log service", _key_log_service(home))
    yield from _all_of("proxy set-up", _proxy_set_up(machine))
    yield from _tools(machine)


def _all_of(check: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """A check's findings, the last of them a file that the system refuses: a diagnosis goes on."""
    try:
        yield from findings
    except OSError as error:
        where = os.fsdecode(error.filename or "")
        what = f"{where}: {error.strerror or error}" if where else str(error.strerror or error)
        fix = f"ls -ld {shlex.quote(os.path.dirname(where) or where)}" if where else ""
        yield Finding(check, False, what, fix, breaks=True)


def _proxy_set_up(machine: Machine) -> Iterator[Finding]:
    from proxy_fallback.setup.changes import ChangeError
    from proxy_fallback.setup.ledger import Ledger

    try:
        ledger = Ledger(machine.home, machine.commands)
    except ChangeError as error:
        yield Finding("proxy set-up", False, error.problem.what, error.problem.fix)
        return
    if ledger.entries:
        # Where uprobes meter, what the proxy misses is metered all the same.
        probed = _asked(machine.home).get("health") == "ok"
        for each in _set_up(machine, ledger):
            yield replace(each, breaks=each.breaks and not (probed and each.check == "CA"))
    else:
        what = "not set up; `run` and the service meter without it (set up: halton-meter init)"
        yield Finding("proxy set-up", None, what)


def _installed() -> Iterator[Finding]:
    from halton_meter.cli.init_uprobes import runs_from_cache

    if runs_from_cache():
        what = f"runs from uv's cache ({sys.prefix}), which uv may empty"
        yield Finding("installation", False, what, f"uv tool install {installed.requirement()}")


def _settings(home: Path) -> Iterator[Finding]:
    from halton_meter.cli.configured import no_folder
    from halton_meter.settings import config

    if (what := no_folder(home)) is not None:
        yield Finding("data folder", False, what, breaks=True)
        return
    found = config.read(home)
    if found.wrong:
        what = f"not used: {'; '.join(found.wrong)}"
        yield Finding("settings", False, what, found.fix)
    else:
        path = home / config.CONFIG_NAME
        what = f"every value in {path} is right" if path.exists() else "the defaults"
        without = (
            f"; {count(len(found.notes), 'setting')} without effect: halton-meter config check"
        )
        yield Finding("settings", True, what + without * bool(found.notes))


def _files(home: Path) -> Iterator[Finding]:
    if not home.is_dir():
        yield Finding("data folder", None, f"{home} does not exist yet")
        return
    private = (
        *("*.duckdb*", "*.journal*", "*.sqlite*", "config.toml", "pricing.toml", "changes.json"),
        *("captures.json", "account.key", "metrics-token"),
    )
    open_ones = [
        file
        for pattern in (*private, "proxy-ca/mitmproxy-ca.p*")
        for file in home.glob(pattern)
        if _is_open(file)
    ]
    listed = " ".join(shlex.quote(str(file)) for file in open_ones)
    if stat.S_IMODE(home.stat().st_mode) & 0o022:
        fix = f"chmod go-w {shlex.quote(str(home))}"
        yield Finding("permissions", False, f"other users can write in {home}", fix, True)
    elif open_ones and stat.S_IMODE(home.stat().st_mode) & 0o055:
        what = f"other users can read files in {home}"
        yield Finding("permissions", False, what, f"chmod go-rwx {listed}", True)
    else:
        yield Finding("permissions", True, f"only you can read and write {home}")
    yield _room(home)


def _is_open(file: Path) -> bool:
    """Whether others than its owner may read it; what a link leads to is not ours to change."""
    found = file.lstat()
    return stat.S_ISREG(found.st_mode) and bool(found.st_mode & 0o077)


def _room(home: Path) -> Finding:
    from halton_meter.store.errors import refusal

    room = os.statvfs(home)
    free = room.f_bavail * room.f_frsize
    fix = f"du -h {shlex.quote(str(home))}"
    if (why := refusal(home)) is not None:
        return Finding("disk space", False, f"nothing can be stored: {why}", fix, breaks=True)
    what = f"{free // 1024**2:,} MB free for {home}"
    return Finding("disk space", free >= FREE_BYTES_MIN, what, fix)


def _database(home: Path) -> Iterator[Finding]:
    from halton_meter.store import DatabaseDamaged, DatabaseTooNew, Store, StoreError

    store = Store(home)
    path = store.database_path
    if not path.exists():
        if path.is_symlink():
            led = os.path.realpath(path)
            what = f"{path} leads to {led}, which is not there"
            here = os.path.isdir(os.path.dirname(led))  # the next request makes the file
            yield Finding(
                "database",
                None if here else False,
                what,
                f"ls -l {shlex.quote(str(path))}",
                breaks=not here,
            )
        return
    try:
        with store.reading(LOCK_SECONDS_MAX):
            pass
    except (DatabaseDamaged, DatabaseTooNew) as error:
        yield Finding("database", False, str(error), breaks=True)
    except StoreError as error:  # locked, or refused by the system: no report can be made
        yield Finding("database", False, str(error))
    else:
        yield Finding("database", True, f"{store.database_path} can be read")
    for path in store.damaged_databases:
        what = f"a damaged one was put aside, its events are missing in reports: {path}"
        yield Finding("database", False, what, f"mv {shlex.quote(str(path))} /tmp")


def _prices(home: Path) -> Finding:
    from pricing.book import PriceBook
    from pricing.rates import PriceError

    try:
        book = PriceBook.load(home)
    except PriceError as error:
        what = f"{error.problem.what}; bundled prices are used"
        return Finding("prices", False, what, error.problem.fix)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}; bundled prices are used"
        return Finding("prices", False, what, f"ls -l {shlex.quote(str(home))}")
    own = f", {len(book.overrides)} overrides of your own" if book.overrides else ""
    return Finding("prices", True, f"price book {book.version}{own}")


def _asked(home: Path) -> Mapping[str, Any]:
    """What the uprobes service says; nothing where none answers."""
    from halton_meter.live.control import ask_service

    return ask_service(home, "status") or {}


def _service(home: Path) -> Iterator[Finding]:
    """The uprobes service, where there is one."""
    if sys.platform != "linux":
        return
    from halton_meter.cli.systemd_unit import is_installed

    found = _asked(home)
    if not found:
        if is_installed(home):
            fix = "sudo halton-meter start   (why: sudo halton-meter logs)"
            yield Finding("uprobes service", False, "does not run", fix, breaks=True)
        else:
            yield Finding("uprobes service", None, "does not run (start: sudo halton-meter start)")
    elif found["health"] == "ok":
        yield Finding(
            "uprobes service", True, f"meters, {count(found['probes'], 'probe')} attached"
        )
    else:
        why = found.get("store_error") or found.get("price_error") or found.get("config_error")
        unstored = bool(found.get("store_error"))
        what = f"{found['health']}{f': {why}' if why else ''}"
        yield Finding("uprobes service", False, what, "halton-meter status", breaks=unstored)


def _key_log_service(home: Path) -> Iterator[Finding]:
    """The key log service, where it runs."""
    from halton_meter.live.control import KEY_LOG_SOCKET_NAME, ask_service

    found = ask_service(home, "status", name=KEY_LOG_SOCKET_NAME)
    if found is None:
        return
    keys = count(found["handshakes_with_keys"], "connection")
    if found["health"] == "ok":
        yield Finding("key log service", True, f"meters, with keys of {keys}")
    else:
        why = found.get("store_error") or found.get("price_error") or found.get("config_error")
        what = f"{found['health']}{f': {why}' if why else ''}"
        unstored = bool(found.get("store_error"))
        yield Finding("key log service", False, what, "halton-meter status", breaks=unstored)


def _set_up(machine: Machine, ledger: Ledger) -> Iterator[Finding]:
    mode = ledger.mode or "apps"
    keys = {entry.change.key.partition(":")[0] for entry in ledger.entries}
    more = "".join(f" --{each}" for each in ("java", "system-trust") if each in keys)
    more += "" if "block" in keys else " --no-shell-rc"
    again = f"halton-meter init --{mode}{more} --non-interactive"
    if not ledger.complete:
        yield Finding("proxy set-up", False, "init was interrupted", again, True)
    else:
        yield Finding("proxy set-up", True, f"mode {mode}")
    yield from _authority(machine, again)
    gone = [entry.change.key for entry in ledger.entries if not ledger.in_force(entry.change)]
    if gone:
        what = "changed or missing since init: " + ", ".join(gone)
        yield Finding("changes", False, what, again, True)
    else:
        yield Finding("changes", True, f"all {len(ledger.entries)} changes of init are in place")
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
        yield Finding("CA", False, error.problem.what, again, True, breaks=True)
        return
    if current is None or trusted is None:
        yield Finding("CA", False, f"no CA in {folder}", again, True, breaks=True)
        return
    if not current.key_file.exists():
        what = f"{current.key_file} is missing"
        yield Finding("CA", False, what, again, True, breaks=True)
        return
    if current.key_id != trusted.key_id:
        what = "programs trust a CA with another key; nothing is metered"
        yield Finding("CA", False, what, again, True, breaks=True)
        return
    last = min(current.not_after, trusted.not_after)
    until = f"{last:%Y-%m-%d}"
    if not trusted.valid_at(machine.now):
        what = f"the CA that programs trust expired on {until}; nothing is metered"
        yield Finding("CA", False, what, again, True, breaks=True)
    elif last - machine.now < RENEW_BEFORE:
        yield Finding("CA", False, f"expires on {until}", again, True)
    else:
        yield Finding("CA", True, f"valid until {until}")
    accepted = set(accepted_hosts(folder, machine.hosts, machine.now))
    missing = [host for host in machine.hosts if host not in accepted]
    if missing and accepted:
        what = f"does not cover {', '.join(missing[:5])}" + (" …" if len(missing) > 5 else "")
        yield Finding("CA's hosts", False, what, again, True)


def _proxy(machine: Machine, again: str) -> Iterator[Finding]:
    from halton_meter.live.proxy import run as proxied

    where = f"127.0.0.1:{machine.port}"
    if not machine.healthy():
        what = f"does not answer at {where}"
        if machine.port_taken():
            what = f"another program listens on {where}"
        yield Finding("proxy", False, what, again, True, breaks=True)
        return
    status = proxied.service_status(machine.home) or {}
    health = str(status.get("health", "unknown"))
    what = f"answers at {where}, health: {health}"
    well = health in ("ok", "paused")
    yield Finding("proxy", well, what, "halton-meter status", breaks=not well)


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
    version = ran.out.splitlines()[0] if ran.out else ""
    if ran.code == 0:
        yield Finding("tshark", True, version)
    else:
        install = "brew install wireshark" if machine.platform == "macos" else "apt install tshark"
        what = f"not installed; only `replay` needs it ({install})"
        yield Finding("tshark", None, what)
    if machine.platform == "macos":
        yield Finding("uprobes", None, "not on macOS; the proxy meters")
        return
    from capture.environment import check_environment

    missing = check_environment()
    for problem in missing:
        yield Finding("uprobes", None, f"{problem.what} (fix: {problem.fix})")
    if not missing:
        yield Finding("uprobes", True, "supported on this machine (start: sudo halton-meter start)")
    yield _coverage(bool(_asked(machine.home)))


def _coverage(runs: bool) -> Finding:
    """Whether the kernel shows the connections that the share of metered traffic is taken of;
    `runs`: the service that counts them.
    """
    from capture.environment import missing_tracepoints

    try:
        lacking = ", ".join(missing_tracepoints())
    except OSError:
        lacking = "type information (CONFIG_DEBUG_INFO_BTF)"
    if lacking:
        return Finding("coverage", None, f"unknown with uprobes: the kernel lacks {lacking}")
    if not runs:
        what = "uprobes would count every connection to a provider, once the service runs"
        return Finding("coverage", None, what)
    return Finding("coverage", True, "uprobes count every connection to a provider")
