"""`python -m halton_meter`."""

from halton_meter.cli import main

main(prog_name="halton-meter")
