"""Sources of plaintext: packet captures (`pcap.py`) and uprobes (`uprobe.py`)."""
