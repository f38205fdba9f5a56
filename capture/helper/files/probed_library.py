"""The libraries that one file holds, each probed, proved and refused for itself.

Most files have one. Codex has OpenSSL and rustls, others have two rustls. Nothing is attached here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from capture.functions.finder_protocol import library_from_json, library_json
from capture.functions.library import Library
from capture.functions.stacks import INSTEAD


@dataclass(slots=True)
class ProbedLibrary:
    """One library of a file; its `others` are libraries of their own.

    `probes` are descriptors: one a probe, or one for many. `number` is in its cookie while it is
    attached to. `failure` is why it is not, though its functions were found; `not_http`: they
    passed other bytes than HTTP.
    """

    library: Library
    probes: list[int] = field(default_factory=list)
    number: int = 0
    failure: str | None = None
    not_http: bool = False

    def give_up(self, reason: str) -> None:
        """It is not probed any more, for good: what was found is not what it was taken for."""
        self.library = replace(self.library, probes=(), reason=f"{reason}; {INSTEAD}")

    @property
    def reason(self) -> str | None:
        """Why it is not probed, as far as that is known."""
        return self.failure or self.library.reason


def libraries_in(library: Library) -> list[ProbedLibrary]:
    """One for each library of the file in which this one was found."""
    return [ProbedLibrary(replace(library, others=())), *map(ProbedLibrary, library.others)]


def libraries_json(libraries: Iterable[ProbedLibrary]) -> list[dict[str, Any]]:
    """For the supervisor: the descriptors go beside, in the same order."""
    return [
        {
            "library": library_json(each.library),
            "number": each.number,
            "failure": each.failure,
            "not_http": each.not_http,
            "descriptors": len(each.probes),
        }
        for each in libraries
    ]


def libraries_from_json(told: Any, descriptors: Sequence[int]) -> list[ProbedLibrary] | None:
    """The inverse; None when a descriptor is missing. Raises ValueError, KeyError, TypeError."""
    libraries, left = [], list(descriptors)
    for each in told:
        library = library_from_json(each["library"])
        if library is None:
            return None
        count = int(each["descriptors"])
        if count > len(left):
            return None
        failure = each["failure"]
        mine, left = left[:count], left[count:]
        libraries.append(
            ProbedLibrary(
                library, mine, int(each["number"]), failure and str(failure), bool(each["not_http"])
            )
        )
    return None if left else libraries
