"""Models, preprocessing and faults for servers, and the servers that stand beside `nercc serve`.

    python bench/served.py bare MODEL [gRPC]
    python bench/served.py ray PORT REPLICAS BATCH SERVICE STRAGGLER_RATE STRAGGLER_DELAY

The bare server is what an engineer writes first: FastAPI around the model. No queue, no batches, no
limits, no metrics, no checks but what the tensor needs; one process, and the model on its event
loop, which for models of milliseconds is the fastest way there is. Binary tensors of the Open
Inference Protocol, as the load sends them. With "gRPC", it is a handler of `grpc.aio` on the same
event loop instead.

Behind Ray Serve are the same model, protocol, worker and faults. A replica works on one call at a
time. With BATCH over 1 it takes what waits for it in one call (`serve.batch`), at most so many
queries.
"""

import functools
import json
import os
import sys
from typing import Any

import numpy as np

SHAPES = {"wide": (64,), "images": (224, 224, 3)}  # of users' sizes, with random weights
_OUTPUTS, _HIDDEN, _PATCH = 1000, 256, 16


def wide(x: Any) -> Any:
    """Map (B, 64) to (B, 1000) by two layers."""
    return _head("wide", x, 64)


def images(x: Any) -> Any:
    """Map (B, 224, 224, 3) to (B, 1000): patches as a ViT has them, their mean, two layers.

    Some 60 million operations a query, a millisecond on one core: what a server adds shows.
    """
    import jax

    side = 224 // _PATCH
    patches = x.reshape(-1, side, _PATCH, side, _PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    kernel = _weights("patches", _PATCH * _PATCH * 3, _HIDDEN)
    embedded = jax.nn.gelu(patches.reshape(-1, side * side, kernel.shape[0]) @ kernel)
    return _head("images", embedded.mean(axis=1), _HIDDEN)


def prepare(x: Any) -> Any:
    """Map (B, 224, 224, 3) bytes to the floats that `images` takes."""
    return x.astype(np.float32) / 127.5 - 1


def _head(name: str, x: Any, width: int) -> Any:
    import jax

    hidden = jax.nn.gelu(x @ _weights(f"{name} hidden", width, _HIDDEN))
    return hidden @ _weights(f"{name} out", _HIDDEN, _OUTPUTS)


@functools.cache
def _weights(name: str, rows: int, columns: int) -> np.ndarray:
    rng = np.random.default_rng(list(name.encode()))
    return rng.normal(0, rows**-0.5, (rows, columns)).astype(np.float32)


def model_of(name: str) -> tuple[Any, tuple[int, ...]]:
    """Return a model on a batch, and one query's shape."""
    if name in SHAPES:
        return globals()[name], SHAPES[name]
    from nercc_models import load_model

    network = load_model(name)
    return network, network.input_shape


def slow_score(batch: Any) -> np.ndarray:
    """Return 1 for a query in the .npy file that `SLOW_QUERIES` names, else 0.

    Fault injection strikes the rows that are above half of those a worker has seen, and none of a
    worker's first twenty: zeros stand before each call's own scores, so that all count.
    """
    own = [float(row.tobytes() in _slow()) for row in np.asarray(batch, np.float32)]
    return np.concatenate([np.zeros(20), own])


@functools.cache
def _slow() -> frozenset[bytes]:
    return frozenset(row.tobytes() for row in np.load(os.environ["SLOW_QUERIES"]))


def read(body: bytes, length: str) -> np.ndarray:
    """Return the tensor of a binary request, whose header has this length."""
    import orjson

    shape = orjson.loads(body[: int(length)])["inputs"][0]["shape"]
    return np.frombuffer(body, "<f4", offset=int(length)).reshape(shape)


def written(name: str, y: np.ndarray) -> tuple[bytes, dict[str, str]]:
    """Return a binary reply and its headers."""
    import orjson

    output = {"name": "output", "datatype": "FP32", "shape": list(y.shape)}
    output |= {"parameters": {"binary_data_size": y.nbytes}}
    head = orjson.dumps({"model_name": name, "outputs": [output]})
    headers = {"inference-header-content-length": str(len(head))}
    return head + y.tobytes(), headers | {"content-type": "application/octet-stream"}


def tell_ready(**ports: int) -> None:
    print(json.dumps({"message": "ready", **ports}), file=sys.stderr, flush=True)


def bare(name: str, transport: str = "REST") -> None:
    """Run the bare server."""
    import equinox as eqx
    import fastapi
    import grpc
    import jax
    import uvicorn
    import uvloop

    from nercc_jax.serving.transport import open_inference_pb2 as messages

    model, shape = model_of(name)
    run = eqx.filter_jit(model)
    jax.block_until_ready(run(np.zeros((1, *shape), np.float32)))

    async def infer(request: Any, context: Any) -> messages.ModelInferResponse:
        x = np.frombuffer(request.raw_input_contents[0], "<f4")
        y = np.asarray(run(x.reshape(tuple(request.inputs[0].shape))))
        reply = messages.ModelInferResponse(
            model_name=request.model_name, raw_output_contents=[y.tobytes()]
        )
        reply.outputs.add(name="output", datatype="FP32", shape=y.shape)
        return reply

    async def serve_grpc() -> None:
        handler = grpc.unary_unary_rpc_method_handler(
            infer,  # pyright: ignore[reportArgumentType]
            request_deserializer=messages.ModelInferRequest.FromString,
            response_serializer=messages.ModelInferResponse.SerializeToString,
        )
        server, service = grpc.aio.server(), "inference.GRPCInferenceService"
        generic = grpc.method_handlers_generic_handler(service, {"ModelInfer": handler})
        server.add_generic_rpc_handlers((generic,))
        tell_ready(grpc_port=server.add_insecure_port("127.0.0.1:0"))
        await server.start()
        await server.wait_for_termination()

    if transport == "gRPC":
        uvloop.run(serve_grpc())
        return
    app = fastapi.FastAPI()

    @app.post("/v2/models/{name}/infer")
    async def answer(name: str, request: fastapi.Request) -> fastapi.Response:
        x = read(await request.body(), request.headers["inference-header-content-length"])
        content, headers = written(name, np.asarray(run(x)))
        return fastapi.Response(content, headers=headers)

    config = uvicorn.Config(app, port=0, log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    sockets = [config.bind_socket()]
    tell_ready(http_port=sockets[0].getsockname()[1])
    server.run(sockets=sockets)


def ray(port: int, replicas: int, batch: int, base: float, rate: float, delay: float) -> None:
    """Run LeNet5 behind Ray Serve."""
    import asyncio
    import logging
    import signal
    import threading

    import ray as cluster
    from ray import serve
    from starlette.requests import Request
    from starlette.responses import Response

    name = "lenet5-digits"

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
            from nercc_models import load_model

            model = load_model(name)
            self.program = Program((model,), jax.local_devices()[0], True)
            sizes = [1 << power for power in range(batch.bit_length())]
            empty = [np.zeros((n, *model.input_shape), np.float32) for n in sizes]
            warm_up([self.program], 1, empty)
            faults = Faults.from_rates(
                service_delay=base, straggler_rate=rate, straggler_delay=delay, seed=os.getpid()
            )
            self.worker = Worker(self.program, faults.at(0, 0), lambda: None)
            self.busy = asyncio.Lock()

        async def __call__(self, request: Request) -> Response:
            x = read(await request.body(), request.headers["inference-header-content-length"])
            y: Any = await (self.together(x) if batch > 1 else self.call(x))
            content, headers = written(name, np.asarray(y, np.float32))
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

    cluster.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    http = {"host": "127.0.0.1", "port": port}
    serve.start(http_options=http, logging_config={"enable_access_log": False})
    serve.run(Model.bind(), name="bench", route_prefix="/")
    tell_ready(http_port=port)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    while not stop.wait(0.1):
        pass
    serve.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    _, kind, *words = sys.argv
    if kind == "bare":
        bare(*words)
    else:
        ray(*map(int, words[:3]), *map(float, words[3:]))
