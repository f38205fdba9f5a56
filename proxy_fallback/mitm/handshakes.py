"""What each client makes of our certificate: it trusts it, it refuses it, or it just leaves.

Some TLS libraries check a certificate during the handshake, and say so by an alert. Others
(GnuTLS, mbedTLS, …) end the handshake first, and TLS 1.3 lets a client's alert come after the
server's end of it. So a handshake alone proves nothing. The rule:

- A byte of a request (HTTP/2's preface is one) proves trust.
- An alert about the certificate, before or after the handshake's end, is a refusal.
- Who leaves within PROMPTLY_S of the handshake's end, without a byte and whatever the way (close,
  half-close, reset, another alert), has most likely checked the certificate and refused it.
- Who leaves later, within CHECKING_S_MAX, may have: some ask a server about the certificate first.
- Who leaves later than that has not: no check takes so long. Pools close connections that they
  opened ahead after minutes.
- Whose connection ends because of us (we closed it, we end, we stood still, we had shown no
  certificate yet) has told nothing by that, but for an alert.

What follows from how a program took it on several connections is the edge's (`Edge.left`). This
file knows no sockets and no mitmproxy.
"""

from __future__ import annotations

import enum
from collections import OrderedDict

PROMPTLY_S = 3.0
CHECKING_S_MAX = 30.0
# Handshakes without a request yet; more than one user's tools have open.
WAITING_MAX = 4096
# RFC 8446, 6.2: bad, unsupported, revoked, expired or unknown certificate; unknown CA; access
# denied; bad certificate status.
_ABOUT_CERTIFICATES = frozenset({42, 43, 44, 45, 46, 48, 49, 113})


class Taken(enum.Enum):
    """How a client took our certificate on one connection."""

    REFUSED = "refused"
    LEFT_PROMPTLY = "left promptly"
    LEFT_LATER = "left later"
    UNUSED = "unused"


class Handshakes:
    """The clients that have our certificate, and have sent no byte of a request yet."""

    def __init__(self) -> None:
        self._ended_at: OrderedDict[str, float] = OrderedDict()
        self._alerts: OrderedDict[str, int] = OrderedDict()

    def ended(self, client_id: str, at_s: float) -> None:
        """A handshake ended."""
        self._ended_at[client_id] = at_s
        if len(self._ended_at) > WAITING_MAX:
            self._ended_at.popitem(last=False)

    def alerted(self, client_id: str, alert: int) -> None:
        """A client sent an alert of this number, before or after the handshake's end."""
        self._alerts[client_id] = alert
        if len(self._alerts) > WAITING_MAX:
            self._alerts.popitem(last=False)

    def spoke(self, client_id: str) -> bool:
        """A client sent a byte of a request; whether it is its first."""
        return self._ended_at.pop(client_id, None) is not None

    def is_refused(self, client_id: str) -> bool:
        """Whether its alert was about the certificate."""
        return self._alerts.get(client_id) in _ABOUT_CERTIFICATES

    def broken_off(self, client_id: str) -> None:
        """We closed a client's connection, or let it wait: how it leaves tells nothing."""
        self._ended_at.pop(client_id, None)

    def left(self, client_id: str, at_s: float) -> Taken | None:
        """A client is gone: how it took our certificate. None: it spoke, or had none of us."""
        refused = self.is_refused(client_id)
        self._alerts.pop(client_id, None)
        ended_at = self._ended_at.pop(client_id, None)
        if ended_at is None:
            return None
        if refused:
            return Taken.REFUSED
        if at_s - ended_at <= PROMPTLY_S:
            return Taken.LEFT_PROMPTLY
        return Taken.LEFT_LATER if at_s - ended_at <= CHECKING_S_MAX else Taken.UNUSED
