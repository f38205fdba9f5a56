"""What registers and memory hold along a path, in terms of what they held where the path begins.

`State` takes the effects of one instruction after the other (`effects.py`). Two values with the
same root differ by a constant that is known; about values with different roots nothing is known.
It may be told too little and then knows less; it never knows what is not so, but for one thing: a
struct that a function was given is taken to lie elsewhere than in that function's own frame.
"""

from __future__ import annotations

from itertools import count
from typing import NamedTuple

from capture.functions.finder.effects import (
    Abi,
    Call,
    Effect,
    Insert,
    Put,
    Register,
    Source,
    Store,
)

Root = int
CONSTANT: Root = 0


class Value(NamedTuple):
    """A number of 64 bits: what its root stands for, plus a constant."""

    root: Root
    plus: int = 0


class Place(NamedTuple):
    """An address: that of a value, as it was when a path came by."""

    root: Root
    at: int


class State:
    """Registers and memory at one point of a path; `copy` for where it forks."""

    def __init__(self, abi: Abi, frame_pointer: str | None = None) -> None:
        """Where all is unknown. `frame_pointer`: a register that points into the frame."""
        self.abi = abi
        self._roots = count(CONSTANT + 1)
        self._registers = {name: self._new() for name in abi.numbers}
        self._memory: dict[tuple[Root, int, int], Value] = {}
        self._read_from: dict[Root, Place] = {}
        frame = (self.register(each).root for each in (abi.stack, frame_pointer) if each)
        self._frame = frozenset(frame)

    def copy(self) -> State:
        """Another state that knows the same; a root means the same to both, and to no other."""
        other = State.__new__(State)
        other.abi, other._roots, other._frame = self.abi, self._roots, self._frame
        other._registers, other._memory = dict(self._registers), dict(self._memory)
        other._read_from = dict(self._read_from)
        return other

    def _new(self) -> Value:
        return Value(next(self._roots))

    def register(self, name: str) -> Value:
        """What a register holds."""
        if name not in self._registers:  # such as aarch64's zero
            self._registers[name] = self._new()
        return self._registers[name]

    def memory(self, place: Place, size: int = 8) -> Value:
        """What memory holds."""
        key = (*place, size)
        if key not in self._memory:
            value = self._memory[key] = self._new()
            self._read_from[value.root] = place
        return self._memory[key]

    def known(self, place: Place, size: int = 8) -> Value | None:
        """What memory holds, None where nothing is known of it."""
        return self._memory.get((*place, size))

    def is_in_frame(self, place: Place) -> bool:
        """Whether an address is one of the function's own frame."""
        return place.root in self._frame

    def read_from(self, value: Value) -> Place | None:
        """Where a value was read, None when it was not, or was changed since."""
        return None if value.plus else self._read_from.get(value.root)

    def value(self, source: Source) -> Value:
        """What an operand is."""
        if source is None:
            return self._new()
        if isinstance(source, Register):
            if source.name is None:
                return Value(CONSTANT, source.plus)
            value = self.register(source.name)
        else:
            value = self.memory(self.place(source.base, source.at), source.size)
        return value._replace(plus=value.plus + source.plus)

    def place(self, base: str, at: int) -> Place:
        """The address that a register and a distance make."""
        value = self.register(base)
        return Place(value.root, value.plus + at)

    def apply(self, effects: tuple[Effect, ...]) -> None:
        """Go on behind an instruction."""
        for effect in effects:
            if isinstance(effect, Put):
                self._registers[effect.register] = self.value(effect.source)
            elif isinstance(effect, Insert):
                self._insert(effect)
            elif isinstance(effect, Store):
                self._store(effect)
            elif isinstance(effect, Call):
                self._call()

    def _insert(self, insert: Insert) -> None:
        value = self.register(insert.register)
        if value.root == CONSTANT:
            value = Value(CONSTANT, value.plus & ~insert.mask | insert.bits)
        else:
            value = self._new()
        self._registers[insert.register] = value

    def _store(self, store: Store) -> None:
        if store.base is None:
            self._memory.clear()
            return
        value, place = self.value(store.source), self.place(store.base, store.at)
        self._forget(place, store.size)
        self._memory[*place, store.size] = value

    def _forget(self, place: Place, size: int) -> None:
        """What a store may have overwritten: the frame and other memory do not overlap."""
        for known in list(self._memory):
            root, at, length = known
            if root == place.root:
                overwritten = at < place.at + size and place.at < at + length
            else:
                overwritten = (root in self._frame) == (place.root in self._frame)
            if overwritten:
                del self._memory[known]

    def _call(self) -> None:
        """A call may change all but the registers that it keeps and what the frame keeps."""
        for register in self.abi.volatile:
            self._registers[register] = self._new()
        for known in [known for known in self._memory if known[0] not in self._frame]:
            del self._memory[known]
