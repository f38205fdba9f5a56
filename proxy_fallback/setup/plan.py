"""The plan of `init`: its numbered steps for one machine and one choice of options.

The order is for safety: the proxy listens and answers before any program is pointed to it. The same
code plans both platforms from a `Machine`, so macOS set-up can be planned, and tested on a recorded
machine, on Linux. A plan changes nothing; setup/steps.py takes its steps. It refuses to replace a
proxy that the user already uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from proxy_fallback.mitm.session import REDIRECT_VARIABLE
from proxy_fallback.setup import java, service_files, services, system_proxy, trust
from proxy_fallback.setup.authority import (
    CERTIFICATE_NAME,
    TRUSTED_NAME,
    Authority,
    constraint_names,
    ensure_authority,
    read_authority,
)
from proxy_fallback.setup.changes import (
    TOLERATED,
    Argv,
    BlockAdded,
    ChangeError,
    CommandRun,
    FileMade,
    FolderOwned,
    MachineChange,
    Unasked,
    shown,
    write_whole,
)
from proxy_fallback.setup.ledger import Ledger
from proxy_fallback.setup.machine import Machine

MODES = ("env-only", "apps", "full")
# Uninstall leaves this file: open terminals still have it in NODE_OPTIONS, and Node would not start
# without it. Without a proxy it does nothing.
PRELOAD_NAME = "node_proxy.cjs"
REDIRECTOR = "/Applications/Mitmproxy Redirector.app"
HEALTHY_S_MAX = 30.0
HEALTHY_EVERY_S = 0.2
_SHELLS = ("bash", "zsh", "fish")


class SetupError(ChangeError):
    """Set-up was refused, or failed and was undone; the problem says why and how to fix it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The options of init. `redirect`: apps, by name or process id, "Claude,Cursor". Without
    `shell_rc` no file of a shell's is changed."""

    mode: str = "apps"
    java: bool = False
    system_trust: bool = False
    redirect: str = ""
    shell_rc: bool = True


@dataclass(frozen=True, slots=True)
class SetupStep:
    """One numbered step.

    `before` and `after` do what needs no undo, and return whether they changed anything; `acts`
    describes that for a dry run. `detail` is called when the step is done.
    """

    title: str
    changes: Callable[[], Sequence[MachineChange]] = tuple
    before: Callable[[Ledger], bool] = lambda ledger: False
    after: Callable[[Ledger], bool] = lambda ledger: False
    acts: tuple[str, ...] = ()
    detail: Callable[[], str] = lambda: ""


class SetupPlan:
    """The steps for one machine and choice. `dry_run`: they are only shown."""

    def __init__(self, machine: Machine, choice: Choice, dry_run: bool = False) -> None:
        self._machine = machine
        self._choice = choice
        self._dry_run = dry_run
        self._macos = machine.platform == "macos"
        self._stores = choice.mode != "env-only"
        self._system: tuple[CommandRun, ...] = ()
        self.steps = tuple(self._planned())

    def check(self, ledger: Ledger) -> None:
        """Refuse what would break something, before any change. Raises ChangeError."""
        m = self._machine
        if self._choice.mode not in MODES:
            raise ChangeError(
                f"unknown mode {self._choice.mode!r}", f"use one of {', '.join(MODES)}"
            )
        if not m.upstream:
            self._check_variables()
        if self._choice.redirect and not self._macos:
            raise ChangeError(
                "--redirect is for macOS; on Linux, uprobes meter apps that ignore proxy settings",
                "sudo halton-meter start",
            )
        if self._choice.redirect:
            _check_redirect(self._choice.redirect)
        options = m.environ.get(java.OPTIONS_NAME, "")
        if self._choice.java and options and str(m.ca_folder) not in options:
            raise ChangeError(
                f"{java.OPTIONS_NAME} is already in use ({options})",
                "leave --java out, and add by hand what halton-meter init --java --dry-run shows",
            )
        installed = any(entry.change.key.startswith("service:") for entry in ledger.entries)
        if not installed and not self._dry_run and m.port_taken() and not m.healthy():
            raise ChangeError(
                f"another program listens on 127.0.0.1:{m.port}",
                f"{'lsof -nP -i' if self._macos else 'ss -ltnp | grep '}:{m.port}   to see which;\n"
                'or choose another port: "port = 8082" under [proxy] in config.toml',
            )
        if self._choice.mode == "full":
            if not self._machine.supervised():
                raise ChangeError(
                    "systemctl --user does not work here, so nothing would restart the proxy or "
                    "reset the system's proxy settings when it fails",
                    "halton-meter init --apps",
                )
            self._system = tuple(self._system_changes())

    def _check_variables(self) -> None:
        m = self._machine
        names = ("HTTPS_PROXY", "https_proxy")
        found = [(name, m.environ.get(name, ""), f"unset {name}") for name in names]
        if self._macos:
            value = m.commands.run(("launchctl", "getenv", "HTTPS_PROXY")).out.strip()
            found.append(("launchctl's HTTPS_PROXY", value, "launchctl unsetenv HTTPS_PROXY"))
        for name, value, unset in found:
            if value and value.rstrip("/") != m.proxy_url:
                # A proxy's address may hold a password.
                shown_value = value.partition("@")[2] or value
                raise ChangeError(
                    f"{name} is already set to another proxy ({shown_value})",
                    f"{unset}, then: halton-meter init;\n"
                    'or, if this network needs it, add upstream = "http://HOST:PORT" under [proxy] '
                    "in config.toml, then: halton-meter init",
                )

    def _planned(self) -> Iterator[SetupStep]:
        m = self._machine
        yield SetupStep(
            "CA generated",
            lambda: [FolderOwned(str(m.ca_folder))],
            after=self._make_authority,
            acts=(
                f"make a CA for {len(constraint_names(m.hosts))} provider names only in "
                f"{m.ca_folder}, key mode 0600",
                f"write {m.ca_folder / trust.BUNDLE_NAME}: the roots trusted now, and the CA",
            ),
            detail=self._authority_detail,
        )
        yield SetupStep(
            "CA trusted",
            self._trust_changes,
            before=self._before_trust,
            acts=(f"write {m.ca_folder / TRUSTED_NAME}: the CA that is in trust stores",),
            detail=self._trust_detail,
        )
        yield SetupStep("service installed", self._service_changes, detail=self._service_detail)
        yield SetupStep(
            f"daemon healthy at 127.0.0.1:{m.port}",
            after=self._wait,
            acts=(f"wait until 127.0.0.1:{m.port} answers, at most {HEALTHY_S_MAX:.0f} s",),
        )
        yield SetupStep(
            "environment set",
            self._environment_changes,
            before=self._write_preload,
            acts=(f"write {m.home / PRELOAD_NAME}, which makes Node use the proxy; it stays",),
            detail=self._environment_detail,
        )
        if self._choice.mode == "full":
            yield SetupStep(
                "system proxy set",
                lambda: [*self._system, *self._guard_changes()],
                detail=lambda: f"{len(self._system)} settings, watched for changes",
            )

    # --- the CA and its trust ---

    def _authority(self) -> Authority | None:
        return read_authority(self._machine.ca_folder)

    def _make_authority(self, ledger: Ledger) -> bool:
        m = self._machine
        authority = ensure_authority(m.ca_folder, m.hosts, m.now)
        usual = trust.usual_roots(m.commands, m.platform)
        own = trust.own_roots(m.environ, m.ca_folder)
        return trust.write_bundles(authority, usual, own)

    def _authority_detail(self) -> str:
        authority = self._authority()
        assert authority is not None
        names = len(authority.names or ())
        return f"for {names} provider names only, until {authority.not_after:%Y-%m-%d}"

    def _before_trust(self, ledger: Ledger) -> bool:
        """Remove an earlier CA from trust stores, and record which one is added."""
        authority = self._authority()
        assert authority is not None
        planned = {change.key for change in self._trust_changes()}
        stale = [
            entry.change.key
            for entry in ledger.entries
            if entry.change.key.startswith(("keychain:", "nss:", "system-trust:"))
            and entry.change.key not in planned
        ]
        for key in reversed(stale):
            ledger.undo(key)
        noted = self._machine.ca_folder / TRUSTED_NAME
        content = authority.certificate_file.read_bytes()
        if _content(noted) == content:
            return bool(stale)
        write_whole(noted, content, 0o644)
        return True

    def _trust_changes(self) -> list[MachineChange]:
        m = self._machine
        authority = self._authority()
        changes: list[MachineChange] = []
        if self._macos and self._stores and not self._choice.system_trust:
            changes.append(trust.keychain(authority, m.ca_folder, m.user_home))
        database = m.user_home / ".pki/nssdb"
        if not self._macos and self._stores and m.commands.has("certutil") and database.is_dir():
            changes.append(trust.nss(authority, m.ca_folder, m.user_home))
        if self._choice.system_trust:
            root = m.uid == 0
            changes.append(trust.system_trust(authority, m.ca_folder, m.platform, m.commands, root))
        if self._choice.java:
            store = m.ca_folder / java.STORE_NAME
            certificate = m.ca_folder / CERTIFICATE_NAME
            changes.append(java.copied_store(store, certificate, self._java_store()))
        return changes

    def _java_store(self) -> str:
        try:
            return java.own_store(self._machine.platform, self._machine.commands)
        except ChangeError:
            if not isinstance(self._machine.commands, Unasked):
                raise
            return "$JAVA_HOME/lib/security/cacerts"  # a dry run for another machine

    def _trust_detail(self) -> str:
        places = {
            "keychain": "your login keychain",
            "nss": "your certificate database (Chromium, Electron)",
            "system-trust": "the system's store",
            "java": "a copy of Java's store",
        }
        keys = [change.key.partition(":")[0] for change in self._trust_changes()]
        return "by " + ", ".join(["variables", *(places[key] for key in keys)])

    # --- the service ---

    def _service_environment(self) -> dict[str, str]:
        m = self._machine
        roots = str(m.ca_folder / trust.ROOTS_NAME)
        return {"HALTON_METER_HOME": str(m.home), "SSL_CERT_FILE": roots}

    def _service_changes(self) -> list[MachineChange]:
        m = self._machine
        authority = self._authority()
        ca = authority.sha256[:16] if authority else "CA"
        command = m.command("daemon", "--foreground", "--via", "proxy")
        if self._macos:
            environment = {**self._service_environment(), "HALTON_METER_CA": ca}
            if self._choice.redirect:
                environment[REDIRECT_VARIABLE] = self._choice.redirect
            log = m.log_file
            text = service_files.launch_agent(
                service_files.LABEL, command, environment, log, m.port
            )
            return [*self._redirector(), *services.agent(m, service_files.LABEL, text)]
        if not self._machine.supervised():
            return [services.background(m, command, self._service_environment())]
        unit = service_files.UNIT
        return services.units(
            m,
            {
                f"{unit}.socket": service_files.socket_unit(m.port),
                f"{unit}.service": service_files.service_unit(
                    "the local proxy", command, self._service_environment(), ca
                ),
            },
            unit,
        )

    def _redirector(self) -> list[MachineChange]:
        """Remove on uninstall what mitmproxy's local mode installs when it first runs."""
        there = self._machine.commands.run(("test", "-e", REDIRECTOR)).code == 0
        if not self._choice.redirect or there:
            return [CommandRun("redirector", run=(), undo=())] if self._choice.redirect else []
        return [CommandRun("redirector", run=(), undo=((TOLERATED, "rm", "-rf", REDIRECTOR),))]

    def _service_detail(self) -> str:
        if self._macos:
            return "by launchd, at every login"
        if self._machine.supervised():
            return "by your systemd, at every login"
        return "in the background; after a reboot only init starts it again"

    def _wait(self, ledger: Ledger) -> bool:
        """Wait until the proxy meters; returns whether it did not at once."""
        m = self._machine
        for times in range(round(HEALTHY_S_MAX / HEALTHY_EVERY_S)):
            if m.healthy() and m.metering():
                return times > 0
            m.sleep(HEALTHY_EVERY_S)
        log = f"journalctl --user -u {service_files.UNIT} -n 30"
        if self._macos or not self._machine.supervised():
            log = f"tail {m.home / 'proxy.log'}"
        what = "answers but does not meter" if m.healthy() else "does not answer"
        raise SetupError(
            f"the proxy at 127.0.0.1:{m.port} {what} after {HEALTHY_S_MAX:.0f} s",
            "halton-meter daemon --foreground --via proxy   to see why"
            + (f"\nor: {log}" if m.commands.has("journalctl") else ""),
        )

    # --- the environment ---

    def _variables(self) -> dict[str, str]:
        m = self._machine
        return trust.variables(m.port, m.ca_folder, m.hosts, self._choice.java)

    def _environment_changes(self) -> list[MachineChange]:
        m = self._machine
        wanted = self._variables()
        script = m.home / "env.sh"
        terms = trust.Terms(
            m.witness,
            m.home / PRELOAD_NAME,
            None if self._machine.supervised() else m.pid_file,
            m.upstream,
        )
        changes: list[MachineChange] = [FileMade(str(script), trust.posix_text(wanted, terms))]
        for file in self._startup_files():
            changes.append(BlockAdded(str(file), trust.sourcing_lines(script)))
        if "fish" in self._shells() and self._choice.shell_rc:
            fish = m.config_home / "fish/conf.d/halton-meter.fish"
            changes.append(FileMade(str(fish), trust.fish_text(wanted, terms)))
        if self._choice.mode != "env-only":
            changes += self._session_changes(wanted)
        return changes

    def _write_preload(self, ledger: Ledger) -> bool:
        file = self._machine.home / PRELOAD_NAME
        content = Path(__file__).with_name(PRELOAD_NAME).read_bytes()
        if _content(file) == content:
            return False
        write_whole(file, content, 0o644)
        return True

    def _shells(self) -> list[str]:
        return [each for each in _SHELLS if self._machine.commands.has(each)]

    def _startup_files(self) -> Iterator[Path]:
        """For each shell, files that cover interactive and login shells."""
        m = self._machine
        shells = self._shells() if self._choice.shell_rc else ()
        if "bash" in shells:
            yield m.user_home / ".bashrc"
            # bash reads only the first of these; a new earlier one would hide a later one.
            login = [m.user_home / name for name in (".bash_profile", ".bash_login", ".profile")]
            missing = ".bash_profile" if self._macos else ".profile"
            yield next((file for file in login if file.exists()), m.user_home / missing)
        if "zsh" in shells:
            yield Path(m.environ.get("ZDOTDIR") or m.user_home) / ".zshenv"

    def _session_changes(self, wanted: Mapping[str, str]) -> list[MachineChange]:
        """Variables for apps that no shell started."""
        if self._macos:
            return self._launchctl_changes(wanted)
        if not self._machine.supervised():
            return []  # nothing reads the file then, and nothing restarts the proxy
        m = self._machine
        file = m.config_home / "environment.d/60-halton-meter.conf"
        control = ("systemctl", "--user")
        values = tuple(f"{name}={value}" for name, value in wanted.items())
        return [
            FileMade(str(file), trust.environment_d_text(wanted, m.upstream)),
            CommandRun(
                key="session-environment",
                run=((*control, "set-environment", *values),),
                undo=((TOLERATED, *control, "unset-environment", *wanted),),
            ),
        ]

    def _launchctl_changes(self, wanted: Mapping[str, str]) -> list[MachineChange]:
        m = self._machine
        script = m.home / "setenv.sh"
        lines = [f"[ -e {shown((str(m.witness),))} ] || exit 0"]
        lines += [shown(("launchctl", "setenv", *each)) for each in wanted.items()]
        undoing: list[Argv] = []
        for name in wanted:
            before = m.commands.run(("launchctl", "getenv", name)).out.removesuffix("\n")
            back: Argv = ("launchctl", "unsetenv", name)
            undoing.append(("launchctl", "setenv", name, before) if before else back)
        label = service_files.ENVIRONMENT_LABEL
        text = service_files.launch_agent(
            label, ("/bin/sh", str(script)), {}, m.log_file, once=True
        )
        return [
            FileMade(str(script), "\n".join(lines) + "\n"),
            CommandRun(
                key="session-environment",
                run=tuple(("launchctl", "setenv", *each) for each in wanted.items()),
                undo=tuple(undoing),
            ),
            *services.agent(m, label, text),
        ]

    def _environment_detail(self) -> str:
        where = ", ".join(self._shells()) or "no shell was found"
        if not self._choice.shell_rc:
            return f"in {self._machine.home / 'env.sh'}; no shell's file was changed"
        apps = ""
        if self._choice.mode != "env-only":
            apps = (
                "; apps that you start from now on" if self._macos else "; apps at the next login"
            )
            apps = apps if self._machine.supervised() else "; apps only if started from a terminal"
        return f"{where} (new terminals){apps}"

    # --- the system's proxy ---

    def _system_changes(self) -> list[CommandRun]:
        m = self._machine
        if not self._macos:
            return system_proxy.desktop_changes(m.commands, m.port)
        try:
            return system_proxy.network_changes(m.commands, m.port)
        except system_proxy.ForeignProxy:
            raise
        except ChangeError:
            if not self._dry_run:
                raise
            return system_proxy.example_changes(m.port)

    def _guard_changes(self) -> list[MachineChange]:
        m = self._machine
        command = m.command("init", "--keep-system-proxy")
        environment = {"HALTON_METER_HOME": str(m.home)}
        if self._macos:
            label = service_files.GUARD_LABEL
            log = m.log_file
            return services.agent(
                m, label, service_files.launch_agent(label, command, environment, log)
            )
        if not self._machine.supervised():
            return []
        unit = service_files.GUARD_UNIT
        text = service_files.service_unit("the system's proxy", command, environment)
        return services.units(m, {f"{unit}.service": text}, unit)


def _check_redirect(apps: str) -> None:
    import mitmproxy_rs

    try:
        mitmproxy_rs.local.LocalRedirector.describe_spec(apps)
    except ValueError:
        raise ChangeError(
            f"--redirect {apps!r} is not a list of apps",
            "--redirect Claude,Cursor (or process ids)",
        ) from None


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
