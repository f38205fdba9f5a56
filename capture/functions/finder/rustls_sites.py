"""Recognise rustls' two virtual calls in a function, and where probes see what they are given.

Both calls have one shape, in terms of a base B that one register holds:

    encrypt(result, [B + e], message, seq)    with [B + e + 0x28] := seq + 1 before it
    decrypt(result, [B + d], message, seq)    with [B + d + 0x20] := seq + 1 after it

each through slot 3 of the vtable at [B + e + 8] or [B + d + 8] (behind drop, size and alignment).
What is said of registers holds on every path to the call (`symbolic.py`, `paths.py`); a probe's
place is taken only where it holds for each time that the probe is hit: from a branch before
`encrypt`, every way must lead to the call or to a panic, and nothing else may join it.
This file knows nothing of files and of which functions are looked at (`rustls.py`).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from capture.functions.finder.effects import (
    X86,
    Abi,
    Call,
    Compare,
    Effect,
    Memory,
    Put,
    Register,
    Store,
)
from capture.functions.finder.instruction_sets import Flow
from capture.functions.finder.paths import Paths
from capture.functions.finder.symbolic import CONSTANT, Place, State, Value
from capture.functions.rustls_layer import DISPLACEMENT_MAX, Kind, Pointer

SLOT = 0x18
SEND_NUMBER, RECEIVE_NUMBER = 0x28, 0x20
"""How far behind the box's pointer the number of the next record is, in the layer."""
MESSAGE_BYTES, RESULT_BYTES = 0x28, 0x20
BACK_MAX = 64
"""Instructions before a call that are looked at."""
AFTER_MAX = 160
BRANCH_MAX = 10
"""Instructions behind `decrypt` within which a branch is worth more than the call's own return."""
TAG_MAX = 255
_CALLS = frozenset(("call", "blr"))
_CALLEE = re.compile(r"(?:qword ptr )?\[\w+ \+ 0x18\]|r\w+|x\d+")


@dataclass(frozen=True, slots=True)
class SendPlace:
    """Where a probe sees what `encrypt` is given; as `Send`, by address."""

    address: int
    kind: Kind
    layer: Pointer
    message: Pointer
    counted: bool


@dataclass(frozen=True, slots=True)
class ReceivePlace:
    """Where probes see what `decrypt` is given, and what it returns."""

    address: int
    kind: Kind
    layer: Pointer
    after: int
    after_kind: Kind
    result: Pointer


@dataclass(frozen=True, slots=True)
class Site:
    """One of the two calls. `box` is the offset of its pointer; `place` None: none is certain.

    `ok_tag`, of `decrypt`, is byte 0 of the result where the record's number is counted; None: it
    is not certain. `in_frame`: the layer lies in the frame of the function.
    """

    call: int
    sends: bool
    box: int
    in_frame: bool
    place: SendPlace | ReceivePlace | None
    ok_tag: int | None = None


@dataclass(frozen=True, slots=True)
class _Shape:
    """What makes a call one of the two, at the call: see the file's head.

    `is_read`: the number is certainly the layer's own.
    """

    sends: bool
    layer: Value
    box: int
    number: Value
    is_read: bool
    message: Value
    result: Value

    @property
    def number_place(self) -> Place:
        return Place(self.layer.root, self.box + (SEND_NUMBER if self.sends else RECEIVE_NUMBER))


def sites_in(paths: Paths, abi: Abi, panics: Collection[int]) -> Iterator[Site]:
    """The calls of either kind. `panics`: addresses that only a panic loads."""
    frame_pointer = paths.frame_pointer
    for number, line in enumerate(paths.lines):
        if line[2] in _CALLS and _may_be(paths, number, abi):
            chain = _chain(paths, number)
            states = _states(paths, chain, State(abi, frame_pointer))
            shape = _shape(paths, number, states[-1])
            if shape is None or any(state.register(abi.stack).plus > 0 for state in states):
                continue  # above the frame lies the caller's, with what is sent
            look = _Look(paths, abi, frozenset(panics), number, chain, states, shape)
            site = look.send() if shape.sends else look.receive()
            if site is not None:
                yield site


def _may_be(paths: Paths, number: int, abi: Abi) -> bool:
    """Whether a line may be one of the calls: what comes before it is read as text only."""
    if not _CALLEE.fullmatch(paths.lines[number][3]):
        return False
    for back in range(number - 1, max(number - BACK_MAX, -1), -1):
        _, _, name, operands = paths.lines[back]
        if paths.flow(back) in (Flow.CALL, Flow.JUMP, Flow.STOP):
            return False
        if operands.startswith(f"{abi.box}, ") or f", {abi.box}, [" in operands:
            return name in ("mov", "ldr", "ldp", "ldur")
    return False


def _chain(paths: Paths, number: int) -> list[int]:
    """The instructions that certainly come before one, in order, and itself."""
    chain = [number]
    while len(chain) < BACK_MAX:
        before = paths.predecessors(chain[-1])
        if before is None or len(before) != 1 or before[0] in chain:
            break
        chain.append(before[0])
    return chain[::-1]


def _states(paths: Paths, chain: list[int], state: State) -> list[State]:
    """What is known before each instruction of a chain."""
    states = [state]
    for number in chain[:-1]:
        state = state.copy()
        state.apply(paths.effects(number))
        states.append(state)
    return states


def _shape(paths: Paths, number: int, state: State) -> _Shape | None:
    """What a call is, by what is known before it; None when it is neither of the two."""
    abi = state.abi
    if not state.is_in_frame(state.place(abi.stack, 0)):
        return None  # something strange was done to the stack pointer
    callee = next((e.callee for e in paths.effects(number) if isinstance(e, Call)), None)
    box_at = state.read_from(state.register(abi.box))
    slot = _read_from(state, callee)
    if box_at is None or slot is None or slot.at != SLOT:
        return None
    vtable_at = state.read_from(Value(slot.root))
    if vtable_at != Place(box_at.root, box_at.at + 8) or abs(box_at.at) > DISPLACEMENT_MAX:
        return None
    number_value = state.register(abi.sequence)
    if number_value.root == CONSTANT:
        return None
    following = number_value._replace(plus=number_value.plus + 1)
    send_at = Place(box_at.root, box_at.at + SEND_NUMBER)
    receive_at = Place(box_at.root, box_at.at + RECEIVE_NUMBER)
    sends = state.known(send_at) == following
    number_at = state.read_from(number_value)
    is_read = number_at == (send_at if sends else receive_at)
    if not sends:
        is_read = is_read and state.known(receive_at) == number_value
        if not is_read and not _is_kept(paths, state, number_at, receive_at.at):
            return None
    message, result = state.register(abi.message), state.register(abi.result)
    stack = state.register(abi.stack)
    if any(
        each.root == stack.root and each.plus < stack.plus
        for each in (Value(*box_at), message, result)
    ):
        return None  # below the frame: the call itself writes there
    return _Shape(sends, Value(box_at.root), box_at.at, number_value, is_read, message, result)


def _is_kept(paths: Paths, state: State, place: Place | None, number_at: int) -> bool:
    """Whether the number was read into the frame before the first record, to be kept there."""
    abi = state.abi
    if place is None or not state.is_in_frame(place):
        return False
    at = place.at - state.register(abi.stack).plus
    return any(
        paths.may_be_loaded(number, effect.source.name, number_at, abi)
        for number in paths.stores_to_frame(at)
        for effect in paths.effects(number)
        if isinstance(effect, Store)
        and (effect.base, effect.at) == (abi.stack, at)
        and isinstance(effect.source, Register)
        and effect.source.name is not None
    )


def _read_from(state: State, callee: Register | Memory | None) -> Place | None:
    """Where a call's target is read from."""
    if isinstance(callee, Memory):
        return state.place(callee.base, callee.at)
    return None if callee is None else state.read_from(state.value(callee))


# --- places for probes --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Look:
    """The search for places around one call that has the shape."""

    paths: Paths
    abi: Abi
    panics: frozenset[int]
    call: int
    chain: list[int]
    states: list[State]
    shape: _Shape

    def send(self) -> Site:
        """The call of `encrypt`: branches first, the nearest first."""
        place = next(self._branches_before(), None) or next(self._chained(), None)
        return self._site(place)

    def _site(self, place: SendPlace | ReceivePlace | None, ok_tag: int | None = None) -> Site:
        call = self.paths.lines[self.call][0]
        in_frame = self.states[-1].is_in_frame(Place(*self.shape.layer))
        return Site(call, self.shape.sends, self.shape.box, in_frame, place, ok_tag)

    # --- encrypt ----------------------------------------------------------------------------

    def _branches_before(self) -> Iterator[SendPlace]:
        for number in range(self.call - 1, max(self.call - BACK_MAX, -1), -1):
            if self.paths.flow(number) is Flow.BRANCH:
                before = State(self.abi, self.paths.frame_pointer)
                before = _states(self.paths, _chain(self.paths, number), before)[-1]
                if (place := self._from_branch(number, before)) is not None:
                    yield place

    def _from_branch(self, branch: int, before: State) -> SendPlace | None:
        """A probe on a branch, if each way from there is the call's or a panic's."""
        ways = _ways(self.paths, branch, self.call, before, self.panics)
        if not ways:
            return None
        inside = {number for way in ways for number in way.numbers}
        for number in inside - {branch}:
            entries = self.paths.predecessors(number)
            if entries is None or not set(entries) <= inside:
                return None
        places = {self._send_place(branch, Kind.BRANCH, before, way) for way in ways}
        return places.pop() if len(places) == 1 else None

    def _send_place(self, number: int, kind: Kind, before: State, way: _Way) -> SendPlace | None:
        """What a probe may be told, if a way from it to the call leaves all of it as it is."""
        shape = _shape(self.paths, self.call, way.state)
        if shape is None or not shape.sends or shape.box != self.shape.box:
            return None
        boxes = Place(shape.layer.root, shape.box)
        message_at = Place(*shape.message)
        for place, size in way.stores:
            if place is None or _overlap(place, size, message_at, MESSAGE_BYTES):
                return None
            if _overlap(place, size, boxes, SEND_NUMBER):
                return None
        layer = _pointer(before, shape.layer)
        message = _pointer(before, shape.message)
        if layer is None or message is None:
            return None
        following = shape.number._replace(plus=shape.number.plus + 1)
        counted = before.known(shape.number_place) == following
        if not (counted or shape.is_read):
            return None
        return SendPlace(self.paths.lines[number][0], kind, layer, message, counted)

    def _chained(self) -> Iterator[SendPlace]:
        """A probe on a load from the layer, or on the call itself."""
        for kind in (Kind.LOAD, Kind.CALL):
            for position in range(len(self.chain) - 1, -1, -1):
                number, before = self.chain[position], self.states[position]
                if kind is Kind.CALL and number != self.call:
                    continue
                if kind is Kind.LOAD and not self._loads_a_box(number, before):
                    continue
                way = _Way(self.chain[position:], self.states[-1], self._stores_from(position))
                if self._calls_from(position):
                    continue
                if (place := self._send_place(number, kind, before, way)) is not None:
                    yield place

    def _loads_a_box(self, number: int, before: State) -> bool:
        for effect in self.paths.effects(number):
            if isinstance(effect, Put) and isinstance(effect.source, Memory):
                place = before.place(effect.source.base, effect.source.at)
                at = place.at - self.shape.box
                if place.root == self.shape.layer.root and at in (0, 8):
                    return True
        return False

    def _stores_from(self, position: int) -> list[tuple[Place | None, int]]:
        return [
            stored
            for number, state in zip(self.chain[position:-1], self.states[position:-1], strict=True)
            for stored in _stores(self.paths.effects(number), state)
        ]

    def _calls_from(self, position: int) -> bool:
        return any(self.paths.flow(n) is Flow.CALL for n in self.chain[position:-1])

    # --- decrypt ----------------------------------------------------------------------------

    def receive(self) -> Site | None:
        """The call of `decrypt`; None where no number is counted behind it."""
        counted, ok_tag = self._ok_tag()
        if not counted:
            return None
        before, after = self._before(), self._after()
        if before is None or after is None:
            return self._site(None, ok_tag)
        return self._site(ReceivePlace(*before, *after), ok_tag)

    def _result_in(self, state: State) -> Pointer | None:
        """Where the result is, from a register that `decrypt` leaves as it is."""
        if (found := _pointer(state, self.shape.result)) is not None:
            return found
        at = self.paths.frame_address(self.call, self.abi.result, self.abi)
        stack = state.register(self.abi.stack)
        if at is None or stack != self.states[-1].register(self.abi.stack):
            return None
        return Pointer(self.abi.numbers[self.abi.stack], at)

    def _before(self) -> tuple[int, Kind, Pointer] | None:
        """The nearest branch of the chain, else a load, else the call."""
        for kind in (Kind.BRANCH, Kind.LOAD, Kind.CALL):
            for position in range(len(self.chain) - 1, -1, -1):
                number, before = self.chain[position], self.states[position]
                if number != self.call and self.paths.flow(number) is Flow.CALL:
                    break
                fits = {
                    Kind.BRANCH: self.paths.flow(number) is Flow.BRANCH,
                    Kind.LOAD: self._loads_a_box(number, before),
                    Kind.CALL: number == self.call,
                }[kind]
                layer = _pointer(before, self.shape.layer) if fits else None
                if layer is not None:
                    return self.paths.lines[number][0], kind, layer
        return None

    def _after(self) -> tuple[int, Kind, Pointer] | None:
        """The first branch behind the call if it is near, else where the call returns to."""
        state = self.states[-1].copy()
        state.apply(self.paths.effects(self.call))
        number, returned = self.call + 1, state
        for number in range(self.call + 1, min(self.call + 1 + BRANCH_MAX, len(self.paths.lines))):
            if number > self.call + 1 and self.paths.predecessors(number) != (number - 1,):
                break
            flow = self.paths.flow(number)
            if flow is Flow.BRANCH:
                if (result := self._result_in(state)) is not None:
                    return self.paths.lines[number][0], Kind.BRANCH, result
                break
            stored = _stores(self.paths.effects(number), state)
            at = Place(*self.shape.result)
            if flow is not Flow.NEXT or any(
                place is None or _overlap(place, size, at, RESULT_BYTES) for place, size in stored
            ):
                break
            state = state.copy()
            state.apply(self.paths.effects(number))
        if self.paths.predecessors(self.call + 1) != (self.call,):
            return None
        result = self._result_in(returned)
        return None if result is None else (self.paths.lines[self.call + 1][0], Kind.AFTER, result)

    def _ok_tag(self) -> tuple[bool, int | None]:
        """Whether the record's number is counted, and what byte 0 of the result is there.

        The way there is the shortest: longer ones lead to the next record.
        """
        state = self.states[-1].copy()
        state.apply(self.paths.effects(self.call))
        ways: deque[tuple[int, State, int | None, int | None]] = deque()
        ways.append((self.call + 1, state, None, None))
        seen: set[tuple[int, int | None]] = set()
        while ways and len(seen) < AFTER_MAX:
            number, state, tag, compared = ways.popleft()
            if (number, tag) in seen:
                continue
            seen.add((number, tag))
            if self._counts(number, state):
                return True, tag
            name = self.paths.lines[number][2]
            flow = self.paths.flow(number)
            if flow in (Flow.CALL, Flow.STOP):
                continue
            effects = self.paths.effects(number)
            if compares := [each for each in effects if isinstance(each, Compare)]:
                compared = self._tag(state, compares[-1])
            elif _changes_flags(name, flow, self.abi):
                compared = None
            state = state.copy()
            state.apply(effects)
            for following in self.paths.successors(number):
                equal = _EQUAL.get(name)
                if equal is None or compared is None:
                    ways.append((following, state, tag, compared))
                    continue
                if following == number + 1:
                    equal = not equal
                if tag is None or equal is (tag == compared):  # else no way leads there
                    ways.append((following, state, compared if equal else tag, compared))
        return False, None

    def _tag(self, state: State, compare: Compare) -> int | None:
        """What the first byte of the result is compared to: it may be addressed otherwise.

        Older compilers have 8 bytes there, numbers that no length is.
        """
        other = state.value(compare.other)
        place = state.read_from(state.value(compare.source))
        if place is None or other.root != CONSTANT:
            return None
        result = Place(*self.shape.result)
        if place == result or (state.is_in_frame(place) and not state.is_in_frame(result)):
            return other.plus & TAG_MAX
        return None

    def _counts(self, number: int, state: State) -> bool:
        """Whether an instruction stores the record's number plus one into the layer."""
        following = self.shape.number._replace(plus=self.shape.number.plus + 1)
        for effect in self.paths.effects(number):
            if isinstance(effect, Store) and effect.base is not None and effect.size == 8:
                place = state.place(effect.base, effect.at)
                if place.at != self.shape.number_place.at:
                    continue
                value = state.value(effect.source)
                before = state.read_from(value._replace(plus=value.plus - 1))
                if value == following or (value.plus == 1 and before == place):
                    return True
        return False


@dataclass(frozen=True, slots=True)
class _Way:
    """A way from an instruction to the call: what it passes, stores, and what is known at last."""

    numbers: list[int]
    state: State
    stores: list[tuple[Place | None, int]]


WAYS_MAX, STEPS_MAX = 8, 200


def _ways(
    paths: Paths, branch: int, call: int, before: State, panics: frozenset[int]
) -> list[_Way]:
    """All ways from a branch to the call; none if there is one to elsewhere but a panic."""
    found: list[_Way] = []
    pending = [(_Way([], before, []), branch)]
    steps = 0
    while pending:
        way, number = pending.pop()
        steps += 1
        if number == call:
            found.append(_Way([*way.numbers, number], way.state, way.stores))
            continue
        flow = paths.flow(number)
        if number in way.numbers or steps > STEPS_MAX or len(found) > WAYS_MAX:
            return []
        effects = paths.effects(number)
        stores = [*way.stores, *_stores(effects, way.state)]
        state = way.state.copy()
        state.apply(effects)
        if _panics(effects, state, panics):
            continue
        following = list(paths.successors(number))
        if flow in (Flow.CALL, Flow.STOP) or len(following) != (2 if flow is Flow.BRANCH else 1):
            return []
        pending += [(_Way([*way.numbers, number], state, stores), each) for each in following]
    return found


_EQUAL = {"je": True, "b.eq": True, "jne": False, "b.ne": False}
_LEAVES_FLAGS = ("mov", "lea", "push", "pop", "set", "cmov", "vmov", "nop")


def _changes_flags(name: str, flow: Flow, abi: Abi) -> bool:
    """Whether an instruction other than a comparison may change what was compared."""
    if flow is not Flow.NEXT:
        return False
    if abi is X86:
        return not name.startswith(_LEAVES_FLAGS)
    return name.endswith("s") or name.startswith("cc")


def _panics(effects: tuple[Effect, ...], after: State, panics: frozenset[int]) -> bool:
    """Whether an instruction loads the source location of a panic."""
    loaded = (after.register(effect.register) for effect in effects if isinstance(effect, Put))
    return any(value.root == CONSTANT and value.plus in panics for value in loaded)


def _stores(effects: tuple[Effect, ...], state: State) -> list[tuple[Place | None, int]]:
    """Where an instruction writes, and how much."""
    return [
        (None if effect.base is None else state.place(effect.base, effect.at), effect.size)
        for effect in effects
        if isinstance(effect, Store)
    ]


def _overlap(place: Place, size: int, other: Place, length: int) -> bool:
    return place.root == other.root and place.at < other.at + length and other.at < place.at + size


def _pointer(state: State, value: Value) -> Pointer | None:
    """A register that holds a value, or one from which it is a constant away."""
    abi = state.abi
    names = (*abi.kept, abi.stack, abi.message, abi.box, *sorted(abi.volatile))
    found = [
        Pointer(abi.numbers[name], value.plus - state.register(name).plus)
        for name in names
        if state.register(name).root == value.root
    ]
    found = [each for each in found if abs(each.displacement) <= DISPLACEMENT_MAX]
    return min(found, key=lambda each: abs(each.displacement), default=None)
