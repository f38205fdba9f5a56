"""Real probes on this kernel; see conftest.py for how other processes are kept out of them."""
