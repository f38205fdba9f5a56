"""The unit files for systemd --user and the agents for launchd that keep the edge listening.

systemd and launchd hold the listening socket, so that a restart refuses no connection. The service
does not get the variables that set-up gives to all other programs: it would proxy to itself. This
file makes texts only; plan.py decides where they go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from proxy_fallback.setup.variables import unset_for_service

UNIT = "halton-meter-proxy"
GUARD_UNIT = "halton-meter-system-proxy"
LABEL = "com.halton-meter.proxy"
GUARD_LABEL = "com.halton-meter.system-proxy"
ENVIRONMENT_LABEL = "com.halton-meter.environment"
# The name under which the edge asks launchd for its socket (launch_activate_socket).
SOCKET_NAME = "Edge"
DESCRIPTORS_MAX = 65536


def systemd_word(word: str) -> str:
    """One word of a unit file, with quotes, backslashes, % and $ escaped."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if escaped != word or any(c.isspace() for c in word) else word


def socket_unit(port: int) -> str:
    """The listening socket, which outlives the service."""
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
    """A service. With `ca`, a CA's fingerprint, it serves the socket.

    A new CA changes the text, so that set-up restarts the service.
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
        # An agent inherits the variables of `launchctl setenv`; an empty one counts as unset.
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
