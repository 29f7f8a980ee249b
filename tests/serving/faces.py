"""One request by REST (in JSON or binary), by gRPC (typed or raw) and in Python."""

# ruff: noqa: E402 (`require` comes before what needs it)

import asyncio
import contextlib
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from conftest import require

httpx, grpc = require("httpx", "serve-test"), require("grpc", "serve-test")
require("starlette", "serve")

from google.protobuf.message_factory import GetMessageClass

from nercc_jax.serving.transport import open_inference_pb2 as messages

LONG = 240.0  # seconds that no answer takes, unless something hangs
REST, GRPC = ("json", "binary"), ("typed", "raw")
FACES = REST + GRPC
# What gRPC says where REST has this status.
CODES = {
    200: "OK",
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    404: "NOT_FOUND",
    413: "RESOURCE_EXHAUSTED",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    502: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_CONTENTS = {"INT64": "int64", "UINT64": "uint64", "BOOL": "bool", "FP32": "fp32", "FP64": "fp64"}


class Stub:
    """Has a method for each of the gRPC service's, made from its description."""

    def __init__(self, channel):
        service = messages.DESCRIPTOR.services_by_name["GRPCInferenceService"]
        for method in service.methods:
            call = channel.unary_unary(
                f"/{service.full_name}/{method.name}",
                request_serializer=GetMessageClass(method.input_type).SerializeToString,
                response_deserializer=GetMessageClass(method.output_type).FromString,
            )
            setattr(self, method.name, call)


@contextlib.contextmanager
def stub_of(server):
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        yield Stub(channel)


def post(server, path, **options):
    url = f"http://127.0.0.1:{server.http_port}{path}"
    return httpx.post(url, timeout=LONG, trust_env=False, **options)


class Tensor(NamedTuple):
    """An input that may not be what it says."""

    data: Any
    shape: Any
    datatype: str = "FP32"


class Answer(NamedTuple):
    """An answer to a request, by whichever face."""

    status: int | str
    error: str | None = None
    outputs: Mapping[str, np.ndarray] = MappingProxyType({})
    parameters: Mapping[str, Any] = MappingProxyType({})
    id: str = ""
    version: str = ""

    def is_(self, http: int) -> bool:
        """Return whether its status is this one, or what gRPC says in its place."""
        return self.status == (http if isinstance(self.status, int) else CODES[http])


def dtype_of(datatype):
    return np.dtype({"FP32": "<f4", "FP64": "<f8"}.get(datatype, datatype.lower()))


def as_tensor(given, datatype="FP32"):
    """A tensor as it is, or of an array."""
    return given if isinstance(given, Tensor) else Tensor(given, np.shape(given), datatype)


def bytes_of(data, datatype):
    with np.errstate(over="ignore"):
        return np.asarray(data, dtype_of(datatype)).tobytes()


def message(
    model, inputs, datatypes=None, *, raw=False, version="", outputs=(), parameters=None, id=""
):
    """A gRPC request for inference."""
    request = messages.ModelInferRequest(model_name=model, model_version=version, id=id)
    for name, given in inputs.items():
        data, shape, datatype = as_tensor(given, (datatypes or {}).get(name, "FP32"))
        tensor = request.inputs.add(name=name, shape=shape, datatype=datatype)
        if raw:
            request.raw_input_contents.append(bytes_of(data, datatype))
        else:
            kind = _CONTENTS.get(datatype, "uint" if datatype.startswith("U") else "int")
            getattr(tensor.contents, f"{kind}_contents").extend(np.ravel(data).tolist())
    for name in outputs:
        request.outputs.add(name=name)
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    for name, value in (parameters or {}).items():
        setattr(request.parameters[name], kinds[type(value)], value)
    return request


def content(model, inputs, datatypes=None, *, raw=False, outputs=(), parameters=None, id=""):
    """The body of a REST request, and its headers; a raw one asks for raw answers unless told."""
    asked, binary = [], b""
    for name, given in inputs.items():
        data, shape, datatype = as_tensor(given, (datatypes or {}).get(name, "FP32"))
        asked.append({"name": name, "shape": list(shape), "datatype": datatype})
        if raw:
            binary += (part := bytes_of(data, datatype))
            asked[-1]["parameters"] = {"binary_data_size": len(part)}
        else:
            asked[-1]["data"] = data.tolist() if isinstance(data, np.ndarray) else data
    body = {"inputs": asked} | ({"id": id} if id else {})
    if raw:
        parameters = {"binary_data_output": True} | (parameters or {})
    if parameters:
        body["parameters"] = parameters
    if outputs:
        body["outputs"] = [{"name": name} for name in outputs]
    head = json.dumps(body).encode()
    return head + binary, {"inference-header-content-length": str(len(head))} if raw else {}


def ask(face, server, model, inputs, datatypes=None, *, version="", headers=None, **more):
    """An answer of a server to a request by one of `FACES`."""
    raw = face in ("binary", "raw")
    if face in REST:
        body, own = content(model, inputs, datatypes, raw=raw, **more)
        path = f"/v2/models/{model}" + (f"/versions/{version}" if version else "") + "/infer"
        return read(post(server, path, content=body, headers=own | (headers or {})))
    request = message(model, inputs, datatypes, raw=raw, version=version, **more)
    metadata = [(name.lower(), value) for name, value in (headers or {}).items()]
    with stub_of(server) as stub:
        try:
            found = stub.ModelInfer(request, timeout=LONG, metadata=metadata)
        except grpc.RpcError as error:
            return Answer(error.code().name, error.details())
    outputs = {
        each.name: np.frombuffer(part, dtype_of(each.datatype)).reshape(each.shape)
        for each, part in zip(found.outputs, found.raw_output_contents, strict=True)
    }
    parameters = {
        name: getattr(value, value.WhichOneof("parameter_choice"))
        for name, value in found.parameters.items()
    }
    return Answer("OK", None, outputs, parameters, found.id, found.model_version)


def read(answer):
    """An answer of REST, whether in JSON or binary."""
    length = int(answer.headers.get("inference-header-content-length", len(answer.content)))
    head, rest = json.loads(answer.content[:length]), answer.content[length:]
    if answer.status_code != 200:
        assert list(head) == ["error"]
        return Answer(answer.status_code, head["error"])
    outputs = {}
    for each in head["outputs"]:
        dtype, size = dtype_of(each["datatype"]), each.get("parameters", {}).get("binary_data_size")
        array = np.array(each["data"], dtype) if size is None else np.frombuffer(rest[:size], dtype)
        outputs[each["name"]], rest = array.reshape(each["shape"]), rest[size or 0 :]
    assert not rest
    return Answer(200, None, outputs, head["parameters"], head["id"], head["model_version"])


def by_rest(server, rows, parameters, model, token=""):
    """The status, and the answer's JSON."""
    body, _ = content(model, {"input": rows}, parameters=parameters, id="mine")
    headers = {"Authorization": f"Bearer {token}"}
    answer = post(server, f"/v2/models/{model}/infer", content=body, headers=headers)
    return answer.status_code, answer.json()


def by_grpc(server, rows, parameters, model, token=""):
    """The status, and the answer, or what the error says."""
    request, given = message(model, {"input": rows}, parameters=parameters), f"Bearer {token}"
    with stub_of(server) as stub:
        try:
            return "OK", stub.ModelInfer(request, metadata=[("authorization", given)], timeout=LONG)
        except grpc.RpcError as error:
            return error.code().name, error.details()


def by_python(model, rows, parameters):
    """The error's name or None, and the reply of a `ServedModel`, or what the error says."""
    options = {"deadline": parameters.get("nercc_deadline_ms", 1e4) / 1000}
    rows = rows if isinstance(rows, dict) else np.array(rows)
    infer = model.infer(rows, exact="nercc_exact" in parameters, **options)
    try:
        return None, asyncio.run(infer)
    except Exception as error:
        return type(error).__name__, str(error)
