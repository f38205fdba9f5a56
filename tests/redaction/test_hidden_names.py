"""Connections whose server's name was hidden (ECH): the host that is asked says whose they are."""

from __future__ import annotations

import pytest

from halton_meter.model import Connection, Direction, Source, TlsChunk
from halton_meter.redaction.conversation import Heard
from halton_meter.redaction.redact import _leads_to_one

PUBLIC = "public.example"


@pytest.mark.parametrize(
    ("shown", "asked", "leads", "named"),
    [
        (PUBLIC, "api.anthropic.com", True, "api.anthropic.com"),
        (PUBLIC, "www.example.org", False, PUBLIC),
        ("api.anthropic.com", "www.example.org", True, "api.anthropic.com"),
        (None, "www.example.org", True, None),  # it was not encrypted
    ],
)
def test_only_what_leads_to_a_provider_is_written_anew(
    shown: str | None, asked: str, leads: bool, named: str | None
) -> None:
    connection = Connection("it", Source.PCAP, peer=shown)
    data = f"GET /v1/models HTTP/1.1\r\nHost: {asked}\r\n\r\n".encode()
    heard = Heard(connection)
    heard.add(TlsChunk(connection, Direction.SENT, 0, data, len(data), 0))
    assert _leads_to_one(heard, lambda host: host == "api.anthropic.com") is leads
    assert heard.connection.peer == named
