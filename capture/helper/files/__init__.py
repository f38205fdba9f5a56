"""What the helper knows of program files, and the probes that it attaches to them."""
