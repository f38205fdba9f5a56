"""TLS secrets: the NSS key log format, from a file or from a pcapng's decryption secrets block.

Holds secrets in memory only for as long as a capture is being read, and writes them nowhere
except, merged, to a private file for tshark (see `pcap.py`). Their values never appear in a
message or in `repr`. Format: https://www.ietf.org/archive/id/draft-ietf-tls-keylogfile-02.html
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

# One handshake gives at most six lines; 200,000 handshakes are a busy proxy's week.
SECRETS_MAX = 1_200_000

_LINE = re.compile(
    rb"^(CLIENT_RANDOM|(?:CLIENT|SERVER)_(?:HANDSHAKE_TRAFFIC_SECRET|TRAFFIC_SECRET_0)"
    rb"|EXPORTER_SECRET|CLIENT_EARLY_TRAFFIC_SECRET|EARLY_EXPORTER_SECRET)"
    rb"[ \t]+([0-9a-fA-F]{64})[ \t]+([0-9a-fA-F]{2,192})[ \t]*\r?$",
    re.MULTILINE,
)


class KeyLog:
    """Secrets by the client's random; the labels are those of the key log format."""

    def __init__(self) -> None:
        self._secrets: dict[bytes, dict[str, bytes]] = {}
        self._count = 0
        self.refused = 0

    def __repr__(self) -> str:
        return f"KeyLog({len(self._secrets)} handshakes)"

    def __len__(self) -> int:
        return len(self._secrets)

    def __contains__(self, client_random: bytes) -> bool:
        return client_random in self._secrets

    def add(self, text: bytes) -> int:
        """Take every secret in key log `text`; lines that are none are passed over.

        Returns the number of secrets found, so that 0 tells a file that is no key log.
        """
        found = 0
        for label, random, secret in _LINE.findall(text):
            if len(secret) % 2:
                continue
            found += 1
            if self._count >= SECRETS_MAX:
                self.refused += 1
                continue
            labels = self._secrets.setdefault(bytes.fromhex(random.decode()), {})
            self._count += label.decode() not in labels
            labels[label.decode()] = bytes.fromhex(secret.decode())
        return found

    def secret(self, client_random: bytes, label: str) -> bytes | None:
        """One secret, or None."""
        return self._secrets.get(client_random, {}).get(label)

    def handshake_of(self, secret: bytes) -> bytes | None:
        """The client random of the handshake that `secret` belongs to, or None."""
        for random, labels in self._secrets.items():
            if secret in labels.values():
                return random
        return None

    def handshakes(self) -> Iterator[bytes]:
        """The client randoms known, newest last."""
        return iter(self._secrets)

    def lines(self) -> Iterable[bytes]:
        """Everything in key log format, for a private file."""
        for random, labels in self._secrets.items():
            for label, secret in labels.items():
                yield f"{label} {random.hex()} {secret.hex()}\n".encode()
