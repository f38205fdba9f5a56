"""Packet captures as a source of plaintext: pcap and pcapng files in, `TlsChunk` out.

    for item in PcapReader([path], keys=[keylog]).items(): meter.receive(item)
"""

from __future__ import annotations
