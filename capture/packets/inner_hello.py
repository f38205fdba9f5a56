"""Whose keys a connection has whose real ClientHello is encrypted (ECH, RFC 9849).

The key log names the random of the hello that is inside; on the wire is another one. Which
handshake of the log it is, the server's first encrypted record shows: that one's key opens it. A
client may send something of ECH's look where there is none (GREASE), and a server may refuse it:
then the log names the random on the wire, and nothing is tried.
"""

from __future__ import annotations

from collections.abc import Iterable

from capture.packets import tls
from capture.packets.keylog import KeyLog
from capture.packets.opening import Records, encrypted_records
from halton_meter.model import Direction

TRIALS_MAX = 256
"""Handshakes tried for one connection; each takes 60 us."""


def is_proof(work: Records) -> bool:
    """Whether these begin with the first record that a server encrypts, by TLS 1.3, behind a hello
    that may hold another one."""
    hello = work.keys.server_hello
    if not work.keys.may_be_outer or work.half.direction is Direction.SENT:
        return False
    return work.encrypted > 0 and work.index == 0 and hello is not None and hello.version == 0x0304


def find(keys: KeyLog, proof: Records, randoms: Iterable[bytes]) -> bool:
    """Whether one of these handshakes opens the record; its keys are then the connection's."""
    outer, hello = proof.keys.client_random, proof.keys.server_hello
    assert outer is not None
    assert hello is not None
    record, _, _ = next(encrypted_records(proof))
    for random in randoms:
        secret = keys.secret(random, "SERVER_HANDSHAKE_TRAFFIC_SECRET")
        if secret is None or not tls.suites(secret, hello.suite):
            continue
        if tls.key13(secret, hello.suite).open(record, 0) is not None:
            keys.also(random, outer)
            proof.keys.is_unwanted = False  # what name is inside, the request's head says
            return True
    return False
