"""The load generator of the servers' benchmarks, a process of its own: many clients of one server.

    python bench/load.py QUERIES.npz URL open RATE SECONDS SEED [ROWS]
    python bench/load.py QUERIES.npz URL closed CLIENTS SECONDS SEED [ROWS]
    python bench/load.py QUERIES.npz URL paced CLIENTS SECONDS SEED [ROWS]

Open loop: requests arrive as a Poisson stream, whatever the server does, and latency counts from
the scheduled arrival. Closed loop: each client sends its next request when it has an answer, which
tells throughput. Paced: each asks every `PERIOD` seconds, if it has its answer by then. A request
has `ROWS` queries, one by default. URL is that of REST, or `grpc://HOST:PORT/MODEL`. Requests are
made before the load begins. Prints what became of them as JSON.
"""

import asyncio
import itertools
import json
import sys
import time
from typing import Any

import aiohttp
import grpc
import numpy as np
import orjson

from nercc_jax.serving.transport import open_inference_pb2 as messages

_TIMEOUT = 20.0  # seconds until a client gives up
PERIOD = 0.1
DATATYPES = {"float32": "FP32", "uint8": "UINT8"}
Answer = tuple[str | None, np.ndarray | None, bool]  # what went wrong, rows, whether exact


class Rest:
    """A server reached by REST, with binary tensors both ways."""

    def __init__(self, url: str, timeout: float = _TIMEOUT):
        self._url, self._timeout = url, aiohttp.ClientTimeout(total=timeout)

    async def __aenter__(self) -> "Rest":
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    def pack(self, x: np.ndarray) -> Any:
        raw = x.tobytes()
        tensor = {"name": "input", "shape": x.shape, "datatype": DATATYPES[x.dtype.name]}
        tensor |= {"parameters": {"binary_data_size": len(raw)}}
        head = orjson.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}})
        length = {"Inference-Header-Content-Length": str(len(head))}
        return head + raw, length | {"Content-Type": "application/octet-stream"}

    async def ask(self, request: Any) -> Answer:
        data, headers = request
        try:
            async with self._session.post(self._url, data=data, headers=headers) as answer:
                body = await answer.read()
                if answer.status != 200:
                    return str(answer.status), None, False
                length = int(answer.headers["inference-header-content-length"])
        except (TimeoutError, aiohttp.ClientError) as error:
            return type(error).__name__, None, False
        about = orjson.loads(body[:length])
        shape = about["outputs"][0]["shape"]
        values = np.frombuffer(body, "<f4", int(np.prod(shape)), length).reshape(shape)
        return None, values, bool(about.get("parameters", {}).get("nercc_exact", True))


class Grpc:
    """A server reached by gRPC, with raw tensors both ways; clients share four connections."""

    def __init__(self, url: str):
        address, self._model = url.removeprefix("grpc://").split("/")
        options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        self._channels = [grpc.aio.insecure_channel(address, options) for _ in range(4)]
        path = "/inference.GRPCInferenceService/ModelInfer"
        parse = messages.ModelInferResponse.FromString
        calls = [each.unary_unary(path, response_deserializer=parse) for each in self._channels]
        self._calls = itertools.cycle(calls)

    async def __aenter__(self) -> "Grpc":
        return self

    async def __aexit__(self, *_: object) -> None:
        for each in self._channels:
            await each.close()

    def pack(self, x: np.ndarray) -> Any:
        request = messages.ModelInferRequest(
            model_name=self._model, raw_input_contents=[x.tobytes()]
        )
        request.inputs.add(name="input", datatype=DATATYPES[x.dtype.name], shape=x.shape)
        return request.SerializeToString()

    async def ask(self, request: Any) -> Answer:
        try:
            answer = await next(self._calls)(request, timeout=_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            return error.code().name, None, False
        values = np.frombuffer(answer.raw_output_contents[0], "<f4")
        exact = answer.parameters["nercc_exact"].bool_param
        return None, values.reshape(tuple(answer.outputs[0].shape)), exact


class Load:
    """Requests that are ready, and what became of those that were sent."""

    def __init__(self, queries: np.ndarray, labels: np.ndarray, server: Rest | Grpc, rows: int):
        places = (np.arange(len(queries))[:, None] + np.arange(rows)) % len(queries)
        self.labels, self.server = labels[places], server
        self.requests = [server.pack(queries[each]) for each in places]
        # One row a request: when it was due, its latency in seconds (NaN where it failed), whether
        # its labels are the same, and whether it is exact.
        self.rows: list[tuple[float, float, bool, bool]] = []
        self.errors: dict[str, int] = {}
        self.lateness: list[float] = []

    async def ask(self, number: int, since: float) -> None:
        query = number % len(self.requests)
        error, values, exact = await self.server.ask(self.requests[query])
        now = time.monotonic()
        if error is not None or values is None:
            self.errors[str(error)] = self.errors.get(str(error), 0) + 1
            self.rows.append((since, float("nan"), False, False))
            return
        same = bool((values.argmax(axis=1) == self.labels[query]).all())
        self.rows.append((since, now - since, same, exact))

    async def open(self, rate: float, seconds: float, seed: int) -> None:
        random = np.random.default_rng(seed)
        arrivals = np.cumsum(random.exponential(1 / rate, int(rate * seconds)))
        first, start, tasks = int(random.integers(len(self.requests))), time.monotonic() + 0.1, []
        for number, arrival in enumerate(arrivals):
            due = start + arrival
            if (left := due - time.monotonic()) > 0:
                await asyncio.sleep(left)
            self.lateness.append(time.monotonic() - due)
            tasks.append(asyncio.create_task(self.ask(first + number, due)))
        await asyncio.gather(*tasks)

    async def closed(self, clients: float, seconds: float, seed: int) -> None:
        end = time.monotonic() + seconds

        async def client(number: int) -> None:
            step = 0
            while time.monotonic() < end:
                await self.ask(seed + number * 7919 + step, time.monotonic())
                step += 1

        await asyncio.gather(*(client(number) for number in range(int(clients))))

    async def paced(self, clients: float, seconds: float, seed: int) -> None:
        begin, phases = time.monotonic(), np.random.default_rng(seed).random(int(clients))

        async def client(number: int) -> None:
            for step in range(int(seconds / PERIOD)):
                due = begin + (step + phases[number]) * PERIOD
                await asyncio.sleep(max(due - time.monotonic(), 0))
                await self.ask(seed + number * 7919 + step, time.monotonic())

        await asyncio.gather(*(client(number) for number in range(int(clients))))


async def main(path: str, url: str, loop: str, amount: float, seconds: float, *rest: int) -> None:
    seed, rows = (*rest, 1)[:2]
    async with Grpc(url) if url.startswith("grpc://") else Rest(url) as server:
        with np.load(path) as data:
            load = Load(data["queries"], data["labels"], server, rows)
        begun = time.process_time()
        await getattr(load, loop)(amount, seconds, seed)
        spent = time.process_time() - begun
    due, latency, same, exact = np.array(load.rows, float).T
    result: dict[str, Any] = {
        "due": (due - due.min()).round(6).tolist(),
        # NaN is no JSON.
        "latency": [None if np.isnan(each) else each for each in latency.round(6).tolist()],
        "same": same.astype(bool).tolist(),
        "exact": exact.astype(bool).tolist(),
        "errors": load.errors,
        "cpu_s": spent,
        "lateness_p99": float(np.quantile(load.lateness, 0.99)) if load.lateness else 0.0,
    }
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    _, path, url, loop, amount, seconds, *rest = sys.argv
    asyncio.run(main(path, url, loop, float(amount), float(seconds), *map(int, rest)))
