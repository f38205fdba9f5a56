"""Sources of plaintext: packet captures (`pcap.py`) and uprobes (`capture/uprobes.py`)."""
