"""rustls' record layer is found by what code does; what sites say is compared with what it does.

The subjects are compiled from `code/rustls_like.c`, stripped and searched; then an emulator runs
them, x86-64 and aarch64 alike, and looks on at each site that was named (`support/rustls_like.py`).
Real builds, some eighty, are in `tests/lab/real_clients/test_rustls_found.py`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from capture.functions.finder.rustls import Found, find_rustls
from tests.capture.functions.test_boringssl import strip
from tests.support.quick import spread
from tests.support.rustls_like import (
    COMPILERS,
    WIDE_OK,
    Trial,
    addresses,
    build_rustls,
)

AVAILABLE = [name for name, (program, *_) in COMPILERS.items() if shutil.which(program)]
if not shutil.which("aarch64-linux-gnu-gcc"):  # clang links by it
    AVAILABLE = [name for name in AVAILABLE if "aarch64" not in name]
VARIANTS = {
    "callee": (),
    "inlined": ("-DINLINED",),
    "hoisted": ("-DHOISTED",),
    "checked": ("-DCHECKED",),
    "outer": ("-DOUTER", "-DINLINED"),
    "wide-tag": ("-DWIDE_TAG",),
}
pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs a C compiler")


def found_in(path: Path) -> Found:
    (found,) = find_rustls(path)
    assert isinstance(found, Found), found
    return found


@pytest.mark.parametrize(
    ("variant", "optimise", "compiler"), spread(VARIANTS, ("-O2", "-O1", "-Os", "-O3"), AVAILABLE)
)
def test_each_call_is_announced_as_it_is_given(
    tmp_path: Path, compiler: str, optimise: str, variant: str
) -> None:
    path = build_rustls(tmp_path, *VARIANTS[variant], compiler=compiler, optimise=optimise)
    layer = found_in(strip(path)).layer
    assert (layer.encrypter, layer.decrypter) == (0x10, 0x20)
    assert (layer.write_seq, layer.read_seq) == (0x38, 0x40)
    how = {"outer": 8 if variant == "outer" else 0}
    how |= {"ok": WIDE_OK} if variant == "wide-tag" else {}
    trial = Trial(path, layer, **how)
    trial.run(addresses(path))
    assert trial.sent == 1 + 4
    assert trial.received == 2 * (3 + 3 + 1)
    assert layer.ok_tag == (0x29 if variant == "wide-tag" else 0xFF)
