"""The same model behind Ray Serve, for serving.py: same protocol, same worker, same faults.

    python bench/_serving_ray.py PORT REPLICAS BATCH SERVICE STRAGGLER_RATE STRAGGLER_DELAY

A replica works on one call at a time. With BATCH over 1 it takes what waits for it in one call
(`serve.batch`), at most so many queries.
"""

import asyncio
import json
import logging
import os
import signal
import sys
import threading
import time
from typing import Any

import numpy as np


def main(port: int, replicas: int, batch: int, base: float, rate: float, delay: float) -> None:
    import ray
    from ray import serve
    from starlette.requests import Request
    from starlette.responses import Response

    @serve.deployment(
        num_replicas=replicas,
        max_ongoing_requests=max(batch, 1),
        ray_actor_options={"num_cpus": 0},
    )
    class Model:
        def __init__(self):
            import jax

            from nercc_jax.pools import Faults
            from nercc_jax.pools.worker import Program, Worker, warm_up
            from nercc_jax.serving import make_servable
            from nercc_models import load_model

            model = load_model("lenet5-digits")
            self.servable = make_servable("lenet5-digits", model, model.input_shape)
            self.program = Program((model,), jax.local_devices()[0], True)
            sizes = [1 << power for power in range(batch.bit_length())]
            shape = self.servable.inputs.shape
            warm_up([self.program], 1, [np.zeros((n, *shape), np.float32) for n in sizes])
            faults = Faults.from_rates(
                service_delay=base,
                straggler_rate=rate,
                straggler_delay=delay,
                seed=os.getpid(),
            )
            self.worker = Worker(self.program, faults.at(0, 0), lambda: None)
            self.busy = asyncio.Lock()

        async def __call__(self, request: Request) -> Response:
            from nercc_jax.serving import Reply
            from nercc_jax.serving.protocol._messages import queries_of, read_request, write_reply

            length = request.headers.get("inference-header-content-length")
            asked = read_request(await request.body(), length)
            x: Any = queries_of(asked, self.servable)
            y = await (self.together(x) if batch > 1 else self.call(x))
            ones, zeros = np.ones(len(y), int), np.zeros(len(y))
            never = ones < 0
            reply = Reply(y, ones > 0, never, never, never, ones, ones, zeros, zeros, 0.0, 0.0)
            content, headers = write_reply(reply, asked, self.servable)
            return Response(content, headers=headers)

        @serve.batch(max_batch_size=max(batch, 1), batch_wait_timeout_s=0.0)
        async def together(self, queries: list[np.ndarray]) -> list[np.ndarray]:
            x = np.concatenate(queries)
            fill = np.repeat(x[-1:], (1 << (len(x) - 1).bit_length()) - len(x), axis=0)
            y = (await self.call(np.concatenate([x, fill])))[: len(x)]
            return [y[i : i + 1] for i in range(len(x))]

        async def call(self, x: np.ndarray) -> np.ndarray:
            async with self.busy:
                return await asyncio.to_thread(self.run, x)

        def run(self, x: np.ndarray) -> np.ndarray:
            with self.program.at_home():
                return self.worker(0, x)

    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    serve.start(
        http_options={"host": "127.0.0.1", "port": port},
        logging_config={"enable_access_log": False},
    )
    serve.run(Model.bind(), name="bench", route_prefix="/")
    summary = {"message": "ready", "http_port": port}
    print(json.dumps(summary), file=sys.stderr, flush=True)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    while not stop.is_set():
        time.sleep(0.1)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    numbers = sys.argv[1:]
    main(*map(int, numbers[:3]), *map(float, numbers[3:]))
