"""That a probe can give the keys of a program that writes none: Go's, by the function that would.

No product code does so: of such programs uprobes read the plaintext. It is the proof of what
docs/capture.md says, where what is known of other libraries stands, too.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from capture import bpf, loader
from capture.functions.elf import Elf
from tests.lab.test_key_log import home as home
from tests.lab.test_key_log_losses import Metered, sniffing
from tests.support.go_programs import GO, go_program
from tests.support.lab.lab import Lab
from tests.support.lab.scenario import Scenario
from tests.support.waiting import wait_until

CODE = Path(__file__).parents[1] / "support" / "code"
pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(GO is None, reason="needs Go"),
    pytest.mark.skipif(shutil.which("clang") is None, reason="needs clang"),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="the probe reads x86-64"),
]
FUNCTION = b"crypto/tls.(*Config).writeKeyLog"
RING_BYTES = 1 << 20
REQUESTS = 3  # of the client


class KeysOfGo:
    """A probe on one process of a Go program; `lines` are in the format of key logs."""

    def __init__(self, folder: Path, program: Path, pid: int) -> None:
        compiled = folder / "go_keys.o"
        command = ["clang", "-O2", "-g", "-target", "bpf", "-D__x86_64__", f"-DTGID={pid}"]
        command += ["-I/usr/include/x86_64-linux-gnu", "-c", str(CODE / "go_keys.bpf.c")]
        subprocess.run([*command, "-o", str(compiled)], check=True, capture_output=True)
        library = self._library = loader.libbpf_library()
        library.bpf_object__open_file.restype = ctypes.c_void_p
        library.bpf_object__find_program_by_name.restype = ctypes.c_void_p
        self._object = ctypes.c_void_p(library.bpf_object__open_file(bytes(compiled), None))
        assert library.bpf_object__load(self._object) == 0
        ring = library.bpf_object__find_map_fd_by_name(self._object, b"ring")
        self._ring = bpf.Ring(ring, RING_BYTES)
        found = library.bpf_object__find_program_by_name(self._object, b"write_key_log")
        fd = library.bpf_program__fd(ctypes.c_void_p(found))
        with Elf(program) as elf:
            [symbol] = elf.symbols((FUNCTION.decode(),))
            offset = elf.offset_of(symbol.address)
        assert offset is not None
        self._link = bpf.attach_uprobe(fd, str(program), offset, at_return=False)

    def lines(self) -> Iterator[str]:
        for _, record in self._ring.records():
            sizes = struct.unpack_from("=3Q", record)
            label, random, secret = (
                bytes(record[at : at + size]) for at, size in zip((24, 88, 120), sizes, strict=True)
            )
            yield f"{label.decode()} {random.hex()} {secret.hex()}\n"

    def close(self) -> None:
        os.close(self._link)
        self._library.bpf_object__close(self._object)


@pytest.mark.parametrize("mode", [(), ("http2",)], ids=["http1", "http2"])
def test_a_go_program_without_a_key_log_is_metered_by_its_packets(
    lab: Lab, home: Path, mode: tuple[str, ...]
) -> None:
    program = lab.folder / "programs" / "go-without-keys"
    program.parent.mkdir(exist_ok=True)
    if not program.exists():
        shutil.copy2(go_program(CODE / "go_client"), program)
    for path in (program, program.parent):
        path.chmod(0o755)
    body = {
        "model": "claude-sonnet-4-5",
        "max_tokens": 64,
        "messages": [{"role": "user", "content": Scenario(n=3).marker}],
    }
    environment = lab.environment(CA=str(lab.folder / "ca.pem"), BODY=json.dumps(body))
    url = "https://api.anthropic.com/v1/messages"
    # It waits with the process id that the probe is for.
    argv = ["sh", "-c", 'read go; exec "$0" "$@"', str(program), url, *mode]
    keys = home / "keys.log"
    skip = len(lab.ledger())
    with sniffing(lab, 16 << 20) as sniffer:
        metered = Metered(sniffer.link, keys, home / "data")
        client = lab.popen(argv, user=lab.user, env=environment, stdin=-1, stdout=-1, text=True)
        probe = KeysOfGo(home, program, client.pid)
        try:
            client.communicate("go\n", timeout=60)
            assert client.returncode == 0

            def is_metered() -> bool:
                with keys.open("a") as file:
                    file.writelines(probe.lines())
                metered.read()
                return len(metered.events) == REQUESTS

            wait_until(is_metered, "the requests")
        finally:
            probe.close()
            metered.finish()
    served = lab.ledger()[skip:]
    assert [event.usage.response_id for event in metered.events] == [
        entry["response_id"] for entry in served
    ]
    assert metered.source.losses == {}
