"""`[proxy]` of `config.toml`: the local proxy's port, and the proxy that leads out of the network.

    [proxy]
    port = 8082
    upstream = "http://proxy.example.com:3128"

Each wrong value is told with the nearest right one. `values.py` calls this; it reads no file
and tries no port.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from halton_meter.settings.host_names import names_a_host, split_port
from halton_meter.toml_file import nearest, shown_value

PROXY_PORT = 8081
KEYS = ("port", "upstream")
_UPSTREAM = re.compile(r"http://([^\s/:@\[\]]+|\[[0-9a-fA-F:]+\]):(\d{1,5})/?", re.ASCII)
_SOCKS = re.compile(r"\s*socks\d?[ah]?:", re.ASCII | re.IGNORECASE)

Say = Callable[..., None]
"""Takes a text, and the keys of the value that it is about."""


class ProxyConfig(NamedTuple):
    """The table `[proxy]`: the edge's port on 127.0.0.1, and the proxy that it must itself use.

    `upstream` is (host, port) of an HTTP proxy that leads out of this network, or None.
    """

    port: int = PROXY_PORT
    upstream: tuple[str, int] | None = None


def read_proxy(value: Any, refuse: Say, note: Say) -> ProxyConfig | None:
    """What the table says; None where it is no table.

    `refuse` and `note` are told, with the keys, of what is not used and of what has no effect.
    """
    if not isinstance(value, dict):
        what = f"proxy must be a table, not {shown_value(value)}: write below a line [proxy]"
        refuse(f"{what} port = {PROXY_PORT}", "proxy")
        return None
    for key in value:
        if key not in KEYS:
            near = nearest(key, KEYS)
            hint = f'; did you mean "{near}"?' if near else f"; known are {', '.join(KEYS)}"
            what = f"unknown setting [proxy] {shown_value(key)} has no effect{hint}"
            note(what, "proxy", key)
    port = _port(value.get("port", PROXY_PORT), refuse)
    upstream = _upstream(value["upstream"], port, refuse) if "upstream" in value else None
    return ProxyConfig(port, upstream)


def _port(port: Any, refuse: Say) -> int:
    if type(port) is int and 1024 <= port <= 65535:
        return port
    what = f"[proxy] port must be a number from 1024 to 65535, not {shown_value(port)}"
    digits = str(port).strip() if isinstance(port, str | float) else ""
    digits = digits.removesuffix(".0")
    if digits.isascii() and digits.isdigit() and len(digits) < 6:
        meant = int(digits) if 1024 <= int(digits) <= 65535 else PROXY_PORT
    else:
        meant = PROXY_PORT
    refuse(f"{what}; did you mean {meant}?", "proxy", "port")
    return PROXY_PORT


def _upstream(text: Any, own_port: int, refuse: Say) -> tuple[str, int] | None:
    match = _UPSTREAM.fullmatch(text) if isinstance(text, str) else None
    if isinstance(text, str) and _SOCKS.match(text):
        what = "[proxy] upstream: SOCKS is not supported; name an HTTP proxy, such as"
        refuse(f'{what} "http://proxy.example.com:3128"', "proxy", "upstream")
        return None
    if match is None or not 0 < int(match[2]) <= 65535:
        what = '[proxy] upstream must be like "http://proxy.example.com:3128"'
        named = isinstance(text, str) and "@" in text
        # Not shown then: a password may stand in it.
        what += ", without a user name" if named else f", not {shown_value(text)}"
        near = _upstream_like(text)
        meant = f'; did you mean "{near}"?' if near else ""
        refuse(what + meant, "proxy", "upstream")
        return None
    host, port = match[1].strip("[]"), int(match[2])
    if port == own_port and (host in ("localhost", "::1") or host.startswith("127.")):
        refuse(
            f"[proxy] upstream {shown_value(text)} is this proxy itself; name the one that "
            "leads out of your network, or remove the line",
            "proxy",
            "upstream",
        )
        return None
    return host, port


def _upstream_like(text: Any) -> str | None:
    """The address of the proxy that somebody meant."""
    if not isinstance(text, str):
        return None
    bare = re.sub(r"^\s*(?:https?:)?//", "", text.strip(), flags=re.IGNORECASE)
    host, port = split_port(bare.rpartition("@")[2].partition("/")[0].strip())
    near = f"http://{host}:{port}"
    return near if port and names_a_host(f"{host.lower()}:{port}") else None
