"""Twenty tasks at once over asyncio, whose TLS goes through memory BIOs: no socket to be seen."""

import asyncio
import os
import ssl

context = ssl.create_default_context(cafile=os.environ["CA"])
host = os.environ["HOST"]


async def talk(number: int) -> None:
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", int(os.environ["PORT"]), ssl=context, server_hostname=host
    )
    for turn in range(5):
        size = 1000 * number + turn
        head = f"POST /bytes/{size} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {size}\r\n\r\n"
        writer.write(head.encode() + b"m" * size)
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(size)
    writer.close()
    await writer.wait_closed()


async def main() -> None:
    await asyncio.gather(*(talk(number) for number in range(20)))


asyncio.run(main())
