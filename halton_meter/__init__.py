"""Halton Meter: what your AI tools spend, exactly. Start reading at `meter.py`."""

__version__ = "0.1.0"
