"""Sets the proxy up on a machine, step by step, and undoes every step."""
