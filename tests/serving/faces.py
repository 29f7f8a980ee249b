"""One request by REST, by gRPC and in Python: queries of one tensor with the same parameters."""

# ruff: noqa: E402 (`require` comes before what needs it)

import asyncio

import numpy as np
from conftest import require

httpx, grpc = require("httpx", "serve-test"), require("grpc", "serve-test")
require("fastapi", "serve")

from serving.grpc_stub import GRPCInferenceServiceStub

from nercc_jax.serving.transport import open_inference_pb2 as messages

LONG = 60.0  # seconds that no answer takes, unless something hangs


def by_rest(server, rows, parameters, model, token=""):
    """The status, and the answer's JSON."""
    tensor = {"name": "input", "datatype": "FP32", "shape": np.shape(rows), "data": rows}
    content = {"id": "mine", "parameters": parameters, "inputs": [tensor]}
    url, given = f"http://127.0.0.1:{server.http_port}/v2/models/{model}/infer", f"Bearer {token}"
    options = {"headers": {"Authorization": given}, "timeout": LONG, "trust_env": False}
    answer = httpx.post(url, json=content, **options)
    return answer.status_code, answer.json()


def by_grpc(server, rows, parameters, model, token=""):
    """The status, and the answer, or what the error says."""
    request = messages.ModelInferRequest(model_name=model, id="mine")
    tensor = request.inputs.add(name="input", datatype="FP32", shape=np.shape(rows))
    tensor.contents.fp32_contents.extend(np.ravel(rows).tolist())
    for name, value in parameters.items():
        kind = "bool_param" if value is True else "int64_param"
        setattr(request.parameters[name], kind, value)
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        infer, given = GRPCInferenceServiceStub(channel).ModelInfer, f"Bearer {token}"
        try:
            return "OK", infer(request, metadata=[("authorization", given)], timeout=LONG)
        except grpc.RpcError as error:
            return error.code().name, error.details()


def by_python(model, rows, parameters):
    """The error's name or None, and the reply of a `ServedModel`, or what the error says."""
    options = {"deadline": parameters.get("nercc_deadline_ms", 1e4) / 1000}
    infer = model.infer(np.array(rows), exact="nercc_exact" in parameters, **options)
    try:
        return None, asyncio.run(infer)
    except Exception as error:
        return type(error).__name__, str(error)
