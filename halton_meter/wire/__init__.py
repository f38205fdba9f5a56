"""Plaintext to exchanges. Start at `stream.py`; nothing here does input or output."""
