"""What a command is told, so that it writes its keys."""

from __future__ import annotations

from pathlib import Path

from halton_meter.live.keylog.told import environment

KEYS = Path("/tmp/keys/keys.log")


def test_a_command_is_told_one_file_in_both_ways() -> None:
    told, file = environment({"PATH": "/bin"}, KEYS)
    assert file == KEYS
    assert told == {
        "PATH": "/bin",
        "SSLKEYLOGFILE": str(KEYS),
        "NODE_OPTIONS": f"--tls-keylog={KEYS}",
    }


def test_what_the_user_has_set_is_kept() -> None:
    own = {"SSLKEYLOGFILE": "/home/ann/keys.log", "NODE_OPTIONS": "--max-old-space-size=100"}
    told, file = environment(own, KEYS)
    assert file == Path("/home/ann/keys.log")
    assert told["NODE_OPTIONS"] == "--max-old-space-size=100 --tls-keylog=/home/ann/keys.log"
    own["NODE_OPTIONS"] = "--tls-keylog=/elsewhere"
    assert environment(own, KEYS)[0]["NODE_OPTIONS"] == "--tls-keylog=/elsewhere"


def test_node_is_told_no_name_that_would_stop_it() -> None:
    told, _ = environment({"SSLKEYLOGFILE": "/home/ann/my keys.log"}, KEYS)
    assert "NODE_OPTIONS" not in told
