"""Programs as their makers ship them, fetched from npm and PyPI: found, probed and metered."""
