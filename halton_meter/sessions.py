"""Sessions: which there were, what each cost, and how one went, request by request.

A session is what a client calls one, or a run of a client that names none (`Caller`). Sums are
those of `report.py` over the same events, so the sessions of a period, with what has no session,
add up to its report. It refuses to know how the answer is drawn (`cli/session.py`).
"""

# ruff: noqa: S608 (every name put into SQL comes from a constant of this file; values are bound)

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import pairwise
from typing import Any

from halton_meter.contract import event_json, rfc3339, usd_text
from halton_meter.model import TOKEN_NAMES, Caller, PricedEvent, Tokens, total_usd
from halton_meter.report import Figures, figures_of, sums_of, totals_of
from halton_meter.store import Reader, Selection
from halton_meter.store.schema import DAY_SUMS

# What `show` names of the sessions that a prefix may mean.
CANDIDATES_MAX = 10
# A shortened id has as many characters at least.
SHORT_CHARS_MIN = 8
_OF_PROCESS = "pid-"
LATEST = "latest"
# What orders them, and how.
ORDERS = {
    "time": ("max(at_ns)", "key DESC"),
    "cost": ("sum(list_usd)", "key DESC NULLS LAST"),
    "requests": ("count(*)", "key DESC"),
}
_CACHE_WRITES = ("cache_write_5m", "cache_write_1h", "cache_write_12h", "cache_write")
_CONTEXT = ("input", "cache_read", *_CACHE_WRITES)

# --- which there were -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Session:
    """What is known of a session as a whole, by its requests in the selection.

    `turns` and `agents` count those that the client names. `ended_ns` is when the last request
    ended that is known to have.
    """

    id: str
    source: str | None
    began_ns: int
    ended_ns: int
    clients: tuple[tuple[str, str | None], ...]
    projects: tuple[str, ...]
    branches: tuple[str, ...]
    models: tuple[str, ...]
    turns: int
    agents: int
    figures: Figures

    def json(self) -> dict[str, Any]:
        """As in `session list --json`."""
        return {
            "session_id": self.id,
            "session_source": self.source,
            "began": rfc3339(self.began_ns),
            "ended": rfc3339(self.ended_ns),
            "clients": [{"client": name, "version": version} for name, version in self.clients],
            "projects": list(self.projects),
            "git_branches": list(self.branches),
            "models": list(self.models),
            "turns": self.turns,
            "agents": self.agents,
            **self.figures.json(),
        }


@dataclass(frozen=True, slots=True)
class Sessions:
    """The sessions asked for, out of `count`; `without` sums the requests of none, `totals` all."""

    sessions: tuple[Session, ...] = ()
    count: int = 0
    without: Figures = field(default_factory=Figures)
    totals: Figures = field(default_factory=Figures)

    def json(self) -> dict[str, Any]:
        """The object that `session list --json` prints."""
        return {
            "sessions": [session.json() for session in self.sessions],
            "count": self.count,
            "without_session": self.without.json(),
            "totals": self.totals.json(),
        }


def sessions_of(
    reader: Reader, selection: Selection, order: str = "time", limit: int | None = None
) -> Sessions:
    """The sessions with requests in a selection, ordered by one of ORDERS, up to `limit`."""
    where, parameters = selection.where()
    key, rank = ORDERS[order]
    ids = reader.rows(
        f"SELECT session_id, min(at_ns), count(*) OVER (), {key} AS key FROM event "
        f"WHERE session_id IS NOT NULL AND {where} GROUP BY 1 "
        f"ORDER BY {rank}, max(at_ns) DESC, session_id"
        + ("" if limit is None else f" LIMIT {int(limit)}"),
        parameters,
    )
    found: dict[str, Session] = {}
    if ids:
        # The bound in time spares reading parts of the file that hold nothing of them.
        first_ns = min(row[1] for row in ids)
        found = _described(reader, selection, [row[0] for row in ids], int(first_ns))
    return Sessions(
        tuple(found[row[0]] for row in ids),
        int(ids[0][2]) if ids else 0,
        figures_of(
            reader.rows(
                f"SELECT {', '.join(sums_of(reader))} FROM event "
                f"WHERE session_id IS NULL AND {where}",
                parameters,
            )[0]
        ),
        totals_of(reader, selection),
    )


_DESCRIBED = (
    "any_value(session_source)",
    "min(at_ns)",
    "max(at_ns + CAST(coalesce(duration_ms, 0) * 1e6 AS BIGINT))",
    "list(DISTINCT {'name': client, 'version': client_version}) FILTER (WHERE client IS NOT NULL)",
    "list(DISTINCT project) FILTER (WHERE project IS NOT NULL)",
    "list(DISTINCT git_branch) FILTER (WHERE git_branch IS NOT NULL)",
    "list(DISTINCT model) FILTER (WHERE model IS NOT NULL)",
    "count(DISTINCT turn_id)",
    "count(DISTINCT coalesce(agent_id, agent))",
)


def _described(
    reader: Reader, selection: Selection, ids: Sequence[str], first_ns: int
) -> dict[str, Session]:
    where, parameters = selection.where()
    picked = ", ".join(("session_id", *_DESCRIBED, *DAY_SUMS.values()))
    rows = reader.rows(
        f"SELECT {picked} FROM event WHERE {where} AND at_ns >= ? "
        "AND session_id IN (SELECT unnest(?)) GROUP BY 1",
        [*parameters, first_ns, list(ids)],
    )
    return {row[0]: _session(row) for row in rows}


def _session(row: tuple[Any, ...]) -> Session:
    name, source, began, ended, clients, *lists, turns, agents = row[: len(_DESCRIBED) + 1]
    known = sorted((each["name"], each["version"]) for each in clients or ())
    projects, branches, models = (tuple(sorted(each or ())) for each in lists)
    return Session(
        id=name,
        source=source,
        began_ns=int(began),
        ended_ns=int(ended),
        clients=tuple(known),
        projects=projects,
        branches=branches,
        models=models,
        turns=int(turns),
        agents=int(agents),
        figures=figures_of(row[len(_DESCRIBED) + 1 :]),
    )


def matching(reader: Reader, text: str) -> list[str]:
    """The ids that a person may mean: that one, or those that begin so; the latest for LATEST."""
    if text == LATEST:
        rows = reader.rows(
            "SELECT session_id FROM event WHERE session_id IS NOT NULL "
            "ORDER BY at_ns DESC, id DESC LIMIT 1"
        )
    else:
        rows = reader.rows("SELECT session_id FROM event WHERE session_id = ? LIMIT 1", [text])
    if not rows and text != LATEST:
        rows = reader.rows(
            "SELECT session_id FROM event WHERE starts_with(session_id, ?) GROUP BY 1 "
            f"ORDER BY max(at_ns) DESC LIMIT {CANDIDATES_MAX + 1}",
            [text],
        )
    return [name for (name,) in rows]


def shortened(reader: Reader, ids: Iterable[str]) -> dict[str, str]:
    """Each id as far as it takes to tell it from all that are stored."""
    wanted = list(ids)
    rows = reader.rows(
        "SELECT session_id FROM (SELECT DISTINCT session_id FROM event) "
        "WHERE left(session_id, ?) IN (SELECT unnest(?))",
        [SHORT_CHARS_MIN, [name[:SHORT_CHARS_MIN] for name in wanted]],
    )
    known = sorted({*wanted, *(name for (name,) in rows)})
    needed = {name: max(SHORT_CHARS_MIN, _process_id_end(name)) for name in known}
    for one, other in pairwise(known):
        common = next(
            (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
            min(len(one), len(other)),
        )
        for name in (one, other):
            needed[name] = max(needed[name], common + 1)
    return {name: name[: needed[name]] for name in wanted}


def _process_id_end(name: str) -> int:
    """Where the process's number ends in `pid-N-…`: half of it would be another process's."""
    return name.find("-", len(_OF_PROCESS)) if name.startswith(_OF_PROCESS) else 0


# --- how one went ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """One request of a session. `turn` counts from 1; None where the client names none.

    `context_tokens` are all that went in, from a cache or not; `context_growth` is by how much
    more they are than at the request before of the same agent. `running_*` sum the known amounts
    up to and with this request.
    """

    event: PricedEvent
    turn: int | None
    agent: str | None
    context_tokens: int | None
    context_growth: int | None
    cache_share: float | None
    running_list_usd: Decimal | None
    running_marginal_usd: Decimal | None
    running_unpriced: int = 0

    def json(self) -> dict[str, Any]:
        """The event with what the session adds to it."""
        return {
            **event_json(self.event),
            "turn_number": self.turn,
            "agent_label": self.agent,
            "context_tokens": self.context_tokens,
            "context_growth": self.context_growth,
            "cache_share": self.cache_share,
            "running_list_usd": usd_text(self.running_list_usd),
            "running_marginal_usd": usd_text(self.running_marginal_usd),
            "running_unpriced_requests": self.running_unpriced,
        }


@dataclass(frozen=True, slots=True)
class Agent:
    """One agent of a session: `label` tells it from others of the same name."""

    label: str | None
    name: str | None
    id: str | None
    parent: str | None
    requests: int
    output_tokens: int | None
    list_usd: Decimal | None
    unpriced_requests: int

    def json(self) -> dict[str, Any]:
        """As in `session show --json`."""
        return {
            "agent_label": self.label,
            "agent": self.name,
            "agent_id": self.id,
            "parent_label": self.parent,
            "requests": self.requests,
            "output_tokens": self.output_tokens,
            "list_usd": usd_text(self.list_usd),
            "unpriced_requests": self.unpriced_requests,
        }


@dataclass(frozen=True, slots=True)
class Course:
    """A session's requests in order, and its agents in the order in which they appeared."""

    session: Session
    steps: tuple[Step, ...]
    agents: tuple[Agent, ...]

    def json(self) -> dict[str, Any]:
        """The object that `session show --json` prints."""
        return {
            "session": self.session.json(),
            "agents": [agent.json() for agent in self.agents],
            "requests": [step.json() for step in self.steps],
        }


def course_of(reader: Reader, session_id: str) -> Course:
    """How a session went; there must be requests of it."""
    own = Selection(session=session_id)
    first_ns = reader.rows("SELECT min(at_ns) FROM event WHERE session_id = ?", [session_id])
    found = _described(reader, own, [session_id], int(first_ns[0][0]))[session_id]
    within = Selection(found.began_ns, found.ended_ns + 1, session=session_id)
    events = list(reader.events(within))
    labels = _labels(events)
    return Course(found, tuple(_steps(events, labels)), tuple(_agents(events, labels)))


_Key = tuple[str | None, str | None]


def _key(caller: Caller) -> _Key:
    return caller.agent, caller.agent_id


def _labels(events: Iterable[PricedEvent]) -> dict[_Key, str | None]:
    """What to call each agent: its name, with a number where several have it."""
    keys = list(dict.fromkeys(_key(event.usage.caller) for event in events))
    several = Counter(name for name, _ in keys)
    numbers: Counter[str | None] = Counter()
    labels: dict[_Key, str | None] = {}
    for name, agent_id in keys:
        numbers[name] += 1
        is_one = several[name] == 1 or name is None
        labels[name, agent_id] = name if is_one else f"{name} {numbers[name]}"
    return labels


def _steps(events: Iterable[PricedEvent], labels: dict[_Key, str | None]) -> Iterable[Step]:
    turns: dict[str, int] = {}
    contexts: dict[_Key, int] = {}
    listed: Decimal | None = None
    marginal: Decimal | None = None
    unpriced = 0
    for event in events:
        caller = event.usage.caller
        turn = None
        if caller.turn_id is not None:
            turn = turns.setdefault(caller.turn_id, len(turns) + 1)
        listed = total_usd((listed, event.list_usd))
        marginal = total_usd((marginal, event.marginal_usd))
        unpriced += _is_unpriced(event)
        tokens = {name: getattr(_asked_with(event), name) for name in TOKEN_NAMES}
        context = _sum_of(tokens, _CONTEXT)
        before = contexts.get(_key(caller))
        if context is not None:
            contexts[_key(caller)] = context
        yield Step(
            event=event,
            turn=turn,
            agent=labels[_key(caller)],
            context_tokens=context,
            context_growth=None if context is None or before is None else context - before,
            cache_share=cache_share_of(tokens),
            running_list_usd=listed,
            running_marginal_usd=marginal,
            running_unpriced=unpriced,
        )


def _is_unpriced(event: PricedEvent) -> bool:
    """As `unpriced_requests` counts them; what is implausible is counted as that alone."""
    return event.list_usd is None and not event.implausible


def _asked_with(event: PricedEvent) -> Tokens:
    """The counts of the request proper: of an event of several parts, the last message's."""
    if event.implausible:
        return Tokens()
    messages = [part.tokens for part in event.usage.parts if part.label == "message"]
    return messages[-1] if messages else event.tokens


def _sum_of(tokens: Mapping[str, int | None], names: Iterable[str]) -> int | None:
    known = [count for name in names if (count := tokens[name]) is not None]
    return sum(known) if known else None


def cache_share_of(tokens: Mapping[str, int | None]) -> float | None:
    """How much of what went in came from a cache, 0 to 1, by the contract's names of tokens; None
    where that is not known.
    """
    context, read = _sum_of(tokens, _CONTEXT), tokens["cache_read"]
    if not context or read is None:
        return None
    return round(read / context, 4)


def _agents(events: Sequence[PricedEvent], labels: dict[_Key, str | None]) -> Iterable[Agent]:
    by_id = {agent_id: label for (_, agent_id), label in labels.items() if agent_id is not None}
    own: dict[_Key, list[PricedEvent]] = {}
    for event in events:
        own.setdefault(_key(event.usage.caller), []).append(event)
    for (name, agent_id), mine in own.items():
        parent = next((p for e in mine if (p := e.usage.caller.parent_agent_id)), None)
        counts = [event.tokens.output for event in mine if event.tokens.output is not None]
        yield Agent(
            label=labels[name, agent_id],
            name=name,
            id=agent_id,
            parent=by_id.get(parent) if parent is not None else None,
            requests=len(mine),
            output_tokens=sum(counts) if counts else None,
            list_usd=total_usd(event.list_usd for event in mine),
            unpriced_requests=sum(map(_is_unpriced, mine)),
        )
