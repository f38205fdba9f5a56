"""What a person can do about connections that proxy or key log did not meter: the next command.

A table by cause, by program and by TLS library. It knows no counts.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

NO_QUIC = "turn HTTP/3 off in the program"
UPROBES = "sudo halton-meter run -- CMD"
JAVA = "halton-meter run --java -- CMD"
QUIC = "QUIC"  # where only that is known of the TLS library
SYSTEM_TRUST = "halton-meter init --system-trust"
# Libraries that uprobes cannot probe: for these programs the proxy is the only way.
_NOT_PROBED = frozenset({"Erlang ssl", "JSSE"})
# Those that read no setting of ours by which a program could trust the proxy.
_DEAF = frozenset({"GnuTLS", "NSS", "mbedTLS", "wolfSSL", "Erlang ssl"})
_ITS_OWN = "the program's own proxy setting, with the proxy of halton-meter init"
# Settings of a program's own, where nothing that we could set makes it use a proxy.
_OWN_SETTINGS: Mapping[str, str] = {
    "beam.smp": "in the program: httpc:set_options([{https_proxy, {{Host, Port}, []}}])",
    "java": JAVA,
}


def fix_for(cause: str, program: str | None, stack: str | None, *, service: bool = False) -> str:
    """The next command; "" where there is none. Programs of a `service` may be older than it."""
    name = (program or "").partition(" ")[0].rpartition("/")[2]
    if cause == "proxy_ignored":
        return _OWN_SETTINGS.get(name, _ITS_OWN if stack in _NOT_PROBED else UPROBES)
    if cause == "quic":
        return NO_QUIC
    if cause in ("no_keys", "not_decrypted"):
        return _without_keys(name, stack)
    has_uprobes = sys.platform == "linux" and stack not in _NOT_PROBED
    if cause == "trust_not_configurable":
        return UPROBES if has_uprobes else SYSTEM_TRUST
    if cause in ("certificate_refused", "certificate_refused_now"):
        if stack == "JSSE" or name == "java":
            return JAVA
        if stack in _DEAF:
            return UPROBES if has_uprobes else SYSTEM_TRUST
        return "halton-meter init, then restart that program" if service else UPROBES
    if cause == "not_asked_by_name":
        return UPROBES if has_uprobes else "have it connect by the host's name"
    if cause == "certificate_unusable":
        return "halton-meter init"
    if cause == "stopped":
        return "halton-meter start"
    return "halton-meter doctor" if cause in _WORKER else ""


def _without_keys(name: str, stack: str | None) -> str:
    """Uprobes meter, or name, all that writes no keys; the proxy only what follows its settings."""
    if stack == QUIC:
        return NO_QUIC
    return JAVA if name == "java" else UPROBES


_WORKER = frozenset(
    {"worker_down", "worker_died", "worker_hung", "worker_failing", "not_configured"}
)
