"""What a usage event costs: dated prices as data (`data/`, `overlay/`) and the book that reads them.

`book.PriceBook.load(home).price(event)` is all that the pipeline needs. Nothing is imported here,
so that importing one part does not pay for the others.
"""
