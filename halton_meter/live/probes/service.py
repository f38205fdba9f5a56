"""The composition root: processes, privileges and signals of live metering.

Three processes. This one, the supervisor, is root and does little: it starts the other two, passes
signals on and restarts what died. The capture helper (`capture/helper/main.py`, root) attaches
probes and forwards plaintext. The metering worker (`probes/worker.py`) reads it as the user, prices
and stores it, and parses all hostile bytes. `run` has a fourth process, the command itself, as the
user, held until the probes are in place. The command never notices when one of ours dies.

Read `serve` for the service and `run_command` for one command; `probes/watched_run.py` for one that
a service meters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import selectors
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from halton_meter import untrusted
from halton_meter.accounts import Account
from halton_meter.live.control import ask_service
from halton_meter.live.held import HeldCommand
from halton_meter.live.probes.command import Signals, attend, prepared
from halton_meter.live.probes.programs import programs_ahead
from halton_meter.live.probes.remembered import LIBRARIES_MAX, PATH_CHARACTERS_MAX, remembered
from halton_meter.live.probes.supervisor import Plan, Supervisor
from halton_meter.live.result import RunResult
from halton_meter.privileges import as_account
from halton_meter.settings.config import (
    EDIT,
    LINES_MAX,
    SYSTEM_CONFIG,
    Config,
    ConfigError,
    Loaded,
)
from halton_meter.settings.host_names import is_host

LINE_CHARACTERS_MAX = 2000


def configured(account: Account, home: Path) -> tuple[Config, tuple[str, ...]]:
    """The user's configuration, read with the user's rights, and the hosts to watch.

    Raises ConfigError.
    """
    found, hosts = read_configuration(account, home)
    return found.sound(), hosts


def read_configuration(account: Account, home: Path) -> tuple[Loaded, tuple[str, ...]]:
    """The same, with what is wrong in it: the rest of it counts. Raises ConfigError."""

    def read() -> Any:
        from halton_meter.providers.registry import Registry
        from halton_meter.settings import config

        found = config.read(home)
        hosts = Registry(found.config.extra_hosts).hosts()
        return {
            "configuration": [
                dataclasses.asdict(dataclasses.replace(found.config, budgets=())),
                hosts,
            ],
            "wrong": list(found.wrong),
            "notes": list(found.notes),
            "editable": bool(found.fix),
        }

    said = as_account(account, read)
    said = said if isinstance(said, dict) else {}
    chosen, hosts = _checked(said.get("configuration"), account)
    wrong, notes = (
        tuple(untrusted.texts(said, name, LINES_MAX, LINE_CHARACTERS_MAX))
        for name in ("wrong", "notes")
    )
    fix = EDIT if wrong and said.get("editable") is True else ""
    return Loaded(chosen, wrong, notes, fix), hosts


def _checked(said: Any, account: Account) -> tuple[Config, tuple[str, ...]]:
    """The configuration that the account's process says it has read. Raises ConfigError."""
    try:
        table, hosts = said
        # All else is the business of processes that read it as the user.
        chosen = Config(
            tuple(str(each) for each in table["openai_compatible_hosts"]),
            {str(host): str(family) for host, family in table["hosts"].items()},
            tuple(str(each) for each in table["users"]),
            table["all_users"] is True,
            str(table["loader"]),
        )
        return chosen, tuple(str(host) for host in hosts if is_host(str(host)))
    except (TypeError, ValueError, KeyError, AttributeError):
        raise ConfigError(f"the process that acts as {account.name} gave no valid answer") from None


# --- one command --------------------------------------------------------------------------------


def run_command(argv: Sequence[str], environment: Mapping[str, str], plan: Plan) -> RunResult:
    """Run one command as the user, metered by probes of its own. Raises Unavailable."""
    held = HeldCommand()
    held.begin()
    with prepared(argv, plan.account, environment) as command:
        programs = programs_ahead(argv, environment, plan.account, plan.home)
        plan = dataclasses.replace(plan, roots=(command.pid,), programs=programs)
        supervisor = Supervisor(plan, held)
        supervisor.start()
        signals = Signals()
    code = attend(
        command, signals, supervisor.selector, supervisor.tick, lambda: supervisor.wait_s, held
    )
    result = supervisor.finish()
    result.exit_code, result.held = code, held.last
    return result


def covers(status: Mapping[str, Any], uid: int) -> bool:
    """Whether the service that gave this status meters all processes of that user."""
    scope = status.get("scope") or {}
    return not scope.get("cgroup") and (bool(scope.get("everyone")) or uid in scope.get("uids", ()))


# --- the service --------------------------------------------------------------------------------


def serve(
    plan: Plan, say: Callable[[str], None], plan_again: Callable[[], Plan] | None = None
) -> None:
    """Meter until SIGTERM, SIGINT or `stop`; restart what dies. Raises Unavailable at first.

    At SIGHUP the configuration is read again by `plan_again`; without it, nothing happens. `say`
    must not raise on a full disk: that would end the service (`cli/daemon.py`).
    """
    Signals.block()
    signals = Signals()
    supervisor = Supervisor(plan)
    supervisor.start()
    say(f"metering into {plan.home}")
    with contextlib.suppress(ConfigError):
        if why := as_account(plan.account, lambda: _disk_refusal(plan.home)):
            said = untrusted.printable(str(why), LINE_CHARACTERS_MAX)
            say(f"nothing can be stored, what is metered will wait in memory: {said}")
    ending = False

    def on_signal() -> None:
        nonlocal ending
        number, by_terminal = signals.read()
        ending = ending or number in (signal.SIGTERM, signal.SIGINT)
        if number == signal.SIGHUP and not by_terminal and plan_again is not None:
            _reload(supervisor, plan, plan_again, say)

    supervisor.selector.register(signals, selectors.EVENT_READ, on_signal)
    while not ending and not supervisor.stop_asked:
        was_ready = supervisor.ready
        for key, _ in supervisor.selector.select(supervisor.wait_s):
            key.data()
        supervisor.tick()
        if was_ready != supervisor.ready:
            say("metering again" if supervisor.ready else "metering stopped; restarting it")
    supervisor.selector.unregister(signals)
    lost = supervisor.finish()
    say(f"stopped; {lost.store_error}" if lost.store_error else "stopped")


def _reload(
    supervisor: Supervisor,
    first: Plan,
    plan_again: Callable[[], Plan],
    say: Callable[[str], None],
) -> None:
    """Read the configuration again, with the user's rights where it is the user's."""
    try:
        plan = plan_again()
    except ConfigError as error:
        what = " ".join(error.what.split("\n"))
        say(f"the configuration could not be read again, nothing has changed: {what}")
        return
    if (plan.uids, plan.everyone) != (first.uids, first.everyone):
        say(f"whom {SYSTEM_CONFIG} names to be metered counts from the next start on")
    supervisor.reload(plan)
    say(f"the configuration was read again; {len(plan.hosts)} hosts are watched")


def supervisor_of(home: Path, owner: int) -> int | None:
    """The process id of the supervisor of that user's service; None where none runs.

    The user's own process names it, so it counts only if it is a process of root's that runs our
    daemon.
    """
    status = ask_service(home, "status", owner=owner) or {}
    pid = untrusted.whole_number(status, "supervisor_pid", untrusted.PID_MAX, 2)
    return pid if pid is not None and _is_daemon(pid) else None


def _is_daemon(pid: int) -> bool:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        of_root = os.stat(f"/proc/{pid}").st_uid == 0
        return of_root and b"halton_meter" in words and b"daemon" in words
    return False


def signal_reload(pid: int) -> None:
    """Have a supervisor read its configuration again."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGHUP)


def _disk_refusal(home: Path) -> str | None:
    from halton_meter.store.errors import refusal

    return refusal(home)


def service_plan(
    account: Account,
    home: Path,
    *,
    all_users: bool,
    users: Iterable[str],
    cgroup: str | None,
    say: Callable[[str], None],
    goes_on: bool = False,
) -> Plan:
    """Which users and which hosts the service meters. Raises ConfigError.

    With `goes_on`, for a service that is started again, a wrong value does not keep it from
    metering by all others; its status says so.

    Root alone chooses the users, and the hosts of other users' processes: on the command line and
    in `config.SYSTEM_CONFIG`. A user's own file adds hosts for the user's own processes.
    """
    from halton_meter.settings.config import read_system

    of_root = read_system()
    own, hosts = read_configuration(account, home)
    wrong = (*of_root.wrong, *own.wrong)
    for line in (*of_root.notes, *own.notes, *(wrong if goes_on else ())):
        say(line)
    if wrong and not goes_on:
        raise ConfigError("\n".join(wrong))
    system, chosen = of_root.config, own.config
    everyone = all_users or system.all_users
    uids = frozenset(wanted_uids(account, system, users))
    if everyone or uids != {account.uid}:
        if chosen.extra_hosts:
            say(
                f"ignored: the hosts in {home / 'config.toml'}, as other users are metered, too. "
                f"Put them into {SYSTEM_CONFIG}"
            )
        hosts = _hosts_of(system)
    else:
        hosts = tuple(dict.fromkeys((*hosts, *_hosts_of(system)))) if system.extra_hosts else hosts
    own_hosts = chosen.extra_hosts
    chosen = dataclasses.replace(
        chosen,
        openai_compatible_hosts=(*chosen.openai_compatible_hosts, *system.openai_compatible_hosts),
        hosts={**chosen.hosts, **system.hosts},
    )
    return Plan(
        account,
        home,
        chosen,
        hosts,
        service=True,
        uids=uids,
        everyone=everyone,
        cgroup=cgroup,
        programs=_remembered(account, home),
        config_error="\n".join(wrong) or None,
        own_hosts=own_hosts,
    )


def _remembered(account: Account, home: Path) -> tuple[str, ...]:
    with contextlib.suppress(ConfigError, OSError):
        said = {"libraries": as_account(account, lambda: remembered(home))}
        return tuple(untrusted.texts(said, "libraries", LIBRARIES_MAX, PATH_CHARACTERS_MAX))
    return ()


def _hosts_of(config: Config) -> tuple[str, ...]:
    from halton_meter.providers.registry import Registry

    return tuple(host for host in Registry(config.extra_hosts).hosts() if is_host(host))


def wanted_uids(account: Account, system: Config, names: Iterable[str]) -> Iterator[int]:
    """The users whom the service meters. Raises ConfigError for a name that is nobody's."""
    from halton_meter.accounts import account_named

    chosen = tuple(names)
    if not chosen:
        yield account.uid
    for name in (*chosen, *system.users):
        yield account_named(name).uid
