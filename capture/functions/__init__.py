"""Where TLS functions are in a program file. Hostile input: only the finder process runs this."""
