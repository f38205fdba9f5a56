"""`halton-meter start` and `stop`: the background service.

With systemd it is a hardened system service; where systemd does not run, a background process
that is started again when it dies, but not after a reboot. Exit codes: 0 healthy, or stopped;
1 not, with the reason and the next command on stderr.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import click

UNIT_NAME = "halton-meter.service"
UNIT_PATH = Path("/etc/systemd/system") / UNIT_NAME
START_S_MAX = 20.0
STOP_S_MAX = 20.0
SYSTEMCTL_S_MAX = 60.0

# Whatever the service may need, and nothing else: BPF and probes (SYS_ADMIN on kernels that want
# it for uprobes), other processes' /proc, acting as the user, signalling the user's half.
_CAPABILITIES = (
    "CAP_BPF CAP_PERFMON CAP_SYS_PTRACE CAP_SYS_ADMIN CAP_SYS_RESOURCE CAP_DAC_READ_SEARCH "
    "CAP_SETUID CAP_SETGID CAP_KILL CAP_IPC_LOCK"
)


def unit_text(command: Sequence[str], home: Path, person_home: Path) -> str:
    """The systemd unit that runs `command`, hardened as far as probes allow.

    Not set, and why: PrivateNetwork (newer systemd then mounts a fresh /sys, without tracefs),
    PrivateTmp (a project may live in /tmp), MemoryDenyWriteExecute (bcc compiles),
    ProtectKernelTunables (tracefs must be writable for old kernels' probes).
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
LimitMEMLOCK=infinity
OOMScoreAdjust=200

CapabilityBoundingSet={_CAPABILITIES}
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths={_quoted(str(home))}
ProtectClock=yes
ProtectHostname=yes
ProtectControlGroups=yes
ProtectKernelLogs=yes
RestrictAddressFamilies=AF_UNIX AF_NETLINK
RestrictNamespaces=mnt
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
IPAddressDeny=any
UMask=0077

[Install]
WantedBy=multi-user.target
"""


def _quoted(word: str) -> str:
    """One word for a unit file: % and $ are systemd's, quotes and backslashes are escaped."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if escaped != word or any(c.isspace() for c in word) else word


def has_systemd() -> bool:
    """Whether systemd runs this machine."""
    return Path("/run/systemd/system").is_dir()


@click.command()
@click.option("--all-users", is_flag=True, help="Meter everybody's processes.")
@click.option("--user", "users", multiple=True, help="Meter this user's processes.")
@click.option("--cgroup", help="Only processes in this cgroup (a path as in /proc/PID/cgroup).")
@click.option("--show-unit", is_flag=True, help="Print the systemd unit and do nothing.")
def start(*, all_users: bool, users: tuple[str, ...], cgroup: str | None, show_unit: bool) -> None:
    """Install and start the background service."""
    from halton_meter import config, daemon

    account = config.invoking_account()
    home = config.home_folder()
    scope = ["--owner", account.name, *(["--all-users"] if all_users else [])]
    for user in users:
        scope += ["--user", user]
    scope += ["--cgroup", cgroup] if cgroup else []
    command = [sys.executable, "-P", "-m", "halton_meter", "daemon", "--foreground", *scope]
    if show_unit:
        click.echo(unit_text(command, home, account.home), nl=False)
        return
    if not config.is_root():
        _fail("starting the service needs root", "sudo halton-meter start")
    status = _status(home)
    if status is not None:
        click.echo(f"already running (pid {status.get('supervisor_pid')})")
        return
    try:
        daemon.configured(account, home)
        daemon.as_account(account, lambda: home.mkdir(0o700, parents=True, exist_ok=True))
    except (config.ConfigError, OSError) as error:
        _fail(str(error), f"mend it, then: sudo halton-meter start   (state lives in {home})")
    if has_systemd():
        _start_unit(unit_text(command, home, account.home), home)
    else:
        _start_kept(command, account, home)


def _start_unit(text: str, home: Path) -> None:
    UNIT_PATH.write_text(text)
    for arguments in (("daemon-reload",), ("enable", UNIT_NAME), ("restart", UNIT_NAME)):
        done = _systemctl(*arguments)
        if done.returncode:
            _fail(done.stderr.strip() or "systemctl failed", f"systemctl status {UNIT_NAME}")
    if _wait_for(home) is None:
        _fail("the service does not answer", f"journalctl -u {UNIT_NAME} -n 50")
    click.echo(f"running as a systemd service ({UNIT_NAME}); it starts with the machine")


def _start_kept(command: list[str], account: object, home: Path) -> None:
    from halton_meter import config, daemon

    assert isinstance(account, config.Account)
    log = home / "daemon.log"
    daemon.as_account(account, lambda: log.touch(0o600))
    environment = {**os.environ, "HALTON_METER_HOME": str(home)}
    arguments = [*command, "--keep"]
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
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
    if _wait_for(home, process) is None:
        _fail("the service did not become healthy", f"tail {log}")
    click.echo("running in the background, without systemd: it will not start with the machine")


def _wait_for(home: Path, process: subprocess.Popen[bytes] | None = None) -> object:
    deadline = time.monotonic() + START_S_MAX
    while time.monotonic() < deadline:
        status = _status(home)
        if status is not None:
            return status
        if process is not None and process.poll() is not None:
            return None
        time.sleep(0.1)
    return None


def _status(home: Path) -> dict[str, object] | None:
    from halton_meter.metering import Control, ServiceAbsent

    try:
        control = Control(home)
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
    click.echo(f"halton-meter: {what}\n  try: {mend}", err=True)
    sys.exit(1)


@click.command()
def stop() -> None:
    """Stop the background service."""
    from halton_meter import config
    from halton_meter.metering import Control, ServiceAbsent

    home = config.home_folder()
    if has_systemd() and UNIT_PATH.exists():
        if not config.is_root():
            _fail("stopping the system service needs root", "sudo halton-meter stop")
        done = _systemctl("disable", "--now", UNIT_NAME)
        if done.returncode:
            _fail(done.stderr.strip() or "systemctl failed", f"systemctl status {UNIT_NAME}")
        click.echo("stopped; it will not start with the machine")
        return
    try:
        control = Control(home)
        control.ask("stop")
        control.close()
    except ServiceAbsent:
        click.echo("it was not running")
        return
    deadline = time.monotonic() + STOP_S_MAX
    while _status(home) is not None:
        if time.monotonic() > deadline:
            _fail("it did not stop in time", "halton-meter status --json   # see supervisor_pid")
        time.sleep(0.05)
    click.echo("stopped")
