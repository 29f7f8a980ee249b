"""Single images as a stream, for cluster.py and replica.py, timed from the scheduled arrival."""

import asyncio
import time

import httpx
import numpy as np


async def stretch(url, seconds, rate, timeout):
    """Send a query at each tick; return (latency in s, status, whether it is exact) of each."""
    x = np.random.default_rng(0).uniform(size=1024).round(3).tolist()
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, 32, 32, 1], "data": x}
    seen = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=timeout, limits=limits) as client:

        async def ask(due):
            try:
                answer = await client.post(url, json={"inputs": [tensor]})
                summary = answer.json()["outputs"] if answer.status_code == 200 else []
                outputs = {each["name"]: each["data"] for each in summary}
                exact = bool(outputs.get("exact", [False])[0])
                seen.append((time.monotonic() - due, answer.status_code, exact))
            except httpx.HTTPError as error:
                seen.append((time.monotonic() - due, type(error).__name__, False))

        start, tasks = time.monotonic(), []
        for number in range(int(seconds * rate)):
            due = start + number / rate
            await asyncio.sleep(max(due - time.monotonic(), 0.0))
            tasks.append(asyncio.create_task(ask(due)))
        await asyncio.gather(*tasks)
    return seen


def latencies(seen):
    """Return the latencies of answered queries."""
    times = np.array([1e3 * seconds for seconds, status, _ in seen if status == 200])
    return {
        "p50_ms": round(float(np.median(times)), 1),
        "p99_ms": round(float(np.quantile(times, 0.99)), 1),
        "max_ms": round(float(times.max()), 1),
    }
