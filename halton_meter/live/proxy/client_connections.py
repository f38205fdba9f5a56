"""Clients' connections to providers: how many were metered, which were not, and why.

It counts what the edge passed on unread and what the worker says of handshakes, keeps which
programs refuse our certificate, and gives the counts to a worker to be stored. Which connections
are passed on, and whom the edge trusts with a handshake, is the edge's
(`proxy_fallback/edge/edge.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halton_meter import untrusted
from halton_meter.coverage import Coverage, Part
from halton_meter.live.proxy.programs import CERTIFICATE
from halton_meter.live.proxy.refusals_file import RUN_NAME, SERVICE_NAME, RefusalsFile
from halton_meter.live.proxy.worker import CA_FOLDER
from halton_meter.live.proxy.worker_answers import SAID_CHARACTERS_MAX
from halton_meter.live.remedies import fix_for
from halton_meter.live.unmetered import Unmetered
from proxy_fallback.edge.edge import Edge

HOST_CHARACTERS_MAX = 255
PROGRAMS_MAX = 512


class ClientConnections:
    """The connections since the start, by program, host and cause, in `connections`.

    `bypassed` is how many passed unmetered. `lets_down` says whether clients may leave because of
    us: then it is no refusal.
    """

    def __init__(
        self, edge: Edge, home: Path, lets_down: Callable[[], bool], *, service: bool
    ) -> None:
        self.connections = Coverage(is_known=True)
        self.bypassed = 0
        self._edge = edge
        self._lets_down = lets_down
        self._is_service = service
        name = SERVICE_NAME if service else RUN_NAME
        self._refusals = RefusalsFile(home / name, home / CA_FOLDER / CERTIFICATE)
        self._refusals_kept: list[tuple[str, str | None]] = []
        # What no worker has stored yet.
        self._unreported: Counter[str] = Counter()
        self._unreported_connections = Coverage()
        # Connections that ended because their program refused our certificate, by (program, host).
        self._refused: Counter[tuple[str | None, str]] = Counter()
        edge.on_bypass = self._on_bypass

    def take_handshake(self, message: dict[str, Any]) -> None:
        """What the worker says of how a program took our certificate.

        Raises TypeError, ValueError or IndexError for a message that is malformed.
        """
        trust = self._edge.trust
        if "opened" in message:
            address, port = message["opened"]
            self._edge.opened.append((untrusted.printable(address), int(port)))
        if "judged" in message:
            trust.judged(untrusted.printable(message["judged"], HOST_CHARACTERS_MAX))
        for what in ("refused", "left", "trusted", "passed"):
            if what not in message:
                continue
            host, program, *rest = message[what]
            host = untrusted.printable(host, HOST_CHARACTERS_MAX)
            program = untrusted.text({"program": program}, "program", SAID_CHARACTERS_MAX)
            stack = untrusted.text(message, "stack")
            if stack is not None and len(self._refusals.stacks) < PROGRAMS_MAX:
                self._refusals.stacks[program] = stack
            if what == "refused":
                if rest[0] is True or not self._lets_down():
                    trust.refuse(host, program, rest[0] is True)
            elif what == "left" and not self._lets_down():
                trust.left(host, program, rest[0] is True)
            elif what == "trusted":
                trust.trust(host, program)
                self.count(program, host, None)
            elif what == "passed":
                self._edge.counts["metered"] -= 1
                self._edge.count_bypass(host, "trust_not_configurable", program)
            if what in ("refused", "left"):
                self._count_refused(host, program)
        self._keep_refusals()

    def _count_refused(self, host: str, program: str | None) -> None:
        """Count an attempt that failed because of our certificate, for those who read the end."""
        key = (program, host)
        known = key in self._refused or len(self._refused) < PROGRAMS_MAX
        if known and self._edge.trust.is_refused(host, program):
            self._refused[key] += 1

    def recall_refusals(self) -> None:
        """Take up what was kept of runs before; not before there is a certificate authority."""
        self._edge.trust.known(self._refusals.read())
        self._refusals_kept = self._edge.refusals()

    def forget_refusals(self) -> None:
        """Try every program again."""
        self._edge.forget_refusals()
        self._keep_refusals()

    def _keep_refusals(self) -> None:
        certain = self._edge.refusals()
        if certain != self._refusals_kept:
            self._refusals_kept = certain
            self._refusals.write(certain)

    def unmetered(self) -> list[Unmetered]:
        """The connections to providers that passed unmetered, by program, host and cause."""
        rows = []
        refused = {(*key, "certificate_refused_now"): n for key, n in self._refused.items()}
        for (program, host, cause), count in (refused | self._edge.unmetered).items():
            stack = self._refusals.stacks.get(program)
            fix = fix_for(cause, program, stack, service=self._is_service)
            rows.append(Unmetered(program, host, count, cause, stack, fix))
        return rows

    def _on_bypass(self, host: str, cause: str, program: str | None) -> None:
        self.bypassed += 1
        self.count(program, host, cause)
        self._unreported[f"unmetered_{cause}"] += 1

    def count(
        self, program: str | None, host: str, cause: str | None, connections: int = 1
    ) -> None:
        """Count connections to a provider, for coverage; `cause` is None for metered ones."""
        part = Part(program, host, self._refusals.stacks.get(program), cause)
        for counted in (self.connections, self._unreported_connections):
            counted.add(part, connections, None)

    def report(self, send: Callable[[dict[str, Any]], bool]) -> None:
        """Let a worker store what none has stored yet; `send` says whether it got a message."""
        counted = self._unreported_connections
        if counted.parts and send({"connections": counted.as_json()}):
            self._unreported_connections = Coverage()
        if self._unreported and send({"losses": self._unreported}):
            self._unreported = Counter()
