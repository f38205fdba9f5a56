"""The systemd unit of the uprobes service: its text, and the commands that install it.

The proxy's unit is the user's own and belongs to `proxy_fallback/setup/service_files.py`.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

UNIT_NAME = "halton-meter.service"
UNIT_PATH = Path("/etc/systemd/system") / UNIT_NAME
SYSTEMCTL_S_MAX = 60.0

# What the service needs and nothing else. BPF, PERFMON: the programs and probes. SYS_ADMIN: the
# same before Linux 5.8, and a mount namespace for the helper. SYS_PTRACE, DAC_READ_SEARCH: other
# processes' /proc and files. SETUID, SETGID: to run as the user and as nobody. KILL: to signal the
# worker. SYS_NICE: to read a process's /proc before it exits, 10 ms after its start. LimitMEMLOCK
# does for old kernels what IPC_LOCK would.
_CAPABILITIES = (
    "CAP_BPF CAP_PERFMON CAP_SYS_PTRACE CAP_SYS_ADMIN CAP_DAC_READ_SEARCH "
    "CAP_SETUID CAP_SETGID CAP_KILL CAP_SYS_NICE"
)
# What these capabilities would allow and the service does not need: to read and change the memory
# and the open files of other processes, to open files by handle, and wide or new kernel interfaces.
_DENIED_CALLS = (
    "@reboot @swap @module @raw-io @obsolete @cpu-emulation @clock @keyring "
    "ptrace process_vm_readv process_vm_writev process_madvise pidfd_getfd kcmp "
    "open_by_handle_at chroot pivot_root acct quotactl userfaultfd "
    "io_uring_setup io_uring_enter io_uring_register"
)


def unit_text(command: Sequence[str], home: Path) -> str:
    """The systemd unit that runs `command`, hardened as far as probes allow.

    Not set, and why: PrivateNetwork (newer systemd then mounts a fresh /sys, without tracefs),
    PrivateTmp (a project may live in /tmp), MemoryDenyWriteExecute (bcc compiles),
    ProtectKernelTunables (tracefs must be writable for old kernels' probes), ProtectKernelModules
    (bcc reads headers under /lib/modules), ProtectProc (/proc says whose plaintext it is),
    CPUWeight (a process that lives 10 ms must be seen while its user's programs are busy),
    MemoryHigh (it would slow the helper down when another of our processes takes memory).

    The limits are some ten times what a busy day takes. When memory runs out, one process is killed
    and started again (OOMPolicy). Prompts in memory go neither to swap nor into a core file.
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


def is_installed(home: Path) -> bool:
    """Whether the unit is there, and stores in this data folder: another one is another user's."""
    try:
        return _quoted(f"HALTON_METER_HOME={home}") in UNIT_PATH.read_text()
    except (OSError, ValueError):
        return False


def has_systemd() -> bool:
    """Whether systemd runs this machine."""
    return Path("/run/systemd/system").is_dir()


def run_quietly(*command: str) -> subprocess.CompletedProcess[str]:
    """The outcome of a command such as systemctl, with what it printed."""
    return subprocess.run(
        command, capture_output=True, text=True, timeout=SYSTEMCTL_S_MAX, check=False
    )
