"""A service that runs takes up other settings: rules for its user, hosts for root alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab.conftest import HALTON_METER, Service, projects
from tests.lab.test_clients import anthropic_body, curl
from tests.support.lab.lab import Lab, User
from tests.support.waiting import wait_until

pytestmark = pytest.mark.lab

HOST = "api.example.com"


@pytest.fixture
def own(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of this test's own, with a home of its own."""
    folder = lab.user.home / tmp_path_factory.mktemp("reload").name
    folder.mkdir()
    os.chown(folder, lab.user.uid, lab.user.gid)
    running = Service(lab, folder / "state")
    yield running
    running.stop()


def config(own: Service, *arguments: str, user: User | None = None) -> str:
    environment = own.lab.environment(HALTON_METER_HOME=str(own.home))
    done = own.lab.run([*HALTON_METER, "config", *arguments], env=environment, user=user)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def ask(own: Service, n: int) -> list[dict[str, Any]]:
    """An exchange with a provider and one with the host; what of both is new in the store."""
    lab = own.lab
    known = {event["id"] for event in own.events()} if (own.home / "meter.duckdb").exists() else ()
    for command in (
        [*curl(), "-d", anthropic_body(n)],
        ["curl", "-sS", f"https://{HOST}/v1/chat/completions", "-d", '{"model":"m","messages":[]}'],
    ):
        done = lab.run(command, user=lab.user)
        assert done.returncode == 0, done.stderr
    own.settle()
    return [event for event in own.events() if event["id"] not in known]


def hosts(events: list[dict[str, Any]]) -> list[str]:
    return sorted(event["host"] for event in events)


def test_rules_count_at_once_and_hosts_when_root_says_so(lab: Lab, own: Service) -> None:
    before = own.wait_ready()
    assert hosts(ask(own, 2)) == ["api.anthropic.com"]
    config(own, "set", "projects.ruled.paths", str(lab.user.home), user=lab.user)
    said = config(own, "set", "openai_compatible_hosts", HOST, user=lab.user)
    assert "except for the hosts; for these: sudo halton-meter config reload" in said
    events = ask(own, 4)
    assert hosts(events) == ["api.anthropic.com"], "a user's process cannot widen what is copied"
    for n in (20, 22, 24):  # its folder is not always read in time
        events = events if projects(events) else ask(own, n)
    assert projects(events) == {"ruled"}

    assert "the hosts too" in config(own, "reload")
    wait_until(lambda: "hosts are watched" in own.log(), "the supervisor's word")
    assert hosts(ask(own, 6)) == ["api.anthropic.com", HOST]

    assert "uses it from now on" in config(own, "unset", "projects.ruled.paths", user=lab.user)
    config(own, "unset", "openai_compatible_hosts", user=lab.user)
    config(own, "reload")
    wait_until(lambda: own.log().count("hosts are watched") == 2, "the supervisor's word")
    events = ask(own, 8)
    assert hosts(events) == ["api.anthropic.com"]
    assert [event["project"] for event in events] != ["ruled"]
    after = own.wait_ready()
    assert (after["pid"], after["restarts"]) == (before["pid"], 0), "nothing was restarted"
    assert after["health"] == "ok"
