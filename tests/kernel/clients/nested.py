"""Capture a client in this process's own PID namespace: argv holds library, host and loader.

Prints what was seen as JSON: plaintext bytes each way, and the process by the ids known in here.
"""

import json
import subprocess
import sys
from pathlib import Path

from capture.helper_process import Scope
from capture.uprobes import UprobeSource
from halton_meter.model import Direction, TlsChunk

library, host, loader = sys.argv[1:]
exchanges = [sys.executable, str(Path(__file__).with_name("exchanges.py")), "1", "2", "10", "20000"]
# A shell that stays: the client is its child, in scope by descent alone.
client = subprocess.Popen(
    ["sh", "-c", 'read go; "$@"; echo done', "sh", *exchanges],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
)
source = UprobeSource(
    [host],
    Scope(roots=(client.pid,)),
    files=[library],
    cache_directory=None,
    loader=loader,
)
source.start(120)
client.communicate(b"go\n")
chunks = [event for event in source.drain(60) if isinstance(event, TlsChunk)]
process = chunks[0].connection.process if chunks else None
print(
    json.dumps(
        {
            "sent": sum(len(c.data) for c in chunks if c.direction is Direction.SENT),
            "received": sum(len(c.data) for c in chunks if c.direction is Direction.RECEIVED),
            "client": client.pid,
            "pid": process and process.pid,
            "parents": process and process.parents,
            "argv": process and process.argv,
        }
    )
)
source.stop()
