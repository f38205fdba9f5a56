"""Asks xAI or Gemini over gRPC with their own SDKs: `grpc_client.py xai|gemini COUNT [stream]`.

Run by the lab's client Python. Prints what the SDK understood, a line of JSON for each answer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any


def ask_xai(prompt: str, stream: bool) -> dict[str, Any]:
    sdk, chats = import_module("xai_sdk"), import_module("xai_sdk.chat")
    client = sdk.Client(api_key="made-up-key-of-xai")
    chat = client.chat.create(model="grok-4-fast", messages=[chats.user(prompt)])
    response: Any = [answer for answer, _ in chat.stream()][-1] if stream else chat.sample()
    usage = response.usage
    return {"id": response.id, "input": usage.prompt_tokens, "output": usage.completion_tokens}


def ask_gemini(prompt: str, stream: bool) -> dict[str, Any]:
    api = import_module("google.ai.generativelanguage_v1beta")
    client = api.GenerativeServiceClient(client_options={"api_key": "made-up-key-of-gemini"})
    request = {"model": "models/gemini-2.5-flash", "contents": [{"parts": [{"text": prompt}]}]}

    def answers() -> Iterator[Any]:
        if stream:
            yield from client.stream_generate_content(request=request)
        else:
            yield client.generate_content(request=request)

    *_, last = answers()
    usage = last.usage_metadata
    return {
        "id": last.response_id,
        "input": usage.prompt_token_count,
        "output": usage.candidates_token_count,
    }


def main(who: str, count: str, mode: str = "whole") -> None:
    ask = {"xai": ask_xai, "gemini": ask_gemini}[who]
    for n in range(1, int(count) + 1):
        print(json.dumps(ask(f"say lab[n={n}&chunks=4]", mode == "stream")))


if __name__ == "__main__":
    main(*sys.argv[1:])
