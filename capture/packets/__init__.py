"""From packets to TLS plaintext. Start at `tcp.py`, `tcp_connections.py`, then `records.py`."""
