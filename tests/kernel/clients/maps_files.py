"""Map the files of a folder executable, then run copies of a program, over and over, until told."""

import mmap
import os
import shutil
import subprocess
import sys

folder, program = sys.argv[1:3]
kept = []
for name in sorted(os.listdir(folder)):
    with open(os.path.join(folder, name), "rb") as file:
        kept.append(
            mmap.mmap(
                file.fileno(),
                min(4096, os.path.getsize(file.fileno())),
                prot=mmap.PROT_READ | mmap.PROT_EXEC,
            )
        )
print("mapped", len(kept), flush=True)
number = 0
while True:
    number += 1
    copy = os.path.join(folder, f"run{os.getpid()}-{number % 5}")
    if number % 2 or not os.path.exists(copy):
        shutil.copy(program, copy + ".new")
        os.rename(copy + ".new", copy)  # another file of the same name
    subprocess.run([copy], check=False)
