"""The bare server that an engineer writes first, for serving.py: FastAPI around the model.

    python bench/_serving_bare.py MODEL

No queue, no batches, no limits, no metrics, no checks but what the tensor needs; one process, and
the model on its event loop, which for models of milliseconds is the fastest way there is. Binary
tensors of the Open Inference Protocol, as the load sends them.
"""

import json
import sys
from typing import Any

import equinox as eqx
import fastapi
import jax
import numpy as np
import orjson
import uvicorn


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


def main(name: str) -> None:
    from _serving_price import model_of

    model, shape = model_of(name)
    jax.block_until_ready(eqx.filter_jit(model)(np.zeros((1, *shape), np.float32)))
    config = uvicorn.Config(make_app(model), port=0, log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    sockets = [config.bind_socket()]
    summary = {"message": "ready", "http_port": sockets[0].getsockname()[1]}
    print(json.dumps(summary), file=sys.stderr, flush=True)
    server.run(sockets=sockets)


if __name__ == "__main__":
    main(sys.argv[1])
