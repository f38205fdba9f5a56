"""Benchmarks: `make bench` runs them all. Figures are ratios within one run."""
