"""Asks again as soon as it is answered, until it is refused: runaway.py [TIMES [MS]].

Standard library only: nothing lies between an answer and the next request. It goes through the
proxy that HTTPS_PROXY names. Each answer is a line; a refusal is the last one.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import sys

HOST = "api.anthropic.com"
# 101 uncached input tokens, 64 read from and 32 written to a cache, 29 output tokens.
PROMPT = "lab[n=1&chunks=8&delay_ms={}]"


def connection() -> http.client.HTTPSConnection:
    context = ssl.create_default_context(cafile=os.environ["SSL_CERT_FILE"])
    proxy = os.environ.get("HTTPS_PROXY", "").rpartition("/")[2]
    if not proxy:
        return http.client.HTTPSConnection(HOST, 443, context=context)
    name, _, port = proxy.partition(":")
    made = http.client.HTTPSConnection(name, int(port), context=context)
    made.set_tunnel(HOST, 443)
    return made


def main() -> int:
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    delay_ms = sys.argv[2] if len(sys.argv) > 2 else "5"
    messages = [{"role": "user", "content": PROMPT.format(delay_ms)}]
    body = {"model": "claude-opus-4-1", "max_tokens": 100, "stream": True, "messages": messages}
    headers = {"content-type": "application/json", "x-api-key": "made-up"}
    asking = connection()
    for _ in range(times):
        asking.request("POST", "/v1/messages", json.dumps(body), headers)
        answer = asking.getresponse()
        said = answer.read()
        if answer.status != 200:
            print(answer.status, said.decode(), flush=True)
            return 3
        print("answered", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
