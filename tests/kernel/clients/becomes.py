"""Makes a connection of its own, then becomes the program that its arguments name."""

import os
import sys

from asks import ask

ask(100)
os.execvp(sys.argv[1], sys.argv[1:])
