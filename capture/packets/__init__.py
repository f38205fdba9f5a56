"""From packets in a capture file to TLS plaintext. Start at `tcp.py`, then `records.py`."""
