"""Run a provider's own Python SDK in the lab: `python sdk.py CLIENT MODE FIRST COUNT [key=value…]`.

CLIENT is anthropic, openai, openai-responses, openai-embeddings, groq, xai, gemini, requests,
aiohttp, aiohttp-websocket, httpx2. MODE is sync, stream, async, async-stream, or several with
commas between. COUNT requests are made in each mode, numbered from FIRST (the scenario's `n`); the
async modes make them all at once. Prints one JSON line each: what the SDK itself read out of the
answer. It uses no code of the project.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

CLIENT, MODES, FIRST, COUNT = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
OPTIONS = "&".join(sys.argv[5:])
STREAM = False
MODELS = {
    "anthropic": "claude-haiku-4-5",
    "openai": "gpt-5-mini",
    "openai-responses": "gpt-5",
    "openai-embeddings": "text-embedding-3-small",
    "groq": "llama-3.3-70b-versatile",
    "xai": "grok-4",
    "gemini": "gemini-2.5-flash",
}


def prompt(n: int) -> str:
    """The prompt that asks the lab for scenario `n`."""
    return f"count this please lab[n={n}{'&' + OPTIONS if OPTIONS else ''}]"


def say(id_: str | None, input_tokens: int | None, output_tokens: int | None) -> None:
    """Tell what the SDK read."""
    print(json.dumps({"id": id_, "input": input_tokens, "output": output_tokens}), flush=True)


# --- Anthropic


def anthropic_arguments(n: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt(n)}]
    return {"model": MODELS["anthropic"], "max_tokens": 1000, "messages": messages}


def anthropic_sync(n: int) -> None:
    import anthropic

    client = shared(anthropic.Anthropic)
    if STREAM:
        with client.messages.stream(**anthropic_arguments(n)) as stream:
            message = stream.get_final_message()
    else:
        message = client.messages.create(**anthropic_arguments(n))
    say(message.id, message.usage.input_tokens, message.usage.output_tokens)


async def anthropic_async(n: int) -> None:
    import anthropic

    client = shared(anthropic.AsyncAnthropic)
    if STREAM:
        async with client.messages.stream(**anthropic_arguments(n)) as stream:
            message = await stream.get_final_message()
    else:
        message = await client.messages.create(**anthropic_arguments(n))
    say(message.id, message.usage.input_tokens, message.usage.output_tokens)


# --- OpenAI's SDK, for OpenAI and xAI; Groq's is of the same make


def chat_arguments(n: int, client: str) -> dict[str, Any]:
    arguments = {
        "model": MODELS[client],
        "messages": [{"role": "user", "content": prompt(n)}],
    }
    if STREAM:
        arguments["stream"] = True
        if client == "openai":
            arguments["stream_options"] = {"include_usage": True}
    return arguments


def openai_client(asynchronous: bool) -> Any:
    import os

    if CLIENT == "groq":
        import groq

        return shared(groq.AsyncGroq if asynchronous else groq.Groq)
    import openai

    kind = openai.AsyncOpenAI if asynchronous else openai.OpenAI
    if CLIENT == "xai":
        return shared(
            lambda: kind(base_url="https://api.x.ai/v1", api_key=os.environ["XAI_API_KEY"])
        )
    return shared(kind)


def say_chat(id_: str | None, usage: Any) -> None:
    say(id_, usage and usage.prompt_tokens, usage and usage.completion_tokens)


def usage_of(chunk: Any) -> Any:
    grown = getattr(chunk, "x_groq", None)
    return getattr(chunk, "usage", None) or (grown and grown.usage)


def chat_sync(n: int) -> None:
    made = openai_client(False).chat.completions.create(**chat_arguments(n, CLIENT))
    if not STREAM:
        return say_chat(made.id, made.usage)
    id_ = usage = None
    for chunk in made:
        id_, usage = chunk.id, usage_of(chunk) or usage
    say_chat(id_, usage)


async def chat_async(n: int) -> None:
    made = await openai_client(True).chat.completions.create(**chat_arguments(n, CLIENT))
    if not STREAM:
        return say_chat(made.id, made.usage)
    id_ = usage = None
    async for chunk in made:
        id_, usage = chunk.id, usage_of(chunk) or usage
    say_chat(id_, usage)


def say_response(response: Any) -> None:
    say(response.id, response.usage.input_tokens, response.usage.output_tokens)


def responses_sync(n: int) -> None:
    made = openai_client(False).responses.create(
        model=MODELS[CLIENT], input=prompt(n), stream=STREAM
    )
    if STREAM:
        for event in made:
            if event.type == "response.completed":
                say_response(event.response)
    else:
        say_response(made)


async def responses_async(n: int) -> None:
    made = await openai_client(True).responses.create(
        model=MODELS[CLIENT], input=prompt(n), stream=STREAM
    )
    if STREAM:
        async for event in made:
            if event.type == "response.completed":
                say_response(event.response)
    else:
        say_response(made)


def embeddings_sync(n: int) -> None:
    made = openai_client(False).embeddings.create(model=MODELS[CLIENT], input=prompt(n))
    say(None, made.usage.prompt_tokens, None)


async def embeddings_async(n: int) -> None:
    made = await openai_client(True).embeddings.create(model=MODELS[CLIENT], input=prompt(n))
    say(None, made.usage.prompt_tokens, None)


# --- Gemini


def say_gemini(answer: Any) -> None:
    usage = answer.usage_metadata
    say(answer.response_id, usage.prompt_token_count, usage.candidates_token_count)


def gemini_sync(n: int) -> None:
    from google import genai

    models = shared(genai.Client).models
    if STREAM:
        for answer in models.generate_content_stream(model=MODELS["gemini"], contents=prompt(n)):
            last = answer
        say_gemini(last)
    else:
        say_gemini(models.generate_content(model=MODELS["gemini"], contents=prompt(n)))


async def gemini_async(n: int) -> None:
    from google import genai

    models = shared(genai.Client).aio.models
    if STREAM:
        chunks = await models.generate_content_stream(model=MODELS["gemini"], contents=prompt(n))
        async for answer in chunks:
            last = answer
        say_gemini(last)
    else:
        say_gemini(await models.generate_content(model=MODELS["gemini"], contents=prompt(n)))


# --- plain HTTP clients, speaking Anthropic's API

URL = "https://api.anthropic.com/v1/messages"
HEADERS = {"x-api-key": "made-up", "anthropic-version": "2023-06-01"}


def say_raw(body: bytes) -> None:
    if not STREAM:
        message = json.loads(body)
        return say(
            message["id"], message["usage"]["input_tokens"], message["usage"]["output_tokens"]
        )
    id_ = usage = None
    for line in body.split(b"\n"):
        if line.startswith(b"data: "):
            event = json.loads(line[6:])
            id_ = event.get("message", {}).get("id") or id_
            usage = event.get("usage") or usage
    say(id_, usage and usage["input_tokens"], usage and usage["output_tokens"])


def raw_arguments(n: int) -> dict[str, Any]:
    return anthropic_arguments(n) | ({"stream": True} if STREAM else {})


def requests_sync(n: int) -> None:
    import requests

    answer = shared(requests.Session).post(
        URL, json=raw_arguments(n), headers=HEADERS, stream=STREAM
    )
    say_raw(b"".join(answer.iter_content(4096)))


async def aiohttp_async(n: int) -> None:
    import ssl

    import aiohttp

    session = shared(aiohttp.ClientSession)
    context = shared(ssl.create_default_context)
    async with session.post(URL, json=raw_arguments(n), headers=HEADERS, ssl=context) as answer:
        say_raw(await answer.read())


async def websocket_async(n: int) -> None:
    import ssl

    import aiohttp

    session = shared(aiohttp.ClientSession)
    context = shared(ssl.create_default_context)
    url = "https://api.openai.com/v1/responses"
    options = {"ssl": context, "headers": {"authorization": "Bearer made-up"}, "compress": 15}
    # aiohttp reads no variable for a proxy of WebSockets but WSS_PROXY.
    options["proxy"] = os.environ.get("HTTPS_PROXY")
    async with session.ws_connect(url, **options) as socket:
        await socket.send_json({"type": "response.create", "model": "gpt-5", "input": prompt(n)})
        async for message in socket:
            event = json.loads(message.data)
            if event["type"] == "response.completed":
                response = event["response"]
                usage = response["usage"]
                say(response["id"], usage["input_tokens"], usage["output_tokens"])
                break


async def httpx2_async(n: int) -> None:
    import httpx

    client = shared(lambda: httpx.AsyncClient(http2=True, timeout=60))
    answer = await client.post(URL, json=raw_arguments(n), headers=HEADERS)
    assert answer.http_version == "HTTP/2"
    say_raw(answer.content)


_shared: dict[Any, Any] = {}


def shared(make: Any) -> Any:
    """One object a kind for the whole run."""
    key = getattr(make, "__qualname__", make)
    if key not in _shared:
        _shared[key] = make()
    return _shared[key]


SYNC = {
    "anthropic": anthropic_sync,
    "openai": chat_sync,
    "groq": chat_sync,
    "xai": chat_sync,
    "openai-responses": responses_sync,
    "openai-embeddings": embeddings_sync,
    "gemini": gemini_sync,
    "requests": requests_sync,
}
ASYNC = {
    "anthropic": anthropic_async,
    "openai": chat_async,
    "groq": chat_async,
    "xai": chat_async,
    "openai-responses": responses_async,
    "openai-embeddings": embeddings_async,
    "gemini": gemini_async,
    "aiohttp": aiohttp_async,
    "aiohttp-websocket": websocket_async,
    "httpx2": httpx2_async,
}


async def all_at_once() -> None:
    """Every request at the same time, on one loop."""
    await asyncio.gather(*(ASYNC[CLIENT](n) for n in range(FIRST, FIRST + COUNT)))
    for thing in _shared.values():
        if hasattr(thing, "aclose"):
            await thing.aclose()
        elif asyncio.iscoroutinefunction(getattr(thing, "close", None)):
            await thing.close()


for mode in MODES.split(","):
    STREAM = mode.endswith("stream")
    _shared.clear()
    if mode.startswith("async"):
        asyncio.run(all_at_once())
    else:
        for number in range(FIRST, FIRST + COUNT):
            SYNC[CLIENT](number)
