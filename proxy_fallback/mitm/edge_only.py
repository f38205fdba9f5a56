"""A mitmproxy addon that admits the edge only: mitmproxy's port is open to the whole machine.

The edge sends a secret of this run with each CONNECT. Clients without it get a 403, or their
connection is closed. Another user's connection (`access.py`) is closed before a byte is read, so
that not even a TLS handshake is answered. Connections from macOS' redirector bypass the edge and
are admitted. It does not look at what is requested.
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
    """Admits clients; `turned_away` counts the others, by cause."""

    def __init__(self, secret: str) -> None:
        self._expected = f"Bearer {secret}".encode()
        self._allowed = allowed_uids()
        self._admitted: set[str] = set()
        self.turned_away: Counter[str] = Counter()

    def client_connected(self, client: connection.Client) -> None:
        """A client connected; a hook of mitmproxy's, as those below."""
        if client.proxy_mode.type_name not in _REGULAR_MODES:
            self._admitted.add(client.id)
        elif peer_at(client.peername[:2], client.sockname[:2], self._allowed) is Peer.OTHER_USER:
            client.error = "another user"
            self.turned_away["refused_other_user_at_worker"] += 1

    def http_connect(self, flow: http.HTTPFlow) -> None:
        """A client requests a tunnel, as the edge always does first."""
        given = flow.request.headers.pop("Proxy-Authorization", "")
        if hmac.compare_digest(given.encode("utf-8", "replace"), self._expected):
            self._admitted.add(flow.client_conn.id)
        elif flow.client_conn.id not in self._admitted:
            from mitmproxy import http

            self.turned_away["refused_past_the_edge"] += 1
            flow.response = http.Response.make(403, b"halton-meter: this is not the proxy's port\n")

    def requestheaders(self, flow: http.HTTPFlow) -> None:
        """A request: without an admitted tunnel, the connection is closed."""
        if flow.client_conn.id not in self._admitted:
            self.turned_away["refused_past_the_edge"] += 1
            kill: Callable[[], None] = flow.kill
            kill()

    def client_disconnected(self, client: connection.Client) -> None:
        """Forget the connection."""
        self._admitted.discard(client.id)
