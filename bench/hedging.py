"""Hedged HTTP calls against none, a fixed limit, and two calls at once.

Two servers run in processes of their own and answer after two seconds, or after twenty when they
are slow: so long that other work on the machine hardly counts. The cases say when:

- one: the second server is slow on 5 % of its calls;
- both: each server is, independently;
- query: both are slow on the same 5 % of the requests, so that a copy is as slow as its original.

All systems send requests at the same random times, at once, so that the machine's noise meets all
of them: `nercc_jax.hedge` within 1.06 calls a request; no hedging; a second call to the other
server once the 95th percentile of the latest 1,000 times has passed (Dean and Barroso, "The tail
at scale"); and both servers at once for a random 6 % of the requests. Figures are of the requests
after the first 1,000, by seed.
"""

import asyncio
import collections
import contextlib
import random
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import aiohttp
import numpy as np
import uvicorn

from nercc_jax import hedge

SHARE, BUDGET = 0.05, 1.06
CASES = {"one": (0.0, SHARE, 0.0), "both": (SHARE, SHARE, 0.0), "query": (0.0, 0.0, SHARE)}
Call = Callable[[aiohttp.ClientSession, int], Coroutine[Any, Any, None]]


def run(
    report: Any,
    requests: int = 3000,
    seeds: int = 3,
    rate: float = 24.0,
    only: tuple[str, ...] = (*CASES,),
) -> None:
    """Send requests by all systems.

    Options:
        requests: Of each case and seed; the first 1,000 are not judged.
        seeds: Of arrivals and slowness.
        rate: Requests a second.
        only: Cases.
    """
    from report import environment, show

    seconds, learned = 2.0, 1000
    if report.quick:
        requests, seeds, only, seconds, learned = 200, 1, only[:1], 0.1, 100
    cases: dict[str, list[Any]] = {}
    about = {"environment": environment("aiohttp", "uvicorn"), "requests": requests}
    for case, seed in ((case, seed) for case in only for seed in range(seeds)):
        found = asyncio.run(measure(case, seed, requests, rate, seconds, learned))
        cases.setdefault(case, []).append(found)
        report.write(about | {"rate": rate, "cases": cases})
        report.log(f"{case} {seed}")
        columns = ("p50_ms", "p99_medians", "calls")
        show({"system": name} | {key: row[key] for key in columns} for name, row in found.items())


def serve(share: float, of_queries: float, seed: int, seconds: float) -> None:
    """Answer by HTTP: slowly by chance, or where the request's number is one of a share."""
    draw = random.Random(seed)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        number = int(scope["path"].rpartition("/")[2])
        slow = draw.random() < share or random.Random(number).random() < of_queries
        await asyncio.sleep(10 * seconds if slow else seconds)
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})

    with socket.create_server(("127.0.0.1", 0)) as listening:
        print(listening.getsockname()[1], flush=True)
        config = uvicorn.Config(app, lifespan="off", log_level="error", timeout_keep_alive=60)
        uvicorn.Server(config).run([listening])


@contextlib.asynccontextmanager
async def servers(
    case: str, seed: int, seconds: float
) -> AsyncIterator[list[aiohttp.ClientSession]]:
    """Start both servers; yield a client of each."""
    first, second, of_queries = CASES[case]
    begun = [
        subprocess.Popen(
            [sys.executable, __file__, *map(str, (share, of_queries, 2 * seed + place, seconds))],
            stdout=subprocess.PIPE,
        )
        for place, share in enumerate((first, second))
    ]
    try:
        async with contextlib.AsyncExitStack() as stack:
            clients = []
            for each in begun:
                assert each.stdout is not None
                url = f"http://127.0.0.1:{int(each.stdout.readline())}"
                client = aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0))
                clients.append(await stack.enter_async_context(client))
            yield clients
    finally:
        for each in begun:
            each.kill()
            each.wait()


class Systems:
    """Ways to answer a request by two servers; each counts its calls."""

    def __init__(self, clients: list[aiohttp.ClientSession], seed: int):
        self.clients, self.draw, self.turn = clients, random.Random(seed), 0
        self.calls: collections.Counter[str] = collections.Counter()
        self.times: collections.deque[float] = collections.deque(maxlen=1000)
        self.hedge = hedge(self.counted("hedge"), clients, budget=BUDGET)

    def counted(self, system: str) -> Call:
        async def call(client: aiohttp.ClientSession, number: int) -> None:
            self.calls[system] += 1
            async with client.get(f"/{number}") as response:
                response.raise_for_status()
                await response.read()

        return call

    def in_turn(self) -> list[aiohttp.ClientSession]:
        self.turn += 1
        return self.clients[:: 1 if self.turn % 2 else -1]

    async def none(self, number: int) -> None:
        await self.counted("none")(self.in_turn()[0], number)

    async def fixed(self, number: int) -> None:
        call, (first, second) = self.counted("fixed"), self.in_turn()
        after = float(np.quantile(self.times, 0.95)) if len(self.times) >= 20 else 60.0

        async def timed() -> None:
            begin = time.perf_counter()
            try:
                await call(first, number)
            finally:  # what is cancelled took longer
                self.times.append(time.perf_counter() - begin)

        tasks = [asyncio.create_task(timed())]
        done, _ = await asyncio.wait(tasks, timeout=after)
        if not done:
            tasks.append(asyncio.create_task(call(second, number)))
        await self.first_of(tasks)

    async def at_once(self, number: int) -> None:
        call, clients = self.counted("at_once"), self.in_turn()
        chosen = clients if self.draw.random() < BUDGET - 1 else clients[:1]
        await self.first_of([asyncio.create_task(call(client, number)) for client in chosen])

    @staticmethod
    async def first_of(tasks: list[asyncio.Task]) -> None:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()


async def measure(
    case: str, seed: int, requests: int, rate: float, usual: float, learned: int
) -> dict[str, Any]:
    """Send the requests by all systems; return what each took and cost after the first ones."""
    async with servers(case, seed, usual) as clients:
        systems = Systems(clients, seed)
        names = ("hedge", "none", "fixed", "at_once")
        seconds = {name: np.full(requests, np.nan) for name in names}
        before: collections.Counter[str] = collections.Counter()

        async def request(name: str, number: int) -> None:
            begin = time.perf_counter()
            await getattr(systems, name)(number)
            seconds[name][number] = time.perf_counter() - begin

        arrivals, begun, due = random.Random(seed), [], time.perf_counter()
        for number in range(requests):
            if number == learned:
                before = collections.Counter(systems.calls)
            begun += [asyncio.create_task(request(name, number)) for name in names]
            due += arrivals.expovariate(rate)
            await asyncio.sleep(max(due - time.perf_counter(), 0))
        await asyncio.gather(*begun)
        found = {}
        for name, taken in seconds.items():
            judged = taken[learned:]
            median, p99 = np.quantile(judged, [0.5, 0.99])
            found[name] = {
                "p50_ms": 1e3 * float(median),
                "p99_ms": 1e3 * float(p99),
                "p99_medians": float(p99 / median),
                "calls": (systems.calls[name] - before[name]) / (requests - learned),
            }
        found["hedge"]["status"] = systems.hedge.status()
        return found


if __name__ == "__main__":
    share, of_queries, seed, seconds = map(float, sys.argv[1:])
    serve(share, of_queries, int(seed), seconds)
