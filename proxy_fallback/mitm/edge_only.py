"""A mitmproxy addon that lets nobody but the edge in: its port is open to the whole machine.

The edge says with each CONNECT a secret that was made for this run. Who does not is told 403, or
hung up on. Another user, whom the kernel names (`access.py`), is let go before a byte is read, so
that not even a TLS handshake of theirs is answered. What macOS' redirector hands over comes past
the edge, and is let in. It refuses to know what is asked for.
"""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from proxy_fallback.edge.access import Peer, allowed_uids, peer_at

if TYPE_CHECKING:
    from mitmproxy import connection, http

_REGULAR_MODES = ("regular", "upstream")


class EdgeOnly:
    """`turned_away` counts those who were no client of ours, by cause."""

    def __init__(self, secret: str) -> None:
        self._expected = f"Bearer {secret}".encode()
        self._allowed = allowed_uids()
        self._let_in: set[str] = set()
        self.turned_away: Counter[str] = Counter()

    def client_connected(self, client: connection.Client) -> None:
        """Somebody connected; mitmproxy's hook, as the others."""
        if client.proxy_mode.type_name not in _REGULAR_MODES:
            self._let_in.add(client.id)
        elif peer_at(client.peername[:2], client.sockname[:2], self._allowed) is Peer.OTHER_USER:
            client.error = "another user"
            self.turned_away["refused_other_user_at_worker"] += 1

    def http_connect(self, flow: http.HTTPFlow) -> None:
        """A tunnel is asked for: of the edge's, all begin so."""
        given = flow.request.headers.pop("Proxy-Authorization", "")
        if hmac.compare_digest(given.encode("utf-8", "replace"), self._expected):
            self._let_in.add(flow.client_conn.id)
        elif flow.client_conn.id not in self._let_in:
            from mitmproxy import http

            self.turned_away["refused_past_the_edge"] += 1
            flow.response = http.Response.make(403, b"halton-meter: this is not the proxy's port\n")

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        """A request, within such a tunnel, or without: then the connection is closed."""
        if flow.client_conn.id not in self._let_in:
            self.turned_away["refused_past_the_edge"] += 1
            kill: Callable[[], None] = flow.kill
            kill()

    def client_disconnected(self, client: connection.Client) -> None:
        """Forget it."""
        self._let_in.discard(client.id)
