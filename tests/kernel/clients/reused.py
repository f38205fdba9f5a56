"""Four processes, one after another, all of one number, each with a connection of its own.

The first, second and fourth become the program that the arguments name, each under a name of its
own and for a path of its own; the third only forks from this one.
"""

import contextlib
import os
import sys
from collections.abc import Callable

from asks import ask, host, port

TRIES_MAX = 500
NOT_THIS_NUMBER = 77


def become(n: int) -> None:
    path, *arguments = sys.argv[1:]
    os.execv(path, [f"client-{chr(96 + n)}", *arguments, f"https://{host}:{port}/bytes/{n}"])


def run(what: Callable[[int], None], n: int, wanted: int | None) -> int:
    """Fork a process of the number that is wanted; its pid."""
    for _ in range(TRIES_MAX):
        if wanted is not None:
            with open("/proc/sys/kernel/ns_last_pid", "w") as file:
                file.write(str(wanted - 1))
        child = os.fork()
        if child == 0:
            if wanted in (None, os.getpid()):
                with contextlib.suppress(Exception):
                    what(n)
                    os._exit(0)
            os._exit(NOT_THIS_NUMBER if wanted not in (None, os.getpid()) else 1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != NOT_THIS_NUMBER:
            return child if code == 0 else sys.exit(f"{n} ended with {code}")
    sys.exit("somebody else had the number every time")


first = run(become, 1, None)
for n, what in ((2, become), (3, ask), (4, become)):
    run(what, n, first)
print(first, flush=True)
