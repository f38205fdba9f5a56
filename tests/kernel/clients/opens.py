"""KIND COUNT: opens some COUNT connections to HOST in one of many ways, as programs do."""

import asyncio
import multiprocessing
import os
import select
import socket
import ssl
import struct
import sys
import threading

HOST, PORT = os.environ["HOST"], int(os.environ["PORT"])
SENT, RECEIVED = 700, 3000
context = ssl.create_default_context(cafile=os.environ["CA"])


def dial(address: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection((address, PORT))


def wrapped(raw: socket.socket, with_context: ssl.SSLContext = context) -> ssl.SSLSocket:
    return with_context.wrap_socket(raw, server_hostname=HOST)


def exchange(tls: ssl.SSLSocket, sent: int = SENT, received: int = RECEIVED) -> None:
    head = f"POST /bytes/{received} HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {sent}\r\n\r\n"
    tls.sendall(head.encode() + b"s" * sent)
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += tls.recv(70000)
    left = received - len(answer.partition(b"\r\n\r\n")[2])
    while left:
        left -= len(tls.recv(min(left, 70000)))


def one() -> None:
    with wrapped(dial()) as tls:
        exchange(tls)


def plain(count: int) -> None:
    for _ in range(count):
        one()


def keep_alive(count: int) -> None:
    for _ in range(count):
        with wrapped(dial()) as tls:
            for _ in range(4):
                exchange(tls)


def at_once(count: int) -> None:
    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def children(count: int) -> None:
    processes = [multiprocessing.Process(target=one) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def opened_by_a_parent(count: int) -> None:
    for _ in range(count):
        raw = dial()
        if not os.fork():
            with wrapped(raw) as tls:
                exchange(tls)
            os._exit(0)
        raw.close()
        os.wait()


def non_blocking(count: int) -> None:
    for _ in range(count):
        raw = socket.socket()
        raw.setblocking(False)
        raw.connect_ex(("127.0.0.1", PORT))
        select.select([], [raw], [])
        tls = context.wrap_socket(raw, server_hostname=HOST, do_handshake_on_connect=False)
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                select.select([tls], [], [])
            except ssl.SSLWantWriteError:
                select.select([], [tls], [])
        tls.setblocking(True)
        with tls:
            exchange(tls)


def ipv6(count: int) -> None:
    for _ in range(count):
        with wrapped(dial("::1")) as tls:
            exchange(tls)


def unused(count: int) -> None:
    for _ in range(count):
        wrapped(dial()).close()


def unused_and_shut_down(count: int) -> None:
    for _ in range(count):
        tls = wrapped(dial())
        tls.shutdown(socket.SHUT_RDWR)
        tls.close()


def silent(count: int) -> None:
    for _ in range(count):
        dial().close()


def reset(count: int) -> None:
    for _ in range(count):
        with wrapped(dial()) as tls:
            exchange(tls)
            tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def unnamed(count: int) -> None:
    quiet = ssl.create_default_context(cafile=os.environ["CA"])
    quiet.check_hostname = False
    for _ in range(count):
        with quiet.wrap_socket(dial()) as tls:
            exchange(tls)


def memory(count: int) -> None:
    async def talk() -> None:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", PORT, ssl=context, server_hostname=HOST
        )
        for _ in range(2):
            head = f"POST /bytes/500 HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 9\r\n\r\n"
            writer.write(head.encode() + b"m" * 9)
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(500)
        writer.close()

    async def main() -> None:
        await asyncio.gather(*(talk() for _ in range(count)))

    asyncio.run(main())


def tls12(count: int) -> None:
    older = ssl.create_default_context(cafile=os.environ["CA"])
    older.maximum_version = ssl.TLSVersion.TLSv1_2
    for _ in range(count):
        with wrapped(dial(), older) as tls:
            exchange(tls)


def unused_tls12(count: int) -> None:
    older = ssl.create_default_context(cafile=os.environ["CA"])
    older.maximum_version = ssl.TLSVersion.TLSv1_2
    for _ in range(count):
        wrapped(dial(), older).close()


def resumed(count: int) -> None:
    session = None
    for _ in range(count):
        with context.wrap_socket(dial(), server_hostname=HOST, session=session) as tls:
            exchange(tls)
            session = tls.session


def large(count: int) -> None:
    for _ in range(count):
        with wrapped(dial()) as tls:
            exchange(tls, 300_000, 200_000)


def small(count: int) -> None:
    for _ in range(count):
        with wrapped(dial()) as tls:
            tls.sendall(b"GET /close/0 HTTP/1.1\r\n\r\n")
            while tls.recv(1000):
                pass


def half_closed(count: int) -> None:
    for _ in range(count):
        with wrapped(dial()) as tls:
            tls.sendall(f"GET /close/4000 HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
            socket.socket.shutdown(tls, socket.SHUT_WR)
            while tls.recv(1000):
                pass


def through_a_proxy(count: int) -> None:
    for _ in range(count):
        raw = dial()
        raw.sendall(f"CONNECT {HOST}:443 HTTP/1.1\r\nHost: {HOST}:443\r\n\r\n".encode())
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            answer += raw.recv(1)
        with wrapped(raw) as tls:
            exchange(tls)


def relay(asked: bool) -> int:
    """The port of a child that passes one connection on to the server, behind a CONNECT or not."""
    listener = socket.create_server(("127.0.0.1", 0))
    if os.fork():
        port: int = listener.getsockname()[1]
        listener.close()
        return port
    near, _ = listener.accept()
    if asked:
        while not near.recv(1 << 16).endswith(b"\r\n\r\n"):
            pass
        near.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    far = dial()
    pairs = {near: far, far: near}
    while pairs:
        for ready in select.select(list(pairs), [], [])[0]:
            data = ready.recv(1 << 16)
            if data:
                pairs[ready].sendall(data)
            else:
                pairs.pop(ready).shutdown(socket.SHUT_WR)
    os._exit(0)


def relayed(count: int) -> None:
    for _ in range(count):
        raw = socket.create_connection(("127.0.0.1", relay(asked=False)))
        with wrapped(raw) as tls:
            exchange(tls)
        os.wait()


def through_a_proxy_in_scope(count: int) -> None:
    for _ in range(count):
        raw = socket.create_connection(("127.0.0.1", relay(asked=True)))
        raw.sendall(f"CONNECT {HOST}:443 HTTP/1.1\r\nHost: {HOST}:443\r\n\r\n".encode())
        raw.recv(1 << 16)
        with wrapped(raw) as tls:
            exchange(tls)
        os.wait()


def killed(count: int) -> None:
    for _ in range(count):
        child = os.fork()
        if not child:
            exchange(wrapped(dial()))
            os.kill(os.getpid(), 9)
        os.waitpid(child, 0)


globals()[sys.argv[1]](int(sys.argv[2]))
