"""Newer prices from a bundle: verified, checked against history, installed under the home.

A bundle is a .tar.gz of `data/*.toml` and `overlay/*.toml`. It may add models, names and dated
rows; a bundle that changes or drops a recorded row is refused whole, so that no past price changes
behind the user's back. `fetched` is the only function of the program's price side that touches the
network, and only `halton-meter pricing refresh --url` calls it.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pricing.files import BUNDLED, RULE_KINDS, SEALS, checked, sealed
from pricing.history import History, describe, merged
from pricing.rates import PriceError

BUNDLE_BYTES_MAX = 32 << 20
_MEMBERS_MAX = 1000
_MEMBER_BYTES_MAX = 8 << 20
_MEMBER = re.compile(r"^(?:\./)?(data|overlay)/([A-Za-z0-9][A-Za-z0-9_.-]{0,63})\.toml$")
_TIMEOUT_SECONDS = 30


def fetched(url: str) -> bytes:
    """The bundle at an https URL."""
    import urllib.request

    if not url.startswith("https://"):
        raise PriceError(f"{url}: prices are fetched over https only")
    # The scheme is checked above; nothing but this URL is asked for.
    with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:  # noqa: S310
        raw: bytes = response.read(BUNDLE_BYTES_MAX + 1)
    return raw


def install(raw: bytes, home: Path, sha256: str | None, *, dry_run: bool = False) -> list[str]:
    """Install a bundle; the changes in words. PriceError when it is damaged or rewrites history."""
    if len(raw) > BUNDLE_BYTES_MAX:
        raise PriceError(f"the bundle is larger than {BUNDLE_BYTES_MAX >> 20} MB")
    digest = hashlib.sha256(raw).hexdigest()
    if sha256 is not None and digest != sha256.strip().lower():
        raise PriceError(f"the bundle's SHA-256 is {digest}, not the one given: not installed")
    files = _unpacked(raw)
    lines: list[str] = []
    conflicts: list[str] = []
    for (kind, provider), written in files.items():
        text = checked(kind, provider, written.encode(), f"{kind}/{provider}.toml")
        files[(kind, provider)] = text
        recorded = _recorded(home, kind, provider)
        _, changes, clashes = merged(_history(recorded), _history(text))
        gone = [m for m, what in changes if what.startswith("no longer listed")]
        conflicts += [f"{provider} {clash}" for clash in clashes]
        conflicts += [f"{provider} {model}: dropped by the bundle" for model in gone]
        conflicts += [f"{provider} {rule}: changed or dropped" for rule in _lost(recorded, text)]
        lines += describe(provider, changes)
    if conflicts:
        shown = "; ".join(conflicts[:5])
        raise PriceError(f"the bundle would rewrite {len(conflicts)} recorded prices: {shown}")
    if not dry_run:
        _write(files, home / "prices")
    return lines


def undo(home: Path) -> bool:
    """Remove refreshed prices; False when there were none."""
    folder = home / "prices"
    if not folder.exists():
        return False
    shutil.rmtree(folder)
    return True


def _unpacked(raw: bytes) -> dict[tuple[str, str], str]:
    files: dict[tuple[str, str], str] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:gz") as archive:
            for count, member in enumerate(archive):
                match = _MEMBER.match(member.name)
                if count >= _MEMBERS_MAX or member.size > _MEMBER_BYTES_MAX:
                    raise PriceError("the bundle holds more, or larger, files than any prices do")
                if not member.isfile() or match is None:
                    continue
                content = archive.extractfile(member)
                assert content is not None
                files[(match.group(1), match.group(2))] = content.read().decode("utf-8")
    except (tarfile.TarError, OSError, EOFError, UnicodeDecodeError) as error:
        raise PriceError(f"the bundle cannot be read: {error}") from None
    if not files:
        raise PriceError("the bundle holds no data/*.toml and no overlay/*.toml")
    return files


def _recorded(home: Path, kind: str, provider: str) -> str:
    for folder in (home / "prices", BUNDLED):
        path = folder / kind / f"{provider}.toml"
        if path.exists():
            return path.read_text("utf-8")
    return ""


def _history(text: str) -> History:
    empty: dict[str, Any] = {"names": [], "price": []}
    return {model["id"]: {**empty, **model} for model in tomllib.loads(text).get("model", [])}


def _lost(recorded: str, text: str) -> Iterator[str]:
    """An overlay's recorded rules that a newer one no longer has word for word."""
    old, new = tomllib.loads(recorded), tomllib.loads(text)
    for kind in RULE_KINDS:
        for rule in old.get(kind, ()):
            if rule not in new.get(kind, ()):
                yield f"{kind} {rule.get('note') or rule.get('when') or rule.get('models')}"


def _write(files: dict[tuple[str, str], str], folder: Path) -> None:
    """Replace the folder in one step: a reader sees the old prices or the new."""
    partial, old = folder.with_name("prices.partial"), folder.with_name("prices.old")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    try:
        if folder.exists():
            shutil.copytree(folder, partial)
        for (kind, provider), text in files.items():
            path = partial / kind / f"{provider}.toml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
            seal = partial / SEALS / f"{kind}-{provider}"
            seal.parent.mkdir(exist_ok=True)
            seal.write_bytes(sealed(text.encode()))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)
