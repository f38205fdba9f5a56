"""`python -m halton_meter`."""

from halton_meter.entry import main

main()
