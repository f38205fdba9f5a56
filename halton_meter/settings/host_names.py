"""Names of hosts as people write them, and as a request's Host has them.

A host is a name, "*." and one, or an address, with a port or without; what was meant by a URL,
capitals or another alphabet is told as well. Knows no provider and no setting, and asks no name
server: who asks which host is metered, asks `providers/registry.py`.
"""

from __future__ import annotations

import re

from halton_meter.toml_file import shown_value

# A host name, or "*." and one: what the kernel's list can hold.
_HOST = r"(\*\.)?([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z0-9-]{2,63}|localhost"

# What else a URL can name: a machine of the local network, an address. Neither is in a server's
# certificate as a provider's name is, so they are metered where they turn up, never watched for.
_LOCAL = r"[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?|\d{1,3}(\.\d{1,3}){3}|\[[0-9a-f:.]{2,45}\]"
_DIGITS = re.compile(r"\d+(\.\d+)*")


def is_host(name: str) -> bool:
    """True for a host name or "*." and one."""
    return len(name) <= 253 and re.fullmatch(_HOST, name) is not None


def names_a_host(host: str) -> bool:
    """Whether a request's Host can be this: a name, an address, either with a port."""
    name, port = split_port(host)
    if port is not None and not 0 < port <= 65535:
        return False
    if name.startswith("["):
        return re.fullmatch(_LOCAL, name) is not None and _is_address(name[1:-1])
    if _DIGITS.fullmatch(name):
        return _is_address(name)
    return is_host(name) or re.fullmatch(_LOCAL, name) is not None


def why_no_host(host: str) -> str | None:
    """What of it no host name has; None where that is not one thing."""
    name, port = split_port(host.lower())
    if port is not None and not 0 < port <= 65535:
        return f"there is no port {port}"
    if not name.startswith("[") and (other := re.search(r"[^a-z0-9.*_:-]", name)):
        return f"it has {'a space' if other[0] == ' ' else shown_value(other[0])} in it"
    if _DIGITS.fullmatch(name):
        return "there is no such address"
    *before, last = name.split(".")
    if before and len(last) == 1:
        return f'no domain is as short as its last part, "{last}"'
    return None


def split_port(host: str) -> tuple[str, int | None]:
    """A host's name, and its port where it has one."""
    name, colon, port = host.rpartition(":")
    if colon and port.isascii() and port.isdigit() and len(port) < 10 and not name.endswith(":"):
        return name, int(port)
    return host, None


def _is_address(text: str) -> bool:
    import socket

    try:
        socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    except (OSError, ValueError):
        return False
    return True


def as_requested(host: str) -> str:
    """A host as a request's Host has it: without the ports that need not be said."""
    name, port = split_port(host)
    return name if port in (80, 443) else host


def host_like(text: str) -> str | None:
    """The host that somebody meant who wrote a URL, another alphabet, capitals or a wild card."""
    text = re.sub(r"^\s*(?:[A-Za-z][A-Za-z0-9+.-]*:)?//", "", text).strip()
    text = re.split(r"[/?#\\]", text, maxsplit=1)[0].rpartition("@")[2].strip().lower()
    name, port = split_port(text)
    name = re.sub(r"^\*?\.?(?=[^*.])", "*." if text[:1] in "*." else "", name.rstrip("."))
    if ":" in name and not name.startswith("[") and _is_address(name):
        name = f"[{name}]"
    if not name.isascii():
        try:
            name = name.encode("idna").decode()
        except UnicodeError:
            return None
    found = name if port in (None, 80, 443) or not 0 < port <= 65535 else f"{name}:{port}"
    return found if names_a_host(found) else None
