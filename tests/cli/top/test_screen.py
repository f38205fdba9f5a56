"""The live screen over a real store and a real metering process, at 80x24 and wider."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import OptionList

from halton_meter.cli.top.feed import Feed
from halton_meter.cli.top.screen import ROWS_MAX, Details, Help, Table, Top
from halton_meter.model import PricedEvent, Process
from halton_meter.statusline.snapshot import BUDGETS_NAME
from halton_meter.statusline.snapshot import NAME as SNAPSHOT_NAME
from halton_meter.store import Store
from tests.live.test_in_flight import (
    BEGUN,
    MESSAGES,
    MODEL,
    answered,
    chunk_of,
    delta,
    frames,
    opened,
)
from tests.support.made import ASKED, made
from tests.support.stand_in import running
from tests.support.waiting import WAIT_SECONDS_MAX

SMALL, LARGE = (80, 24), (200, 50)
HOSTILE = "[red]m\x1b[2J\u202e[/red]"


def ended(name: str, ago_s: float, usd: str | None = "1", **fields: Any) -> PricedEvent:
    at_ns = time.time_ns() - int((ago_s + 1) * 1e9)
    return made(name, usd, at_ns=at_ns, duration_ms=1000.0, **fields)


def of(session: str, **fields: Any) -> dict[str, Any]:
    return {"caller": replace(ASKED, session_id=session, **fields)}


class Seen:
    """The program under test, and what stands on its screen."""

    def __init__(self, app: Top, pilot: Pilot[Any]) -> None:
        self.app, self.pilot = app, pilot

    def rows(self, table: str) -> list[str]:
        """The rows of a table."""
        found = self.app.screen.query_one(f"#{table}", Table).query_one(OptionList)
        return [
            str(found.get_option_at_index(at).prompt).rstrip() for at in range(found.option_count)
        ]

    def text(self) -> str:
        """All that stands on the screen, line by line."""
        strips = self.app.screen._compositor.render_strips()
        return "\n".join("".join(part.text for part in strip).rstrip() for strip in strips)

    async def wait_for(self, condition: Callable[[], Any], what: str) -> None:
        """As soon as that is so; fails with the screen's text."""
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while not condition():
            assert time.monotonic() < deadline, f"{what}; the screen:\n{self.text()}"
            await self.pilot.pause(0.05)

    async def look(self) -> None:
        """Read the source once, and draw it."""
        self.app.take(self.app.source.update())
        await self.pilot.pause()

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.pilot.pause()


def show(
    home: Path,
    act: Callable[[Seen], Coroutine[Any, Any, None]] | Callable[[Seen], Awaitable[None]],
    size: tuple[int, int] = SMALL,
    looks: bool = False,
) -> None:
    """Run the program without a terminal."""

    async def run() -> None:
        app = Top(Feed(home), looks)
        async with app.run_test(size=size) as pilot:
            seen = Seen(app, pilot)
            if not looks:
                await seen.look()
            await act(seen)

    asyncio.run(run())


@pytest.fixture
def home(tmp_path: Path) -> Path:
    with Store(tmp_path) as store:
        store.append(
            [
                ended("a", 30, "1.5", **of("s1-session", client="claude-cli"), project="web"),
                ended("b", 20, "0.5", **of("s1-session", client="claude-cli", agent="Explore")),
                ended("c", 10, "5", **of("s2-session", client="codex_exec"), project="api"),
                ended("d", 1000, "9", process=Process(7, 1, "/x/opencode"), project="api"),
            ]
        )
        store.flush()
        store.append([ended("e", 5, "0.25", **of("s1-session"), error_class="rate_limit")])
    return tmp_path


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["80x24", "200x50"])
def test_sessions_with_their_requests_rates_and_cost(home: Path, size: tuple[int, int]) -> None:
    async def act(seen: Seen) -> None:
        rows = [row.split() for row in seen.rows("groups")]
        assert [(row[0], row[1]) for row in rows] == [
            ("opencode", "7"),
            ("codex_exec", "api"),
            ("claude-cli", "web"),
        ]
        third = rows[2][2:] if size == SMALL else rows[2][2:-1]
        # in flight, requests, a minute, in, cached, out, cost, a minute
        assert third == "s1-sessi - 3 3 300 - 60 $2.2500 $2.2500".split()
        text = seen.text()
        assert "last minute: 4 requests, 400 in, 80 out, $7.2500" in text
        assert "today" in text
        assert "Nothing is metered now: no service runs" in text
        assert "sudo halton-meter start" in text
        assert text.splitlines()[-1].startswith("g group  s sort")
        assert max(map(len, text.splitlines())) <= size[0]

    show(home, act, size)


def test_keys_group_sort_filter_and_choose_the_period(home: Path) -> None:
    async def act(seen: Seen) -> None:
        await seen.press("g")
        assert "Each process, last hour, by cost (2)" in seen.text()
        await seen.press("g")
        assert [row.split()[0] for row in seen.rows("groups")] == ["api", "web"]
        await seen.press("r")
        assert [row.split()[0] for row in seen.rows("groups")] == ["web", "api"]
        await seen.press("r", "s", "s", "s", "s", "s")
        assert "by name" in seen.text()
        await seen.press("p", "p")
        assert "Each project, last 5 minutes, by name" in seen.text()
        assert seen.rows("groups")[0].split()[:3] == ["api", "-", "1"]
        await seen.press("slash", *"codex")
        assert [row.split()[0] for row in seen.rows("groups")] == ["api"]
        await seen.press("enter")
        assert "with 'codex'" in seen.text()
        assert "last minute: 1 request" in seen.text()
        await seen.press("slash", *"none")  # takes the place of what was typed before
        assert "No request of the last 5 minutes matches 'none'" in seen.text()
        await seen.press("escape")
        assert len(seen.rows("groups")) == 2

    show(home, act)


def test_enter_shows_a_sessions_requests_in_order_and_what_they_came_to(home: Path) -> None:
    async def act(seen: Seen) -> None:
        await seen.press("down", "down", "enter")
        assert isinstance(seen.app.screen, Details)
        await seen.wait_for(lambda: len(seen.rows("steps")) == 3, "its requests")
        rows = [row.split()[1:] for row in seen.rows("steps")]
        assert rows == [
            "main claude-opus-5-5 100 - 20 $1.5000 $1.5000 ok".split(),
            "Explore claude-opus-5-5 100 - 20 $0.5000 $2.0000 ok".split(),
            "main claude-opus-5-5 100 - 20 $0.2500 $2.2500 200 r…".split(),
        ]
        assert "session s1-session: claude-cli, web, claude 4711" in seen.text()
        assert "3 requests, 300 in, 0 cached, 60 out, 0% from the cache, $2.2500" in seen.text()
        await seen.press("escape")
        assert "Each session" in seen.text()

    show(home, act)


def test_a_long_sessions_earlier_requests_are_read_from_the_store(home: Path) -> None:
    with Store(home) as store:
        old = [ended(f"old{n}", 3 * 10**6 - n, "0.1", **of("s1-session")) for n in range(5)]
        store.append(old)
        store.flush()

    async def act(seen: Seen) -> None:
        seen.app.board.done = type(seen.app.board.done)(
            each for each in seen.app.board.done if not each.id.startswith("old")
        )
        await seen.press("down", "down", "enter")

        def is_read() -> bool:
            screen = seen.app.screen
            assert isinstance(screen, Details)
            screen.show(seen.app.board)
            return len(seen.rows("steps")) == 8

        await seen.wait_for(is_read, "all its requests")
        assert seen.rows("steps")[-1].split()[-3] == "$2.7500"

    show(home, act)


def test_what_is_chosen_stays_chosen_as_rows_move(home: Path) -> None:
    async def act(seen: Seen) -> None:
        table = seen.app.query_one("#groups", Table)
        await seen.press("down")
        assert table.chosen_key == "s2-session"
        with Store(home) as store:
            store.append([ended("f", 1, "50", **of("s1-session"), project="web")])
        await seen.look()
        assert table.chosen_key == "s2-session"
        assert [row.split()[0] for row in seen.rows("groups")] == [
            "claude-cli",
            "opencode",
            "codex_exec",
        ]
        await seen.press("slash", *"opencode")
        assert table.chosen_key == "opencode 7"

    show(home, act)


def test_held_it_stands_still_and_goes_on(home: Path) -> None:
    async def act(seen: Seen) -> None:
        await seen.press("space")
        assert "HELD" in seen.text()
        with Store(home) as store:
            store.append([ended("f", 1, "50", project="new")])
        await seen.look()
        assert "$50" not in seen.text()
        await seen.press("space")
        assert "$50.0000" in seen.text()

    show(home, act)


def test_help_names_every_key(home: Path) -> None:
    async def act(seen: Seen) -> None:
        await seen.press("question_mark")
        assert isinstance(seen.app.screen, Help)
        text = seen.text()
        for words in (
            "group by session",
            "sort by cost",
            "period:",
            "filter",
            "hold still",
            "quit",
        ):
            assert words in text
        await seen.press("escape")
        assert not isinstance(seen.app.screen, Help)

    show(home, act)


def test_budgets_stand_above_and_say_when_a_cap_holds(home: Path) -> None:
    budgets = [
        {"name": "day", "limit_usd": "10", "spent_usd": "6.17", "ends_at": None},
        {"name": "web", "limit_usd": "2", "spent_usd": "2.5", "stopped": True, "at_least": True},
        {"name": "over", "limit_usd": "2", "spent_usd": "1", "ends_at": 5},
        {"name": HOSTILE, "limit_usd": "1e9999999", "spent_usd": "NaN"},
        {"name": 5, "limit_usd": [], "spent_usd": {}},
        "nonsense",
    ]
    (home / BUDGETS_NAME).write_text(json.dumps({"version": 1, "budgets": budgets}))

    async def act(seen: Seen) -> None:
        await seen.look()
        text = seen.text()
        assert "day [######....] 62%, $6.17 of $10.00" in text
        assert "web [##########] 125%, at least $2.50 of $2.00, stopped: halton-meter" in text
        assert "over [" not in text
        (home / BUDGETS_NAME).write_bytes(b"\xff{[")
        await seen.look()
        assert "day [" not in seen.text()

    show(home, act)


def test_plan_windows_stand_above_with_when_they_will_be_full(home: Path) -> None:
    now_s = time.time()
    windows = {
        "7d": {"used": 0.17, "length_s": 604800, "resets_at": now_s + 3 * 86400},
        "5h": {"used": 0.62, "length_s": 18000, "resets_at": now_s + 60, "full_at": now_s + 30},
        "over": {"used": 0.99, "length_s": 1, "resets_at": now_s - 5},
        "odd": {"used": "x"},
        "far": {"used": 0.5, "length_s": 10**7, "resets_at": 1e12, "full_at": -1},
    }
    accounts = [
        {"plan": "claude", "account": "9c", "at": now_s, "windows": windows},
        {"plan": HOSTILE, "account": 5, "windows": []},
        7,
    ]
    snapshot = {"version": 1, "accounts": accounts}
    (home / SNAPSHOT_NAME).write_text(json.dumps(snapshot))

    def clock(at_s: float) -> str:
        return time.strftime("%H:%M", time.localtime(at_s))

    async def act(seen: Seen) -> None:
        await seen.look()
        [line] = [each for each in seen.text().splitlines() if each.startswith("plan")]
        assert line.startswith(
            f"plan claude 5h [###..] 62% full {clock(now_s + 30)}, resets {clock(now_s + 60)}; "
            "7d [#....] 17% resets "
        )
        assert line.endswith("; far [##...] 50% resets -")

    show(home, act, LARGE)


def test_names_from_traffic_are_text_and_no_markup(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.append([ended("a", 1, model=HOSTILE, project=HOSTILE, **of(HOSTILE, client=HOSTILE))])

    async def act(seen: Seen) -> None:
        for _ in range(6):
            await seen.press("g")
            assert "\x1b" not in seen.text()
        assert "[red]m?[2J" in seen.text()
        await seen.press("enter")
        assert "\x1b" not in seen.text()

    show(tmp_path, act)


def test_more_groups_than_rows(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.append([ended(f"e{n}", 1, "1", project=f"p{n:04}") for n in range(ROWS_MAX + 50)])

    async def act(seen: Seen) -> None:
        await seen.press("g", "g")
        assert len(seen.rows("groups")) == ROWS_MAX
        assert f"({ROWS_MAX + 50})" in seen.text()

    show(tmp_path, act)


def test_a_store_that_cannot_be_read_is_said(home: Path) -> None:
    (home / "meter.duckdb").write_bytes(b"x" * 9000)

    async def act(seen: Seen) -> None:
        text = seen.text()
        assert "trouble:" in text
        assert "damaged" in text

    show(home, act)


def test_nothing_at_all(tmp_path: Path) -> None:
    async def act(seen: Seen) -> None:
        text = seen.text()
        assert "Nothing is metered now: no service runs, and no `halton-meter run`." in text
        assert "Nothing metered yet." in text
        assert "trouble" not in text

    show(tmp_path / "none", act)


def test_a_request_appears_in_flight_and_becomes_an_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real worker, its control socket and its journal; the screen looks by itself."""
    with running(tmp_path, monkeypatch) as service:
        service.wait_for(lambda status: status, "its status")
        helper, begun = service.helpers[-1], answered(BEGUN, delta("x" * 400))

        async def act(seen: Seen) -> None:
            await seen.wait_for(lambda: "No request is in flight" in seen.text(), "an empty table")
            assert "metering: uprobes" in seen.text()
            helper.send(opened(1) + frames(1, 0, 0, MESSAGES))
            await seen.wait_for(lambda: seen.rows("flights"), "it in flight")
            row = seen.rows("flights")[0].split()
            assert row[0] == "claude"
            assert row[3] == MODEL
            assert row[-4:-1] == ["~221", "-", "~0"]
            helper.send(frames(1, 1, 0, begun))
            await seen.wait_for(lambda: "~100" in seen.rows("flights")[0], "its answer")
            assert seen.rows("flights")[0].split()[-4:-1] == ["1,000", "50k", "~100"]
            assert "in flight: 1, ~$0.0325" in seen.text()
            rest = chunk_of({"type": "message_stop"}) + b"0\r\n\r\n"
            helper.send(frames(1, 1, len(begun), rest))
            await seen.wait_for(lambda: not seen.rows("flights"), "its end")
            await seen.wait_for(lambda: "last minute: 1 request" in seen.text(), "the event")

        show(tmp_path, act, looks=True)
