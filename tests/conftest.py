"""For all tests: this process stays who it is; variables choose how much runs, in what order.

HALTON_TESTS=quick gives each property fewer examples: `make test` sets it. HALTON_TEST_ORDER=SEED
shuffles the files, and the tests within each; the seed is printed at the top. HALTON_TEST_WHEEL=1
says that the packages are installed, and refuses any that come from a checkout.
"""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# `sudo make test`: a command that a test calls in this process would become the person for good.
for _name in ("SUDO_UID", "PKEXEC_UID", "DOAS_USER"):
    os.environ.pop(_name, None)

# Nor may a test that forgets to name a folder change the settings of whoever runs it.
os.environ["CLAUDE_CONFIG_DIR"] = "/nowhere/that/a/test/may/write"

# `pytest &` and `nohup pytest` ignore these; every program that a test starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# A busy machine generates slowly, too: that is no fault of a test's.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

PACKAGES = ("capture", "halton_meter", "pricing", "proxy_fallback")
QUICK_SHARE, QUICK_EXAMPLES_MIN = 8, 2
# Where Hypothesis keeps a test's settings. Should the name change, the quick run takes longer.
_SETTINGS = "_hypothesis_internal_use_settings"


def pytest_configure() -> None:
    if os.environ.get("HALTON_TEST_WHEEL"):
        installed = Path(sysconfig.get_path("purelib"))
        for name in PACKAGES:
            found = importlib.util.find_spec(name)
            if found is None or not Path(found.origin or "").is_relative_to(installed):
                raise pytest.UsageError(f"{name} is {found}, not the wheel's in {installed}")


def pytest_report_header() -> str | None:
    order = os.environ.get("HALTON_TEST_ORDER")
    return f"order of tests: HALTON_TEST_ORDER={order}" if order else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("HALTON_TESTS") == "quick":
        for function in {id(each): each for each in map(_function, items)}.values():
            _give_fewer_examples(function)
    if seed := os.environ.get("HALTON_TEST_ORDER"):
        _shuffle(items, seed)


def _function(item: pytest.Item) -> Any:
    return getattr(item, "function", None)


def _give_fewer_examples(function: Any) -> None:
    declared = getattr(function, _SETTINGS, None)
    if declared is not None:
        fewer = max(QUICK_EXAMPLES_MIN, declared.max_examples // QUICK_SHARE)
        count = min(declared.max_examples, fewer)
        setattr(function, _SETTINGS, settings(declared, max_examples=count))


def _shuffle(items: list[pytest.Item], seed: str) -> None:
    """Files first, then the tests of each: a module's fixtures are made once all the same."""
    by_file: dict[str, list[pytest.Item]] = {}
    for item in items:
        by_file.setdefault(str(item.path), []).append(item)
    order = random.Random(seed)
    files = sorted(by_file)
    order.shuffle(files)
    for name in files:
        order.shuffle(by_file[name])
    items[:] = [item for name in files for item in by_file[name]]
