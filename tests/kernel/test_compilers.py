"""The kernel takes the program whichever clang compiled it.

What a newer compiler makes of the same C is another program to the verifier: clang 19 once made six
branches of one test in a loop, more than the verifier follows.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from capture import loader
from tests.support.quick import first

COMPILERS = [
    path
    for n in ("", *(f"-{version}" for version in range(13, 30)))
    if (path := shutil.which(f"clang{n}"))
]

# In a process of its own: what it loads goes with it.
LOAD = """
import sys
from pathlib import Path
from capture import bpf, loader
loaded = loader._Libbpf(Path(sys.argv[1]), 4096, at_once=bpf.attaches_at_once())
assert {*loader.PROGRAMS, *loader.OPTIONAL} <= set(loaded.programs)
assert min(*loaded.programs.values(), *loaded.maps.values()) > 0
"""


def test_there_is_a_compiler() -> None:
    assert COMPILERS


@pytest.mark.parametrize("compiler", first(COMPILERS), ids=lambda path: Path(path).name)
def test_the_kernel_takes_what_this_compiler_makes(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "clang", lambda: compiler)
    target = tmp_path / "probe.bpf.o"
    loader.compile_object(target)
    subprocess.run([sys.executable, "-c", LOAD, str(target)], check=True)
