"""What reads one connection's bytes, once it is known what they are.

A connection has one engine at a time; `successor` is who reads on, set by an engine as it hands
over. `recognition.py` chooses the first one, an upgrade the next (`http1.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from halton_meter.model import Direction, Exchange
from halton_meter.wire.so_far import ExchangeSoFar


class Engine(ABC):
    """Reads both directions of a connection, in order, and gives exchanges as they finish."""

    successor: Engine | None = None

    @property
    @abstractmethod
    def is_open(self) -> bool:
        """Whether an exchange is under way, so that bytes would be missed."""

    @property
    @abstractmethod
    def held_bytes(self) -> int:
        """The memory that its open exchanges take, more or less."""

    @abstractmethod
    def feed(self, direction: Direction, data: bytes, at_ns: int) -> list[Exchange]:
        """Take the next bytes of one direction; return the exchanges they finished."""

    @abstractmethod
    def hole(self, direction: Direction, count: int, at_ns: int) -> list[Exchange]:
        """Step over lost bytes of one direction."""

    @abstractmethod
    def close(self, at_ns: int, clean: bool) -> list[Exchange]:
        """The connection ended: everything open becomes an exchange as far as it got."""

    def goes_on(self) -> Callable[[bytes], bool] | None:
        """What says of the server's next bytes that they may wait for those behind them.

        None where none may: then each delivery is read as it comes.
        """
        return None

    def under_way(self) -> list[ExchangeSoFar]:
        """What was seen of each exchange that is wanted and goes on; nothing changes by it."""
        return []

    @abstractmethod
    def shrink(self) -> None:
        """Keep only what usage needs: others need the room."""


def reading(engine: Engine) -> Engine:
    """The engine itself, or the one that it has handed over to."""
    return engine if engine.successor is None else engine.successor


class Ignored(Engine):
    """A protocol that nobody here reads: nothing of it is kept."""

    @property
    def is_open(self) -> bool:
        """Never: nothing of it would be missed."""
        return False

    @property
    def held_bytes(self) -> int:
        """None."""
        return 0

    def feed(self, direction: Direction, data: bytes, at_ns: int) -> list[Exchange]:
        """Nothing comes of it."""
        return []

    def hole(self, direction: Direction, count: int, at_ns: int) -> list[Exchange]:
        """Nothing comes of it."""
        return []

    def close(self, at_ns: int, clean: bool) -> list[Exchange]:
        """Nothing comes of it."""
        return []

    def shrink(self) -> None:
        """There is nothing to let go."""
