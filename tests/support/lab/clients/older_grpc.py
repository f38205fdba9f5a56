"""`older_grpc.py HOST`: a gRPC channel of the maker's own SDK that asks for each line it reads.

A line is the prompt; the answer's id is printed when it has come. Run by the lab's client Python.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

Ask = Callable[[str, bool], str]


def xai() -> Ask:
    sdk, chats = import_module("xai_sdk"), import_module("xai_sdk.chat")
    client = sdk.Client(api_key="made-up-key-of-xai")

    def ask(prompt: str, stream: bool) -> str:
        chat = client.chat.create(model="grok-4-fast", messages=[chats.user(prompt)])
        response = [answer for answer, _ in chat.stream()][-1] if stream else chat.sample()
        return str(response.id)

    return ask


def gemini() -> Ask:
    api = import_module("google.ai.generativelanguage_v1beta")
    client = api.GenerativeServiceClient(client_options={"api_key": "made-up-key-of-gemini"})

    def ask(prompt: str, stream: bool) -> str:
        request = {"model": "models/gemini-2.5-flash", "contents": [{"parts": [{"text": prompt}]}]}
        if stream:
            return str(list(client.stream_generate_content(request=request))[-1].response_id)
        return str(client.generate_content(request=request).response_id)

    return ask


ask = {"api.x.ai": xai, "generativelanguage.googleapis.com": gemini}[sys.argv[1]]()
for line in sys.stdin:
    print(ask(line, '"stream": true' in line), flush=True)
