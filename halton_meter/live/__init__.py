"""Metering while programs run: what `probes/` and `proxy/` share stands here."""
