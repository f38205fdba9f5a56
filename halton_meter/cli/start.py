"""`halton-meter start`: runs the uprobes service, or the local proxy, in the background.

With systemd the uprobes service is a hardened system unit; without, a background process that is
restarted when it dies, but not after a reboot. The proxy runs as the user: under systemd or launchd
where `init` installed it there, else as such a background process. Exit codes: 0 it meters; 1 it
does not, with the reason and the next command on stderr; 2 wrong usage. `stop.py` is the opposite.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from halton_meter import installed, untrusted
from halton_meter.cli import systemd_unit
from halton_meter.cli.output import fail, harmless_lines, note
from halton_meter.cli.systemd_unit import UNIT_NAME, UNIT_PATH, has_systemd, run_quietly
from halton_meter.live.control import SOCKET_NAME
from halton_meter.problem import Problem

if TYPE_CHECKING:
    from halton_meter.accounts import Account

START_S_MAX = 180.0  # it takes 1 s; a machine may be very busy
PROBLEM_CHARACTERS_MAX = 1000
EXAMPLES = """
    \b
    Examples:
      sudo halton-meter start                  meter all programs of yours, without a proxy
      sudo halton-meter start --all-users      meter everybody's programs
      halton-meter start --via proxy           run the local proxy (no root needed)
      sudo halton-meter start --via keylog     packets, with the TLS keys that programs write
"""
VIA = click.Choice(["auto", "uprobes", "proxy", "keylog"])


@click.command(epilog=EXAMPLES)
@click.option(
    "--via",
    type=VIA,
    default="auto",
    help="Capture method: uprobes on the TLS libraries (Linux, root), a local proxy (as "
    "yourself), or packets with the TLS keys that programs write (Linux, root). auto: uprobes "
    "where they can work.",
)
@click.option("--all-users", is_flag=True, help="Meter every user's processes (uprobes).")
@click.option("--user", "users", multiple=True, help="Meter this user's processes (uprobes).")
@click.option("--cgroup", help="Meter this cgroup only; a path as in /proc/PID/cgroup (uprobes).")
@click.option("--show-unit", is_flag=True, help="Print the systemd unit and change nothing.")
def start(
    *, via: str, all_users: bool, users: tuple[str, ...], cgroup: str | None, show_unit: bool
) -> None:
    """Start metering in the background.

    The uprobes service also starts at boot where systemd runs. The proxy meters only programs that
    use it: `halton-meter init` sets them up, and starts it at login.
    """
    from halton_meter import accounts

    if via == "auto":
        only_proxy = sys.platform != "linux" or proxy_start_commands() is not None
        via = "proxy" if only_proxy and not accounts.is_root() and not show_unit else "uprobes"
    if via == "proxy":
        _start_proxy()
    elif via == "keylog":
        start_key_log()
    else:
        start_probes(all_users, users, cgroup, show_unit)


# --- uprobes --------------------------------------------------------------------------------------


def start_probes(
    all_users: bool = False,
    users: tuple[str, ...] = (),
    cgroup: str | None = None,
    show_unit: bool = False,
    *,
    quiet: bool = False,
) -> None:
    """Start the uprobes service, and return when it meters; it ends the command where it cannot.

    With `quiet`, nothing is said on stdout.
    """
    from halton_meter import accounts
    from halton_meter.live import own_code
    from halton_meter.live.control import ask_service

    account, home = accounts.invoking_account(), accounts.home_folder()
    scope = ["--owner", account.name, *(["--all-users"] if all_users else [])]
    for user in users:
        scope += ["--user", user]
    scope += ["--cgroup", cgroup] if cgroup else []
    # Isolated, as root's processes are: no variable or folder of a user's changes what it runs.
    command = [sys.executable, "-I", "-m", "halton_meter", "daemon", "--foreground", *scope]
    try:
        unit = systemd_unit.unit_text(command, home)
    except ValueError as error:
        fail(Problem(str(error), "choose another data folder or name"))
    if show_unit:
        click.echo(unit, nl=False)
        return
    if not accounts.is_root():
        ways = "sudo halton-meter start\nor: halton-meter start --via proxy   (no root needed)"
        fail(Problem("the uprobes service needs root", ways))
    if problems := own_code.problems():
        fail(*problems)
    status = ask_service(home, "status", owner=account.uid)
    if status is not None:
        if not quiet:
            click.echo(f"already running (pid {status.get('supervisor_pid')})")
        return
    _prepare(account, home, users)
    if (changeable := own_code.changeable_by_others()) is not None:
        note(
            f"warning: root will execute {changeable}, which non-root users can modify. Safer:\n"
            f"  {installed.for_root()}"
        )
    if has_systemd():
        _start_unit(unit, home, account.uid)
        said = f"running as a systemd service ({UNIT_NAME}); it starts at boot"
    else:
        _start_kept(command, account, home)
        said = "running in the background; without systemd, it does not start at boot"
    if not quiet:
        click.echo(said)


def _prepare(account: Account, home: Path, users: Sequence[str]) -> None:
    """Fail now for what the service would only write into its log."""
    from halton_meter import privileges
    from halton_meter.cli.configured import told
    from halton_meter.live.probes import service
    from halton_meter.settings import config

    try:
        of_root = config.read_system()
        own, _ = service.read_configuration(account, home)
        if told(config.joined(of_root, own)):
            sys.exit(1)
        for _ in service.wanted_uids(account, of_root.config, users):
            pass  # each is somebody, or this raises
        privileges.as_account(account, lambda: home.mkdir(0o700, parents=True, exist_ok=True))
    except config.ConfigError as error:
        fail(*error.problems)
    except OSError as error:
        fail(Problem(f"cannot make {home}: {error.strerror}", f"ls -ld {home.parent}"))
    if not privileges.as_account(account, lambda: os.access(home, os.W_OK | os.X_OK)):
        what = f"{account.name} may not write in {home}, so nothing could be stored"
        give = f"sudo chown {account.uid}:{account.gid} {shlex.quote(str(home))}"
        fail(Problem(what, f"{give} && chmod u+rwx {shlex.quote(str(home))}"))


def _start_unit(text: str, home: Path, owner: int) -> None:
    UNIT_PATH.write_text(text)
    for arguments in (("daemon-reload",), ("enable", UNIT_NAME), ("restart", UNIT_NAME)):
        done = run_quietly("systemctl", *arguments)
        if done.returncode:
            said = done.stderr.strip() or f"systemctl {arguments[0]} failed"
            fail(Problem(said, f"systemctl status {UNIT_NAME}"))
    if _wait_for(home, owner) is None:
        fail(Problem("the service does not answer", "sudo halton-meter logs"))


def _start_kept(
    command: list[str],
    account: Account,
    home: Path,
    log_name: str = "daemon.log",
    socket_name: str = SOCKET_NAME,
) -> dict[str, Any]:
    """Start a service with a process that keeps it alive; its status once it answers."""
    log = home / log_name
    environment = {**os.environ, "HALTON_METER_HOME": str(home)}
    with os.fdopen(_users_log(log, account), "ab") as output:
        process = _in_background([*command, "--keep"], output, environment)
    found = _wait_for(home, account.uid, process, socket_name)
    if found is None:
        _fail_for_disk("the service did not become healthy", home, account, process)
        via = " --via keylog" if socket_name != SOCKET_NAME else ""
        fail(Problem("the service did not become healthy", f"halton-meter logs{via}"))
    return found


def _users_log(log: Path, account: Account) -> int:
    """The descriptor of a log file that is the user's alone, and no link to elsewhere."""
    from halton_meter import privileges
    from halton_meter.settings import config

    try:
        privileges.as_account(account, lambda: log.touch(0o600))
        fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (config.ConfigError, OSError) as error:
        _fail_for_disk(f"{log} cannot be written", log.parent, account)
        fail(Problem(f"{log} cannot be written: {error}", f"ls -l {log}"))
    found = os.fstat(fd)
    if found.st_uid != account.uid or not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        fail(Problem(f"{log} is not a file of {account.name}'s alone", f"rm {log}"))
    return fd


def _wait_for(
    home: Path,
    owner: int,
    process: subprocess.Popen[bytes] | None = None,
    name: str = SOCKET_NAME,
) -> dict[str, Any] | None:
    """A service's status once it answers; None when it does not come to that."""
    from halton_meter.live.control import ask_service

    return _waited_for(lambda: ask_service(home, "status", name=name, owner=owner), process)


# --- packets and keys -----------------------------------------------------------------------------


def start_key_log() -> None:
    """Start the key log service in the background, and return when it meters."""
    from halton_meter import accounts
    from halton_meter.live import own_code
    from halton_meter.live.control import KEY_LOG_SOCKET_NAME, ask_service

    account, home = accounts.invoking_account(), accounts.home_folder()
    if not accounts.is_root():
        fail(Problem("to capture packets needs root", "sudo halton-meter start --via keylog"))
    if problems := own_code.problems():
        fail(*problems)
    found = ask_service(home, "status", name=KEY_LOG_SOCKET_NAME, owner=account.uid)
    if found is not None:
        click.echo(f"already running (pid {found['pid']})")
        return
    _prepare(account, home, ())
    command = [sys.executable, "-I", "-m", "halton_meter", "daemon", "--foreground"]
    command += ["--via", "keylog", "--owner", account.name]
    found = _start_kept(command, account, home, "keylog.log", KEY_LOG_SOCKET_NAME)
    click.echo("running in the background; it does not start at boot")
    click.echo("  programs are metered that are started with")
    for line in found["exports"]:
        click.echo(f"    {untrusted.printable(str(line), PROBLEM_CHARACTERS_MAX)}")


# --- the proxy ------------------------------------------------------------------------------------


def _start_proxy() -> None:
    from halton_meter import accounts
    from halton_meter.cli.configured import require_sound
    from halton_meter.live.control import PROXY_SOCKET_NAME, ask_service

    require_sound()
    home = accounts.home_folder()
    try:
        home.mkdir(0o700, parents=True, exist_ok=True)
    except OSError as error:
        fail(Problem(f"cannot make {home}: {error.strerror}", f"ls -ld {home.parent}"))
    found = ask_service(home, "status", name=PROXY_SOCKET_NAME)
    if found is None:
        _start_stopped_proxy(home)
    elif found["health"] == "paused":
        ask_service(home, "resume", name=PROXY_SOCKET_NAME)
        if _wait_for_proxy(home) is None:
            fail(Problem("the proxy does not meter", "halton-meter status"))
        click.echo("metering again")
    else:
        click.echo(f"already running (pid {found['pid']}) on {', '.join(found['addresses'])}")


def _start_stopped_proxy(home: Path) -> None:
    commands = proxy_start_commands()
    if commands is None:
        _start_kept_proxy(home)
        return
    for command in commands:
        run_quietly(*command)
    found = _wait_for_proxy(home)
    if found is None:
        _fail_for_disk("the proxy service did not become healthy", home)
        fail(Problem("the proxy service did not become healthy", _proxy_log_command()))
    click.echo(f"running on {', '.join(found['addresses'])}; it starts at login")


def proxy_start_commands() -> list[list[str]] | None:
    """The commands that start the proxy service that `init` installed; None when there is none."""
    from proxy_fallback.setup import service_files

    user_home = Path.home()
    unit = user_home / ".config/systemd/user" / f"{service_files.UNIT}.service"
    agent = user_home / "Library/LaunchAgents" / f"{service_files.LABEL}.plist"
    if sys.platform == "darwin" and agent.exists():
        domain = f"gui/{os.getuid()}"
        return [
            ["launchctl", "bootstrap", domain, str(agent)],
            ["launchctl", "kickstart", f"{domain}/{service_files.LABEL}"],
        ]
    if unit.exists() and _has_user_systemd():
        units = [f"{service_files.UNIT}.socket", f"{service_files.UNIT}.service"]
        return [["systemctl", "--user", "enable", "--now", *units]]
    return None


def _has_user_systemd() -> bool:
    """Whether systemd runs for this user."""
    folder = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    return (Path(folder) / "systemd" / "private").exists()


def _proxy_log_command() -> str:
    from proxy_fallback.setup import service_files

    if sys.platform == "darwin":
        return f"launchctl print gui/{os.getuid()}/{service_files.LABEL}"
    return f"journalctl --user -u {service_files.UNIT} -n 50"


def _start_kept_proxy(home: Path) -> None:
    """The proxy in the background, kept alive by a process of ours that holds its socket."""
    log = home / "proxy.log"
    command = [sys.executable, "-P", "-m", "halton_meter", "daemon", "--foreground"]
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    try:
        output = os.fdopen(os.open(log, flags, 0o600), "ab")
    except OSError as error:
        _fail_for_disk(f"{log} cannot be written", home)
        fail(Problem(f"{log} cannot be written: {error.strerror}", f"ls -l {log}"))
    environment = {**os.environ, "HALTON_METER_HOME": str(home)}
    with output:
        at = output.tell()
        process = _in_background([*command, "--via", "proxy", "--keep"], output, environment)
    found = _wait_for_proxy(home, process)
    if found is None:
        said = log.read_bytes()[at:].decode(errors="replace").strip()
        if process.poll() is not None and said:
            click.echo(harmless_lines(said), err=True)  # why, and what to do
            sys.exit(1)
        _fail_for_disk("the proxy did not become healthy", home, process=process)
        fail(Problem("the proxy did not become healthy", f"tail {log}"))
    click.echo(
        f"running on {', '.join(found['addresses'])} in the background; it does not start at boot\n"
        "  to set up programs to use it, now and later: halton-meter init"
    )


def _wait_for_proxy(
    home: Path, process: subprocess.Popen[bytes] | None = None
) -> dict[str, Any] | None:
    """The proxy's status once it meters; None when it does not come to that."""
    from halton_meter.live.control import PROXY_SOCKET_NAME, ask_service

    def healthy() -> dict[str, Any] | None:
        found = ask_service(home, "status", name=PROXY_SOCKET_NAME)
        return found if found is not None and found["health"] == "ok" else None

    return _waited_for(healthy, process)


# --- both -----------------------------------------------------------------------------------------


def _in_background(
    command: Sequence[str], output: IO[bytes], environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        cwd="/",
        env=environment,
        start_new_session=True,
    )


def _waited_for(
    ask: Callable[[], dict[str, Any] | None], process: subprocess.Popen[bytes] | None
) -> dict[str, Any] | None:
    """The first answer of `ask`; None after too long a time or once the process has ended."""
    deadline = time.monotonic() + START_S_MAX
    while time.monotonic() < deadline:
        if (found := ask()) is not None:
            return found
        if process is not None and process.poll() is not None:
            return None
        time.sleep(0.1)
    return None


def _fail_for_disk(
    what: str,
    home: Path,
    account: Account | None = None,
    process: subprocess.Popen[bytes] | None = None,
) -> None:
    """Fail if the user's disk refuses writes: the log, on the same disk, cannot say so."""
    from halton_meter import privileges, untrusted
    from halton_meter.settings import config

    def trouble() -> str | None:
        from halton_meter.store.errors import refusal

        return refusal(home)

    with contextlib.suppress(config.ConfigError):  # then it is not the disk, and the log says why
        said = trouble() if account is None else privileges.as_account(account, trouble)
        if said:
            goes_on = process is not None and process.poll() is None
            after = "it keeps trying: halton-meter status" if goes_on else "then start it again"
            said = untrusted.printable(str(said), PROBLEM_CHARACTERS_MAX)
            fail(Problem(f"{what}: {said}", f"df -h {home}   ({after})"))
