"""`rust.py LIBRARY THREADS CONNECTIONS REQUESTS [http1|http2] [HOST…] [chunks=4…]`: through rustls.

Each thread makes CONNECTIONS clients, one after the other and each with a connection of its own,
on which it makes REQUESTS requests; hosts take turns. LIBRARY is a package that has a rustls of its
own, reached through PYTHONPATH. Prints the ids that came back. `wait` as the last word: a line is
waited for before each round of requests.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import threading
from typing import Any

library, threads, connections, requests = sys.argv[1], *map(int, sys.argv[2:5])
words = sys.argv[5:]
waits = words[-1:] == ["wait"]
version = next((word for word in words if word.startswith("http")), "http1")
scenario = "&".join(word for word in words if "=" in word) or "chunks=4"
hosts = [word for word in words if "." in word] or ["api.openai.com"]
AUTHORITY = os.environ.get("SSL_CERT_FILE", "")
ids: list[str] = []


class Asker:
    """One client of that library: what it has sent stays on one connection."""

    def __init__(self) -> None:
        module: Any = importlib.import_module(library)
        self.name = library
        if library == "pyreqwest":
            client = importlib.import_module("pyreqwest.client")
            builder = client.SyncClientBuilder()
            with open(AUTHORITY, "rb") as file:
                builder = builder.add_root_certificate_pem(file.read())
            only = builder.http1_only if version == "http1" else builder.http2_prior_knowledge
            self.client = only().build()
        elif library == "impit":
            browser = {"http2": "chrome"}.get(version)
            self.client = module.Client(verify=False, browser=browser)
        elif library == "httpr":
            only = {f"{version}_only": True}
            self.client = module.Client(ca_cert_file=AUTHORITY, **only)
        else:  # primp: by itself it resolves no names of /etc/hosts
            self.client = module.Client(ca_cert_file=AUTHORITY, dns_resolver="system")

    def ask(self, host: str, n: int) -> str:
        """The text of an answer."""
        asked = {
            "model": "gpt-5-mini",
            "stream": n % 2 == 1,
            "stream_options": {"include_usage": True},
            "messages": [{"role": "user", "content": f"say lab[n={n}&{scenario}] " + "x" * 40 * n}],
        }
        if not asked["stream"]:
            del asked["stream_options"]
        url, headers = f"https://{host}/v1/chat/completions", {"authorization": "Bearer made-up"}
        headers["accept-encoding"] = "identity"
        if self.name == "pyreqwest":
            sent = self.client.post(url).headers(headers).body_json(asked).build().send()
            return str(sent.text())
        headers["content-type"] = "application/json"
        return str(self.client.post(url, content=json.dumps(asked).encode(), headers=headers).text)


def work(first: int) -> None:
    """All of one thread's."""
    for made in range(connections):
        asker = Asker()
        for request in range(requests):
            if waits:
                sys.stdin.readline()
            n = (first + made + request) % 50
            text = asker.ask(hosts[(first + made) % len(hosts)], n)
            found = re.search(r'"id": ?"([\w-]+)"', text)
            ids.append(found[1] if found else "")
            if waits:
                print(ids[-1], flush=True)


started = [threading.Thread(target=work, args=(each,)) for each in range(threads)]
for each in started:
    each.start()
for each in started:
    each.join()
print(json.dumps(ids))
