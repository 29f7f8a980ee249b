"""The bare server that an engineer writes first, for serving.py: FastAPI around the model.

    python bench/_serving_bare.py MODEL [gRPC]

No queue, no batches, no limits, no metrics, no checks but what the tensor needs; one process, and
the model on its event loop, which for models of milliseconds is the fastest way there is. Binary
tensors of the Open Inference Protocol, as the load sends them. With "gRPC", it is a handler of
`grpc.aio` on the same event loop instead.
"""

import json
import sys
from typing import Any

import equinox as eqx
import fastapi
import grpc
import jax
import numpy as np
import orjson
import uvicorn
import uvloop

from nercc_jax.serving.transport import open_inference_pb2 as messages


def make_app(model: Any) -> fastapi.FastAPI:
    app = fastapi.FastAPI()
    run = eqx.filter_jit(model)

    @app.post("/v2/models/{name}/infer")
    async def infer(name: str, request: fastapi.Request) -> fastapi.Response:
        body = await request.body()
        length = int(request.headers["inference-header-content-length"])
        shape = orjson.loads(body[:length])["inputs"][0]["shape"]
        x = np.frombuffer(body, "<f4", offset=length).reshape(shape)
        y = np.asarray(run(x))
        output = {
            "name": "output",
            "datatype": "FP32",
            "shape": list(y.shape),
            "parameters": {"binary_data_size": y.nbytes},
        }
        head = orjson.dumps({"model_name": name, "outputs": [output]})
        return fastapi.Response(
            head + y.tobytes(),
            media_type="application/octet-stream",
            headers={"inference-header-content-length": str(len(head))},
        )

    return app


async def serve_grpc(model: Any) -> None:
    run = eqx.filter_jit(model)

    async def infer(request: Any, context: Any) -> messages.ModelInferResponse:
        shape = tuple(request.inputs[0].shape)
        x = np.frombuffer(request.raw_input_contents[0], "<f4").reshape(shape)
        y = np.asarray(run(x))
        reply = messages.ModelInferResponse(
            model_name=request.model_name, raw_output_contents=[y.tobytes()]
        )
        reply.outputs.add(name="output", datatype="FP32", shape=y.shape)
        return reply

    handler = grpc.unary_unary_rpc_method_handler(
        infer,  # pyright: ignore[reportArgumentType]
        request_deserializer=messages.ModelInferRequest.FromString,
        response_serializer=messages.ModelInferResponse.SerializeToString,
    )
    server = grpc.aio.server()
    service = "inference.GRPCInferenceService"
    generic = grpc.method_handlers_generic_handler(service, {"ModelInfer": handler})
    server.add_generic_rpc_handlers((generic,))
    tell_ready(grpc_port=server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    await server.wait_for_termination()


def tell_ready(**ports: int) -> None:
    print(json.dumps({"message": "ready", **ports}), file=sys.stderr, flush=True)


def main(name: str, transport: str = "REST") -> None:
    from _serving_price import model_of

    model, shape = model_of(name)
    jax.block_until_ready(eqx.filter_jit(model)(np.zeros((1, *shape), np.float32)))
    if transport == "gRPC":
        uvloop.run(serve_grpc(model))
        return
    config = uvicorn.Config(make_app(model), port=0, log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    sockets = [config.bind_socket()]
    tell_ready(http_port=sockets[0].getsockname()[1])
    server.run(sockets=sockets)


if __name__ == "__main__":
    main(*sys.argv[1:])
