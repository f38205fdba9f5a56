"""Captures without what was said in them: begin at `redact.py`."""
