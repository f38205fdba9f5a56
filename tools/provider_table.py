"""Writes docs/providers.md, the table of providers and their hosts, from the code.

python tools/provider_table.py          # writes the file
python tools/provider_table.py --check  # exit 1 when the file is out of date
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

from halton_meter.providers.registry import built_in

FILE = Path(__file__).resolve().parents[1] / "docs" / "providers.md"
HEAD = """\
# Providers

Written by `python tools/provider_table.py` from `halton_meter/providers/`. `*` stands for any name.
Hosts in parentheses carry much else besides: uprobes leave them alone; the proxy and captures meter
them. To add hosts of your own: [capture.md](capture.md#hosts-of-your-own).

| Provider | Hosts |
|---|---|
"""
_REGION = re.compile(r"[a-z]+(?:-[a-z]+)+-?\d+")
REGIONS_MIN = 8  # hosts of one provider; with more, regions are written as *


def table() -> str:
    """The whole document."""
    hosts: dict[str, dict[str, bool]] = defaultdict(dict)
    for provider in built_in():
        for host in provider.hosts:
            hosts[provider.id][host] = provider.captured
    rows = [f"| {name} | {', '.join(_shown(found))} |" for name, found in sorted(hosts.items())]
    return HEAD + "\n".join(rows) + "\n"


def _shown(hosts: dict[str, bool]) -> list[str]:
    many = len(hosts) >= REGIONS_MIN
    shown = {(_REGION.sub("*", host) if many else host): is_seen for host, is_seen in hosts.items()}
    return sorted(f"`{host}`" if is_seen else f"(`{host}`)" for host, is_seen in shown.items())


def main() -> int:
    """Write or check; see the file's head."""
    made = table()
    if "--check" in sys.argv[1:]:
        return int(not FILE.exists() or FILE.read_text() != made)
    FILE.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
