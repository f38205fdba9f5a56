"""The texts by which systemd (a user's instance) and launchd keep the edge listening.

The supervisor holds the listening socket, so that a restart of ours refuses no connection. The
service gets none of the variables that set-up gives to everybody else: it would proxy to itself.
Only text is made here; the plan (plan.py) puts it where it belongs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from proxy_fallback.setup.variables import unset_for_service

UNIT = "halton-meter-proxy"
KEEPER_UNIT = "halton-meter-system-proxy"
LABEL = "com.halton-meter.proxy"
KEEPER_LABEL = "com.halton-meter.system-proxy"
ENVIRONMENT_LABEL = "com.halton-meter.environment"
# The name under which the edge asks launchd for its socket (launch_activate_socket).
SOCKET_NAME = "Edge"
DESCRIPTORS_MAX = 65536


def systemd_word(word: str) -> str:
    """One word of a unit file: % and $ are systemd's, quotes and backslashes are escaped."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if escaped != word or any(c.isspace() for c in word) else word


def socket_unit(port: int) -> str:
    """The socket that is always there."""
    return f"""\
[Unit]
Description=Halton Meter: the local proxy's socket

[Socket]
ListenStream=127.0.0.1:{port}
Backlog=1024
NoDelay=yes

[Install]
WantedBy=sockets.target
"""


def service_unit(
    what: str, command: Sequence[str], environment: Mapping[str, str], ca: str | None = None
) -> str:
    """A service. `ca`: it serves the socket, with the CA of that fingerprint.

    A new CA is a new text, hence a restart.
    """
    words = " ".join(systemd_word(word) for word in command)
    variables = "\n".join(
        f"Environment={systemd_word(f'{name}={value}')}" for name, value in environment.items()
    )
    needs = "" if ca is None else f"Requires={UNIT}.socket\nAfter={UNIT}.socket\n"
    return f"""\
[Unit]
Description=Halton Meter: {what}
{needs}# Started again for ever: while the proxy is down, its socket keeps clients waiting.
StartLimitIntervalSec=0

[Service]
# CA: {ca or "none"}
Type=exec
ExecStart={words}
{variables}
UnsetEnvironment={" ".join(name for name in unset_for_service() if name not in environment)}
Restart=always
RestartSec=1
TimeoutStopSec=20
NoNewPrivileges=yes
UMask=0077
# Where memory runs out one process ends, and is started again; no prompt goes to swap or to a core.
OOMPolicy=continue
MemoryMax=2G
MemorySwapMax=0
TasksMax=1024
LimitNOFILE={DESCRIPTORS_MAX}
LimitCORE=0
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native

[Install]
WantedBy=default.target
"""


def launch_agent(
    label: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    port: int | None = None,
    once: bool = False,
) -> str:
    """A launchd agent: kept running, or run `once` at login; with a socket on `port` if given."""
    import plistlib

    emptied = {} if once else dict.fromkeys(unset_for_service(), "")
    agent: dict[str, object] = {
        "Label": label,
        "ProgramArguments": list(command),
        # An agent inherits what `launchctl setenv` said; an empty variable counts as none.
        "EnvironmentVariables": {**emptied, **environment},
        "RunAtLoad": True,
        "StandardErrorPath": str(log),
    }
    if not once:
        agent |= {
            "KeepAlive": True,
            "ThrottleInterval": 1,
            "ProcessType": "Interactive",
            "Umask": 0o077,
            "SoftResourceLimits": {"NumberOfFiles": DESCRIPTORS_MAX, "Core": 0},
            "HardResourceLimits": {"NumberOfFiles": DESCRIPTORS_MAX, "Core": 0},
        }
    if port is not None:
        agent["Sockets"] = {
            SOCKET_NAME: {
                "SockFamily": "IPv4",
                "SockNodeName": "127.0.0.1",
                "SockServiceName": str(port),
                "SockType": "stream",
            }
        }
    return plistlib.dumps(agent, sort_keys=False).decode()
