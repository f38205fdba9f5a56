"""`older.py HOST`: an HTTP/2 connection that makes a request now, and one for each line it reads.

A line is the request's body; the answer's id is printed when it has come. Run by the lab's client
Python.
"""

from __future__ import annotations

import re
import sys

import httpx

# By default it gives up a connection that was idle for five seconds, and opens another.
client = httpx.Client(http2=True, timeout=60, limits=httpx.Limits(keepalive_expiry=None))
url = f"https://{sys.argv[1]}/v1/messages"
headers = {"x-api-key": "made-up", "anthropic-version": "2023-06-01"}
for line in sys.stdin:
    answer = client.post(url, content=line.encode(), headers=headers)
    assert answer.http_version == "HTTP/2"
    found = re.search(r'"id": ?"(msg_\w+)"', answer.text)
    print(found[1] if found else len(answer.content), flush=True)
