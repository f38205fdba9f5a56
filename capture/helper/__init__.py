"""The root helper: attaches probes and forwards what they copy. Start at `main.py`."""
