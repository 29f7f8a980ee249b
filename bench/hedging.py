"""Hedged HTTP calls against none, a fixed limit, and two calls at once.

    python bench/hedging.py [--requests 3000] [--seeds 3] [--rate 24] [--output FILE]

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

Writes results/hedging.json, which docs/hedging.md shows.
"""

import argparse
import asyncio
import collections
import contextlib
import random
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import uvicorn
from _report import environment, write_json

from nercc_jax import hedge

RESULTS = Path(__file__).parent / "results" / "hedging.json"
SECONDS, SLOW, SHARE = 2.0, 20.0, 0.05
BUDGET, LEARNED = 1.06, 1000
CASES = {"one": (0.0, SHARE, 0.0), "both": (SHARE, SHARE, 0.0), "query": (0.0, 0.0, SHARE)}
Call = Callable[[aiohttp.ClientSession, int], Coroutine[Any, Any, None]]


def serve(share: float, of_queries: float, seed: int) -> None:
    """Answer by HTTP: slowly by chance, or where the request's number is one of a share."""
    draw = random.Random(seed)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        number = int(scope["path"].rpartition("/")[2])
        slow = draw.random() < share or random.Random(number).random() < of_queries
        await asyncio.sleep(SLOW if slow else SECONDS)
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})

    with socket.create_server(("127.0.0.1", 0)) as listening:
        print(listening.getsockname()[1], flush=True)
        config = uvicorn.Config(app, lifespan="off", log_level="error", timeout_keep_alive=60)
        uvicorn.Server(config).run([listening])


@contextlib.asynccontextmanager
async def servers(case: str, seed: int) -> AsyncIterator[list[aiohttp.ClientSession]]:
    """Start both servers; yield a client of each."""
    first, second, of_queries = CASES[case]
    command = [sys.executable, __file__, "--serve"]
    begun = [
        subprocess.Popen(
            [*command, str(share), str(of_queries), str(2 * seed + place)], stdout=subprocess.PIPE
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
        self.clients, self.draw = clients, random.Random(seed)
        self.calls: collections.Counter[str] = collections.Counter()
        self.times: collections.deque[float] = collections.deque(maxlen=1000)
        self.turn = 0
        self.hedged = hedge(self.counted("hedge"), clients, budget=BUDGET)

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
        known = len(self.times) >= 20
        after = float(np.quantile(self.times, 0.95)) if known else 60.0

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
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()

    async def at_once(self, number: int) -> None:
        call, clients = self.counted("at_once"), self.in_turn()
        chosen = clients if self.draw.random() < BUDGET - 1 else clients[:1]
        tasks = [asyncio.create_task(call(client, number)) for client in chosen]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()


async def measure(case: str, seed: int, requests: int, rate: float) -> dict[str, Any]:
    """Send the requests by all systems; return what each took and cost after the first 1,000."""
    async with servers(case, seed) as clients:
        systems = Systems(clients, seed)
        run = {
            "hedge": systems.hedged,
            "none": systems.none,
            "fixed": systems.fixed,
            "at_once": systems.at_once,
        }
        seconds = {name: np.full(requests, np.nan) for name in run}
        before: collections.Counter[str] = collections.Counter()

        async def request(name: str, number: int) -> None:
            begin = time.perf_counter()
            await run[name](number)
            seconds[name][number] = time.perf_counter() - begin

        arrivals, begun, due = random.Random(seed), [], time.perf_counter()
        for number in range(requests):
            if number == LEARNED:
                before = collections.Counter(systems.calls)
            begun += [asyncio.create_task(request(name, number)) for name in run]
            due += arrivals.expovariate(rate)
            await asyncio.sleep(max(due - time.perf_counter(), 0))
        await asyncio.gather(*begun)
        found = {}
        for name, taken in seconds.items():
            median, p99 = np.quantile(taken[LEARNED:], [0.5, 0.99])
            usual = taken[LEARNED:][taken[LEARNED:] < SLOW]  # without hedging: the machine's noise
            found[name] = {
                "p50_ms": 1e3 * float(median),
                "p99_ms": 1e3 * float(p99),
                "p99_medians": float(p99 / median),
                "p99_of_usual_medians": float(np.quantile(usual, 0.99) / median),
                "calls": (systems.calls[name] - before[name]) / (requests - LEARNED),
                "calls_of_all": systems.calls[name] / requests,
                "p99_medians_of_all": float(np.quantile(taken, 0.99) / np.median(taken)),
            }
        found["hedge"]["status"] = systems.hedged.status()
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=24.0)
    parser.add_argument("--only", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--serve", nargs=3, type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        share, of_queries, seed = options.serve
        serve(share, of_queries, int(seed))
        return
    results: dict[str, Any] = {
        "environment": environment(("aiohttp", "uvicorn", "numpy")),
        "requests": options.requests,
        "rate": options.rate,
        "cases": {},
    }
    for case in options.only:
        for seed in range(options.seeds):
            found = asyncio.run(measure(case, seed, options.requests, options.rate))
            results["cases"].setdefault(case, []).append(found)
            for name, row in found.items():
                print(
                    f"{case} {seed} {name:8}"
                    f" p99 {row['p99_medians']:5.2f} medians, {row['calls']:.3f} calls;"
                    f" of all {row['p99_medians_of_all']:5.2f}, {row['calls_of_all']:.3f}",
                    flush=True,
                )
            write_json(options.output, results)


if __name__ == "__main__":
    main()
