"""What is left of the limits of each account, how fast it goes, and who used it.

`windows.py` makes the present state of an account of the readings that its responses brought,
`pace.py` where a window is heading, `shares.py` which project, session and process used how much of
it. Those three are pure; `answer.py` asks the store and puts them together.
"""

from __future__ import annotations
