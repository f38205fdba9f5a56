"""NAME COUNT: COUNT requests to Anthropic or OpenAI by a library as its documentation calls it.

The rest comes by the environment, as for any client: SSL_CERT_FILE, keys, proxies. It uses no code
of the project. Imports are within the functions: each runs where only its own library is there.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
from collections.abc import Callable
from typing import Any

NAME, COUNT = sys.argv[1], int(sys.argv[2])
MESSAGES, CHAT = (
    "https://api.anthropic.com/v1/messages",
    "https://api.openai.com/v1/chat/completions",
)
CLAUDE, GPT = "claude-haiku-4-5", "gpt-5-mini"
PROMPT = "say lab[n=3&chunks=4]"
ASKED: dict[str, Any] = {
    "model": CLAUDE,
    "max_tokens": 100,
    "messages": [{"role": "user", "content": PROMPT}],
}
if "ANSWER_SLOWLY" in os.environ:  # as models do
    ASKED |= {
        "stream": True,
        "messages": [{"role": "user", "content": PROMPT[:-1] + "&delay_ms=20]"}],
    }
BODY = json.dumps(ASKED).encode()
HEADERS = {"content-type": "application/json", "x-api-key": "made-up"}
ROOTS = os.environ["SSL_CERT_FILE"]
HEAD = (
    b"POST /v1/messages HTTP/1.1\r\nHost: api.anthropic.com\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(BODY)
)


def times(ask: Callable[[], object]) -> None:
    for _ in range(COUNT):
        ask()


# --- HTTP libraries


def primp() -> None:
    import primp

    client = primp.Client(ca_cert_file=ROOTS)
    times(lambda: client.post(MESSAGES, content=BODY, headers=HEADERS).content)


def rnet() -> None:
    import rnet

    async def main() -> None:
        client = rnet.Client(verify=False)
        for _ in range(COUNT):
            await (await client.post(MESSAGES, body=BODY, headers=HEADERS)).text()

    asyncio.run(main())


def tls_client() -> None:
    import tls_client

    session = tls_client.Session()
    times(lambda: session.post(MESSAGES, data=BODY, headers=HEADERS, insecure_skip_verify=True))


def curl_cffi() -> None:
    from curl_cffi import requests

    session: Any = requests.Session(impersonate="chrome", verify=ROOTS)
    times(lambda: session.post(MESSAGES, data=BODY, headers=HEADERS).content)


def pycurl() -> None:
    import pycurl

    handle = pycurl.Curl()
    handle.setopt(handle.URL, MESSAGES)
    handle.setopt(handle.CAINFO, ROOTS)
    handle.setopt(handle.POSTFIELDS, BODY.decode())
    handle.setopt(handle.HTTPHEADER, ["content-type: application/json"])
    handle.setopt(handle.WRITEDATA, io.BytesIO())
    times(handle.perform)


def niquests() -> None:
    import niquests

    session = niquests.Session()
    times(lambda: session.post(MESSAGES, data=BODY, headers=HEADERS, verify=ROOTS).content)


def impit() -> None:
    import impit

    client = impit.Client(verify=False)
    times(lambda: client.post(MESSAGES, content=BODY, headers=HEADERS).content)


def httpr() -> None:
    import httpr

    client = httpr.Client(ca_cert_file=ROOTS)
    times(lambda: client.post(MESSAGES, content=BODY, headers=HEADERS).content)


def pyreqwest() -> None:
    from pyreqwest.client import SyncClientBuilder

    with SyncClientBuilder().danger_accept_invalid_certs(True).build() as client:
        times(lambda: client.post(MESSAGES).headers(HEADERS).body_bytes(BODY).build().send().status)


def tlslite() -> None:
    from tlslite import HTTPTLSConnection

    connection = HTTPTLSConnection("api.anthropic.com", 443)
    for _ in range(COUNT):
        connection.request("POST", "/v1/messages", BODY, HEADERS)
        connection.getresponse().read()


def treq() -> None:
    import treq as it
    from twisted.internet import defer, task

    async def main(_: object) -> None:
        for _ in range(COUNT):
            await it.content(await it.post(MESSAGES, data=BODY, headers=HEADERS))

    task.react(lambda reactor: defer.ensureDeferred(main(reactor)))


def tornado() -> None:
    from tornado.httpclient import HTTPClient

    client = HTTPClient()
    times(lambda: client.fetch(MESSAGES, method="POST", body=BODY, headers=HEADERS, ca_certs=ROOTS))


def gevent() -> None:
    from gevent import monkey

    monkey.patch_all()
    import gevent as it
    import requests

    def ask() -> None:
        requests.post(MESSAGES, data=BODY, headers=HEADERS, verify=ROOTS, timeout=60)

    it.joinall([it.spawn(ask) for _ in range(COUNT)], raise_error=True)


def urllib() -> None:
    from urllib.request import Request, urlopen

    times(lambda: urlopen(Request(MESSAGES, BODY, HEADERS)).read())


def asyncio_streams() -> None:
    """A hand-made client: Python's own asyncio with a memory BIO."""

    async def main() -> None:
        import ssl

        context = ssl.create_default_context(cafile=ROOTS)
        for _ in range(COUNT):
            reader, writer = await asyncio.open_connection("api.anthropic.com", 443, ssl=context)
            writer.write(HEAD + BODY)
            await reader.read()
            writer.close()

    asyncio.run(main())


# --- frameworks


def litellm() -> None:
    import litellm as it

    it.telemetry = False
    for n in range(COUNT):
        model = f"openai/{GPT}" if n % 2 else f"anthropic/{CLAUDE}"
        it.completion(model=model, messages=[{"role": "user", "content": PROMPT}])


def langchain_openai() -> None:
    from langchain_openai import ChatOpenAI

    times(lambda: ChatOpenAI(model=GPT).invoke(PROMPT))


def langchain_anthropic() -> None:
    from langchain_anthropic import ChatAnthropic

    times(lambda: ChatAnthropic(model=CLAUDE).invoke(PROMPT))


def openai_agents() -> None:
    from agents import Agent, Runner, set_tracing_disabled

    set_tracing_disabled(True)
    times(lambda: Runner.run_sync(Agent(name="it", model=GPT), PROMPT))


def pydantic_ai() -> None:
    from pydantic_ai import Agent

    times(lambda: Agent(f"anthropic:{CLAUDE}").run_sync(PROMPT))


def smolagents() -> None:
    from smolagents import OpenAIServerModel

    model = OpenAIServerModel(model_id=GPT)
    times(lambda: model.generate([{"role": "user", "content": PROMPT}]))


def dspy() -> None:
    import dspy as it

    model = it.LM(f"anthropic/{CLAUDE}", cache=False)
    times(lambda: model(PROMPT))


def google_adk() -> None:
    from google.adk.agents import Agent
    from google.adk.runners import InMemoryRunner
    from google.genai import types

    async def main() -> None:
        agent = Agent(name="it", model="gemini-2.5-flash", instruction="answer")
        runner = InMemoryRunner(agent=agent, app_name="it")
        for _ in range(COUNT):
            session = await runner.session_service.create_session(app_name="it", user_id="u")
            said = types.Content(role="user", parts=[types.Part(text=PROMPT)])
            async for _event in runner.run_async(
                user_id="u", session_id=session.id, new_message=said
            ):
                pass

    asyncio.run(main())


def crewai() -> None:
    from crewai import LLM

    times(lambda: LLM(model=f"openai/{GPT}").call(PROMPT))


# --- the makers' own SDKs, of providers with hosts or forms of their own


def mistral() -> None:
    from mistralai.client import Mistral

    client = Mistral(api_key="made-up")
    ask: Any = {"model": "mistral-small-latest"}
    ask["messages"] = [{"role": "user", "content": PROMPT}]
    for n in range(COUNT):
        if n % 2:
            with client.chat.stream(**ask) as events:
                list(events)
        else:
            client.chat.complete(**ask)


def cohere() -> None:
    import cohere as it

    client = it.ClientV2("made-up")
    ask: Any = {"model": "command-a-03-2025"}
    ask["messages"] = [{"role": "user", "content": PROMPT}]
    for n in range(COUNT):
        if n % 2:
            list(client.chat_stream(**ask))
        else:
            client.chat(**ask)


def azure() -> None:
    from openai import AzureOpenAI

    client = AzureOpenAI(
        azure_endpoint="https://lab.openai.azure.com", api_key="made-up", api_version="2024-10-21"
    )
    said: Any = [{"role": "user", "content": PROMPT}]
    for n in range(COUNT):
        if n % 2:
            usage: Any = {"include_usage": True}
            list(
                client.chat.completions.create(
                    model=GPT, messages=said, stream=True, stream_options=usage
                )
            )
        else:
            client.chat.completions.create(model=GPT, messages=said)


def bedrock() -> None:
    import boto3
    import botocore.config

    said = {"messages": [{"role": "user", "content": [{"text": PROMPT}]}]}
    body = json.dumps({"anthropic_version": "bedrock-2023-05-31"} | json.loads(BODY))
    model = "anthropic.claude-haiku-4-5-20251001-v1:0"
    client = boto3.client(
        "bedrock-runtime",
        region_name="us-east-1",
        aws_access_key_id="made-up",
        aws_secret_access_key="made-up",
        verify=ROOTS,
        config=botocore.config.Config(retries={"max_attempts": 0}),
    )
    for _ in range(COUNT // 4):
        client.converse(modelId=model, **said)
        list(client.converse_stream(modelId=model, **said)["stream"])
        client.invoke_model(modelId=model, body=body)["body"].read()
        list(client.invoke_model_with_response_stream(modelId=model, body=body)["body"])


def mbedtls() -> None:
    import socket

    from mbedtls import exceptions, tls

    roots = tls.TrustStore.from_pem_file(ROOTS)
    context = tls.ClientContext(tls.TLSConfiguration(trust_store=roots, validate_certificates=True))
    for _ in range(COUNT):
        host = "api.anthropic.com"
        connection = context.wrap_socket(socket.create_connection((host, 443)), host)
        connection.do_handshake()
        connection.sendall(HEAD + BODY)
        try:
            while connection.recv(4096):
                pass
        except exceptions.TLSError:
            pass  # the server has closed
        connection.close()


globals()[NAME]()
