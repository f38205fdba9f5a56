"""One scripted conversation with several providers: `python conversation.py`, in the lab.

HTTP/1.1 by the standard library, HTTP/2 by httpx, a WebSocket by aiohttp. The answers' ids are
made of $RUN and the call's number. It goes through HTTPS_PROXY where that is set. Prints one line
a call. It uses no code of the project.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import ssl
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import httpx

KEY = {"x-api-key": "made-up", "authorization": "Bearer made-up", "x-goog-api-key": "made-up"}
CHAT = "/v1/chat/completions"


def marker(n: int, **options: Any) -> str:
    """What asks the lab for scenario `n`; every call has another `n`, and so another id."""
    named = {"n": n, "serial": f"{os.environ['RUN']}{n:012d}"} | options
    return "count this please lab[" + "&".join(f"{k}={v}" for k, v in named.items()) + "]"


def prompted(model: str, text: str, stream: bool = False) -> dict[str, Any]:
    """A request of OpenAI's and of Anthropic's shape."""
    return {
        "model": model,
        "max_tokens": 1000,
        "messages": [{"role": "user", "content": text}],
        "stream": stream,
    }


def connect(host: str) -> http.client.HTTPSConnection:
    """A connection to a provider, by the proxy of the environment if there is one."""
    context = ssl.create_default_context()
    proxy = urlsplit(os.environ.get("HTTPS_PROXY", ""))
    if not proxy.hostname:
        return http.client.HTTPSConnection(host, context=context, timeout=30)
    connection = http.client.HTTPSConnection(
        proxy.hostname, proxy.port, context=context, timeout=30
    )
    connection.set_tunnel(host, 443)
    return connection


def http1(host: str, calls: list[tuple[str, Any]], leave_after: int = 0) -> None:
    """The calls (path, body) one after the other on one connection."""
    connection = connect(host)
    for path, body in calls:
        headers = KEY | {"content-type": "application/json"}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        if data is body:
            headers["content-type"] = "multipart/form-data; boundary=lab"
        connection.request("POST", path, data, headers)
        answer = connection.getresponse()
        if leave_after:
            while b"delta" not in answer.readline():
                pass
            connection.sock.shutdown(socket.SHUT_RDWR)
            connection.sock.close()
            print(host, path, answer.status, "left")
            return
        try:
            size = len(answer.read())
        except (http.client.HTTPException, OSError):
            print(host, path, answer.status, "cut off")
            return
        print(host, path, answer.status, size)
    connection.close()


async def http2(calls: list[tuple[str, Any]]) -> None:
    """Calls (URL, body) at the same time, multiplexed."""
    async with httpx.AsyncClient(http2=True, timeout=30, headers=KEY) as client:

        async def call(url: str, body: Any) -> None:
            async with client.stream("POST", url, json=body) as answer:
                size = sum([len(part) async for part in answer.aiter_raw()])
                print(url, answer.http_version, answer.status_code, size)

        await call(*calls[0])  # opens the connection that the others share
        await asyncio.gather(*(call(*each) for each in calls[1:]))


async def websocket(numbers: range) -> None:
    """Turns of the Responses API on one socket, compressed."""
    url = "https://api.openai.com/v1/responses"
    async with (
        aiohttp.ClientSession(trust_env=True) as session,
        session.ws_connect(
            url, ssl=ssl.create_default_context(), headers=KEY, compress=15
        ) as socket,
    ):
        for n in numbers:
            asked = {"type": "response.create", "model": "gpt-5", "input": marker(n)}
            await socket.send_json(asked)
            async for message in socket:
                if json.loads(message.data)["type"] == "response.completed":
                    print(url, "turn", n)
                    break


def audio(text: str, size: int) -> bytes:
    """A form with a model, a prompt and so many bytes of sound."""
    head = (
        '--lab\r\nContent-Disposition: form-data; name="model"\r\n\r\ngpt-4o-transcribe\r\n'
        f'--lab\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n{text}\r\n'
        '--lab\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
        "Content-Type: audio/wav\r\n\r\n"
    )
    return head.encode() + bytes(range(256)) * (size // 256) + b"\r\n--lab--\r\n"


claude, gpt, llama = "claude-haiku-4-5", "gpt-5-mini", "llama-3.3-70b-versatile"
gemini = "/v1beta/models/gemini-2.5-flash"
http1(
    "api.anthropic.com",
    [
        ("/v1/messages", prompted(claude, marker(1))),
        ("/v1/messages", prompted(claude, marker(2, coding="gzip"), stream=True)),
        ("/v1/messages", prompted(claude, marker(3, coding="br", chunks=40), stream=True)),
        ("/v1/messages", prompted(claude, marker(4, status=529))),
    ],
)
http1("api.anthropic.com", [("/v1/messages", prompted(claude, marker(5, cut=4), stream=True))])
http1(
    "api.anthropic.com",
    [("/v1/messages", prompted(claude, marker(6, chunks=500, delay_ms=400), stream=True))],
    leave_after=1,
)
http1(
    "api.openai.com",
    [
        (CHAT, prompted(gpt, marker(7, coding="zstd"))),
        (CHAT, prompted(gpt, marker(8), stream=True) | {"stream_options": {"include_usage": True}}),
        ("/v1/embeddings", {"model": "text-embedding-3-small", "input": marker(9)}),
        ("/v1/embeddings", {"model": "text-embedding-3-small", "input": marker(9)}),
        ("/v1/audio/transcriptions", audio(marker(10), 700_000)),
        ("/v1/responses", {"model": "gpt-5", "input": marker(11), "stream": True}),
    ],
)
http1("api.groq.com", [("/openai" + CHAT, prompted(llama, marker(12), stream=True))])
http1(
    "generativelanguage.googleapis.com",
    [
        (f"{gemini}:generateContent", {"contents": [{"parts": [{"text": marker(13)}]}]}),
        (f"{gemini}:streamGenerateContent", {"contents": [{"parts": [{"text": marker(14)}]}]}),
        (
            f"{gemini}:streamGenerateContent?alt=sse",
            {"contents": [{"parts": [{"text": marker(15, coding="gzip")}]}]},
        ),
    ],
)
asyncio.run(
    http2(
        [
            ("https://api.anthropic.com/v1/messages", prompted(claude, marker(n, **more), stream))
            for n, stream, more in (
                (20, False, {}),
                (21, True, {"chunks": 30, "delay_ms": 2}),
                (22, True, {"coding": "zstd", "chunks": 30, "delay_ms": 1}),
                (23, False, {"coding": "br", "piece_bytes": 20_000}),
                (24, False, {"status": 429}),
                (25, True, {"piece_bytes": 30_000}),
            )
        ]
    )
)
asyncio.run(websocket(range(30, 33)))
