"""Plaintext to exchanges. Start at `wire/conversation.py`; nothing here does input or output."""
