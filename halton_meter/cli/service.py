"""`halton-meter start` and `stop`: the background services, of the probes and of the local proxy.

With systemd the probes' is a hardened system service; where systemd does not run, a background
process that is started again when it dies, but not after a reboot. The proxy's runs as the user:
under systemd or launchd where `init` installed it there, else as such a process. Exit codes: 0
healthy, or stopped; 1 not, with the reason and the next command on stderr.
"""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from halton_meter.cli.output import harmless_lines

if TYPE_CHECKING:
    from halton_meter.accounts import Account

UNIT_NAME = "halton-meter.service"
UNIT_PATH = Path("/etc/systemd/system") / UNIT_NAME
START_S_MAX = 20.0
STOP_S_MAX = 20.0
SYSTEMCTL_S_MAX = 60.0
SAID_CHARACTERS_MAX = 1000

# Whatever the service may need, and nothing else: BPF and probes (BPF and PERFMON; SYS_ADMIN before
# Linux 5.8, and for a mount namespace of the helper's own), other processes' /proc and files,
# acting as the user and as nobody, signalling the user's half, and being there before a process
# that lives 10 ms is gone (NICE). LimitMEMLOCK does for old kernels what IPC_LOCK would.
_CAPABILITIES = (
    "CAP_BPF CAP_PERFMON CAP_SYS_PTRACE CAP_SYS_ADMIN CAP_DAC_READ_SEARCH "
    "CAP_SETUID CAP_SETGID CAP_KILL CAP_SYS_NICE"
)
# What these capabilities would allow, and nobody needs: to read and change the memory and the open
# files of others, to open files past their folders, and doors to the kernel that are new or wide.
_DENIED_CALLS = (
    "@reboot @swap @module @raw-io @obsolete @cpu-emulation @clock @keyring "
    "ptrace process_vm_readv process_vm_writev process_madvise pidfd_getfd kcmp "
    "open_by_handle_at chroot pivot_root acct quotactl userfaultfd "
    "io_uring_setup io_uring_enter io_uring_register"
)


def unit_text(command: Sequence[str], home: Path, person_home: Path) -> str:
    """The systemd unit that runs `command`, hardened as far as probes allow.

    Not set, and why: PrivateNetwork (newer systemd then mounts a fresh /sys, without tracefs),
    PrivateTmp (a project may live in /tmp), MemoryDenyWriteExecute (bcc compiles),
    ProtectKernelTunables (tracefs must be writable for old kernels' probes), ProtectKernelModules
    (bcc reads headers under /lib/modules), ProtectProc (whose plaintext it is stands in /proc),
    CPUWeight (a process that lives 10 ms must be seen while its user's programs are busy),
    MemoryHigh (it would slow the helper down for what another process of ours takes).

    The limits are some ten times what a busy day takes. Where memory runs out one process ends, and
    is started again (OOMPolicy); what it holds, prompts among it, goes neither to swap nor into a
    core file.
    """
    return f"""\
[Unit]
Description=Halton Meter: what AI tools spend
Documentation=https://pypi.org/project/halton-meter/
After=local-fs.target

[Service]
Type=exec
ExecStart={" ".join(_quoted(word) for word in command)}
Environment={_quoted(f"HALTON_METER_HOME={home}")}
Restart=on-failure
RestartSec=1
KillMode=mixed
TimeoutStopSec=25
OOMScoreAdjust=200
OOMPolicy=continue
MemoryMax=2G
MemorySwapMax=0
TasksMax=1024
LimitMEMLOCK=infinity
LimitNOFILE=65536
LimitCORE=0

CapabilityBoundingSet={_CAPABILITIES}
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths={_quoted(str(home))}
CacheDirectory=halton-meter
CacheDirectoryMode=0755
PrivateDevices=yes
PrivateMounts=yes
ProtectClock=yes
ProtectHostname=yes
ProtectControlGroups=yes
ProtectKernelLogs=yes
RestrictAddressFamilies=AF_UNIX
RestrictNamespaces=mnt
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
SystemCallFilter=~{_DENIED_CALLS}
SystemCallErrorNumber=EPERM
IPAddressDeny=any
UMask=0077

[Install]
WantedBy=multi-user.target
"""


def _quoted(word: str) -> str:
    """One word for a unit file: % and $ are systemd's, quotes and backslashes are escaped.

    Raises ValueError for a word that would end its line: what follows would be settings of root's.
    """
    if any(ord(c) < 32 or ord(c) == 127 for c in word):
        raise ValueError(f"{word!r} holds control characters")
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if escaped != word or any(c.isspace() for c in word) else word


def has_systemd() -> bool:
    """Whether systemd runs this machine."""
    return Path("/run/systemd/system").is_dir()


_VIA = click.Choice(["auto", "uprobes", "proxy"])


@click.command()
@click.option(
    "--via",
    type=_VIA,
    default="auto",
    help="Probes on the TLS libraries (Linux, root) or the local proxy (as yourself); "
    "auto: what this user and machine can do.",
)
@click.option("--all-users", is_flag=True, help="Meter everybody's processes.")
@click.option("--user", "users", multiple=True, help="Meter this user's processes.")
@click.option("--cgroup", help="Only processes in this cgroup (a path as in /proc/PID/cgroup).")
@click.option("--show-unit", is_flag=True, help="Print the systemd unit and do nothing.")
def start(
    *, via: str, all_users: bool, users: tuple[str, ...], cgroup: str | None, show_unit: bool
) -> None:
    """Install and start the background service.

    \b
    Examples:
      sudo halton-meter start            meter this user's programs with probes
      halton-meter start --via proxy     run the local proxy; halton-meter init sets it up for good
    """
    from halton_meter import accounts

    if via == "auto":
        proxied = not accounts.is_root() and (sys.platform != "linux" or _installed() is not None)
        via = "proxy" if proxied and not show_unit else "uprobes"
    if via == "proxy":
        _start_proxy()
    else:
        _start_probes(all_users, users, cgroup, show_unit)


def _start_probes(
    all_users: bool, users: tuple[str, ...], cgroup: str | None, show_unit: bool
) -> None:
    from halton_meter import accounts, config, privileges
    from halton_meter.live import own_code
    from halton_meter.live.probes import service as daemon

    account = accounts.invoking_account()
    home = accounts.home_folder()
    scope = ["--owner", account.name, *(["--all-users"] if all_users else [])]
    for user in users:
        scope += ["--user", user]
    scope += ["--cgroup", cgroup] if cgroup else []
    # Isolated, as root's processes are: no variable or folder of a person's changes what it runs.
    command = [sys.executable, "-I", "-m", "halton_meter", "daemon", "--foreground", *scope]
    try:
        unit = unit_text(command, home, account.home)
    except ValueError as error:
        _fail(str(error), "choose another folder or name")
    if show_unit:
        click.echo(unit, nl=False)
        return
    if not accounts.is_root():
        ways = "sudo halton-meter start\n   or: halton-meter start --via proxy   (no root needed)"
        _fail("starting the service needs root", ways)
    for problem in own_code.problems():
        _fail(problem.what, problem.fix)
    status = _status(home, account.uid)
    if status is not None:
        click.echo(f"already running (pid {status.get('supervisor_pid')})")
        return
    try:
        daemon.configured(account, home)
        privileges.as_account(account, lambda: home.mkdir(0o700, parents=True, exist_ok=True))
    except (config.ConfigError, OSError) as error:
        _fail(str(error), f"mend it, then: sudo halton-meter start   (state lives in {home})")
    if (changeable := own_code.changeable_by_others()) is not None:
        click.echo(
            f"note: root will run code of {changeable}, which others than root may change\n"
            "  to avoid it: sudo python3 -m venv /opt/halton-meter && "
            "sudo /opt/halton-meter/bin/pip install halton-meter",
            err=True,
        )
    if has_systemd():
        _start_unit(unit, home, account.uid)
    else:
        _start_kept(command, account, home)


def _start_unit(text: str, home: Path, owner: int) -> None:
    UNIT_PATH.write_text(text)
    for arguments in (("daemon-reload",), ("enable", UNIT_NAME), ("restart", UNIT_NAME)):
        done = _systemctl(*arguments)
        if done.returncode:
            _fail(done.stderr.strip() or "systemctl failed", f"systemctl status {UNIT_NAME}")
    if _wait_for(home, owner) is None:
        _fail("the service does not answer", f"journalctl -u {UNIT_NAME} -n 50")
    click.echo(f"running as a systemd service ({UNIT_NAME}); it starts with the machine")


def _persons_log(log: Path, account: Account) -> int:
    """The descriptor of a log file, the person's alone: the name may lead elsewhere by now."""
    from halton_meter import config, privileges

    try:
        privileges.as_account(account, lambda: log.touch(0o600))
        fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (config.ConfigError, OSError) as error:
        _fail_for_disk(f"{log} cannot be written", log.parent, account)
        _fail(f"{log} cannot be written: {error}", f"ls -l {log}")
    found = os.fstat(fd)
    if found.st_uid != account.uid or not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        _fail(f"{log} is not a file of {account.name}'s alone", f"rm {log}")
    return fd


def _start_kept(command: list[str], account: Account, home: Path) -> None:
    log = home / "daemon.log"
    environment = {**os.environ, "HALTON_METER_HOME": str(home)}
    arguments = [*command, "--keep"]
    fd = _persons_log(log, account)
    with os.fdopen(fd, "ab") as output:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            env=environment,
            start_new_session=True,
        )
    if _wait_for(home, account.uid, process) is None:
        _fail_for_disk("the service did not become healthy", home, account, process)
        _fail("the service did not become healthy", f"tail {log}")
    click.echo("running in the background, without systemd: it will not start with the machine")


def _wait_for(home: Path, owner: int, process: subprocess.Popen[bytes] | None = None) -> object:
    deadline = time.monotonic() + START_S_MAX
    while time.monotonic() < deadline:
        status = _status(home, owner)
        if status is not None:
            return status
        if process is not None and process.poll() is not None:
            return None
        time.sleep(0.1)
    return None


def _status(home: Path, owner: int) -> dict[str, object] | None:
    from halton_meter.live.control import Control, ServiceAbsent

    try:
        control = Control(home, owner=owner)
        try:
            return control.ask("status")
        finally:
            control.close()
    except ServiceAbsent:
        return None


def _systemctl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemctl", *arguments],
        capture_output=True,
        text=True,
        timeout=SYSTEMCTL_S_MAX,
        check=False,
    )


def _fail(what: str, mend: str) -> NoReturn:
    click.echo(harmless_lines(f"halton-meter: {what}\n  try: {mend}"), err=True)
    sys.exit(1)


def _fail_for_disk(
    what: str,
    home: Path,
    account: Account | None = None,
    process: subprocess.Popen[bytes] | None = None,
) -> None:
    """Fail if the person's disk takes nothing: the log, on the same disk, cannot say so."""
    from halton_meter import config, privileges, untrusted

    def trouble() -> str | None:
        from halton_meter.store.errors import refusal

        return refusal(home)

    with contextlib.suppress(config.ConfigError):  # then it is not the disk, and the log tells
        said = trouble() if account is None else privileges.as_account(account, trouble)
        if said:
            goes_on = process is not None and process.poll() is None
            after = "it goes on trying: halton-meter status" if goes_on else "then start it again"
            said = untrusted.printable(str(said), SAID_CHARACTERS_MAX)
            _fail(f"{what}: {said}", f"df -h {home}   ({after})")


# --- the proxy's service --------------------------------------------------------------------------


def _installed() -> list[list[str]] | None:
    """The commands that start the service that `init` installed; None when there is none."""
    from proxy_fallback.setup import service_files

    person = Path.home()
    unit = person / ".config/systemd/user" / f"{service_files.UNIT}.service"
    agent = person / "Library/LaunchAgents" / f"{service_files.LABEL}.plist"
    if sys.platform == "darwin" and agent.exists():
        domain = f"gui/{os.getuid()}"
        return [
            ["launchctl", "bootstrap", domain, str(agent)],
            ["launchctl", "kickstart", f"{domain}/{service_files.LABEL}"],
        ]
    if unit.exists() and _user_systemd():
        units = [f"{service_files.UNIT}.socket", f"{service_files.UNIT}.service"]
        return [["systemctl", "--user", "enable", "--now", *units]]
    return None


def _user_systemd() -> bool:
    """Whether systemd runs for this user."""
    folder = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    return (Path(folder) / "systemd" / "private").exists()


def _start_proxy() -> None:
    from halton_meter import accounts, config
    from halton_meter.live.proxy import run as proxied

    home = accounts.home_folder()
    try:
        config.load_proxy(home)
        home.mkdir(0o700, parents=True, exist_ok=True)
    except (config.ConfigError, OSError) as error:
        _fail(str(error), f"mend it, then: halton-meter start --via proxy   (state is in {home})")
    found = proxied.service_status(home)
    if found is not None and found["health"] == "paused":
        proxied.ask_service(home, "resume")
        found = _wait_for_proxy(home)
        if found is None:
            _fail("the proxy does not meter", "halton-meter status")
        click.echo("metering again")
        return
    if found is not None:
        click.echo(f"already running (pid {found['pid']}) on {', '.join(found['addresses'])}")
        return
    commands = _installed()
    if commands is None:
        _keep_proxy(home)
        return
    for command in commands:
        _run_quietly(command)
    found = _wait_for_proxy(home)
    if found is None:
        _fail_for_disk("the proxy's service does not become healthy", home)
        _fail("the proxy's service does not become healthy", _journal())
    click.echo(f"running on {', '.join(found['addresses'])}; it starts when you log in")


def _journal() -> str:
    from proxy_fallback.setup import service_files

    if sys.platform == "darwin":
        return f"launchctl print gui/{os.getuid()}/{service_files.LABEL}"
    return f"journalctl --user -u {service_files.UNIT} -n 50"


def _keep_proxy(home: Path) -> None:
    """The proxy in the background, kept by a process of ours that holds its socket."""
    log = home / "proxy.log"
    command = [sys.executable, "-P", "-m", "halton_meter", "daemon", "--foreground"]
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    try:
        output = os.fdopen(os.open(log, flags, 0o600), "ab")
    except OSError as error:
        _fail_for_disk(f"{log} cannot be written", home)
        _fail(f"{log} cannot be written: {error.strerror}", f"ls -l {log}")
    with output:
        at = output.tell()
        process = subprocess.Popen(
            [*command, "--via", "proxy", "--keep"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            env={**os.environ, "HALTON_METER_HOME": str(home)},
            start_new_session=True,
        )
    found = _wait_for_proxy(home, process)
    if found is None:
        said = log.read_bytes()[at:].decode(errors="replace").strip()
        if process.poll() is not None and said:
            click.echo(said, err=True)  # it says why, and what to do
            sys.exit(1)
        _fail_for_disk("the proxy did not become healthy", home, process=process)
        _fail("the proxy did not become healthy", f"tail {log}")
    click.echo(
        f"running on {', '.join(found['addresses'])} in the background: it will not start with the "
        "machine\n  to have programs use it, now and later: halton-meter init"
    )


def _wait_for_proxy(
    home: Path, process: subprocess.Popen[bytes] | None = None
) -> dict[str, Any] | None:
    """The status of the proxy once it meters; None when it does not come to that."""
    from halton_meter.live.proxy import run as proxied

    deadline = time.monotonic() + START_S_MAX
    while time.monotonic() < deadline:
        found = proxied.service_status(home)
        if found is not None and found["health"] == "ok":
            return found
        if process is not None and process.poll() is not None:
            return None
        time.sleep(0.1)
    return None


def _run_quietly(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(command), capture_output=True, text=True, timeout=SYSTEMCTL_S_MAX, check=False
    )


def _stop_proxy(home: Path) -> bool:
    """Stop metering through the proxy; whether there was one.

    On a machine that was set up the edge stays and lets everything through: without it, every
    program that was told to use it would lose the network.
    """
    from halton_meter.live.proxy import run as proxied

    found = proxied.service_status(home)
    if found is None:
        return False
    if _installed() is not None or _is_set_up(home):
        proxied.ask_service(home, "pause")
        click.echo(
            "stopped metering; the proxy lets everything through, as programs were set up to use "
            "it\n  to meter again: halton-meter start --via proxy\n"
            "  to take it away: halton-meter uninstall"
        )
        return True
    proxied.ask_service(home, "stop")
    deadline = time.monotonic() + 2 * STOP_S_MAX
    # Whoever kept the socket lets go of it last.
    while proxied.service_status(home) is not None or _answering(found["addresses"]):
        if time.monotonic() > deadline:
            _fail("the proxy did not stop in time", "halton-meter status --json   # see pid")
        time.sleep(0.05)
    click.echo("the proxy stopped")
    return True


def _answering(addresses: Sequence[str]) -> bool:
    import socket

    for address in addresses:
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), 1.0).close()
        except OSError:
            continue
        return True
    return False


def _is_set_up(home: Path) -> bool:
    from proxy_fallback.setup.ledger import LEDGER_NAME

    return (home / LEDGER_NAME).exists()


@click.command()
@click.option("--via", type=_VIA, default="auto", help="Which service; auto: whichever runs.")
def stop(via: str) -> None:
    """Stop the background service.

    \b
    Examples:
      sudo halton-meter stop            stop metering with probes
      halton-meter stop --via proxy     stop metering through the local proxy
    """
    from halton_meter import accounts, config, privileges

    account, home = accounts.invoking_account(), accounts.home_folder()
    try:
        stopped = via != "uprobes" and bool(
            privileges.as_account(account, lambda: _stop_proxy(home))
        )
    except config.ConfigError as error:
        _fail(str(error), "halton-meter stop --via proxy")
    if via == "proxy":
        if not stopped:
            click.echo("it was not running")
        return
    if stopped and not accounts.is_root() and _status(home, account.uid) is None:
        return
    _stop_probes(home, account.uid, stopped)


def _stop_probes(home: Path, owner: int, stopped: bool) -> None:
    from halton_meter import accounts
    from halton_meter.live.control import Control, ServiceAbsent

    if has_systemd() and UNIT_PATH.exists():
        if not accounts.is_root():
            _fail("stopping the system service needs root", "sudo halton-meter stop")
        done = _systemctl("disable", "--now", UNIT_NAME)
        if done.returncode:
            _fail(done.stderr.strip() or "systemctl failed", f"systemctl status {UNIT_NAME}")
        click.echo("stopped; it will not start with the machine")
        return
    try:
        control = Control(home, owner=owner)
        control.ask("stop")
        control.close()
    except ServiceAbsent:
        if not stopped:
            click.echo("it was not running")
        return
    deadline = time.monotonic() + STOP_S_MAX
    while _status(home, owner) is not None:
        if time.monotonic() > deadline:
            _fail("it did not stop in time", "halton-meter status --json   # see supervisor_pid")
        time.sleep(0.05)
    click.echo("stopped")
