"""Keep freed memory for the next answer instead of giving it back to the kernel after each.

glibc returns the top of the heap whenever more than twice the largest block ever freed lies there
unused (mallopt(3), M_MMAP_THRESHOLD). A process that reads answers of some hundred kB one after the
other then gets the same pages back, zeroed one fault at a time: a third of all its time, measured.
"""

from __future__ import annotations

# At most twice this stays with the process; `replay` and the service are promised far more.
LARGEST_FREED_BYTES = 4 << 20


def keep_freed_memory() -> None:
    """Free one large block, which is what tells glibc; other allocators take no notice."""
    bytes(LARGEST_FREED_BYTES)  # never touched, so it costs no page
