"""The lab: real clients against local providers, in a network namespace of their own.

It knows nothing of Halton Meter: `lab.py` builds the place, `server.py` answers, `answers.py` says
what, and the server's ledger is the truth that a meter is compared with. `python -m
tests.support.lab` opens a shell in it.
"""
