"""KIND [ARGUMENT …]: a thread goes on when the first one has ended.

`exec`: it becomes the program of the arguments. `before`, `amid`: it makes one exchange to HOST
after the other; the first thread ends before them, or in the middle of the first answer.
"""

import ctypes
import os
import platform
import socket
import ssl
import sys
import threading

EXIT = 93 if platform.machine() == "aarch64" else 60
KIND, ARGUMENTS = sys.argv[1], sys.argv[2:]
RECEIVED = 20_000
may_end = threading.Event()


def wait_for_the_first_thread() -> None:
    """Return when it has ended: its process has no code of its own any more."""
    may_end.set()
    while True:
        with open(f"/proc/self/task/{os.getpid()}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] == "Z":
                return
        os.sched_yield()


def exchange(tls: ssl.SSLSocket, host: str, in_the_middle: bool) -> None:
    tls.sendall(
        f"POST /bytes/{RECEIVED} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 3\r\n\r\na=b".encode()
    )
    answer = b""
    while len(answer) < RECEIVED or len(answer.partition(b"\r\n\r\n")[2]) < RECEIVED:
        answer += tls.recv(1000)
        if in_the_middle:
            in_the_middle = False
            wait_for_the_first_thread()


def exchanges() -> None:
    host, port = os.environ["HOST"], int(os.environ["PORT"])
    context = ssl.create_default_context(cafile=os.environ["CA"])
    if KIND == "before":
        wait_for_the_first_thread()
    for number in range(2):
        raw = socket.create_connection(("127.0.0.1", port))
        with context.wrap_socket(raw, server_hostname=host) as tls:
            exchange(tls, host, KIND == "amid" and number == 0)
    os._exit(0)


def becomes() -> None:
    os.execvp(ARGUMENTS[0], ARGUMENTS)


threading.Thread(target=becomes if KIND == "exec" else exchanges).start()
may_end.wait()  # for ever, where the thread becomes another program
ctypes.CDLL(None).syscall(EXIT, 0)
