"""Journal segments of any lines: no line that is whole is lost, none is counted twice.

Lines are damaged, repeated, cut and joined, and there are some with a right checksum and values
that nobody wrote. Every tenth case goes on into a database.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from halton_meter.store import Store
from halton_meter.store.driver import driver as database
from halton_meter.store.journal import _is_sound, _line, _storable, checked, event_line, loss_line
from tests.fuzz import attack as driver
from tests.fuzz.mutate import ODD_VALUES, mutated, wrong_types
from tests.support.made import NOON_NS, made


def run(seed: int, seconds: float | None = None, cases: int | None = None, only: int | None = None
        ) -> driver.Findings:  # fmt: skip
    """Attack the reading of the journal."""
    return driver.attack("segments", _case, seed, seconds=seconds, cases=cases, only=only)


@cache
def _honest_line(number: int) -> bytes:
    return event_line(made(f"honest{number}"))


def _case(dice: random.Random) -> None:
    honest = [_honest_line(number) for number in range(dice.randint(1, 20))]
    lines = [*honest, *(_hostile(dice) for _ in range(dice.randint(0, 12)))]
    dice.shuffle(lines)
    data = b"".join(lines)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        home = Path(folder, "home")
        store = Store(home)
        path = home / "journal" / "00000000000000000001-1-a.jsonl"
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        _check_lines(path, data)
        if dice.random() < 0.1:
            _check_database(store, data)
        store.close()


def _hostile(dice: random.Random) -> bytes:
    """A line that nobody wrote; it ends, or honest ones behind it were not whole."""
    way = dice.randrange(5)
    original = event_line(made(f"hostile{dice.randrange(9)}"))
    if way == 0:
        return mutated(dice, original).rstrip(b"\n") + b"\n"
    if way == 1:  # the right sum over wrong values
        values = json.loads(original)
        del values["crc"]
        wrong = {name: wrong_types(dice, value, 0.1) for name, value in values.items()}
        return _line({**wrong, "id": _some_id(dice)})
    if way == 2:
        return loss_line(dice.choice(("l1", "l2")), "made_up", dice.choice((1, 2**40)), NOON_NS)
    if way == 3:
        return dice.choice(_nearly_right())
    return dice.randbytes(dice.randint(0, 300)).replace(b"\n", b"") + b"\n"


def _some_id(dice: random.Random) -> Any:
    return dice.choice((f"hostile{dice.randrange(9)}", "../../x", " /etc/x ", *ODD_VALUES))


@cache
def _nearly_right() -> list[bytes]:
    """Lines that are right but for one thing."""
    whole = event_line(made("hostile"))
    return [
        b"\n",
        b"{}\n",
        b'{"crc":0,\n',
        whole[:-2] + b"\n",
        whole[:-1] + b" \n",
        b'{"crc":' + b"9" * 4_000 + b",1}\n",
        b'{"crc":' + "²".encode() + b",1}\n",
        _line({"id": "hostile-deep", "x": "[" * 9_000}),
    ]


def _check_lines(path: Path, data: bytes) -> None:
    lines = data.splitlines(keepends=True) if b"\r" not in data else data.split(b"\n")
    sound, damaged, kept = checked(path)
    whole = [good for line in _lines(data) if (good := _storable(line)) is not None]
    sound_now = {line for line in _lines(data) if line.endswith(b"\n") and _is_sound(line[:-1])}
    assert len(whole) <= sum(line in sound_now for line in _lines(data))  # nothing comes of damage
    assert sound == len(whole)
    assert sound + damaged == len(_lines(data)), lines
    if damaged:
        assert kept.read_bytes() == b"".join(whole)
        kept.unlink()


def _lines(data: bytes) -> list[bytes]:
    parts = data.split(b"\n")
    return [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def _check_database(store: Store, data: bytes) -> None:
    expected = {f"honest{number}" for number in range(20) if _honest_line(number) in _lines(data)}
    store.flush()
    with database().connect(str(store.home / "meter.duckdb"), read_only=True) as connection:
        rows = connection.execute("SELECT id FROM event WHERE id LIKE 'honest%'").fetchall()
    found = [row[0] for row in rows]
    assert sorted(found) == sorted(expected), "a whole line was lost, or counted twice"
    assert not [name for name in os.listdir(store.home / "journal") if name.endswith(".jsonl")]
