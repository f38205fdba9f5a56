"""What a command is told, so that it writes its keys."""

from __future__ import annotations

import os
from pathlib import Path

from halton_meter.live.keylog.told import environment, why_no_keys

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


def test_a_key_file_that_can_give_no_keys_is_told_with_the_reason(tmp_path: Path) -> None:
    no_file = "it is no regular file"
    os.mkfifo(tmp_path / "pipe")
    for name in ("/dev/null", str(tmp_path), str(tmp_path / "pipe")):
        assert why_no_keys(Path(name)) == no_file
    assert why_no_keys(tmp_path / "nothing") == "the command has not made it"
    assert why_no_keys(Path("/dev/null/keys")) == "Not a directory"
    (tmp_path / "keys.log").touch()
    assert why_no_keys(tmp_path / "keys.log") is None
