"""mitmproxy: decrypts what the edge hands over, and meters it."""
