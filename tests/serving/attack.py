"""Attackers that send JSON as large as they may, and what others see of it meanwhile."""

import asyncio
import contextlib
import json
import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from typing import Any

SIZE = 7_900_000  # bytes of a body, just below what is taken
_NUMBER = b"0.12345678,"


def bodies(shape: Sequence[int]) -> dict[str, bytes]:
    """Bodies for a model of this input, none of which is a request, by what they are made of."""

    def body(data: bytes, first: Sequence[int] = (1,), more: bytes = b"") -> bytes:
        head = b'{"inputs":[{"name":"input","datatype":"FP32","shape":%s,"data":['
        return head % json.dumps([*first, *shape]).encode() + data + b"]}]%s}" % more

    def repeat(part: bytes) -> bytes:
        return (part * (SIZE // len(part)))[:-1]

    size = math.prod(shape)
    one = (b"0," * size)[:-1]
    rows = min(SIZE // (len(_NUMBER) * size), 1024)
    return {
        "objects": body(repeat(b"{},")),
        "lists": body(repeat(b"[],")),
        "texts": body(repeat(b'"",')),
        "numbers": body(repeat(b"0,")),
        "one long number": body(b"1" * SIZE),
        "deep": body(b"[" * (SIZE // 2) + b"]" * (SIZE // 2)),
        "parameters": body(one, more=b',"parameters":{"a":0%s}' % (b',"b":0' * (SIZE // 6))),
        "outputs": body(one, more=b',"outputs":[%s]' % repeat(b'{"name":"x"},')),
        "an unknown output": body(
            (_NUMBER * rows * size)[:-1], (rows,), b',"outputs":[{"name":"x"}]'
        ),
    }


async def _exchange(reader: Any, writer: Any, path: str, body: bytes) -> int:
    """Send a request, and return the status of its answer once all of it has come."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
    length = next(line for line in lines if line.startswith(b"content-length"))
    await reader.readexactly(int(length.split(b":")[1]))
    return int(lines[0].split()[1])


async def _attack(port: int, path: str, body: bytes, source: str) -> None:
    while True:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port, local_addr=(source, 0)
            )
            while await _exchange(reader, writer, path, body):
                pass
        await asyncio.sleep(0.01)


def _attackers(*arguments: Any, number: int) -> None:
    async def run() -> None:
        await asyncio.gather(*(_attack(*arguments) for _ in range(number)))

    asyncio.run(run())


@contextlib.contextmanager
def attacking(
    port: int, path: str, body: bytes, number: int, source: str = "127.0.0.1"
) -> Iterator[None]:
    """Send a body again and again, from this number of connections of another process."""
    arguments = {"args": (port, path, body, source), "kwargs": {"number": number}}
    process = multiprocessing.get_context("spawn").Process(target=_attackers, **arguments)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def ask(
    port: int, path: str, body: bytes, clients: int, seconds: float
) -> tuple[list[float], list[Any]]:
    """Return the seconds that each answer took, of clients in a loop.

    And of what was no answer, its status and seconds.
    """
    times: list[float] = []
    faults: list[Any] = []

    async def client(end: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.monotonic() < end:
            begin = time.monotonic()
            status = await asyncio.wait_for(_exchange(reader, writer, path, body), 60)
            took = time.monotonic() - begin
            if status == 200:
                times.append(took)
            else:
                faults.append((status, took))
            await asyncio.sleep(0.01)
        writer.close()

    async def run() -> None:
        end = time.monotonic() + seconds
        await asyncio.gather(*(client(end) for _ in range(clients)))

    asyncio.run(run())
    return times, faults
