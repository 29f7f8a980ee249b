"""The load generator of serving.py, a process of its own: many HTTP clients of one server.

    python bench/_serving_load.py QUERIES.npz URL open RATE SECONDS SEED
    python bench/_serving_load.py QUERIES.npz URL closed CLIENTS SECONDS SEED
    python bench/_serving_load.py QUERIES.npz URL paced CLIENTS SECONDS SEED

Open loop: single queries arrive as a Poisson stream, whatever the server does, and latency counts
from the scheduled arrival. Closed loop: each client sends its next query when it has an answer,
which tells throughput. Paced: each asks every `PERIOD` seconds, if it has its answer by then.
Prints what became of them as JSON.
"""

import asyncio
import json
import sys
import time
from typing import Any

import aiohttp
import numpy as np
import orjson

_TIMEOUT = 20.0  # seconds until a client gives up
PERIOD = 0.1


class Load:
    def __init__(self, queries: np.ndarray, labels: np.ndarray, url: str):
        self.labels, self.url = labels, url
        self.bodies, self.headers = [], []
        for x in queries:
            raw = x.astype("<f4").tobytes()
            head = {
                "inputs": [
                    {
                        "name": "input",
                        "shape": [1, *x.shape],
                        "datatype": "FP32",
                        "parameters": {"binary_data_size": len(raw)},
                    }
                ],
                "parameters": {"binary_data_output": True},
            }
            text = orjson.dumps(head)
            self.bodies.append(text + raw)
            self.headers.append(
                {
                    "Inference-Header-Content-Length": str(len(text)),
                    "Content-Type": "application/octet-stream",
                }
            )
        # One row a query: latency in seconds, same label, exact; NaN latency where it failed.
        self.rows: list[tuple[float, bool, bool]] = []
        self.errors: dict[str, int] = {}
        self.lateness: list[float] = []

    async def ask(self, session: aiohttp.ClientSession, number: int, since: float) -> None:
        query = number % len(self.bodies)
        try:
            async with session.post(
                self.url, data=self.bodies[query], headers=self.headers[query]
            ) as answer:
                body = await answer.read()
                status = answer.status
                length = int(answer.headers.get("inference-header-content-length", len(body)))
        except (TimeoutError, aiohttp.ClientError) as error:
            status, body, length = type(error).__name__, b"", 0
        now = time.monotonic()
        if status != 200:
            self.errors[str(status)] = self.errors.get(str(status), 0) + 1
            self.rows.append((float("nan"), False, False))
            return
        about = orjson.loads(body[:length])
        count = int(np.prod(about["outputs"][0]["shape"]))
        values = np.frombuffer(body, "<f4", count, length)
        same = int(values.argmax()) == int(self.labels[query])
        exact = bool(about.get("parameters", {}).get("nercc_exact", True))
        self.rows.append((now - since, same, exact))

    async def open_loop(self, session, rate: float, seconds: float, seed: int) -> None:
        random = np.random.default_rng(seed)
        arrivals = np.cumsum(random.exponential(1 / rate, int(rate * seconds)))
        first = int(random.integers(len(self.bodies)))
        start = time.monotonic() + 0.1
        tasks = []
        for number, arrival in enumerate(arrivals):
            due = start + arrival
            if (left := due - time.monotonic()) > 0:
                await asyncio.sleep(left)
            self.lateness.append(time.monotonic() - due)
            tasks.append(asyncio.create_task(self.ask(session, first + number, due)))
        await asyncio.gather(*tasks)

    async def closed_loop(self, session, clients: float, seconds: float, seed: int) -> None:
        end = time.monotonic() + seconds

        async def client(number: int) -> None:
            step = 0
            while time.monotonic() < end:
                await self.ask(session, seed + number * 7919 + step, time.monotonic())
                step += 1

        await asyncio.gather(*(client(number) for number in range(int(clients))))

    async def paced(self, session, clients: float, seconds: float, seed: int) -> None:
        begin = time.monotonic()
        phases = np.random.default_rng(seed).random(int(clients))

        async def client(number: int) -> None:
            for step in range(int(seconds / PERIOD)):
                due = begin + (step + phases[number]) * PERIOD
                await asyncio.sleep(max(due - time.monotonic(), 0))
                await self.ask(session, seed + number * 7919 + step, time.monotonic())

        await asyncio.gather(*(client(number) for number in range(int(clients))))


async def main(path: str, url: str, loop: str, amount: float, seconds: float, seed: int) -> None:
    with np.load(path) as data:
        load = Load(data["queries"], data["labels"], url)
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        runs = {"open": load.open_loop, "closed": load.closed_loop, "paced": load.paced}
        await runs[loop](session, amount, seconds, seed)
    latency, same, exact = np.array(load.rows, float).T
    result: dict[str, Any] = {
        "latency": latency.round(6).tolist(),
        "same": same.astype(bool).tolist(),
        "exact": exact.astype(bool).tolist(),
        "errors": load.errors,
        "lateness_p99": float(np.quantile(load.lateness, 0.99)) if load.lateness else 0.0,
    }
    # NaN is no JSON.
    result["latency"] = [None if np.isnan(value) else value for value in result["latency"]]
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    _, path, url, loop, amount, seconds, seed = sys.argv
    asyncio.run(main(path, url, loop, float(amount), float(seconds), int(seed)))
