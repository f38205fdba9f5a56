"""The live screen of `top`: two tables, a few lines above them, and keys.

`Looking` reads the feed in a thread, once a second, and posts what it found; the screen only draws.
All colours are the terminal's own, so that a light background stays readable, and nothing needs
more than 80x24. Only `command.py` imports this, when the screen is shown: textual takes half a
second to import.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

from rich.text import Text
from textual import on
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.message import Message
from textual.screen import ModalScreen, Screen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from halton_meter.cli.output import shown
from halton_meter.cli.top import cells
from halton_meter.cli.top.cells import (
    FLIGHT_COLUMNS,
    GROUP_COLUMNS,
    STEP_COLUMNS,
    Column,
    Shown,
    fitting,
)
from halton_meter.cli.top.feed import Update
from halton_meter.cli.top.figures import (
    GROUPINGS,
    PERIODS,
    SORTS,
    Board,
    Done,
    Flight,
    Group,
    key_of,
    total,
)
from halton_meter.model import PricedEvent
from halton_meter.periods import day_of, start_of

LOOK_EVERY_S = 1.0
ROWS_MAX = 200
SCROLLBAR_CELLS = 1


class Source(Protocol):
    """What the screen needs of the feed: `feed.Feed` has it."""

    def update(self) -> Update:
        """What there is now."""

    def session(self, session_id: str) -> list[PricedEvent]:
        """The latest requests of a session."""

    def close(self) -> None:
        """Let go of files."""


class Looking(threading.Thread):
    """Reads the source again and again, in a thread of its own, until told to stop."""

    def __init__(
        self, source: Source, found: Callable[[Update], object], failed: Callable[[str], object]
    ) -> None:
        super().__init__(name="looking", daemon=True)
        self._source, self._found, self._failed = source, found, failed
        self._stopped = threading.Event()

    def run(self) -> None:
        """The thread's life."""
        try:
            while not self._stopped.is_set():
                self._found(self._source.update())
                self._stopped.wait(LOOK_EVERY_S)
            self._source.close()
        except Exception as error:  # a bug of ours must not leave a screen that stands still
            self._failed(f"{type(error).__name__}: {error}")

    def stop(self) -> None:
        """Let it end; it may be waiting for an answer, and nobody waits for it."""
        self._stopped.set()


class Table(Vertical):
    """A heading over rows of which one is chosen, by its key, as long as it is there; at first the
    first, or with `from_end` the last.
    """

    DEFAULT_CSS = """
    Table { height: 1fr; }
    Table .heading { height: 1; text-style: bold; }
    Table .names { height: 1; text-style: dim; }
    Table .empty { height: auto; color: ansi_yellow; display: none; }
    Table OptionList {
        height: 1fr; border: none; padding: 0; background: ansi_default;
        scrollbar-size-vertical: 1; scrollbar-background: ansi_default;
        scrollbar-color: ansi_bright_black;
    }
    Table OptionList:focus { border: none; }
    Table OptionList > .option-list--option { padding: 0; }
    Table OptionList > .option-list--option-highlighted { text-style: none; }
    Table OptionList:focus > .option-list--option-highlighted { text-style: reverse; }
    """

    class Chosen(Message):
        """Enter was pressed on a row."""

        def __init__(self, table: Table, key: str) -> None:
            super().__init__()
            self.table, self.key = table, key

    def __init__(self, name: str, from_end: bool = False) -> None:
        super().__init__(id=name)
        self._keys: list[str] = []
        self._shown: list[Text] = []
        self._from_end = from_end

    def compose(self) -> ComposeResult:
        """Its parts."""
        yield Static(classes="heading", markup=False)
        yield Static(classes="names", markup=False)
        yield Static(classes="empty", markup=False)
        yield OptionList()

    @property
    def rows(self) -> OptionList:
        """The rows."""
        return self.query_one(OptionList)

    @property
    def chosen_key(self) -> str | None:
        """The key of the row that is chosen; None where there is none."""
        at = self.rows.highlighted
        return None if at is None or at >= len(self._keys) else self._keys[at]

    def show(
        self,
        heading: str,
        columns: Sequence[Column[Shown]],
        rows: Sequence[tuple[str, Shown, str]],
        empty: Sequence[str],
    ) -> None:
        """Show rows, each with its key and its style; where there are none, why."""
        cells_wide = self.app.size.width
        width = cells_wide - SCROLLBAR_CELLS
        there = fitting(columns, cells_wide)
        self._put(".heading", heading[:width])
        self._put(".names", cells.heading(there, cells_wide)[:width])
        said = self.query_one(".empty", Static)
        said.display = not rows
        self._put(".empty", "\n".join(empty) if not rows else "")
        drawn = [
            Text(" ".join(each.cell(of, cells_wide) for each in there)[:width], style)
            for _, of, style in rows[:ROWS_MAX]
        ]
        self._draw([key for key, _, _ in rows[:ROWS_MAX]], drawn)

    def _put(self, part: str, text: str) -> None:
        self.query_one(part, Static).update(Text(text))

    def _draw(self, keys: list[str], drawn: list[Text]) -> None:
        """Change the lines that differ: a terminal at the end of a long way gets no more."""
        rows, before = self.rows, self.chosen_key
        for at in range(len(self._shown) - 1, len(drawn) - 1, -1):
            rows.remove_option_at_index(at)
        for at, text in enumerate(drawn):
            if at >= len(self._shown):
                rows.add_option(Option(text))
            elif text != self._shown[at] or text.style != self._shown[at].style:
                rows.replace_option_prompt_at_index(at, text)
        self._keys, self._shown = keys, drawn
        if before in keys:
            rows.highlighted = keys.index(before)
        elif keys and rows.highlighted is None:
            rows.highlighted = len(keys) - 1 if self._from_end else 0

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        if event.option_index < len(self._keys):
            self.post_message(self.Chosen(self, self._keys[event.option_index]))


# --- the requests of one group --------------------------------------------------------------------


class Details(Screen[None]):
    """The requests of one session, process or the like, in order, with what they came to."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,left", "app.pop_screen", "back"),
    ]

    def __init__(self, by: str, group: Group) -> None:
        super().__init__()
        self.by, self.group = by, group
        self._earlier: list[Done] | None = None

    def compose(self) -> ComposeResult:
        """Its parts."""
        yield Static(id="head", markup=False)
        yield Table("steps", from_end=True)
        yield Static(id="keys", markup=False)

    def on_mount(self) -> None:
        """Show it, and read what is older than what the screen holds."""
        self.query_one("#keys", Static).update(Text("Esc back   ↑↓ scroll   q back"))
        self.query_one(Table).rows.focus()
        self.show(self.top.board)
        if self.by == "session" and self.group.asked.session is not None:
            threading.Thread(target=self._read, daemon=True).start()

    @property
    def top(self) -> Top:
        """The program."""
        app = self.app
        assert isinstance(app, Top)
        return app

    def _read(self) -> None:
        session = self.group.asked.session
        assert session is not None
        try:
            events = self.top.source.session(session)
        except Exception:  # what the screen holds stays; the line above says what is wrong
            return
        self._earlier = list(map(Done.of, events))

    def show(self, board: Board) -> None:
        """Draw."""
        done, flights = board.of_group(self.by, self.group.key, 0)
        if self._earlier is not None:
            known = {each.id for each in done}
            done = [*(each for each in self._earlier if each.id not in known), *done]
            done.sort(key=lambda each: each.ended_ns)
        rows = [(step.either.id, step, _step_style(step)) for step in cells.steps(done, flights)]
        asked = self.group.asked
        named = [asked.client, asked.project, asked.process and cells.who(asked)]
        title = f"{self.by} {shown(self.group.key)}: {', '.join(shown(n) for n in named if n)}"
        self.query_one("#head", Static).update(
            Text(f"{title}\n{cells.summary_text(done, flights)}")
        )
        self.query_one(Table).show("Requests in order", STEP_COLUMNS, rows[-ROWS_MAX:], [])


def _step_style(step: cells.Step) -> str:
    if step.done is None:
        return "bold"
    return "red" if step.done.failed else ""


class Help(ModalScreen[None]):
    """The keys."""

    DEFAULT_CSS = """
    Help { align: center middle; background: ansi_default; }
    Help Static { width: auto; height: auto; border: solid ansi_default; padding: 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,question_mark,enter", "dismiss")]

    def compose(self) -> ComposeResult:
        """Its parts."""
        yield Static(Text(HELP), markup=False)


HELP = """\
g      group by session, process, project, model, client, agent
s / r  sort by cost, rate, requests, output, latest, name / reverse
p      period: 5 minutes, hour, day
/      filter by any name (Esc clears it)
Enter  the requests of the chosen session or group (Esc: back)
Tab    the other table       ↑↓ PgUp PgDn  choose
Space  hold still and go on
q      quit

~  an estimate: what the provider has not stated yet
+  something in the sum has no price
IN is uncached; CACHED was read from the cache; NOW is in flight
"""


# --- the whole ------------------------------------------------------------------------------------


class Top(App[str]):
    """The program; its result is why it failed, None where the user ended it."""

    CSS = """
    Screen { background: ansi_default; color: ansi_default; layers: base; }
    #head { height: auto; }
    #flights { height: auto; max-height: 40%; }
    #flights OptionList { height: auto; max-height: 100%; }
    #filter { display: none; height: 1; border: none; padding: 0; background: ansi_default; }
    #filter:focus { border: none; }
    #keys { height: 1; text-style: reverse; }
    """
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", priority=False),
        Binding("ctrl+c,ctrl+q", "quit", priority=True),
        Binding("g", "group"),
        Binding("s", "sort"),
        Binding("r", "reverse"),
        Binding("p", "period"),
        Binding("slash", "filter"),
        Binding("escape", "clear"),
        Binding("space", "hold"),
        Binding("question_mark,h", "help"),
        Binding("ctrl+z", "suspend_process"),
    ]

    def __init__(self, source: Source, looks: bool = True) -> None:
        super().__init__(ansi_color=True)
        self.source = source
        self.board = Board()
        self._looks = looks
        self._looking: Looking | None = None
        self._update: Update | None = None
        self._by, self._sort, self._period = GROUPINGS[0], next(iter(SORTS)), "hour"
        self._reversed = self._held = self._is_there = False
        self._wanted = ""

    class Looked(Message):
        """The source was read."""

        def __init__(self, update: Update) -> None:
            super().__init__()
            self.update = update

    def compose(self) -> ComposeResult:
        """Its parts."""
        yield Static(id="head", markup=False)
        yield Table("flights")
        yield Table("groups")
        yield Input(id="filter", placeholder="filter: part of any name; Enter keeps it, Esc clears")
        yield Static(id="keys", markup=False)

    def on_mount(self) -> None:
        """Begin to look."""
        self.query_one("#groups", Table).rows.focus()
        self._is_there = True
        self._draw()
        if self._looks:
            self._looking = Looking(
                self.source,
                lambda update: self.post_message(self.Looked(update)),
                lambda why: self.call_from_thread(self.exit, why, 1),
            )
            self._looking.start()

    def on_unmount(self) -> None:
        """Stop looking."""
        if self._looking is not None:
            self._looking.stop()

    def on_resize(self) -> None:
        """Draw for the new width."""
        self._draw()

    @on(Looked)
    def _looked(self, message: Looked) -> None:
        self.take(message.update)

    def take(self, update: Update) -> None:
        """Take what was read, and draw it unless the user has it held."""
        try:
            self.board.ended(update.events)
            self.board.flights, self.board.more = update.flights, update.more
            self._update = update
            if not self._held:
                self._draw()
        except Exception as error:  # in one line, and not as a page of code
            self.exit(f"{type(error).__name__}: {error}", 1)

    # --- keys

    def action_group(self) -> None:
        """Group by the next thing."""
        self._by = _next(GROUPINGS, self._by)
        self._draw()

    def action_sort(self) -> None:
        """Sort by the next thing."""
        self._sort = _next(tuple(SORTS), self._sort)
        self._draw()

    def action_reverse(self) -> None:
        """Turn the order round."""
        self._reversed = not self._reversed
        self._draw()

    def action_period(self) -> None:
        """Take the next period."""
        self._period = _next(tuple(PERIODS), self._period)
        self._draw()

    def action_hold(self) -> None:
        """Hold still, or go on."""
        self._held = not self._held
        self._draw()

    def action_help(self) -> None:
        """Show the keys."""
        self.push_screen(Help())

    def action_filter(self) -> None:
        """Let the user type a filter."""
        typed = self.query_one("#filter", Input)
        typed.display = True
        typed.focus()

    def action_clear(self) -> None:
        """Filter no longer."""
        typed = self.query_one("#filter", Input)
        typed.value = self._wanted = ""
        self._end_filter()

    @on(Input.Changed, "#filter")
    def _typed(self, event: Input.Changed) -> None:
        self._wanted = event.value.strip()
        self._draw()

    @on(Input.Submitted, "#filter")
    def _end_filter(self) -> None:
        self.query_one("#filter", Input).display = False
        self.query_one("#groups", Table).rows.focus()
        self._draw()

    @on(Table.Chosen)
    def _chosen(self, event: Table.Chosen) -> None:
        """Show the requests of the chosen group, or of the chosen request's session."""
        by = self._by
        if event.table.id == "flights":
            flight = next((each for each in self.board.flights if each.id == event.key), None)
            if flight is None:
                return
            by, key, asked = "session", key_of("session", flight.asked), flight.asked
            self.push_screen(Details(by, Group(key, asked)))
            return
        group = next((each for each in self._groups() if each.key == event.key), None)
        if group is not None:
            self.push_screen(Details(by, group))

    # --- drawing

    def _groups(self) -> list[Group]:
        now_ns = self._update.at_ns if self._update else time.time_ns()
        return self.board.groups(
            now_ns, self._by, self._period, self._sort, self._reversed, self._wanted
        )

    def _draw(self) -> None:
        if not self._is_there:
            return
        main = self.screen_stack[0]
        update = self._update
        if update is None:
            main.query_one("#head", Static).update(Text("reading what was metered …"))
            return
        main.query_one("#head", Static).update(Text("\n".join(self._head(update))))
        main.query_one("#keys", Static).update(Text(self._keys()))
        self._draw_flights(main.query_one("#flights", Table), update)
        self._draw_groups(main.query_one("#groups", Table), update)
        if isinstance(self.screen, Details) and not self._held:
            self.screen.show(self.board)

    def _draw_flights(self, table: Table, update: Update) -> None:
        flights = self.board.flying(self._wanted)
        heading = f"In flight ({len(flights):,})"
        if update.more:
            heading += f" and {update.more:,} more"
        rows = [(each.id, each, _flight_style(each)) for each in flights]
        table.show(
            heading, FLIGHT_COLUMNS, rows, cells.empty_flight_text(update.meters, self._wanted)
        )

    def _draw_groups(self, table: Table, update: Update) -> None:
        groups = self._groups()
        order = f"by {self._sort}{', reversed' if self._reversed else ''}"
        heading = f"Each {self._by}, last {self._period}, {order} ({len(groups):,})"
        if self._wanted:
            heading += f", with {shown(self._wanted)!r}"
        latest = self.board.done[-1] if self.board.done else None
        empty = cells.empty_groups_text(
            self._period, latest, update.at_ns, self._wanted, update.is_known
        )
        rows = [(each.key, each, "bold" if each.flying.requests else "") for each in groups]
        table.show(heading, GROUP_COLUMNS, rows, empty)

    def _head(self, update: Update) -> list[str]:
        now_ns = update.at_ns
        today_ns = start_of(day_of(now_ns))
        today = self.board.begun_since(today_ns, self._wanted)
        partly = self.board.is_full and self.board.done[0].ended_ns > today_ns
        minute = self.board.since(now_ns - 60 * 10**9, self._wanted)
        flying = self.board.flying(self._wanted)
        clock = time.strftime("%H:%M:%S", time.localtime(now_ns // 10**9))
        held = "   HELD: Space goes on" if self._held else ""
        return [
            f"{clock}  {cells.meters_text(update.meters)}   "
            f"{cells.today_text(total(today), partly, update.is_known)}{held}",
            cells.rates_text(total(minute), total(flying), update.meters, update.is_known),
            *(cells.plan_text(each, len(update.plans) > 1) for each in update.plans),
            *(cells.budget_text(each) for each in update.budgets),
            *([f"trouble: {shown(update.trouble, 300)}"] if update.trouble else []),
        ]

    def _keys(self) -> str:
        return "g group  s sort  r reverse  p period  / filter  Enter details  ? help  q quit"


def _next(values: Sequence[str], now: str) -> str:
    return values[(values.index(now) + 1) % len(values)]


def _flight_style(flight: Flight) -> str:
    return "" if flight.answering else "dim"
