"""`halton-meter version [--verbose]`: what a report of a fault should state, and nothing private.

No host, no setting's value, no count of requests; home directories are written as ~. Exit codes: 0;
2 wrong usage.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click

from halton_meter import __version__
from halton_meter.cli.output import print_json, say

TSHARK_S_MAX = 5.0
# Any user's home directory, not only this one's.
_HOMES = re.compile(r"/(?:home|Users|root)(?:(?<=root)|/[^/\s]+)")


@click.command(
    epilog="""\b
Examples:
  halton-meter version                   the version alone
  halton-meter version --verbose         for a report of a fault
  halton-meter version --verbose --json
"""
)
@click.option("--verbose", "-v", is_flag=True, help="Also what it runs on, and what works there.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def version(verbose: bool, as_json: bool) -> None:
    """Show the version, and what a report of a fault should state.

    Nothing private is in it: no host, no setting, no request.
    """
    rows = dict(_rows()) if verbose else {"version": __version__}
    if as_json:
        print_json(rows)
        return
    if not verbose:
        click.echo(f"halton-meter {__version__}")
        return
    width = max(map(len, rows))
    for name, value in rows.items():
        say(f"{name.replace('_', ' '):<{width}}  {_text(value)}")


def _text(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _rows() -> Iterator[tuple[str, Any]]:
    yield "version", __version__
    yield "installed", f"{_how()}, in {_public(str(Path(__file__).parents[2]))}"
    python = f"{platform.python_implementation()} {platform.python_version()}"
    yield "python", f"{python} at {_public(sys.executable)}"
    yield "system", _system()
    yield "kernel", f"{platform.system()} {platform.release()} {platform.machine()}"
    if sys.platform == "linux":
        yield from _uprobes()
    for name in ("duckdb", "mitmproxy", "click", "cryptography"):
        yield name, _or_none(partial(importlib.metadata.version, name))
    yield "tshark", _tshark()
    yield from _data()
    yield from _services()


def _or_none(ask: Callable[[], Any]) -> Any:
    """An answer; None where it cannot be had, whatever the reason: a fault is being reported."""
    with contextlib.suppress(Exception):
        return ask()
    return None


def _public(text: str) -> str:
    return _HOMES.sub("~", text)


def _how() -> str:
    from halton_meter.cli.init_uprobes import runs_from_cache

    prefix = Path(sys.prefix)
    if runs_from_cache():
        return "uvx"
    if "pipx" in prefix.parts:
        return "pipx"
    if (prefix / "uv-receipt.toml").exists():
        return "uv tool"
    if _or_none(_is_checkout):
        return "checkout"
    return "virtual environment" if sys.prefix != sys.base_prefix else "system Python"


def _is_checkout() -> bool:
    found = importlib.metadata.distribution("halton-meter").read_text("direct_url.json") or ""
    return '"editable": true' in found


def _system() -> str | None:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    name = _or_none(lambda: platform.freedesktop_os_release()["PRETTY_NAME"])
    inside = [what for what, is_it in _INSIDE.items() if _or_none(is_it)]
    return f"{name} ({', '.join(inside)})" if inside else name


_INSIDE: dict[str, Callable[[], bool]] = {
    "container": lambda: os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv"),
    "WSL": lambda: "microsoft" in platform.release().lower(),
    "no systemd": lambda: not os.path.isdir("/run/systemd/system"),
}


def _uprobes() -> Iterator[tuple[str, Any]]:
    from capture import bpf, loader
    from capture.environment import check_environment, missing_tracepoints

    missing = _or_none(check_environment)
    lacking = None if missing is None else [problem.what for problem in missing]
    yield "uprobes_lack", lacking
    yield "btf", os.path.exists("/sys/kernel/btf/vmlinux")
    yield "probes_in_one_call", _or_none(bpf.attaches_at_once) if os.geteuid() == 0 else None
    yield "tracepoints_missing", _or_none(lambda: list(missing_tracepoints()))
    built = _or_none(loader.built_object)
    where = "in the wheel" if built == loader.BUILT_OBJECT else "in the cache" if built else "no"
    yield "program_compiled", where


def _tshark() -> str | None:
    if shutil.which("tshark") is None:
        return "not installed"

    def ask() -> str:
        done = subprocess.run(
            ("tshark", "--version"),
            capture_output=True,
            text=True,
            timeout=TSHARK_S_MAX,
            check=True,
        )
        return done.stdout.splitlines()[0]

    return str(found) if (found := _or_none(ask)) else None


def _data() -> Iterator[tuple[str, Any]]:
    from halton_meter import accounts
    from halton_meter.settings import config
    from halton_meter.store import Store, schema
    from pricing.book import PriceBook

    home = _or_none(accounts.home_folder)
    named = " (by HALTON_METER_HOME)" if os.environ.get("HALTON_METER_HOME") else ""
    yield "data_folder", None if home is None else f"{_public(str(home))}{named}"
    if home is None:
        return
    book = _or_none(lambda: PriceBook.load(home))
    yield "price_book", None if book is None else book.version
    yield "own_prices", None if book is None else len(book.overrides)
    found = _or_none(lambda: config.read(home))
    if found is not None:
        sound = "sound" if not found.wrong else f"{len(found.wrong)} wrong values"
        yield "settings", sound if (home / config.CONFIG_NAME).exists() else "defaults"
    yield "schema", len(schema.MIGRATIONS)
    database = home / "meter.duckdb"
    there = database.exists()
    yield "database", f"{database.stat().st_size / 1e6:,.1f} MB" if there else "none yet"
    if there:
        yield "database_schema", _or_none(Store(home).schema_version)


def _services() -> Iterator[tuple[str, Any]]:
    from halton_meter import accounts
    from halton_meter.live.control import SERVICES, ask_service

    home = _or_none(accounts.home_folder)
    names = ("uprobes_service", "local_proxy", "key_log_service")
    for name, socket_name in zip(names, SERVICES, strict=True):
        found = _or_none(partial(ask_service, home, "status", name=socket_name))
        told = found or {"health": "stopped"}
        loader = f", loader {told['loader']}" if told.get("loader") else ""
        yield name, f"{told['health']}{loader}"
