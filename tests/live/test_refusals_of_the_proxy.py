"""Which of the worker's words on a handshake the proxy's service takes for a refusal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from halton_meter.live.proxy.service import ProxyService
from halton_meter.live.proxy.worker import Job

HOST, PROGRAM = "api.example.net", "/usr/bin/curl"


def ready(service: ProxyService) -> None:
    pass


def hung(service: ProxyService) -> None:
    service._down("worker_hung", "hung")


def died(service: ProxyService) -> None:
    service._down("worker_down", "waiting")


def stopped_by_the_user(service: ProxyService) -> None:
    service._pause()


def ends(service: ProxyService) -> None:
    service.ask_to_stop()


def stood_still(service: ProxyService) -> None:
    service._pulse.stood_still_since = lambda at_s: True  # type: ignore[method-assign]


@pytest.mark.parametrize("what", ["left", "refused"])
@pytest.mark.parametrize("state", [ready, hung, died, stopped_by_the_user, ends, stood_still])
def test_only_who_leaves_a_service_that_works_has_refused(
    tmp_path: Path, what: str, state: Callable[[ProxyService], None]
) -> None:
    async def scene() -> None:
        service = ProxyService(Job(str(tmp_path), False), {})
        service.take({"ready": True, "port": 9, "accepted": [HOST]})
        state(service)
        for _ in range(3):
            service.take({what: [HOST, PROGRAM, False]})
            service.edge.trust._left_at.clear()
        assert service.edge.refusals() == ([(HOST, PROGRAM)] if state is ready else [])
        service.take({"refused": [HOST, PROGRAM, True]})  # it said so
        assert service.edge.refusals() == [(HOST, PROGRAM)]

    asyncio.run(scene())
