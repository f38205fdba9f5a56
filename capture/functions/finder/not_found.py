"""How a search by structure ends without a result: the three finders share these.

Nothing is guessed: where two functions may be the one sought, or none, a finder gives up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class NotFound:
    """Nothing to attach to; `reason` is for people.

    `absent`: the file does not use this stack at all, though its marker is there.
    """

    reason: str
    build_id: str | None = None
    absent: bool = False
    go_version: str | None = None

    @property
    def functions(self) -> Mapping[str, int]:
        """None of them."""
        return MappingProxyType({})


class Ambiguous(Exception):
    """Why a search gave up; becomes `NotFound`."""


class Absent(Ambiguous):
    """The stack is not used in this file."""
