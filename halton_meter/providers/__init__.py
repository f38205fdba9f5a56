"""What a provider is: its hosts, its routes, and the functions that read their answers.

One file here a provider (families may share one), each with `PROVIDER = Provider(...)` or
`PROVIDERS = (...)`. `registry.py` finds the provider and route of an exchange; `reading/draft.py`
says how a reader is written. Nothing here knows prices or where the bytes came from. To add a
provider: its file, its name in `registry.MODULES`, a price file, a fixture.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from halton_meter.model import Exchange, UsageEvent

Reader = Callable[[Exchange, "Route", "Provider"], Iterator[UsageEvent]]
# Tokens of a text for a model; None where it cannot tell.
Counter = Callable[[str, str | None], int | None]


@dataclass(frozen=True, slots=True)
class Route:
    """A path of a provider and how to read its exchanges.

    `path` is matched whole (fullmatch) against the request's path without its query. `methods`
    are upper-case. `turn_ends`, for WebSockets only, says whether a server's message (bytes)
    ends a turn, so that the wire hands over what was said up to it as one exchange. `recognises`
    says of an exchange whose request's head was lost whether its answer is one of this route's;
    without it, the words of the answer decide (`shapes.py`).
    """

    endpoint: str
    kind: str
    path: re.Pattern[str]
    read: Reader
    methods: frozenset[str] = frozenset({"POST"})
    turn_ends: Callable[[bytes], bool] | None = None
    recognises: Callable[[Exchange], bool] | None = None


@dataclass(frozen=True, slots=True)
class Provider:
    """A provider: `hosts` are exact names, or suffixes written "*.example.com".

    `captured` False keeps its hosts out of what the kernel is asked to copy, because they carry
    much else besides; a capture file or the proxy still meters them. `host_pattern` is matched
    whole (fullmatch) against names that no provider lists: a region opened after this list was
    written, a private endpoint. Like those hosts, such names are only metered where they turn up.
    `counter`, set by the registry, counts the text of answers that state no usage (None: by its
    characters); `account_key`, likewise, is the key of the hashes by which accounts are known.
    `states_cost` says that a cost which an answer of these hosts states is what is paid, in US
    dollars (`reading/charges.py`): true of gateways, of resellers that bill in dollars and of the
    user's own hosts, not of a maker, whose answers have no such field.

    The last two tell whose an answer is that was kept without its host: `models` is searched in the
    lower-case name of the model, and `answer_header` begins the name of a header that only answers
    of these hosts have. A named group of `host_pattern` gives the value of the path's segment
    behind that name ("locations").
    """

    id: str
    hosts: tuple[str, ...]
    routes: tuple[Route, ...]
    captured: bool = True
    host_pattern: re.Pattern[str] | None = None
    counter: Counter | None = None
    account_key: bytes | None = field(default=None, repr=False)
    states_cost: bool = False
    models: re.Pattern[str] | None = None
    answer_header: str | None = None
