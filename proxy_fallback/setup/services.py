"""The changes that install a service: systemd units, a launchd agent, or a background process.

service_files.py makes the texts. plan.py says which services there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from proxy_fallback.setup.changes import TOLERATED, CommandRun, FileMade, MachineChange, shown
from proxy_fallback.setup.machine import Machine
from proxy_fallback.setup.variables import unset_for_service


def units(machine: Machine, texts: Mapping[str, str], unit: str) -> list[MachineChange]:
    """Unit files, enabled and started. A reload comes first, and last when undone."""
    control = ("systemctl", "--user")
    folder = machine.config_home / "systemd/user"
    names = tuple(texts)
    files = [FileMade(str(folder / name), text) for name, text in texts.items()]
    start = tuple((*control, "restart", name) for name in names)
    # With several names, one success is enough for systemctl; the first unit starts the rest.
    checks = [shown((*control, "is-enabled", "--quiet", name)) for name in names]
    checks.append(shown((*control, "is-active", "--quiet", names[0])))
    return [
        CommandRun(f"reload:{unit}", run=(), undo=((TOLERATED, *control, "daemon-reload"),)),
        *files,
        CommandRun(
            key=f"service:{unit}",
            # A socket cannot be restarted while its service holds it.
            run=(
                (*control, "daemon-reload"),
                (TOLERATED, *control, "stop", *reversed(names)),
                (*control, "enable", *names),
                *start,
            ),
            undo=((*control, "disable", "--now", *reversed(names)),),
            check=("sh", "-c", " && ".join(checks)),
        ),
    ]


def agent(machine: Machine, label: str, text: str) -> list[MachineChange]:
    """A launchd agent, loaded into the user's graphical session."""
    file = machine.user_home / "Library/LaunchAgents" / f"{label}.plist"
    target = f"gui/{machine.uid}/{label}"
    # bootout returns before the job is gone, and bootstrap then fails with error 5.
    there = f"launchctl print {target} >/dev/null 2>&1"
    wait = ("sh", "-c", f"for n in 1 2 3 4 5 6 7 8 9; do {there} || exit 0; sleep 0.5; done")
    return [
        FileMade(str(file), text),
        CommandRun(
            key=f"service:{label}",
            run=(
                (TOLERATED, "launchctl", "bootout", target),
                (TOLERATED, *wait),
                (TOLERATED, "launchctl", "enable", target),
                ("launchctl", "bootstrap", f"gui/{machine.uid}", str(file)),
            ),
            undo=((TOLERATED, "launchctl", "bootout", target), (TOLERATED, *wait)),
            check=("launchctl", "print", target),
            check_decides=True,
        ),
    ]


def background(
    machine: Machine, command: Sequence[str], environment: Mapping[str, str]
) -> CommandRun:
    """Without a supervisor: a process in the background, until the next reboot."""
    pid, log = machine.pid_file, machine.log_file
    unset = [f"--unset={name}" for name in unset_for_service()]
    given = [f"{name}={value}" for name, value in environment.items()]
    line = shown(("setsid", "env", *unset, *given, *command, "--keep"))
    quoted = [shown((str(each),)) for each in (log, pid)]
    alive = f'kill -0 "$(cat {quoted[1]})" 2>/dev/null'
    start = f"umask 077; {line} >>{quoted[0]} 2>&1 </dev/null & echo $! >{quoted[1]}"
    stop = f'kill "$(cat {quoted[1]})"; while {alive}; do sleep 0.1; done; rm -f {quoted[1]}'
    return CommandRun(
        key="service:background",
        run=(("sh", "-c", start),),
        undo=((TOLERATED, "sh", "-c", stop), (TOLERATED, "rm", "-f", str(log))),
        check=("sh", "-c", alive),
    )
