"""Messages of the Open Inference Protocol: a record of requests, one of responses, and errors.

JSON and the binary extension are read and written here, gRPC's messages in `transport/_grpc.py`.
`question_of` checks the contents of requests from both transports.
"""

import dataclasses
import itertools
import math
import sys
import uuid
from collections.abc import Mapping, Set
from typing import Annotated, Any, NamedTuple, TypeAlias

import grpc
import numpy as np
import orjson
from pydantic import (
    BeforeValidator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    TypeAdapter,
    ValidationError,
)

from .._policy import MAX_DEADLINE_S
from ..core._request import DeadlineExceeded, InferenceFailed, QueueFull, Reply, ServerClosing
from .servable import ADDED, Servable, Tensor

# The value of a probability or an error that is unknown: JSON has no NaN.
UNKNOWN = -1.0

# The known parameters of requests, inputs and outputs. KServe's clients send those of binary data
# by gRPC, too.
_OF_REQUESTS = frozenset(("nercc_exact", "nercc_deadline_ms", "binary_data_output"))
_OF_INPUTS, _OF_OUTPUTS = frozenset(("binary_data_size",)), frozenset(("binary_data",))
_BOOLEANS = frozenset(("nercc_exact", "binary_data_output", "binary_data"))
# By kind of dtype: the Python types of its values in JSON, and their name in messages.
_TYPES: Mapping[str, tuple[set[type], str]] = {
    "f": ({int, float}, "numbers"),
    "i": ({int}, "whole numbers"),
    "u": ({int}, "whole numbers"),
    "b": ({bool}, "booleans"),
}
# The most inputs or outputs of a request, axes of a tensor (NumPy's limit), and parameters of each.
_TENSORS, _AXES, _PARAMETERS = 1024, 64, 64


class InvalidInput(ValueError):
    """A request that does not conform to the protocol, or does not fit the model."""


class Unauthenticated(Exception):
    """A request without a token that the server knows."""


class ModelNotFound(Exception):
    """The error of a request for an unknown model, or an unknown version of it."""

    def __init__(self, model: str):
        Exception.__init__(self, f"Model with name {model} does not exist.")


class ServerNotReady(RuntimeError):
    """The error of a request to a server or a model that is not ready."""

    def __init__(self, reason: str = ""):
        RuntimeError.__init__(self, f"Server is not ready. {reason}".rstrip())


class TooLarge(Exception):
    """The error of a body or a batch that is larger than the server accepts."""


class UnsupportedEncoding(Exception):
    """The error of a compressed body."""


class Overloaded(RuntimeError):
    """The error of a request beyond the memory for all requests; the client should retry later."""


class ErrorKind(NamedTuple):
    """An error's statuses in HTTP and gRPC, and its outcome in metrics and the log."""

    http: int
    grpc: grpc.StatusCode
    outcome: str = "failed"


KINDS: Mapping[type[Exception], ErrorKind] = {
    InvalidInput: ErrorKind(400, grpc.StatusCode.INVALID_ARGUMENT, "invalid"),
    Unauthenticated: ErrorKind(401, grpc.StatusCode.UNAUTHENTICATED),
    ModelNotFound: ErrorKind(404, grpc.StatusCode.NOT_FOUND, "not_found"),
    TooLarge: ErrorKind(413, grpc.StatusCode.RESOURCE_EXHAUSTED, "invalid"),
    UnsupportedEncoding: ErrorKind(415, grpc.StatusCode.UNIMPLEMENTED, "invalid"),
    QueueFull: ErrorKind(429, grpc.StatusCode.RESOURCE_EXHAUSTED, "queue_full"),
    NotImplementedError: ErrorKind(403, grpc.StatusCode.UNIMPLEMENTED),
    InferenceFailed: ErrorKind(502, grpc.StatusCode.INTERNAL),
    Overloaded: ErrorKind(503, grpc.StatusCode.UNAVAILABLE, "overloaded"),
    ServerClosing: ErrorKind(503, grpc.StatusCode.UNAVAILABLE, "draining"),
    ServerNotReady: ErrorKind(503, grpc.StatusCode.UNAVAILABLE, "not_ready"),
    DeadlineExceeded: ErrorKind(504, grpc.StatusCode.DEADLINE_EXCEEDED, "deadline"),
}


# The message of all other errors.
INTERNAL = "internal error: see the server's log"


def _refuse_many(parameters: Any) -> Any:
    """Return parameters; raise ValueError for so many that reporting their errors takes long."""
    if isinstance(parameters, dict) and len(parameters) > _PARAMETERS:
        raise ValueError(f"{len(parameters)} parameters; at most {_PARAMETERS} are taken")
    return parameters


# A limit, since validating and reporting every part of 1 MB of invalid data would take seconds.
Parameters: TypeAlias = Annotated[
    dict[str, StrictFloat | StrictInt | StrictBool | str], BeforeValidator(_refuse_many)
]


@dataclasses.dataclass(slots=True)
class RequestInput:
    """An input tensor, whose data are lists of numbers, from JSON, or bytes."""

    name: str
    shape: Annotated[list[int], Field(max_length=_AXES, fail_fast=True)]
    datatype: str
    parameters: Parameters | None = None
    data: Any = None


@dataclasses.dataclass(slots=True)
class RequestOutput:
    """An output that a request asks for."""

    name: str
    parameters: Parameters | None = None


@dataclasses.dataclass(slots=True)
class InferenceRequest:
    """A request by either transport; if it names no outputs, it asks for all of them."""

    inputs: Annotated[list[RequestInput], Field(max_length=_TENSORS, fail_fast=True)]
    outputs: Annotated[list[RequestOutput], Field(max_length=_TENSORS, fail_fast=True)] | None = (
        None
    )
    id: str | None = None
    parameters: Parameters | None = None


AS_JSON = TypeAdapter(InferenceRequest)


class Response(NamedTuple):
    """A response by either transport.

    Attributes:
        id: the request's id, or a new one.
        servable: the model.
        parameters: the sources and expected errors of the answers, for the whole request.
        outputs: datatypes and arrays by name.
        binary: the outputs that the request asks for as binary data.
    """

    id: str
    servable: Servable
    parameters: dict[str, Any]
    outputs: dict[str, tuple[str, np.ndarray]]
    binary: frozenset[str]


def json_size(size: int, json_length: str | None, limit: int = sys.maxsize) -> int:
    """Return how many of a body's bytes are JSON: all, unless the request's header gives a length.

    Raises:
        InvalidInput: if `json_length` is not a length within the body.
        TooLarge: if the JSON is longer than `limit` bytes.
    """
    length = size
    if json_length is not None:
        # A short text, since Python refuses to read numbers with thousands of digits.
        short = json_length.isascii() and json_length.isdigit() and len(json_length) < 20
        if not short or int(json_length) > size:
            raise InvalidInput(
                f"Inference-Header-Content-Length {json_length[:20]!r} is no length within the "
                f"body's {size} bytes"
            )
        length = int(json_length)
    if length > limit:
        raise TooLarge(
            f"{length} bytes of JSON; at most {limit} are taken: send tensors as binary data (the "
            "protocol's extension: binary_data_size)"
        )
    return length


def read_request(body: bytes | bytearray, json_length: str | None) -> InferenceRequest:
    """Read a REST body: JSON, which ends at `json_length` if binary tensors follow it.

    Raises InvalidInput if it is not such a body.
    """
    size = json_size(len(body), json_length)
    try:
        request = AS_JSON.validate_python(orjson.loads(memoryview(body)[:size]))
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"the body is not JSON: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = "".join(f"{part}: " for part in (".".join(map(str, first["loc"])),) if part)
        raise InvalidInput(f"the request is not as it should be: {where}{first['msg']}") from error

    binary: Any = memoryview(body)[size:]
    for place, each in enumerate(request.inputs):
        if not isinstance(each.data, list | None):
            raise InvalidInput(
                f"the request is not as it should be: inputs.{place}.data: Input should be a list"
            )
        size = (each.parameters or {}).get("binary_data_size")
        if size is None:
            continue
        if each.data is not None:
            raise InvalidInput(f"input {each.name!r} has both data and a binary_data_size")
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(binary):
            raise InvalidInput(
                f"input {each.name!r}: binary_data_size {size!r} does not fit the "
                f"{len(binary)} bytes that are left after the JSON"
            )
        each.data, binary = binary[:size], binary[size:]
    if len(binary):
        raise InvalidInput(f"{len(binary)} bytes are left over after all binary tensors")
    return request


def question_of(
    request: InferenceRequest, servable: Servable, most: int = sys.maxsize
) -> tuple[np.ndarray | dict[str, np.ndarray], dict[str, Any]]:
    """Check a request, and return its queries and the other arguments of `ServedModel.infer`.

    Queries are an array (B, *shape), or arrays by name if the model takes a dict of arrays. The
    arguments follow from the parameters `nercc_exact`, a boolean, and `nercc_deadline_ms`.

    Raises:
        InvalidInput: for unknown outputs or parameters, parameters of the wrong type, and tensors
            whose names, types or shapes differ from the metadata.
        TooLarge: for more than `most` queries, which the queue could never hold.
    """
    asked = request.parameters or {}
    check_parameters("a request", asked, _OF_REQUESTS)
    for each in request.inputs:
        check_parameters(f"input {each.name!r}", each.parameters, _OF_INPUTS)
    for each in request.outputs or ():
        check_parameters(f"output {each.name!r}", each.parameters, _OF_OUTPUTS)
    names = [each.name for each in request.outputs or ()]
    known = [each.name for each in (*servable.outputs.parts, *ADDED)]
    if not {*names} <= {*known} or len({*names}) < len(names):
        raise InvalidInput(f"{servable.name} has outputs {known}, each once, not {names}")
    milliseconds, longest = asked.get("nercc_deadline_ms"), 1e3 * MAX_DEADLINE_S
    if milliseconds is not None and (
        isinstance(milliseconds, bool | str) or not 0 < milliseconds <= longest
    ):
        raise InvalidInput(
            f"parameter nercc_deadline_ms must be a positive number up to {longest:.0f}, an hour, "
            f"not {milliseconds!r}"
        )
    deadline = None if milliseconds is None else milliseconds / 1e3
    options = {"deadline": deadline, "exact": asked.get("nercc_exact", False)}

    inputs = servable.inputs
    try:
        inputs.check_names([each.name for each in request.inputs])
        given = {each.name: each for each in request.inputs}
        arrays = {each.name: _read_tensor(given[each.name], each) for each in inputs.parts}
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    some = arrays[inputs.parts[0].name]
    if len(some) > most:
        raise TooLarge(
            f"{len(some)} queries in one request; the queue of {servable.name} holds {most}"
        )
    return (some if inputs.alone else arrays), options


def _read_tensor(given: RequestInput, wanted: Tensor) -> np.ndarray:
    """Return a tensor as an array. Raises ValueError if it does not fit the `wanted` one.

    Sizes and types are checked first, since NumPy would convert other types, slowly.
    """
    shape, dtype, data = tuple(given.shape), wanted.sent, given.data
    if given.datatype.upper() != wanted.datatype:
        raise ValueError(f"the model takes {wanted}, not {given.datatype.upper()}")
    wanted.check_shape(shape)
    count = math.prod(shape)
    if isinstance(data, bytes | memoryview):
        if len(data) != dtype.itemsize * count:
            raise ValueError(
                f"shape {given.shape} takes {dtype.itemsize * count} bytes of {wanted.datatype}, "
                f"but {len(data)} came for {wanted.name!r}"
            )
        array = np.frombuffer(data, np.uint8 if dtype.kind == "b" else dtype)
        return (array != 0 if dtype.kind == "b" else array).reshape(shape)
    if data is None:
        raise ValueError(f"input {wanted.name!r} has neither data nor a binary_data_size")
    types, what = _TYPES[dtype.kind]
    try:
        while len(data) and isinstance(data[0], list):
            if len(set(map(len, data))) > 1:
                raise ValueError("nested lists have different lengths")
            data = list(itertools.chain.from_iterable(data))
        if len(data) != count:
            raise ValueError(f"it takes {count} elements, but {len(data)} came")
        # NumPy would convert null to NaN, and strings and booleans to numbers.
        if not set(map(type, data)) <= types:
            raise ValueError(f"not all of it are {what}")
        if dtype.kind == "f":
            with np.errstate(over="ignore"):
                return np.fromiter(data, np.float64, count).astype(np.float32).reshape(shape)
        array = np.array(data, bool if dtype.kind == "b" else None)
        if array.dtype.kind not in "iub":  # integers in JSON may have any size
            raise ValueError("some of it do not fit into 64 bits")
    except (ValueError, OverflowError, TypeError) as error:
        raise ValueError(
            f"the data of {wanted.name!r} do not make a tensor of shape {given.shape}: {error}"
        ) from error
    return array.reshape(shape)


def check_parameters(where: str, given: Mapping[str, Any] | None, known: Set[str]) -> None:
    """Raise InvalidInput for unknown parameters, such as Triton's, and for invalid booleans.

    Unknown ones are refused because they would be ignored.
    """
    if unknown := [name for name in given or () if name not in known]:
        raise InvalidInput(f"{where} has no parameters {unknown}, only {sorted(known)}")
    for name in known & _BOOLEANS:
        value = (given or {}).get(name, False)
        if not isinstance(value, bool):
            raise InvalidInput(f"parameter {name} must be a boolean, not {value!r}")


def response_of(reply: Reply, request: InferenceRequest, servable: Servable) -> Response:
    """Return the response to a checked request, with the sources and expected errors of answers."""
    # With lists: NumPy is slower for the few numbers of one query.
    exact = reply.exact.tolist()
    disagreement, error = (
        [UNKNOWN if math.isnan(value) else value for value in values.tolist()]
        for values in (reply.expected_disagreement, reply.expected_error)
    )
    parameters = {
        "nercc_exact": all(exact),
        "nercc_approximate": exact.count(False),
        "nercc_predicted": sum(reply.predicted.tolist()),
        "nercc_reexecuted": sum(reply.reexecuted.tolist()),
        "nercc_suspicious": sum(reply.suspicious.tolist()),
        "nercc_workers_asked": sum(reply.asked.tolist()),
        "nercc_workers_responded": sum(reply.responded.tolist()),
        "nercc_expected_disagreement": max(disagreement),
        "nercc_expected_error": max(error),
        "nercc_queue_ms": 1e3 * reply.queued,
    }
    parts = servable.outputs.parts
    values = {parts[0].name: reply.values} if servable.outputs.alone else reply.values
    outputs = {part.name: (part.datatype, values[part.name]) for part in parts}
    outputs["exact"] = "BOOL", reply.exact
    outputs["expected_disagreement"] = "FP32", np.array(disagreement, np.float32)
    outputs["expected_error"] = "FP32", np.array(error, np.float32)
    # The request's `binary_data_output` is the default for outputs without `binary_data`.
    every = (request.parameters or {}).get("binary_data_output", False)
    wanted = {each.name: each.parameters or {} for each in request.outputs or ()}
    wanted = wanted or {name: {} for name in outputs}
    outputs = {name: outputs[name] for name in wanted}
    binary = frozenset(name for name, about in wanted.items() if about.get("binary_data", every))
    return Response(request.id or uuid.uuid4().hex, servable, parameters, outputs, binary)


def write_response(response: Response) -> tuple[bytes, dict[str, str]]:
    """Return a REST body and its headers."""
    outputs, binary = [], []
    for name, (datatype, array) in response.outputs.items():
        output = {"name": name, "shape": array.shape, "datatype": datatype}
        if name in response.binary:
            raw = array.tobytes()
            output["parameters"] = {"binary_data_size": len(raw)}
            binary.append(raw)
        else:
            output["data"] = array.ravel().tolist()
        outputs.append(output)
    head = orjson.dumps(
        {
            "id": response.id,
            "model_name": response.servable.name,
            "model_version": response.servable.version,
            "outputs": outputs,
            "parameters": response.parameters,
        }
    )
    if not binary:
        return head, {"content-type": "application/json"}
    return b"".join([head, *binary]), {
        "content-type": "application/octet-stream",
        "inference-header-content-length": str(len(head)),
    }
