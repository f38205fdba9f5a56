"""Which exchange a sighting is of: one that is known by its id, or another of the same id.

An exchange has the id that its provider gives it (`providers/reading/draft.py`). Two sightings of
one id are of one exchange unless something contradicts it: another request id or request, another
second of the server's, another usage, another time, another request of one connection. The first
exchange of an id keeps it, and so do all that were ever alone with theirs; each further one gets an
id of its own, made of the shared one and of what tells it apart. A meter decides so for what it
saw (`Identities`), the store again for all (`Group`), as sources see different exchanges first.
No I/O; times come with the data.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from halton_meter.model import Exchange, Source, Traits, UsageEvent, event_id

# Letters of `Traits.told`.
HOST, KEY, LINE, USAGE, CACHED = "h", "k", "l", "u", "c"
REQUEST_IDS = "01234567"
DATE = "d"
# d: the second in which the server answered; s: the status; p: the request's beginning; q: all of
# it. Each is the same for every source that saw it.
_ASKED = ("p", "q")
_COMPARED = (*REQUEST_IDS, DATE, "s", *_ASKED, KEY)
_VERSION_CHARACTERS = 4  # of USAGE: which version of the program counted
# A status from here on may be an intermediary's own.
SERVED = 500

# Two sightings of one exchange overlap: who passes it on hears it later and answers it earlier.
# Their clocks are one machine's, read at slightly different points.
APART_NS = 50_000_000
# Where the server's own second is the same in both, a clock that was set meanwhile is no reason.
APART_DATED_NS = 60_000_000_000
# The flag of an event whose id the provider gave to another request as well.
ID_REPEATED = "response_id_repeated"
# Of a group, the entries next in time that are compared with a sighting; and those that nothing
# but their order tells from it.
COMPARED_MAX = 64
ALIKE_MAX = 1024


@dataclass(slots=True)
class Entry:
    """One exchange of a group; `seen` says where a meter has seen it, by source."""

    event_id: str
    traits: Traits
    seen: dict[Source, Seen] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Seen:
    """Where a source saw an exchange, in words that only one meter has for it."""

    connection: str
    exchange: str
    pid: int | None
    started_ns: int
    ended_ns: int
    from_content: bool

    @classmethod
    def of(cls, usage: UsageEvent, exchange: Exchange) -> Seen:
        """Of an event of an exchange."""
        process = exchange.connection.process
        return cls(
            exchange.connection.id,
            exchange.id,
            None if process is None else process.pid,
            exchange.started_ns,
            exchange.ended_ns,
            usage.id_from_content,
        )


def contradict(one: Traits, other: Traits, apart_dated_ns: int = APART_DATED_NS) -> bool:
    """Whether two sightings of one id cannot be of one exchange; equal `nth` assumed."""
    if one.told == other.told:  # the same as below, and what most that are compared are
        again = one.by_id or other.by_id or KEY in one.told or CACHED in one.told
        return not again and _apart(one, other, apart_dated_ns)
    if one.by_id or other.by_id:  # what the id names is read back, at any time
        return _differ(one, other, LINE)
    if _differ(one, other, HOST):  # a gateway rewrites what it passes on, within its own times
        return _usage_differs(one, other) or _apart(one, other, 0)
    if _is_sent_again(one, other):
        return _usage_differs(one, other) or any(_differ(one, other, each) for each in _ASKED)
    for letter in _COMPARED:
        if _differ(one, other, letter):
            return True
    if _usage_differs(one, other):
        return True
    return _apart(one, other, apart_dated_ns)


def asked_alike(one: Traits, other: Traits) -> bool:
    """Whether two sightings that share no id are of one request, of those that began together."""
    return _agree(one, other, _ASKED[0]) and not contradict(one, other)


def _differ(one: Traits, other: Traits, letter: str) -> bool:
    mine, its = one.told.get(letter), other.told.get(letter)
    return mine is not None and its is not None and mine != its


def _is_sent_again(one: Traits, other: Traits) -> bool:
    """Whether a second answer to one request would be the first one's, kept, and billed once."""
    return _agree(one, other, KEY) or CACHED in one.told or CACHED in other.told


def _agree(one: Traits, other: Traits, letter: str) -> bool:
    mine = one.told.get(letter)
    return mine is not None and mine == other.told.get(letter)


def _usage_differs(one: Traits, other: Traits) -> bool:
    mine, its = one.told.get(USAGE), other.told.get(USAGE)
    if mine is None or its is None or mine[:_VERSION_CHARACTERS] != its[:_VERSION_CHARACTERS]:
        return False
    return mine != its


def _apart(one: Traits, other: Traits, apart_dated_ns: int) -> bool:
    """Whether they are of different times by one clock."""
    if one.live is not other.live or _halves(one, other):
        return False
    slack = max(APART_NS, apart_dated_ns) if _agree(one, other, DATE) else APART_NS
    return max(one.started_ns - other.ended_ns, other.started_ns - one.ended_ns) > slack


def _halves(one: Traits, other: Traits) -> bool:
    """Whether they may be the beginning and the end of what was lost sight of between."""
    return (one.joined and not other.whole) or (other.joined and not one.whole)


def more_telling(one: Traits, other: Traits) -> Traits:
    """Of two sightings of one exchange the traits that contradict others the more surely."""
    again, again_too = (each.by_id or CACHED in each.told for each in (one, other))
    if again is not again_too:
        return other if again else one
    return other if len(other.told) > len(one.told) else one


_Key = tuple[tuple[str, str], ...]


def _key(traits: Traits) -> _Key:
    return tuple(sorted(traits.told.items()))


class _InTime:
    """Entries in the order of their beginnings."""

    __slots__ = ("entries", "times")

    def __init__(self) -> None:
        self.times: list[int] = []
        self.entries: list[Entry] = []

    def add(self, entry: Entry) -> None:
        at = bisect.bisect_right(self.times, entry.traits.started_ns)
        self.times.insert(at, entry.traits.started_ns)
        self.entries.insert(at, entry)

    def remove(self, entry: Entry) -> None:
        at = bisect.bisect_left(self.times, entry.traits.started_ns)
        while self.entries[at] is not entry:
            at += 1
        del self.times[at], self.entries[at]

    def near(self, at_ns: int, most: int) -> Iterator[Entry]:
        """Up to `most` of them, the nearest in time first."""
        after = bisect.bisect_left(self.times, at_ns)
        before = after - 1
        while most > 0 and (before >= 0 or after < len(self.times)):
            gone = at_ns - self.times[before] if before >= 0 else math.inf
            comes = self.times[after] - at_ns if after < len(self.times) else math.inf
            if comes <= gone:
                yield self.entries[after]
                after += 1
            else:
                yield self.entries[before]
                before -= 1
            most -= 1


class Group:
    """The exchanges of one id, in the order in which they became known."""

    __slots__ = ("_alike", "_all", "_by_id", "_shared_id")

    def __init__(self, shared_id: str, entries: Iterable[Entry] = ()) -> None:
        self._shared_id = shared_id
        self._all = _InTime()
        self._alike: dict[_Key, _InTime] = {}
        self._by_id: dict[str, Entry] = {}
        for entry in entries:
            self.add(entry)

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._by_id.values())

    def add(self, entry: Entry) -> None:
        """Take an exchange in."""
        self._by_id[entry.event_id] = entry
        self._all.add(entry)
        self._alike.setdefault(_key(entry.traits), _InTime()).add(entry)

    def remove(self, entry: Entry) -> None:
        """Forget an exchange."""
        del self._by_id[entry.event_id]
        self._all.remove(entry)
        key = _key(entry.traits)
        self._alike[key].remove(entry)
        if not self._alike[key].entries:
            del self._alike[key]

    def learn(self, entry: Entry, traits: Traits) -> bool:
        """Keep the traits of another sighting of an exchange if they tell more; whether they do."""
        better = more_telling(entry.traits, traits)
        if better is entry.traits:
            return False
        self.remove(entry)
        entry.traits = replace(better, nth=entry.traits.nth)
        self.add(entry)
        return True

    def find(self, traits: Traits, other: Callable[[Entry], bool] | None = None) -> Entry | None:
        """The exchange that a sighting is of; None for one that is not known.

        `other` is a meter's: it says of an exchange that the sighting is of another one, whatever
        the traits say, and one clock and one order hold for all that a meter sees. Without it
        `nth` tells apart what nothing else does.
        """
        named = self._by_id.get(self._shared_id)
        if traits.by_id and named is not None and not contradict(named.traits, traits):
            return named
        dated_ns = APART_DATED_NS if other is None else 0
        found: tuple[int, int] | None = None
        best: Entry | None = None
        for entry in self._near(traits):
            known = entry.traits
            if other is not None and other(entry):
                continue
            if other is None and known.nth != traits.nth and known.told == traits.told:
                continue
            if contradict(known, traits, dated_ns):
                continue
            common = sum(known.told.get(letter) == told for letter, told in traits.told.items())
            order = (-common, abs(known.started_ns - traits.started_ns))
            if found is None or order < found:
                found, best = order, entry
        return best

    def _near(self, traits: Traits) -> Iterator[Entry]:
        """Those that may be of one exchange with a sighting: alike, or next to it in time."""
        if len(self) <= COMPARED_MAX:
            yield from self
            return
        alike = self._alike.get(_key(traits))
        if alike is not None:
            yield from alike.near(traits.started_ns, COMPARED_MAX)
        yield from self._all.near(traits.started_ns, COMPARED_MAX)

    def nth(self, traits: Traits) -> int:
        """The lowest number that tells an exchange from those that nothing else tells it from."""
        alike = self._alike.get(_key(traits))
        if alike is None:
            return 1
        near = alike.near(traits.started_ns, ALIKE_MAX)
        taken = {each.traits.nth for each in near if not contradict(each.traits, traits)}
        return next(number for number in range(1, len(taken) + 2) if number not in taken)

    def new_id(self, traits: Traits, from_content: bool = False) -> str:
        """An id for an exchange that is not known: the shared one where nobody has it."""
        if self._shared_id not in self._by_id:
            return self._shared_id
        if from_content:
            return self._free(len(self) + 1, "repeat", self._shared_id)
        # Without the usage, which another version of the program may read otherwise.
        told = ",".join(letter + digest for letter, digest in _key(traits) if letter != USAGE)
        alike = self._alike.get(_key(traits))
        return self._free(len(alike.times) + 1 if alike else 1, "shared", self._shared_id, told)

    def _free(self, number: int, *names: str) -> str:
        while (found := event_id(*names, str(number))) in self._by_id:
            number += 1
        return found


class Identities:
    """Tells the exchanges of one meter apart, the latest `events_max` of them.

    `forget` is told the id of each that has to go: a later event may be given it again, and the
    store then tells the two apart.
    """

    def __init__(self, events_max: int, forget: Callable[[str], None]) -> None:
        self._events_max = events_max
        self._forget = forget
        self._groups: dict[str, Group] = {}
        self._order: deque[tuple[str, Entry]] = deque()

    def __len__(self) -> int:
        return len(self._order)

    def settle(self, usage: UsageEvent, exchange: Exchange) -> UsageEvent:
        """The event with the id of its exchange."""
        traits = usage.traits
        if traits is None:
            return usage
        source, seen = usage.source, Seen.of(usage, exchange)
        group = self._groups.get(usage.id)
        if group is None:
            group = self._groups[usage.id] = Group(usage.id)
        else:
            told = traits
            entry = group.find(told, lambda each: _is_another(each, source, seen, told))
            if entry is not None:
                group.learn(entry, traits)
                entry.seen[source] = seen
                return _renamed(usage, entry.event_id, entry.traits.nth)
        if (nth := group.nth(traits)) != 1:
            traits = replace(traits, nth=nth)
        entry = Entry(group.new_id(traits, usage.id_from_content), traits, {source: seen})
        group.add(entry)
        self._order.append((usage.id, entry))
        if len(self._order) > self._events_max:
            self._let_go()
        return _renamed(usage, entry.event_id, traits.nth)

    def _let_go(self) -> None:
        shared_id, entry = self._order.popleft()
        group = self._groups[shared_id]
        group.remove(entry)
        if not len(group):
            del self._groups[shared_id]
        self._forget(entry.event_id)


def _is_another(entry: Entry, source: Source, seen: Seen, traits: Traits) -> bool:
    """Whether one source saw both, as two requests of one client or one after the other."""
    other = entry.seen.get(source)
    if other is None:
        return False
    if seen.from_content:  # made of what equal calls have in common: each source counts them
        return True
    known = entry.traits
    if other.exchange == seen.exchange or known.by_id or traits.by_id:
        return False
    if _differ(known, traits, HOST) or _is_sent_again(known, traits) or _halves(known, traits):
        return False
    if other.connection == seen.connection or (other.pid is not None and other.pid == seen.pid):
        return True
    # Of one that an intermediary passes on, the times of both connections overlap.
    return max(seen.started_ns - other.ended_ns, other.started_ns - seen.ended_ns) > 0


def _renamed(usage: UsageEvent, name: str, nth: int) -> UsageEvent:
    traits = usage.traits
    assert traits is not None
    if nth != traits.nth:
        traits = replace(traits, nth=nth)
    elif name == usage.id and not usage.id_from_content:
        return usage
    shared = None if name == usage.id else usage.id
    flags = usage.flags
    if shared is not None and not usage.id_from_content:
        flags = tuple(sorted({*flags, ID_REPEATED}))
    return replace(
        usage, id=name, shared_id=shared, traits=traits, flags=flags, id_from_content=False
    )
