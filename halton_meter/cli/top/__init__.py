"""`halton-meter top`: what is metered at this moment, live in the terminal.

`feed.py` collects what others know: requests in flight from whoever meters, those that have ended
from the store, windows and budgets from the files of those who keep them. `figures.py` groups and
sums it, `cells.py` words it, `screen.py` shows it with textual, which only `command.py` imports,
and only to show it. `terminal.py` leaves the terminal as it was, however this ends.
"""
