"""What a usage event costs: dated prices as data, and the book that reads them.

`book.PriceBook.load(home).price(event)` is all that the pipeline needs; `data/` holds compiled
rates, `overlay/` what we add by hand. Nothing is imported here, so that importing one part does
not pay for the others.
"""
