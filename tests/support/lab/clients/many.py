"""Make many exchanges fast: `python many.py COUNT CONNECTIONS`, standard library only.

Each connection is kept alive and makes its share, one after the other, in a thread of its own.
Prints the ids that came back.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading

COUNT, CONNECTIONS = int(sys.argv[1]), int(sys.argv[2])
ids: list[str] = []


def work(numbers: range) -> None:
    """Make the exchanges `numbers` on one connection."""
    connection = http.client.HTTPSConnection("api.anthropic.com")
    for n in numbers:
        asked = {
            "model": "claude-haiku-4-5",
            "max_tokens": 100,
            "stream": n % 2 == 1,
            "messages": [{"role": "user", "content": f"lab[n={n}&chunks=4]"}],
        }
        connection.request("POST", "/v1/messages", json.dumps(asked), {"x-api-key": "made-up"})
        body = connection.getresponse().read()
        ids.append(body.partition(b'"id":"')[2].partition(b'"')[0].decode())
    connection.close()


threads = [
    threading.Thread(target=work, args=(range(first, COUNT, CONNECTIONS),))
    for first in range(CONNECTIONS)
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps(ids))
