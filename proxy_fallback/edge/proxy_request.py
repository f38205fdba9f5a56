"""A client's request to a proxy: its head, parsed, and as it is forwarded.

CONNECT requests a tunnel. Plain HTTP names a whole URL; it is forwarded in origin form, or in
absolute form to another proxy, without the fields that are meant for the proxy only. A URL may hold
a password, so nothing of it is logged.
"""

from __future__ import annotations


class ProxyRequest:
    """A request to a proxy. The heads are what to forward for plain HTTP, None for CONNECT."""

    __slots__ = ("host", "port", "origin_head", "absolute_head")

    def __init__(
        self, host: str, port: int, origin_head: bytes | None, absolute_head: bytes | None
    ) -> None:
        self.host = host
        self.port = port
        self.origin_head = origin_head
        self.absolute_head = absolute_head


def read_request(head: bytes) -> ProxyRequest | None:
    """Parse a head (without its blank line); None when it is not a request to a proxy."""
    line, *fields = head.split(b"\r\n")
    words = line.split(b" ")
    if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
        return None
    method, target, version = words
    if method == b"CONNECT":
        where = _host_and_port(target, None)
        return ProxyRequest(*where, None, None) if where else None
    scheme, found, rest = target.partition(b"://")
    if not found or scheme.lower() != b"http":
        return None
    cut = min((at for at in (rest.find(b"/"), rest.find(b"?")) if at >= 0), default=len(rest))
    authority, path = rest[:cut], rest[cut:]
    where = _host_and_port(authority.rpartition(b"@")[2], 80)
    if where is None:
        return None
    path = path if path.startswith(b"/") else b"/" + path
    kept = b"".join(field + b"\r\n" for field in _forwarded(fields)) + b"\r\n"
    return ProxyRequest(
        *where,
        b" ".join((method, path, version)) + b"\r\n" + kept,
        line + b"\r\n" + kept,
    )


def _forwarded(fields: list[bytes]) -> list[bytes]:
    """The fields that a proxy forwards. One connection carries one request (RFC 9112, 9.6: the
    server closes after it), because the next may be for another host; an upgrade stays as it is.
    """
    names = [field.partition(b":")[0].strip().lower() for field in fields]
    dropped = {b"proxy-connection", b"proxy-authorization"}
    upgrade = b"upgrade" in names
    if not upgrade:
        dropped |= {b"connection", b"keep-alive"}
    kept = [field for field, name in zip(fields, names, strict=True) if name not in dropped]
    return kept if upgrade else [*kept, b"Connection: close"]


def _host_and_port(authority: bytes, default: int | None) -> tuple[str, int] | None:
    host, colon, port = authority.rpartition(b":")
    if not colon or (port.endswith(b"]") and authority.startswith(b"[")):
        host, port = authority, b"" if default is None else b"%d" % default
    try:
        name = host.decode("ascii").strip("[]").lower().rstrip(".")
        number = int(port) if port.isdigit() else 0
    except UnicodeDecodeError:
        return None
    if not name or not 0 < number < 65536 or any(c.isspace() or c in "/@\0" for c in name):
        return None
    return name, number
