"""Attackers that send JSON that is no request, and what others see of it meanwhile."""

import asyncio
import contextlib
import json
import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from typing import Any


def bodies(shape: Sequence[int], size: int = 1_000_000) -> dict[str, bytes]:
    """Bodies of about this size for a model of this input, by what they are made of."""

    def body(data: bytes, more: bytes = b"") -> bytes:
        head = b'{"inputs":[{"name":"input","datatype":"FP32","shape":%s,"data":['
        return head % json.dumps([1, *shape]).encode() + data + b"]}]%s}" % more

    def repeat(part: bytes) -> bytes:
        return (part * (size // len(part)))[:-1]

    one = (b"0," * math.prod(shape))[:-1]
    return {
        "objects": body(repeat(b"{},")),
        "lists": body(repeat(b"[],")),
        "texts": body(repeat(b'"",')),
        "numbers": body(repeat(b"0,")),
        "one long number": body(b"1" * size),
        "deep": body(b"[" * (size // 2) + b"]" * (size // 2)),
        "parameters": body(one, b',"parameters":{"a":0%s}' % (b',"b":0' * (size // 6))),
        "outputs": body(one, b',"outputs":[%s]' % repeat(b'{"name":"x"},')),
    }


def post(path: str, body: bytes, chunked: bool = False, length: int | None = None) -> bytes:
    """An HTTP request, which may say another length; in chunks it does not say how large it is."""
    head = f"Content-Length: {len(body) if length is None else length}"
    if chunked:
        head, body = "Transfer-Encoding: chunked", b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode() + body


async def _exchange(reader: Any, writer: Any, request: bytes) -> int:
    """Send a request, and return the status of its answer once all of it has come."""
    writer.write(request)
    lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
    length = next(line for line in lines if line.startswith(b"content-length"))
    await reader.readexactly(int(length.split(b":")[1]))
    return int(lines[0].split()[1])


async def _attack(port: int, request: bytes, statuses: Any) -> None:
    while True:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            while True:
                statuses.put(await _exchange(reader, writer, request))
                await writer.drain()
        await asyncio.sleep(0.01)


def _attackers(number: int, *arguments: Any) -> None:
    async def run() -> None:
        await asyncio.gather(*(_attack(*arguments) for _ in range(number)))

    asyncio.run(run())


@contextlib.contextmanager
def attacking(port: int, request: bytes, number: int) -> Iterator[Any]:
    """Send it again and again, from this number of connections of another process.

    Yields a queue of the answers' statuses, of which there is one by then.
    """
    context = multiprocessing.get_context("spawn")
    statuses = context.Queue()
    arguments = (number, port, request, statuses)
    process = context.Process(target=_attackers, args=arguments)
    process.start()
    try:
        first = statuses.get(timeout=60)
        statuses.put(first)
        yield statuses
    finally:
        process.kill()
        process.join()


def ask(port: int, request: bytes, clients: int, seconds: float) -> list[float]:
    """Return the seconds that each answer took, of clients in a loop; all must be answered."""
    times: list[float] = []

    async def client(end: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.monotonic() < end:
            begin = time.monotonic()
            assert await asyncio.wait_for(_exchange(reader, writer, request), 60) == 200
            times.append(time.monotonic() - begin)
            await asyncio.sleep(0.01)
        writer.close()

    async def run() -> None:
        end = time.monotonic() + seconds
        await asyncio.gather(*(client(end) for _ in range(clients)))

    asyncio.run(run())
    return times
