"""What a scenario is: conversations, what befalls their capture, and what must come out.

The expected events are written by hand beside the bodies they follow from, with costs worked out
from the price list. Nothing of them may ever be copied from the program's output.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.recorder.damage import Damage
from tests.support.recorder.packets import Packet, pcapng, write
from tests.support.recorder.relay import BEGINNING_NS, Step, record

FOLDER = Path(__file__).parents[3] / "fixtures" / "pcaps"


@dataclass(frozen=True)
class Talk:
    """One connection. `options` are `relay.record`'s; `delay_ms` is when it begins."""

    host: str
    steps: Sequence[Step]
    options: dict[str, Any] = field(default_factory=dict)
    delay_ms: int = 0
    damage: Damage | None = None


@dataclass(frozen=True)
class Scenario:
    """A capture and its events. `name` is the file's: <provider>_<what happens>."""

    name: str
    talks: Sequence[Talk]
    expected: Sequence[dict[str, Any]]
    garbage: Callable[[bytes], bytes] | None = None

    def capture(self) -> bytes:
        """Record it anew: a pcapng with its secrets inside."""
        packets: list[Packet] = []
        secrets = ""
        for number, talk in enumerate(self.talks):
            options = {"number": number, "start_ns": BEGINNING_NS + talk.delay_ms * 1_000_000}
            recording = record(talk.host, talk.steps, **{**options, **talk.options})
            packets += talk.damage(recording.packets) if talk.damage else recording.packets
            secrets += recording.secrets
        if len(self.talks) > 1:
            packets.sort(key=lambda packet: packet.at_ns)
        data = pcapng(packets, secrets)
        return self.garbage(data) if self.garbage else data

    def save(self, folder: Path = FOLDER) -> Path:
        """Write the capture and the expected events."""
        path = write(folder / f"{self.name}.pcapng", self.capture())
        lines = "".join(json.dumps(event) + "\n" for event in self.expected)
        (folder / f"{self.name}.expected.jsonl").write_text(lines)
        return path


def event(
    provider: str,
    endpoint: str,
    model: str | None,
    tokens: dict[str, int] | None = None,
    usd: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """An expected event. `tokens` are all the counts that are not null; `usd` the list price."""
    return {
        "provider": provider,
        "endpoint": endpoint,
        "model": model,
        "tokens": tokens or {},
        "outcome": "complete",
        "http_status": 200,
        "error_class": None,
        "source": "pcap",
        **({"list_usd": usd} if usd is not None else {}),
        **more,
    }


_SENTENCE = (
    "the harbour wakes before the town and counts its boats by their lamps while a kettle "
    "argues with the wind about who was here first and nobody keeps the score"
)
WORDS = _SENTENCE.split()


def prose(count: int, start: int = 0) -> list[str]:
    """`count` words of no importance, each with its space."""
    return [WORDS[(start + i) % len(WORDS)] + " " for i in range(count)]
