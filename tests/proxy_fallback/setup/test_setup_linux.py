"""Set-up on a Linux desktop that answers as recorded, in real files read by real shells."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from proxy_fallback.setup.authority import ensure_authority
from proxy_fallback.setup.changes import ChangeError, Commands, Ran
from proxy_fallback.setup.ledger import Ledger
from proxy_fallback.setup.machine import Machine
from proxy_fallback.setup.plan import Choice, SetupError
from proxy_fallback.setup.steps import describe, take_steps, undo
from proxy_fallback.setup.system_proxy import gnome_changes
from proxy_fallback.setup.trust import variables
from tests.support.machines import Desktop, Killed, Recorded, files, life, machine

PATH = os.environ["PATH"]


@pytest.fixture(autouse=True)
def no_disk_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def set_up(here: Machine, mode: str = "full") -> bool:
    with Ledger.open(here.home, here.commands) as ledger:
        return take_steps(here, Choice(mode), ledger, lambda done: None)


def take_back(here: Machine) -> list[str]:
    with Ledger.open(here.home, here.commands) as ledger:
        return undo(ledger, here.home)


def left_of_us(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {name: each for name, each in files(folder).items() if ".halton-meter" not in name}


@pytest.mark.parametrize("desktop", ["gnome", "kde"])
def test_all_is_set_and_put_back_to_the_byte(tmp_path: Path, desktop: str) -> None:
    life(tmp_path)
    commands = Desktop(desktop)
    commands.settings = {("org.gnome.system.proxy.http", "host"): "'was.example'"}
    commands.kde = {"ProxyType": "0", "httpProxy": "http://was.example 3128"}
    here = machine(tmp_path, commands)
    before, state = left_of_us(tmp_path), commands.snapshot()
    assert set_up(here)
    if desktop == "gnome":
        assert commands.settings["org.gnome.system.proxy", "mode"] == "'manual'"
        assert commands.settings["org.gnome.system.proxy.https", "port"] == "8081"
    else:
        assert commands.kde["httpsProxy"] == "http://127.0.0.1 8081"
    assert "halton-meter-proxy.socket" in commands.running
    assert commands.environment["HTTPS_PROXY"] == "http://127.0.0.1:8081"
    assert not set_up(here)
    assert take_back(here) == []
    assert left_of_us(tmp_path) == before
    assert commands.snapshot() == state


def test_a_socket_that_was_stopped_by_hand_is_started_again(tmp_path: Path) -> None:
    life(tmp_path)
    commands = Desktop("none")
    here = machine(tmp_path, commands)
    set_up(here, "apps")
    commands.running.clear()
    assert set_up(here, "apps")
    assert "halton-meter-proxy.socket" in commands.running
    assert not set_up(here, "apps")


def test_a_second_init_that_fails_leaves_the_first_one_complete(tmp_path: Path) -> None:
    life(tmp_path)
    here = machine(tmp_path, Desktop("none"))
    set_up(here, "apps")
    with pytest.raises(SetupError, match="everything that this init did is undone"):
        set_up(replace(here, healthy=lambda: False), "env-only")
    ledger = Ledger(here.home, here.commands)
    assert (ledger.mode, ledger.complete) == ("apps", True)
    assert all(ledger.in_force(entry.change) for entry in ledger.entries)


def test_a_gnome_setting_that_nobody_made_goes_back_to_having_none() -> None:
    commands = Desktop()
    for change in gnome_changes(commands, 8081):
        assert change.undo[0][:2] == ("gsettings", "reset")
    commands.settings["org.gnome.system.proxy.https", "port"] = "3128"
    undone = {change.undo[0] for change in gnome_changes(commands, 8081)}
    assert ("gsettings", "set", "org.gnome.system.proxy.https", "port", "3128") in undone


@pytest.mark.parametrize(("mode", "host"), [("'auto'", "''"), ("'manual'", "'corp.example'")])
def test_a_gnome_proxy_in_use_is_refused(tmp_path: Path, mode: str, host: str) -> None:
    commands = Desktop()
    commands.settings["org.gnome.system.proxy", "mode"] = mode
    commands.settings["org.gnome.system.proxy.https", "host"] = host
    before = commands.snapshot()
    with pytest.raises(SetupError, match="upstream"):
        set_up(machine(tmp_path, commands))
    assert commands.snapshot() == before


def test_a_machine_without_a_desktop_is_told_what_to_use_instead(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="init --apps"):
        set_up(machine(tmp_path, Desktop("none")))


def test_killed_at_any_command_it_is_undone_by_uninstall_or_finished_by_init(
    tmp_path: Path,
) -> None:
    for number in range(100):
        folder, commands = tmp_path / str(number), Desktop()
        life(folder)
        here = machine(folder, commands)
        before, state = left_of_us(folder), commands.snapshot()
        countdown = [number]

        def killing(
            argv: tuple[str, ...], countdown: list[int] = countdown, to: Desktop = commands
        ) -> Ran | None:
            countdown[0] -= 1
            if countdown[0] < 0:
                if countdown[0] % 2:
                    to.answer(argv)
                raise Killed
            return None

        commands.before = killing
        with contextlib.suppress(Killed):
            set_up(here)
        survived = countdown[0] >= 0
        commands.before = lambda argv: None
        if number % 2:
            set_up(here)
            assert not set_up(here)
        assert take_back(here) == []
        assert left_of_us(folder) == before, number
        assert commands.snapshot() == state, number
        if survived:
            assert number > 20
            return
    raise AssertionError("it never got to its end")


@pytest.mark.skipif(sys.platform == "darwin", reason="it would set up this Mac")
def test_killed_for_real_between_the_record_and_the_change(tmp_path: Path) -> None:
    life(tmp_path)
    tools, reached = tmp_path / "tools", tmp_path / "reached"
    tools.mkdir()
    stuck = f"#!/bin/sh\ncase $2 in enable) touch {reached}; exec sleep 3600;; esac\nexit 0\n"
    (tools / "systemctl").write_text(stuck)
    (tools / "systemctl").chmod(0o755)
    user = tmp_path / "user"
    environment = {
        "HOME": str(user),
        "PATH": f"{tools}:{PATH}",
        "HALTON_METER_HOME": str(user / ".halton-meter"),
    }
    before = {name: each for name, each in left_of_us(tmp_path).items() if name.startswith("user")}
    command = [sys.executable, "-m", "halton_meter"]
    init = subprocess.Popen(
        [*command, "init", "--apps", "--non-interactive"], env=environment, start_new_session=True
    )
    while not reached.exists():  # however long: a machine may be busy, and init ends by itself
        assert init.poll() is None
        time.sleep(0.02)
    os.killpg(init.pid, signal.SIGKILL)
    init.wait()
    assert (user / ".config/systemd/user/halton-meter-proxy.service").exists()
    done = subprocess.run(
        [*command, "uninstall"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    after = {name: each for name, each in left_of_us(tmp_path).items() if name.startswith("user")}
    assert after == before


# --- shells ---


def environment_of(shell: list[str], home: Path, **given: str) -> dict[str, str]:
    """The variables that a program started from a new shell has."""
    done = subprocess.run(
        [*shell, "env"],
        env={"HOME": str(home), "PATH": PATH, "TERM": "dumb", **given},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


SHELLS = [
    pytest.param(shell.split(), id=shell)
    for shell in ("bash -ic", "bash -lc", "zsh -c", "zsh -ic", "fish -c")
    if shutil.which(shell.split()[0])
]


@pytest.fixture
def here(tmp_path: Path) -> Machine:
    made = machine(tmp_path, Desktop("none"))
    set_up(made, "env-only")
    return made


@pytest.mark.parametrize("shell", SHELLS)
def test_a_new_shells_programs_have_the_variables(here: Machine, shell: list[str]) -> None:
    found = environment_of(shell, here.user_home)
    wanted = variables(8081, here.ca_folder, here.hosts, java=False)
    assert {name: found.get(name) for name in wanted} == wanted
    for name in ("SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS"):
        assert Path(found[name]).read_text().count("BEGIN CERTIFICATE") >= 1


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_in_which_another_proxy_is_used_is_left_alone(
    here: Machine, shell: list[str]
) -> None:
    found = environment_of(shell, here.user_home, HTTPS_PROXY="http://proxy.corp.example:3128")
    assert found["HTTPS_PROXY"] == "http://proxy.corp.example:3128"
    assert not {"SSL_CERT_FILE", "https_proxy"} & set(found)


@pytest.mark.parametrize("shell", SHELLS)
def test_with_an_upstream_that_other_proxy_gives_way(tmp_path: Path, shell: list[str]) -> None:
    here = machine(tmp_path, Desktop("none"), upstream=True)
    set_up(here, "env-only")
    found = environment_of(shell, here.user_home, HTTPS_PROXY="http://proxy.corp.example:3128")
    assert found["HTTPS_PROXY"] == "http://127.0.0.1:8081"


@pytest.mark.parametrize("shell", SHELLS)
def test_a_package_that_was_removed_without_uninstall_leaves_shells_without_a_proxy(
    tmp_path: Path, shell: list[str]
) -> None:
    witness = tmp_path / "proxy_fallback.py"
    witness.touch()
    here = machine(tmp_path, Desktop("none"), witness=witness)
    set_up(here, "env-only")
    assert "HTTPS_PROXY" in environment_of(shell, here.user_home)
    witness.unlink()
    assert "HTTPS_PROXY" not in environment_of(shell, here.user_home)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_still_starts_when_our_folder_is_gone(here: Machine, shell: list[str]) -> None:
    shutil.rmtree(here.home)
    assert environment_of(shell, here.user_home)["HOME"] == str(here.user_home)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_folder_with_odd_characters_is_quoted(tmp_path: Path, shell: list[str]) -> None:
    odd = tmp_path / 'it\'s $HOME; a "b"\\ c'
    here = machine(odd, Desktop("none"))
    set_up(here, "env-only")
    found = environment_of(shell, here.user_home)
    assert found["SSL_CERT_FILE"] == str(here.ca_folder / "ca-bundle.pem")


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", ["plain", 'it\'s; a "b" c'])
def test_node_starts_with_its_preload_in_nested_shells_and_after_uninstall(
    tmp_path: Path, shell: list[str], name: str
) -> None:
    here = machine(tmp_path / name, Desktop("none"))
    set_up(here, "env-only")
    given = environment_of(shell, here.user_home, NODE_OPTIONS="--no-warnings")
    nested = environment_of(shell, here.user_home, **given)
    assert nested["NODE_OPTIONS"] == given["NODE_OPTIONS"]
    assert given["NODE_OPTIONS"].startswith("--no-warnings --require")
    take_back(here)
    done = subprocess.run(
        ["node", "-e", "console.log(Object.keys(require.cache).join())"],
        env={"PATH": PATH, "NODE_OPTIONS": given["NODE_OPTIONS"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "node_proxy.cjs" in done.stdout, done.stderr


def test_no_proxy_of_the_persons_own_is_kept(here: Machine) -> None:
    found = environment_of(["bash", "-ic"], here.user_home, NO_PROXY="intranet.example")
    assert found["NO_PROXY"] == "intranet.example"


def test_bash_reads_the_login_file_that_the_person_has(tmp_path: Path) -> None:
    user = tmp_path / "user"
    user.mkdir()
    (user / ".bash_login").write_text("export MINE=1\n")
    (user / ".profile").write_text("export SHADOWED=1\n")
    set_up(machine(tmp_path, Desktop("none")), "env-only")
    found = environment_of(["bash", "-lc"], user)
    assert found["MINE"] == "1"
    assert found["HTTPS_PROXY"] == "http://127.0.0.1:8081"
    assert not (user / ".bash_profile").exists()


# --- systemd's own judgement ---

ANALYZE = shutil.which("systemd-analyze")


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed")
def test_systemd_finds_no_fault_with_the_units(tmp_path: Path) -> None:
    here = machine(tmp_path, Desktop(), python=sys.executable)
    set_up(here)
    folder = here.user_home / ".config/systemd/user"
    units = sorted(str(file) for file in folder.glob("halton-meter*"))
    assert len(units) == 3
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", *units],
        env={"PATH": PATH, "HOME": str(here.user_home), "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "halton-meter" not in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr


GENERATOR = Path("/usr/lib/systemd/user-environment-generators/30-systemd-environment-d-generator")


@pytest.mark.skipif(not GENERATOR.exists(), reason="systemd's generator is not installed")
def test_systemd_reads_the_session_environment_as_it_is_meant(tmp_path: Path) -> None:
    here = machine(tmp_path / "a b$c", Desktop(), port=8081)
    set_up(here, "apps")

    def generated(**given: str) -> dict[str, str]:
        done = subprocess.run(
            [str(GENERATOR)],
            env={"HOME": str(here.user_home), "PATH": PATH, **given},
            capture_output=True,
            text=True,
            check=True,
        )
        return dict(line.split("=", 1) for line in done.stdout.splitlines())

    wanted = variables(8081, here.ca_folder, here.hosts, java=False)
    found = generated()
    # It prints values for a shell to read.
    plain = {
        name: subprocess.run(
            ["sh", "-c", f"printf %s {found[name]}"], capture_output=True, text=True, check=True
        ).stdout
        for name in wanted
    }
    assert plain == wanted
    assert generated(HTTPS_PROXY="http://corp:1")["HTTPS_PROXY"] == "http://corp:1"


# --- the rest ---


def test_chromiums_database_is_used_where_there_is_one(tmp_path: Path) -> None:
    commands = Desktop("none")
    commands.programs.add("certutil")
    commands.before = lambda argv: Ran(0) if argv[0] == "certutil" else None
    here = machine(tmp_path, commands)
    assert not any("certutil" in line for line in listed(here))
    (here.user_home / ".pki/nssdb").mkdir(parents=True)
    assert any("certutil" in line and " -A -t C,, " in line for line in listed(here))


def listed(here: Machine, mode: str = "apps") -> list[str]:
    told = describe(here, Choice(mode), Ledger(here.home, here.commands))
    return [line for _, does in told for line in does]


def test_without_a_systemd_of_the_persons_own_a_process_is_kept_in_the_background(
    tmp_path: Path,
) -> None:
    here = machine(tmp_path, Recorded())
    [line] = [line for line in listed(here) if "daemon" in line and line.startswith("run ")]
    assert "--via proxy --keep" in line
    assert "--unset=HTTPS_PROXY" in line


@pytest.mark.parametrize("shell", SHELLS)
def test_where_nobody_supervises_shells_use_the_proxy_only_while_it_runs(
    tmp_path: Path, shell: list[str]
) -> None:
    class Unsupervised(Recorded):
        def answer(self, argv: tuple[str, ...]) -> Ran:
            return Ran(0) if argv[0] == "sh" else super().answer(argv)

    here = machine(tmp_path, Unsupervised())
    set_up(here, "apps")
    pid_file = here.home / "proxy.pid"
    assert "HTTPS_PROXY" not in environment_of(shell, here.user_home)
    like = subprocess.Popen(
        [sys.executable, "-c", "input()", "halton_meter"], stdin=subprocess.PIPE
    )
    try:
        pid_file.write_text(f"{like.pid}\n")
        assert "HTTPS_PROXY" in environment_of(shell, here.user_home)
    finally:
        like.kill()
        like.communicate()
    assert "HTTPS_PROXY" not in environment_of(shell, here.user_home)
    other = subprocess.Popen(["sleep", "60"])
    try:
        pid_file.write_text(f"{other.pid}\n")
        assert "HTTPS_PROXY" not in environment_of(shell, here.user_home), "a pid used again"
    finally:
        other.kill()
        other.wait()


def test_where_nobody_supervises_the_systems_settings_are_left_alone(tmp_path: Path) -> None:
    commands = Desktop()
    commands.programs.discard("systemctl")
    before = commands.snapshot()
    with pytest.raises(SetupError, match="init --apps"):
        set_up(machine(tmp_path, commands))
    assert commands.snapshot() == before


def test_a_dry_run_changes_nothing_and_writes_nothing(tmp_path: Path) -> None:
    life(tmp_path)
    commands = Desktop()
    here = machine(tmp_path, commands)
    before, state = files(tmp_path), commands.snapshot()
    assert any("gsettings set org.gnome.system.proxy mode" in each for each in listed(here, "full"))
    assert files(tmp_path) == before
    assert commands.snapshot() == state


def test_java_gets_a_store_of_its_own_that_verifies_our_leaves(tmp_path: Path) -> None:
    if shutil.which("keytool") is None:
        pytest.skip("no Java here")

    class Real(Desktop):
        def answer(self, argv: tuple[str, ...]) -> Ran:
            if argv[0] in ("sh", "cp", "chmod", "keytool", "test", "rm"):
                return Commands().run(argv)
            return super().answer(argv)

    commands = Real("none")
    commands.programs.add("keytool")
    here = machine(tmp_path, commands)
    with Ledger.open(here.home, commands) as ledger:
        take_steps(here, Choice("env-only", java=True), ledger, lambda done: None)
    store = here.ca_folder / "java-cacerts"
    found = Commands().run(
        (
            *("keytool", "-list", "-keystore", str(store)),
            *("-storepass", "changeit", "-alias", "halton-meter"),
        )
    )
    assert "trustedCertEntry" in found.out
    options = environment_of(["bash", "-ic"], here.user_home)["JAVA_TOOL_OPTIONS"]
    assert f"trustStore={store}" in options
    take_back(here)
    assert not store.exists()


def test_java_options_of_the_persons_own_are_not_replaced(tmp_path: Path) -> None:
    here = machine(tmp_path, Desktop("none"), environ={"JAVA_TOOL_OPTIONS": "-Xmx1g"})
    with (
        Ledger.open(here.home, here.commands) as ledger,
        pytest.raises(SetupError, match="leave --java out"),
    ):
        take_steps(here, Choice("apps", java=True), ledger, lambda done: None)


def test_what_a_person_trusted_by_variables_is_trusted_still_after_two_inits(
    tmp_path: Path,
) -> None:
    now = machine(tmp_path, Desktop("none")).now
    made = ensure_authority(tmp_path / "company", ("corp.example",), now)
    company = made.certificate_file.read_text().strip()
    (tmp_path / "company.pem").write_text(company)
    given = {"NODE_EXTRA_CA_CERTS": str(tmp_path / "company.pem")}
    here = machine(tmp_path, Desktop("none"), environ=given)
    set_up(here, "env-only")
    again = replace(here, environ=variables(8081, here.ca_folder, here.hosts, java=False))
    assert not set_up(again, "env-only")
    for name in ("ca-bundle.pem", "node-extra-ca.pem", "roots.pem"):
        assert company in (here.ca_folder / name).read_text()
    own = (here.ca_folder / "mitmproxy-ca-cert.pem").read_text().strip()
    assert own in (here.ca_folder / "ca-bundle.pem").read_text()
    assert own not in (here.ca_folder / "roots.pem").read_text()


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="use one of env-only, apps, full"):
        set_up(machine(tmp_path, Desktop("none")), "everything")


def test_two_at_once_wait_for_each_other(tmp_path: Path) -> None:
    import threading

    here = machine(tmp_path, Desktop("none"))
    failures: list[BaseException] = []

    def init() -> None:
        try:
            set_up(here, "apps")
        except (SetupError, ChangeError) as error:
            failures.append(error)

    threads = [threading.Thread(target=init) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert (here.user_home / ".bashrc").read_text().count(">>> halton-meter >>>") == 1
