"""The proxy service's control socket: one request a line, one answer a line, in its event loop.

The counterpart of `live/control.py:Answering`, which serves a selector. What may be asked, and what
is answered, is `service.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from halton_meter import untrusted
from halton_meter.live.control import REQUEST_BYTES_MAX, Listener, is_friend


class ControlServer:
    """The socket of this name in `home`. `on_refused` is called for each invalid request, and for
    one on which `answer` failed."""

    def __init__(
        self,
        home: Path,
        name: str,
        answer: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]],
        on_refused: Callable[[], None],
    ) -> None:
        self._path = home / name
        self._answer = answer
        self._on_refused = on_refused
        self._listener = Listener(home, name)
        self._server: asyncio.Server | None = None

    async def renew(self) -> None:
        """Listen, again if the socket's file is gone."""
        with contextlib.suppress(OSError):  # no status then, but traffic goes on
            if not self._listener.renew() or self._listener.socket is None:
                return
            if self._server is not None:
                self._server.close()
            listener = self._listener.socket.dup()
            listener.setblocking(False)
            self._server = await asyncio.start_unix_server(
                self.converse, sock=listener, limit=REQUEST_BYTES_MAX
            )

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one client until it has no more to ask."""
        try:
            # Outside of the folder, no file mode keeps other users out.
            friend = self._listener.has_file or is_friend(writer.get_extra_info("socket"))
            while friend and (line := await reader.readline()):
                request = untrusted.parsed(line)
                if request is None:
                    self._on_refused()
                    break
                answer = await self._answer(request)
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (OSError, ValueError):  # the client is gone, or its line was too long
            pass
        except Exception:  # no request may end the service
            self._on_refused()
        writer.close()

    def close(self) -> None:
        """Listen no more, and remove the socket's file."""
        if self._server is not None:
            self._server.close()
            self._listener.close()
            with contextlib.suppress(OSError):
                self._path.unlink()
