"""A client that speaks HTTP/3: requests to one host over one connection, side by side.

    python http3.py HOST PATH COUNT BODY [CA]

SSLKEYLOGFILE names its key log. Prints the status of each answer and its bytes. With ZERO_RTT=1 all
requests but the first go over a second connection, which goes on with the first one's session: they
are sent before its handshake, and it says whether the server took them.
"""

import asyncio
import os
import sys

from aioquic.asyncio import QuicConnectionProtocol, connect
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration

HOST, PATH, COUNT, BODY = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4].encode()
EARLY = os.environ.get("ZERO_RTT") == "1"
UPDATES = os.environ.get("KEY_UPDATE") == "1"


class Client(QuicConnectionProtocol):
    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.http = H3Connection(self._quic)
        self.answers = {}
        self.waiting = {}

    def quic_event_received(self, event):
        for each in self.http.handle_event(event):
            if isinstance(each, HeadersReceived | DataReceived):
                answer = self.answers.setdefault(each.stream_id, [None, 0])
                if isinstance(each, HeadersReceived):
                    answer[0] = dict(each.headers)[b":status"].decode()
                else:
                    answer[1] += len(each.data)
                if each.stream_ended:
                    self.waiting[each.stream_id].set_result(None)

    async def ask(self):
        stream = self._quic.get_next_available_stream_id()
        self.waiting[stream] = asyncio.get_running_loop().create_future()
        fields = [
            (b":method", b"POST"),
            (b":scheme", b"https"),
            (b":authority", HOST.encode()),
            (b":path", PATH.encode()),
            (b"content-type", b"application/json"),
            (b"user-agent", b"http3-client"),
        ]
        self.http.send_headers(stream, fields)
        self.http.send_data(stream, BODY, True)
        self.transmit()
        await self.waiting[stream]
        print(*self.answers[stream], flush=True)


async def main():
    configuration = QuicConfiguration(is_client=True, alpn_protocols=H3_ALPN, server_name=HOST)
    configuration.load_verify_locations(os.environ["SSL_CERT_FILE"])
    with open(os.environ["SSLKEYLOGFILE"], "a") as keys:
        configuration.secrets_log_file = keys
        tickets = []
        options = {"configuration": configuration, "create_protocol": Client}
        async with connect(HOST, 443, session_ticket_handler=tickets.append, **options) as client:
            await client.ask()
            keys.flush()
            if UPDATES:
                client.request_key_update()
            if not EARLY:
                await asyncio.gather(*(client.ask() for _ in range(COUNT - 1)))
        if EARLY:
            configuration.session_ticket = tickets[0]
            async with connect(HOST, 443, wait_connected=False, **options) as client:
                await asyncio.gather(*(client.ask() for _ in range(COUNT - 1)))
                print("early", client._quic.tls.early_data_accepted, flush=True)


asyncio.run(main())
