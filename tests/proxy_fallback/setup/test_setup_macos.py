"""Set-up on a Mac that is not here: its programs answer as recorded."""

from __future__ import annotations

import os
import plistlib
from dataclasses import replace
from pathlib import Path

import pytest

from proxy_fallback.setup import settings_guard
from proxy_fallback.setup.authority import ensure_authority
from proxy_fallback.setup.changes import ChangeError, Ran
from proxy_fallback.setup.ledger import Ledger
from proxy_fallback.setup.machine import Machine
from proxy_fallback.setup.plan import Choice, SetupError
from proxy_fallback.setup.settings_guard import ProxySettingsGuard, notifications
from proxy_fallback.setup.steps import StepTaken, describe, take_steps, undo
from proxy_fallback.setup.system_proxy import network_proxy, network_services
from tests.support.machines import RECORDED, Mac, files, life, machine, said

FULL = Choice("full")
OURS = (True, "127.0.0.1", 8081, False)
NEVER = (False, "", 0, False)


@pytest.fixture(autouse=True)
def no_disk_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def mac() -> Mac:
    return Mac()


@pytest.fixture
def here(tmp_path: Path, mac: Mac) -> Machine:
    life(tmp_path)
    return machine(tmp_path, mac)


def set_up(here: Machine, choice: Choice = FULL) -> tuple[bool, list[StepTaken]]:
    steps: list[StepTaken] = []
    with Ledger.open(here.home, here.commands) as ledger:
        return take_steps(here, choice, ledger, steps.append), steps


def take_back(here: Machine) -> list[str]:
    with Ledger.open(here.home, here.commands) as ledger:
        return undo(ledger, here.home)


def left_of_us(folder: Path) -> dict[str, tuple[int, bytes]]:
    """What is in the folder but for our own data folder, which uninstall leaves."""
    return {name: each for name, each in files(folder).items() if ".halton-meter" not in name}


# --- reading what its programs say ---


def test_disabled_services_are_left_out_and_names_may_hold_spaces(mac: Mac) -> None:
    assert network_services(mac) == ["USB 10/100/1000 LAN", "Wi-Fi", "iPhone USB"]


def test_a_mac_without_network_services_has_none(tmp_path: Path) -> None:
    assert network_services(Mac("networksetup_no_services")) == []


@pytest.mark.parametrize(
    ("recorded", "enabled", "server", "port", "authenticated"),
    [
        ("networksetup_proxy_never_set", False, "", 0, False),
        ("networksetup_proxy_switched_off", False, "old.example.com", 3128, False),
        ("networksetup_proxy_of_a_company", True, "proxy.corp.example", 8080, True),
    ],
)
def test_a_services_proxy_is_read_from_what_networksetup_prints(
    mac: Mac, recorded: str, enabled: bool, server: str, port: int, authenticated: bool
) -> None:
    mac.before = lambda argv: Ran(0, said(recorded))
    found = network_proxy(mac, "webproxy", "Wi-Fi")
    assert (found.enabled, found.server, found.port) == (enabled, server, port)
    assert found.authenticated is authenticated


def test_a_service_that_networksetup_does_not_know_is_an_error(mac: Mac) -> None:
    mac.before = lambda argv: Ran(4, "Wi-Fi 6 is not a recognized network service.\n")
    with pytest.raises(ChangeError, match="not a recognized network service"):
        network_proxy(mac, "webproxy", "Wi-Fi 6")


# --- init and uninstall ---


def test_all_is_set_and_put_back_to_the_byte(here: Machine, mac: Mac, tmp_path: Path) -> None:
    mac.state.services["Wi-Fi"]["webproxy"] = (False, "old.example.com", 3128, False)
    mac.state.environment["NO_PROXY"] = "intranet.example"
    state, before = mac.snapshot(), left_of_us(tmp_path)
    changed, steps = set_up(here)
    assert changed
    assert [step.title for step in steps] == [
        "CA generated",
        "CA trusted",
        "service installed",
        "daemon healthy at 127.0.0.1:8081",
        "environment set",
        "system proxy set",
    ]
    for service in ("USB 10/100/1000 LAN", "Wi-Fi", "iPhone USB"):
        kinds = mac.state.services[service]
        assert kinds == {"webproxy": OURS, "securewebproxy": OURS}
    assert mac.state.services["Thunderbolt Bridge"]["webproxy"] == NEVER
    assert len(mac.state.trusted) == 1
    assert mac.state.environment["HTTPS_PROXY"] == "http://127.0.0.1:8081"
    assert take_back(here) == []
    assert mac.snapshot() == state
    assert left_of_us(tmp_path) == before
    assert not here.ca_folder.exists()


def test_a_second_init_changes_nothing_and_a_smaller_mode_takes_the_rest_away(
    here: Machine, mac: Mac, tmp_path: Path
) -> None:
    set_up(here)
    state, written = mac.snapshot(), files(tmp_path)
    mac.ran.clear()
    assert not set_up(here)[0]
    assert mac.snapshot() == state
    assert files(tmp_path) == written
    verbs = {argv[1] for argv in mac.ran}
    assert not verbs & {"add-trusted-cert", "bootstrap", "setenv", "-setwebproxy"}
    assert set_up(here, Choice("apps"))[0]
    assert mac.state.services["Wi-Fi"]["webproxy"][0] is False
    assert set(mac.state.loaded) == {"com.halton-meter.proxy", "com.halton-meter.environment"}
    assert set_up(here, Choice("env-only"))[0]
    assert mac.state.trusted == set()
    assert mac.state.environment == {}


def test_a_password_dialog_that_was_cancelled_undoes_all(
    here: Machine, mac: Mac, tmp_path: Path
) -> None:
    state, before = mac.snapshot(), left_of_us(tmp_path)

    def cancelled(argv: tuple[str, ...]) -> Ran | None:
        if argv[1] == "add-trusted-cert":
            # macOS has put the certificate into the keychain by then.
            mac.state.certificates.add(mac.ran[-1][-1])
            return Ran(1, "", said("security_cancelled"))
        if argv[1] == "find-certificate" and "-c" in argv:
            return Ran(0 if mac.state.certificates else 44)
        return None

    mac.before = cancelled
    with pytest.raises(SetupError, match=r"CA trusted: .*canceled by the user") as caught:
        set_up(here)
    assert "undone" in str(caught.value)
    assert mac.snapshot() == state
    assert left_of_us(tmp_path) == before
    assert not here.ca_folder.exists()


@pytest.mark.parametrize(
    "failing",
    [
        ("security", "add-trusted-cert"),
        ("launchctl", "bootstrap"),
        ("launchctl", "setenv"),
        ("networksetup", "-setwebproxy"),
        ("networksetup", "-setsecurewebproxystate"),
    ],
    ids=" ".join,
)
def test_a_step_that_fails_undoes_those_before_it(
    here: Machine, mac: Mac, tmp_path: Path, failing: tuple[str, str]
) -> None:
    state, before = mac.snapshot(), left_of_us(tmp_path)
    answers = [Ran(14, said("networksetup_not_admin"))]
    mac.before = lambda argv: answers.pop() if answers and argv[:2] == failing else None
    with pytest.raises(SetupError, match="requires admin privileges"):
        set_up(here)
    assert mac.snapshot() == state
    assert left_of_us(tmp_path) == before
    assert take_back(here) == []


def test_a_daemon_that_never_answers_undoes_all_before_anything_points_to_it(
    here: Machine, mac: Mac, tmp_path: Path
) -> None:
    state, before = mac.snapshot(), left_of_us(tmp_path)
    deaf = replace(here, healthy=lambda: False)
    with pytest.raises(SetupError, match="does not answer after"):
        set_up(deaf)
    assert mac.snapshot() == state
    assert left_of_us(tmp_path) == before
    assert not any(argv[1] in ("setenv", "-setwebproxy") for argv in mac.ran)


def test_launchd_that_is_still_tearing_the_old_job_down_is_believed_by_what_it_prints(
    here: Machine, mac: Mac
) -> None:
    def busy(argv: tuple[str, ...]) -> Ran | None:
        if argv[1] == "bootstrap":
            mac.answer(argv)
            return Ran(5, "", said("launchctl_busy"))
        return None

    mac.before = busy
    set_up(here, Choice("apps"))
    assert "com.halton-meter.proxy" in mac.state.loaded


def test_a_company_proxy_on_one_service_is_neither_replaced_nor_half_way_left(
    here: Machine, mac: Mac, tmp_path: Path
) -> None:
    mac.state.services["iPhone USB"]["securewebproxy"] = (True, "proxy.corp.example", 8080, True)
    state, before = mac.snapshot(), files(tmp_path)
    with pytest.raises(
        SetupError, match=r"'iPhone USB' already uses the proxy proxy.corp.example:8080"
    ):
        set_up(here)
    assert mac.snapshot() == state
    assert {n: f for n, f in files(tmp_path).items() if not n.startswith("user/.halt")} == before


@pytest.mark.parametrize("where", ["environment", "launchctl"])
def test_another_proxy_in_use_is_refused_without_its_password_being_shown(
    here: Machine, mac: Mac, where: str
) -> None:
    url = "http://me:SECRET@proxy.corp.example:3128"
    if where == "environment":
        here = replace(here, environ={"HTTPS_PROXY": url})
    else:
        mac.state.environment["HTTPS_PROXY"] = url
    with pytest.raises(SetupError, match=r"to another proxy \(proxy.corp.example:3128\)") as e:
        set_up(here)
    assert "SECRET" not in str(e.value)
    unset = "unset HTTPS_PROXY" if where == "environment" else "launchctl unsetenv HTTPS_PROXY"
    assert e.value.problem.fix.startswith(f"{unset}, then: halton-meter init")
    assert set_up(replace(here, upstream=True))[0]


def test_a_port_that_somebody_else_has_is_told_before_anything_changes(
    here: Machine, mac: Mac
) -> None:
    taken = replace(here, port_taken=lambda: True, healthy=lambda: False)
    with pytest.raises(SetupError, match="another program listens on"):
        set_up(taken)
    assert not any(argv[1] == "bootstrap" for argv in mac.ran)


def test_a_new_ca_replaces_the_old_one_in_the_keychain_and_restarts_the_service(
    here: Machine, mac: Mac
) -> None:
    set_up(here, Choice("apps"))
    [old] = mac.state.trusted
    mac.ran.clear()
    more = replace(here, hosts=(*here.hosts, "llm.example.com"))
    assert set_up(more, Choice("apps"))[0]
    verbs = [argv[1] for argv in mac.ran]
    assert verbs.index("remove-trusted-cert") < verbs.index("add-trusted-cert")
    assert ("launchctl", "bootout", "gui/501/com.halton-meter.proxy") in mac.ran
    assert mac.state.trusted == {old}, "renewed: the same name and key"


def test_a_dry_run_lists_every_command_that_the_run_then_runs(
    here: Machine, mac: Mac, tmp_path: Path
) -> None:
    ensure_authority(here.ca_folder, here.hosts, here.now)
    before = files(tmp_path)
    told = describe(here, FULL, Ledger(here.home, mac))
    assert files(tmp_path) == before
    listed = {line for _, does in told for line in does}
    mac.ran.clear()
    set_up(here)
    from proxy_fallback.setup.changes import shown

    asking = ("print", "getenv", "find-certificate", "-get", "-list", "-e")
    doing = [argv for argv in mac.ran if not argv[1].startswith(asking)]
    assert doing
    assert [argv for argv in doing if f"run {shown(argv)}" not in listed] == []


def test_system_trust_asks_sudo_and_nothing_else_does(here: Machine, mac: Mac) -> None:
    told = describe(here, Choice("full", system_trust=True), Ledger(here.home, mac))
    with_sudo = [line for _, does in told for line in does if line.startswith("run sudo ")]
    assert len(with_sudo) == 1
    assert "security add-trusted-cert -d " in with_sudo[0]
    told = describe(here, FULL, Ledger(here.home, mac))
    assert not any(line.startswith("run sudo ") for _, does in told for line in does)


def test_the_agents_are_as_launchd_wants_them(here: Machine, mac: Mac) -> None:
    set_up(here)
    folder = here.user_home / "Library/LaunchAgents"
    agent = plistlib.loads((folder / "com.halton-meter.proxy.plist").read_bytes())
    socket = agent["Sockets"]["Edge"]
    assert (socket["SockNodeName"], socket["SockServiceName"]) == ("127.0.0.1", "8081")
    assert agent["KeepAlive"] is True
    assert agent["EnvironmentVariables"]["HTTPS_PROXY"] == ""
    assert agent["ProgramArguments"][-4:] == ["daemon", "--foreground", "--via", "proxy"]
    once = plistlib.loads((folder / "com.halton-meter.environment.plist").read_bytes())
    assert "KeepAlive" not in once
    for name, path in mac.state.loaded.items():
        assert Path(path).name == f"{name}.plist"


def test_apps_to_redirect_are_told_to_the_service_and_the_redirector_goes_with_it(
    here: Machine, mac: Mac
) -> None:
    mac.before = lambda argv: Ran(1) if argv[:2] == ("test", "-e") else None
    set_up(here, Choice("apps", redirect="Claude,Cursor"))
    file = here.user_home / "Library/LaunchAgents/com.halton-meter.proxy.plist"
    agent = plistlib.loads(file.read_bytes())
    assert agent["EnvironmentVariables"]["HALTON_METER_REDIRECT"] == "Claude,Cursor"
    take_back(here)
    assert ("rm", "-rf", "/Applications/Mitmproxy Redirector.app") in mac.ran


@pytest.mark.parametrize(("apps", "on"), [("a,,b", "macos"), ("Claude", "linux")])
def test_apps_that_cannot_be_redirected_are_refused(here: Machine, apps: str, on: str) -> None:
    with pytest.raises(SetupError, match="--redirect"):
        set_up(replace(here, platform=on), Choice("apps", redirect=apps))


def test_a_redirector_that_was_there_before_stays(here: Machine, mac: Mac) -> None:
    mac.before = lambda argv: Ran(0) if argv[:2] == ("test", "-e") else None
    set_up(here, Choice("apps", redirect="Claude"))
    take_back(here)
    assert not any(argv[0] == "rm" and "-rf" in argv for argv in mac.ran)


# --- the guard of the system proxy ---


class Health:
    well = True

    def __call__(self) -> bool:
        return self.well


@pytest.fixture
def kept(here: Machine, mac: Mac) -> tuple[ProxySettingsGuard, Health, list[str]]:
    set_up(here)
    health, told = Health(), list[str]()
    return ProxySettingsGuard(here.home, mac, "macos", 8081, health, told.append), health, told


Kept = tuple[ProxySettingsGuard, Health, list[str]]


def test_a_dock_that_is_plugged_in_later_is_covered_and_put_back(
    here: Machine, mac: Mac, kept: Kept
) -> None:
    mac.plug("Thunderbolt Ethernet Slot 1")
    kept[0].check(network_changed=False)
    assert mac.state.services["Thunderbolt Ethernet Slot 1"]["webproxy"] == NEVER
    kept[0].check(network_changed=True)
    assert mac.state.services["Thunderbolt Ethernet Slot 1"]["securewebproxy"] == OURS
    take_back(here)
    kinds = mac.state.services["Thunderbolt Ethernet Slot 1"]
    assert not any(enabled for enabled, *_ in kinds.values())


def test_a_service_with_a_proxy_of_its_own_is_left_alone_and_told_once(
    mac: Mac, kept: Kept
) -> None:
    theirs = (True, "proxy.corp.example", 8080, True)
    mac.plug("Office LAN")
    mac.state.services["Office LAN"]["securewebproxy"] = theirs
    for _ in range(3):
        kept[0].check(network_changed=True)
    assert mac.state.services["Office LAN"]["securewebproxy"] == theirs
    assert sum("proxy.corp.example" in text for text in kept[2]) == 1


def test_a_proxy_that_the_person_switched_off_is_not_set_again(mac: Mac, kept: Kept) -> None:
    mac.state.services["Wi-Fi"]["webproxy"] = (False, "127.0.0.1", 8081, False)
    kept[0].check(network_changed=True)
    assert mac.state.services["Wi-Fi"]["webproxy"][0] is False


def test_failed_checks_in_a_row_take_the_system_proxy_away_until_it_is_well_again(
    here: Machine, mac: Mac, kept: Kept
) -> None:
    def on() -> bool:
        return any(kind[0] for kinds in mac.state.services.values() for kind in kinds.values())

    guard, health, told = kept
    for well, expected in (
        *((False, True), (True, True)),  # one failure is nothing yet
        *((False, True), (False, True), (False, False), (False, False)),
        *((True, False), (False, False), (True, False), (True, True)),
    ):
        health.well = well
        guard.check(network_changed=False)
        assert on() is expected, told
    assert "system proxy settings removed" in told[0]
    assert set_up(here)[0] is False


def test_a_keeper_that_starts_while_all_is_down_takes_the_proxy_away(mac: Mac, kept: Kept) -> None:
    kept[1].well = False
    for _ in range(settings_guard.FAILURES_MAX):
        kept[0].check(network_changed=True)
    assert not any(k[0] for kinds in mac.state.services.values() for k in kinds.values())


def test_the_keeper_does_nothing_where_set_up_was_taken_back(
    here: Machine, mac: Mac, kept: Kept
) -> None:
    take_back(here)
    mac.plug("Dock")
    kept[0].check(network_changed=True)
    assert mac.state.services["Dock"]["webproxy"] == NEVER


def test_notifications_are_taken_from_what_scutil_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings_guard, "HEALTH_EVERY_S", 0.05)
    monkeypatch.setattr(settings_guard, "SETTLE_S", 0.01)
    asked, go = tmp_path / "asked", tmp_path / "go"
    recorded = RECORDED / "scutil_watch.txt"
    script = (
        f'for n in 1 2 3 4; do read line; echo "$line" >>{asked}; done; '
        f"until [ -e {go} ]; do sleep 0.02; done; cat {recorded}; cat"
    )
    told = notifications(("sh", "-c", script))
    try:
        assert next(told) is True, "what happened before the watch is looked at first"
        assert next(told) is False
        go.touch()
        assert any(next(told) for _ in range(200))
        assert "n.watch" in asked.read_text()
        assert next(told) is False
    finally:
        told.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", [("true",), ("/no/such/scutil",)], ids=" ".join)
def test_without_notifications_the_network_is_looked_at_from_time_to_time(
    monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setattr(settings_guard, "HEALTH_EVERY_S", 0.01)
    monkeypatch.setattr(settings_guard, "LIST_EVERY_S", 0.05)
    told = notifications(command)
    assert next(told)
    assert any(next(told) for _ in range(200))
