"""Events that a running service holds in memory, said by commands that find nothing stored."""

from __future__ import annotations

from halton_meter.accounts import home_folder
from halton_meter.cli.output import count


def with_held(nothing: str) -> str:
    """What is said where nothing is stored; where a service has events that it cannot store, that
    instead.
    """
    from halton_meter.live.control import SERVICES, ask_service

    home, held = home_folder(), 0
    for name in SERVICES:
        found = (ask_service(home, "status", name=name) or {}).get("held")
        held += found if isinstance(found, int) else 0
    if not held:
        return nothing
    requests = count(held, "request")
    return f"Nothing stored yet; the service holds {requests} in memory. Why: halton-meter status"
