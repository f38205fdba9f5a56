"""Twenty threads, each with connections of its own."""

import http.client
import os
import ssl
import threading

context = ssl.create_default_context(cafile=os.environ["CA"])


class Connection(http.client.HTTPSConnection):
    def connect(self) -> None:
        http.client.HTTPConnection.connect(self)
        self.sock = context.wrap_socket(self.sock, server_hostname=os.environ["HOST"])


def talk(number: int) -> None:
    for _ in range(3):
        connection = Connection("127.0.0.1", int(os.environ["PORT"]))
        for turn in range(10):
            size = 100 * number + 1000 * turn + 1
            connection.request("POST", f"/bytes/{size}", body=b"t" * size)
            assert len(connection.getresponse().read()) == size
        connection.close()


threads = [threading.Thread(target=talk, args=(number,)) for number in range(20)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
