"""Metering by packets and the keys that clients write; needs the right to capture packets."""
