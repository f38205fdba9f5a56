"""Carries out what budgets want done at a threshold: a notification, a command, a webhook.

`python -m halton_meter.live.acting HOME` does what is due in `budgets/fired.json`, notes how each
went, and ends. `Actor` starts it: a process that meters waits for nothing and runs nothing of the
user's. It runs as the user, never as root for a user. Where the service is fenced in by systemd
(no network, no writing in the home directory), it is started by the user's own systemd instead, as
the user's other programs are. One at a time acts for a home; each action has bounded time.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from halton_meter.budget import NOTIFY, Budget
from halton_meter.live import own_code
from halton_meter.settings import config
from halton_meter.settings.budgets import host_of
from halton_meter.spending import firing, ledger
from halton_meter.spending.firing import BEGUN, COMMAND, DONE, PENDING, WEBHOOK, Fired

LOCK_NAME = "acting.lock"
COMMAND_S_MAX, WEBHOOK_S_MAX, NOTIFY_S_MAX = 30.0, 10.0, 5.0
ANSWER_BYTES_MAX = 1024
POLL_S = 0.2
VARIABLE = "HALTON_BUDGET_"
HERE = "here"  # an argument: do it in this process, fenced in or not


_KEPT = (
    *("HOME", "PATH", "LANG", "USER", "LOGNAME", "DISPLAY", "WAYLAND_DISPLAY"),
    *("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS"),
)


class Failed(Exception):
    """An action did not work; the text says why. `for_good`: another try would not, either."""

    def __init__(self, why: str, *, for_good: bool = False) -> None:
        super().__init__(why)
        self.for_good = for_good


class Actor:
    """Starts the process when something is due; its owner calls `tick` when `due_at` has come."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._process: subprocess.Popen[bytes] | None = None
        self._due: float | None = None

    @property
    def due_at(self) -> float | None:
        """By the monotonic clock."""
        return self._due

    def wake(self) -> None:
        """Something is to be done now."""
        self._due = time.monotonic()

    def look(self) -> None:
        """Find out when what is noted is due."""
        with contextlib.suppress(OSError):
            due_ns = firing.due_at_ns(firing.read(self._home / ledger.FOLDER_NAME))
            if due_ns is not None:
                self._due = time.monotonic() + max(0.0, (due_ns - time.time_ns()) / 1e9)

    def tick(self, now: float) -> None:
        """Start it, or note that it has ended."""
        if self._due is None or now < self._due:
            return
        if self._process is not None:
            if self._process.poll() is None:
                self._due = now + POLL_S
                return
            self._process, self._due = None, None
            self.look()
            return
        try:
            self._process = start(self._home)
            self._due = now + POLL_S
        except OSError:
            self._due = now + firing.WAITS_S[1]

    def close(self) -> None:
        """Have what is due done all the same: a run that ends may have been all that meters. The
        process needs us no more, and ends by itself.
        """
        with contextlib.suppress(OSError):
            if self._due is not None and _is_due(self._home, time.time_ns()):
                start(self._home)
        self._process = None


def _is_due(home: Path, now_ns: int) -> bool:
    due_ns = firing.due_at_ns(firing.read(home / ledger.FOLDER_NAME))
    return due_ns is not None and due_ns <= now_ns


def start(home: Path) -> subprocess.Popen[bytes]:
    """Start the process. Raises OSError."""
    return subprocess.Popen(
        own_code.python("halton_meter.live.acting", str(home)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env=_environment(home),
        start_new_session=True,
    )


def _environment(home: Path) -> dict[str, str]:
    """What the user's own programs have of ours: little, as a service has little."""
    found = {name: os.environ[name] for name in _KEPT if name in os.environ}
    runtime = found.setdefault("XDG_RUNTIME_DIR", f"/run/user/{os.getuid()}")
    if os.path.exists(bus := f"{runtime}/bus"):
        found.setdefault("DBUS_SESSION_BUS_ADDRESS", f"unix:path={bus}")
    found.setdefault("PATH", os.defpath)
    return found | {"HALTON_METER_HOME": str(home)}


def _outside(home: Path) -> bool:
    """Have the user's own systemd run this, where we are fenced in; False where it does not."""
    runner = shutil.which("systemd-run")
    if runner is None or not is_fenced_in():
        return False
    argv = own_code.python("halton_meter.live.acting", str(home), HERE)
    command = [runner, "--user", "--quiet", "--collect", "--wait", "--", *argv]
    quiet = subprocess.DEVNULL
    done = subprocess.run(command, stdin=quiet, stdout=quiet, stderr=quiet, check=False)
    return done.returncode == 0


def is_fenced_in() -> bool:
    """Whether we may not use the network, as under the service's unit."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()
    except OSError:
        return True
    return False


# --- the process ----------------------------------------------------------------------------------


def act(home: Path, now_ns: Callable[[], int] = time.time_ns) -> int:
    """Do all that is due; how many actions that were. Raises OSError where nothing can be noted."""
    folder = ledger.folder_of(home)
    done = 0
    budgets = {each.name: each for each in config.read(home).config.budgets}
    while (job := _take(folder, now_ns())) is not None:
        fired, name = job
        error: Failed | None = None
        try:
            budget = budgets.get(fired.budget)
            if budget is None:
                raise Failed("the budget was removed", for_good=True)
            _DEEDS[name](budget, fired.facts)
        except Failed as failed:
            error = failed
        except Exception as fault:  # one action's trouble must not become the others'
            error = Failed(type(fault).__name__)
        _note(folder, fired.key, name, error, now_ns())
        done += 1
    return done


def _take(folder: Path, now_ns: int) -> tuple[Fired, str] | None:
    """The next action that is due, noted as begun."""
    with ledger.locked(folder):
        kept = firing.read(folder)
        for fired in kept:
            for name, deed in fired.deeds.items():
                if deed.state == PENDING and deed.next_at_ns <= now_ns:
                    deed.state, deed.tries = BEGUN, deed.tries + 1
                    firing.write(folder, kept, now_ns)
                    return fired, name
    return None


def _note(folder: Path, key: object, name: str, error: Failed | None, now_ns: int) -> None:
    with ledger.locked(folder):
        kept = firing.read(folder)
        for fired in kept:
            deed = fired.deeds.get(name) if fired.key == key else None
            if deed is None:
                continue
            if error is None:
                deed.state, deed.error = DONE, None
            else:
                deed.failed(str(error), now_ns, for_good=error.for_good)
        firing.write(folder, kept, now_ns)


def give_up_begun(folder: Path, now_ns: int) -> None:
    """What a process before us began and did not end may have been done: it is not tried again."""
    with ledger.locked(folder):
        kept = firing.read(folder)
        begun = [deed for each in kept for deed in each.deeds.values() if deed.state == BEGUN]
        for deed in begun:
            deed.failed("it ended before it said how it went", now_ns, for_good=True)
        if begun:
            firing.write(folder, kept, now_ns)


# --- the actions ----------------------------------------------------------------------------------


def sentence(facts: Mapping[str, Any]) -> str:
    """What a person reads: "website: 80 % of $150 a month is spent ($120.40)"."""
    at_least = "at least " if facts.get("at_least") else ""
    whose = ""
    if each := facts.get("each"):
        without = f"requests without {'an' if each == 'account' else 'a'} {each}"
        whose = f" of {each} {facts['of']}" if facts.get("of") else f" of {without}"
    spent = f"{float(facts['spent_usd']):,.2f}"
    return (
        f"{facts['budget']}{whose}: {at_least}{facts['percent']} % of ${facts['limit_usd']} "
        f"a {facts['per']} spent (${spent})"
    )


def _notify(budget: Budget, facts: Mapping[str, Any]) -> None:
    title, text = "Halton Meter", sentence(facts)
    if sys.platform == "darwin":
        script = "display notification (item 1 of argv) with title (item 2 of argv)"
        argv = ["osascript", "-e", "on run argv", "-e", script, "-e", "end run", text, title]
    else:
        if shutil.which("notify-send") is None:
            why = "notify-send is not installed: sudo apt install libnotify-bin"
            raise Failed(why, for_good=True)
        urgency = "critical" if int(facts["threshold"]) >= 100 else "normal"
        argv = ["notify-send", "--app-name=Halton Meter", f"--urgency={urgency}", "--", title, text]
    _run(argv, NOTIFY_S_MAX, dict(os.environ))


def variables(facts: Mapping[str, Any]) -> dict[str, str]:
    """The facts as a command's environment: HALTON_BUDGET_NAME and so on."""
    scope = facts.get("scope") or {}
    values = {
        "NAME": facts["budget"],
        "LIMIT_USD": facts["limit_usd"],
        "SPENT_USD": facts["spent_usd"],
        "AT_LEAST": "1" if facts.get("at_least") else "0",
        "PERCENT": facts["percent"],
        "THRESHOLD": facts["threshold"],
        "PERIOD": facts["per"],
        "FROM": facts.get("from"),
        "TO": facts.get("to"),
        "SCOPE": "; ".join(f"{name} {', '.join(globs)}" for name, globs in scope.items()),
        "EACH": facts.get("each"),
        "OF": facts.get("of"),
        "REQUESTS": facts["requests"],
        "UNPRICED_REQUESTS": facts["unpriced_requests"],
    }
    return {
        VARIABLE + name: "" if value is None else str(value).replace("\0", "")
        for name, value in values.items()
    }


def _command(budget: Budget, facts: Mapping[str, Any]) -> None:
    if budget.command is None:
        raise Failed("the budget has no command any more", for_good=True)
    if os.geteuid() == 0 and Path(os.environ["HALTON_METER_HOME"]).stat().st_uid != 0:
        raise Failed("it would run as root", for_good=True)  # a fault of ours: never for a user
    shell = isinstance(budget.command, str)
    argv = ["/bin/sh", "-c", str(budget.command)] if shell else list(budget.command)
    _run(argv, COMMAND_S_MAX, dict(os.environ) | variables(facts))


def _run(argv: list[str], seconds: float, environment: dict[str, str]) -> None:
    """Run to the end, in a session of its own, which is killed where it takes too long."""
    home = environment.get("HOME", "/")
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=home if os.path.isdir(home) else "/",
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise Failed(f"{os.path.basename(argv[0])}: {error.strerror}") from None
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise Failed(f"it took longer than {seconds:g} s and was killed") from None
    if code:
        how = f"ended with code {code}" if code > 0 else f"was killed by signal {-code}"
        raise Failed(f"{os.path.basename(argv[0])} {how}")


def _webhook(budget: Budget, facts: Mapping[str, Any]) -> None:
    """POST the facts as JSON to the host that the user has named, and to no other."""
    if budget.webhook is None:
        raise Failed("the budget has no webhook any more", for_good=True)
    url = urllib.parse.urlsplit(budget.webhook)
    connection: http.client.HTTPConnection
    if url.scheme == "https":
        context = ssl.create_default_context()
        connection = http.client.HTTPSConnection(
            url.hostname or "", url.port, timeout=WEBHOOK_S_MAX, context=context
        )
    else:
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=WEBHOOK_S_MAX)
    path = (url.path or "/") + (f"?{url.query}" if url.query else "")
    body = json.dumps({"event": "budget_threshold", **facts}).encode()
    where = host_of(budget.webhook)
    headers = {"Content-Type": "application/json", "User-Agent": "halton-meter"}
    try:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        answer.read(ANSWER_BYTES_MAX)
    except (OSError, http.client.HTTPException) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Failed(f"{where}: {why}") from None
    finally:
        connection.close()
    if not 200 <= answer.status < 300:  # a redirect leads to a host that nobody has named
        raise Failed(f"{where} answered {answer.status}", for_good=300 <= answer.status < 400)


_DEEDS: dict[str, Callable[[Budget, Mapping[str, Any]], None]] = {
    NOTIFY: _notify,
    COMMAND: _command,
    WEBHOOK: _webhook,
}


def main(home: Path, *how: str) -> int:
    """The process's whole life; another one that acts for this home has the work already."""
    os.umask(0o077)
    if HERE not in how and _outside(home):
        return 0
    os.environ["HALTON_METER_HOME"] = str(home)
    folder = ledger.folder_of(home)
    try:
        with ledger.locked(folder, LOCK_NAME):
            give_up_begun(folder, time.time_ns())
            act(home)
    except OSError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
