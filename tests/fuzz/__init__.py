"""Fuzzers, one module for each border that bytes of others cross.

`attack.py` runs a border's cases: each is made from a seed and a number, so that it can be made
again. `make fuzz` runs all of them for minutes, `test_fuzz.py` some hundred cases of each.
"""
