"""A capture without what was said in it: read, redacted in place, written anew, and proved.

    done = redact(Path("in.pcapng"), Path("out.pcapng"), price=book.price)

The new file holds the connections to providers whose keys are known, and no others. It appears
under its name only when it is proved (`proof.py`); what fails leaves nothing behind.
"""

from __future__ import annotations

import os
import ssl
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

from halton_meter.model import Request, TlsChunk, TlsClosed
from halton_meter.providers.registry import Registry
from halton_meter.redaction import conversation, proof, writing
from halton_meter.redaction.conversation import Conversations, Heard
from halton_meter.redaction.filler import Filler
from halton_meter.redaction.heads import shown_host
from halton_meter.wire.conversation import NOT_WANTED, Conversation, Interest

# Plaintext of one capture, all of which is held.
PLAINTEXT_BYTES_MAX = 256 << 20


class NotRedacted(Exception):
    """No file was made; `reasons` are why, in words."""

    def __init__(self, *reasons: str) -> None:
        self.reasons = reasons
        super().__init__("; ".join(reasons))


@dataclass(frozen=True, slots=True)
class Redacted:
    """What was made, and what both files give."""

    connections: int
    packets: int
    requests: int
    total_usd: Decimal
    unpriced: int
    hosts: tuple[str, ...]
    without_keys: int


def redact(
    source: Path,
    target: Path,
    price: proof.Price,
    keys: Iterable[Path] = (),
    hosts: Mapping[str, str] | None = None,
) -> Redacted:
    """Write a redacted copy of a capture.

    Raises NotRedacted, FileExistsError, OSError, TsharkMissing.
    """
    if target.exists():
        raise FileExistsError(target)
    heard = _Listening()
    old = proof.read(source, keys, price, hosts or {}, heard.take)
    if old.findings.errors:
        raise NotRedacted(*old.findings.errors)
    is_known = proof.known(Registry(dict(hosts or {})), hosts or {})
    found = [each for each in heard.with_plaintext() if _leads_to_one(each, is_known)]
    if not found:
        raise NotRedacted(_nothing(old))
    filler = Filler(is_known)

    def shown(host: str) -> str:
        return shown_host(host.encode(), filler).decode()

    for each in found:
        conversation.redact(each, filler)
    with tempfile.TemporaryDirectory(prefix=".halton-meter-", dir=target.parent) as folder:
        made = Path(folder) / "redacted.pcapng"
        try:
            count, packets = writing.write(found, made, shown)
        except (ValueError, ssl.SSLError) as error:  # a server name that no client would send
            raise NotRedacted(f"a connection cannot be made anew: {error}") from None
        items: list[TlsChunk | TlsClosed] = []
        new = proof.read(made, (), price, hosts or {}, items.append)
        new.items = items
        wrong = proof.differences(old.events, new.events) or proof.left_over(made, new, filler)
        if wrong:
            raise NotRedacted(*wrong)
        os.close(os.open(target, os.O_CREAT | os.O_EXCL, 0o600))  # it is ours from here on
        os.replace(made, target)
    return Redacted(
        count,
        packets,
        len(old.events),
        old.total_usd,
        sum(event.list_usd is None for event in old.events),
        tuple(sorted({host for event in new.events if (host := event.usage.host)})),
        sum(old.findings.without_keys.values()),
    )


def _leads_to_one(heard: Heard, is_known: Callable[[str], bool]) -> bool:
    """Whether a connection leads to a provider, by its server's name or, where that was hidden
    (ECH), by the host that is asked. That is its name from then on: the new file shows it, as its
    reader has to know the connection for a provider's."""
    connection = heard.connection
    if connection.peer is None or is_known(connection.peer):
        return True
    asked: list[str] = []

    def ask(request: Request) -> Interest:
        asked.extend(host for host in (request.host,) if host and is_known(host))
        return NOT_WANTED

    talk = Conversation(connection, ask)
    for item in heard.items:
        if isinstance(item, TlsChunk):
            talk.receive(item)
    if asked:
        heard.connection = replace(connection, peer=asked[0])
    return bool(asked)


def _nothing(old: proof.Read) -> str:
    findings = old.findings
    if without := sum(findings.without_keys.values()):
        return f"no connection could be decrypted: {without:,} without keys"
    if not findings.connections:
        return "it holds no TCP connection"
    if findings.not_wanted:
        return "all that it holds goes to hosts of no known provider"
    return "it holds no decrypted request"


class _Listening(Conversations):
    """All plaintext of a capture, bounded."""

    def take(self, item: TlsChunk | TlsClosed) -> None:
        """The next of a connection."""
        super().take(item)
        if self.bytes > PLAINTEXT_BYTES_MAX:
            limit = PLAINTEXT_BYTES_MAX >> 20
            raise NotRedacted(f"it holds more than {limit} MB of plaintext; split it first")
