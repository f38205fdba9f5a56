"""The source where uprobes cannot work: mitmproxy flows to exchanges. Start at `addon.py`."""
