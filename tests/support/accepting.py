"""A stand-in server's loop: each connection is answered in a thread of its own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable


def answer_each(listener: socket.socket, answer: Callable[[socket.socket], None]) -> None:
    """Answer every connection until the listener is closed; returns at once."""

    def accept() -> None:
        while True:
            try:
                raw, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(raw,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
