"""What was not metered, said in one way by every command: who, to which host, why, what to do.

`run`, `status` and the proxy's service make these of what they counted. Both sources share the
causes. It counts nothing itself and knows no socket.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from halton_meter import untrusted

# Cause -> what it is called in a line. A cause's name is part of JSON: names stay.
_OF_PROBES: Mapping[str, str] = {
    "no_probes_yet": "its TLS functions were still being searched for",
    "probed_late": "the probes came after the connection",
    "older_than_probes": "the connection is older than the probes",
    "stack_not_probed": "its TLS library cannot be probed",
    "stack_unknown": "its TLS library is not known",
    "functions_not_found": "its TLS functions were not found",
    "host_not_told": "its TLS library did not tell the host of an HTTP/2 connection",
    "nothing_passed": "its traffic did not pass the functions that are probed",
    "quic": "QUIC (HTTP/3) is not metered",
    "no_server_name": "it named no server (SNI)",
    "ech": "its server name is encrypted (ECH)",
}
_OF_KEY_LOG: Mapping[str, str] = {
    "no_keys": "it wrote no TLS keys",
    "not_decrypted": "its TLS keys did not open it (a CBC suite of TLS 1.2, or other keys)",
}
# The same, of what the proxy saw or ought to have seen.
_OF_PROXY: Mapping[str, str] = {
    "proxy_ignored": "it ignores proxy settings",
    "not_asked_by_name": "it asked the proxy for an address or another name than the host's",
    "certificate_refused_now": "it refused the proxy's certificate; its next try passes unread",
    "certificate_refused": "it refused the proxy's certificate earlier, so it passes unread",
    "trust_not_configurable": "its TLS library reads no setting by which it could trust the proxy",
    "certificate_unusable": "the proxy's certificate does not cover this host",
    "worker_down": "the proxy worker did not run",
    "worker_died": "the proxy worker died",
    "worker_hung": "the proxy worker did not answer",
    "worker_slow": "the proxy worker was too slow",
    "worker_failing": "the proxy worker failed several times in a row",
    "worker_declined": "the proxy worker could not reach the host",
    "not_started": "the proxy worker had not started yet",
    "not_configured": "the configuration could not be read",
    "stopped": "metering was stopped",
}
PROXY_CAUSES = frozenset(_OF_PROXY)
KEY_LOG_CAUSES = frozenset(_OF_KEY_LOG)
CAUSES: Mapping[str, str] = {**_OF_PROBES, **_OF_KEY_LOG, **_OF_PROXY}
# Found by looking again and again: there may be more.
_AT_LEAST = frozenset({"proxy_ignored"})
_CHARACTERS_MAX = 1000


@dataclass(frozen=True, slots=True)
class Unmetered:
    """Connections of one program to one host that were not metered, for one cause.

    `program` is a file's path or name; `stack` its TLS library's name; `fix` the next command, ""
    for none. None means not known.
    """

    program: str | None
    host: str | None
    connections: int
    cause: str
    stack: str | None = None
    fix: str = ""

    def line(self) -> str:
        """ "not metered: wget (GnuTLS) to api.openai.com, 3 connections: CAUSE. Use: FIX"."""
        name = shown_program(self.program)
        who = f"{name} ({self.stack})" if self.stack else name
        least = "at least " if self.cause in _AT_LEAST else ""
        noun = "connection" if self.connections == 1 else "connections"
        where = self.host or "an unknown host"
        cause = CAUSES.get(self.cause, self.cause.replace("_", " "))
        said = f"not metered: {who} to {where}, {least}{self.connections:,} {noun}: {cause}"
        return f"{said}. Use: {self.fix}" if self.fix else said

    def as_json(self) -> dict[str, Any]:
        """For `--json`, `--json-summary` and the control socket."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def of_json(cls, told: dict[str, Any]) -> Self:
        """The inverse of `as_json`, of what another process says. Raises ValueError."""
        count = untrusted.whole_number(told, "connections")
        cause = untrusted.text(told, "cause", _CHARACTERS_MAX)
        if count is None or cause is None:
            raise ValueError("no cause or no count")
        texts = {
            name: untrusted.text(told, name, _CHARACTERS_MAX)
            for name in ("program", "host", "stack", "fix")
        }
        return cls(
            texts["program"], texts["host"], count, cause, texts["stack"], texts["fix"] or ""
        )


def shown_program(program: str | None) -> str:
    """A program's name for people: each path in it without its folders."""
    if not program:
        return "a program"
    return " ".join(word.rpartition("/")[2] or word for word in program.split(" "))


def lines(rows: Iterable[Unmetered], shown_max: int) -> list[str]:
    """One line a row, most connections first, and how many more there are."""
    ordered = sorted(rows, key=lambda row: -row.connections)
    said = [row.line() for row in ordered[:shown_max]]
    if len(ordered) > shown_max:
        more = sum(row.connections for row in ordered[shown_max:])
        said.append(f"not metered: {more:,} more connections; --json names them")
    return said
