"""What happens to captures: packets lost, repeated, out of order, cut; garbage in between."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence

from tests.support.recorder.packets import Packet

Damage = Callable[[list[Packet]], list[Packet]]


def _carrying(packets: Sequence[Packet], sent: bool) -> list[int]:
    """Positions of the packets with payload in one direction."""
    return [i for i, packet in enumerate(packets) if packet.sent is sent and packet.payload]


def drop(ordinals: Collection[int], *, sent: bool = False) -> Damage:
    """Lose the nth packets with payload of one direction (negative: from the end)."""

    def apply(packets: list[Packet]) -> list[Packet]:
        carrying = _carrying(packets, sent)
        lost = {carrying[n] for n in ordinals}
        return [packet for i, packet in enumerate(packets) if i not in lost]

    return apply


def duplicate(every: int = 3) -> Damage:
    """Repeat every nth packet, two packets later."""

    def apply(packets: list[Packet]) -> list[Packet]:
        out: list[Packet] = []
        for i, packet in enumerate(packets):
            out.append(packet)
            if i >= 2 and i % every == 0:
                out.append(packets[i - 2])
        return out

    return apply


def reorder(distance: int = 3, seed: int = 7) -> Damage:
    """Shuffle packets within a short distance, behind the TCP handshake."""

    def apply(packets: list[Packet]) -> list[Packet]:
        chance = random.Random(seed)
        places = [
            (i + (chance.random() * distance if i > 2 else 0), i) for i in range(len(packets))
        ]
        return [packets[i] for _, i in sorted(places)]

    return apply


def start_after(ordinal: int, *, sent: bool = True) -> Damage:
    """The capture begins with the nth packet with payload of one direction."""

    def apply(packets: list[Packet]) -> list[Packet]:
        return packets[_carrying(packets, sent)[ordinal] :]

    return apply


def end_before(ordinal: int, *, sent: bool = False) -> Damage:
    """The capture ends before the nth packet with payload of one direction."""

    def apply(packets: list[Packet]) -> list[Packet]:
        return packets[: _carrying(packets, sent)[ordinal]]

    return apply


def snap(length: int, *, skip: int = 0) -> Damage:
    """A snap length cuts frames, from the `skip`th on."""

    def apply(packets: list[Packet]) -> list[Packet]:
        return [packet.cut(length) if i >= skip else packet for i, packet in enumerate(packets)]

    return apply


def both(*damages: Damage) -> Damage:
    """One after the other."""

    def apply(packets: list[Packet]) -> list[Packet]:
        for damage in damages:
            packets = damage(packets)
        return packets

    return apply
