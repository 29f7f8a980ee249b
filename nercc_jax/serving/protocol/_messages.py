"""Messages of the Open Inference Protocol: requests to queries, and replies to outputs.

`InferRequest` is a request of either transport. Its REST form is read and written here; `_grpc.py`
has the other.
"""

import dataclasses
import itertools
import math
import sys
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Annotated, Any, NamedTuple, TypeAlias

import numpy as np
import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationError,
)

from .._policy import MAX_DEADLINE_S
from ..core._request import Reply
from ._errors import InvalidInput, TooLarge, UnsupportedEncoding
from ._servable import ADDED_OUTPUTS, Servable, Tensor

# The value of a probability or an error that is unknown: JSON has no NaN.
UNKNOWN = -1.0

_MICROSECONDS, _MILLISECONDS = 1e6, 1e3

_REQUEST_PARAMETERS = frozenset(
    ("nercc_exact", "nercc_deadline_ms", "timeout", "priority", "binary_data_output")
)

# Bytes that a compressed body may become at a time.
_UNPACKED = 2**20

# By the first letter of a datatype: the Python types that JSON may have for it, and their name.
_TYPES: Mapping[str, tuple[set[type], str]] = {
    "F": ({int, float}, "numbers"),
    "I": ({int}, "whole numbers"),
    "U": ({int}, "whole numbers"),
    "B": ({bool}, "booleans"),
}

# Most inputs or outputs of a request, axes of a tensor (NumPy has no more), and parameters of each.
_TENSORS, _AXES, _PARAMETERS = 1024, 64, 64


def _refuse_many(parameters: Any) -> Any:
    """Return parameters, unless they are so many that reporting what is wrong takes long."""
    if isinstance(parameters, dict) and len(parameters) > _PARAMETERS:
        raise ValueError(f"{len(parameters)} parameters; at most {_PARAMETERS} are taken")
    return parameters


# One MB of nonsense would take seconds, were each part of it validated and reported.
Parameters: TypeAlias = Annotated[
    dict[str, StrictFloat | StrictInt | StrictBool | str], BeforeValidator(_refuse_many)
]


class RequestInput(BaseModel):
    """A tensor of a REST request."""

    name: str
    shape: Annotated[list[int], Field(max_length=_AXES, fail_fast=True)]
    datatype: str
    parameters: Parameters | None = None
    data: list[Any] | None = None


class RequestOutput(BaseModel):
    """An output that a REST request asks for."""

    name: str
    parameters: Parameters | None = None


class InferenceRequest(BaseModel):
    """The JSON of a REST request."""

    id: str | None = None
    parameters: Parameters | None = None
    inputs: Annotated[list[RequestInput], Field(max_length=_TENSORS, fail_fast=True)]
    outputs: Annotated[list[RequestOutput], Field(max_length=_TENSORS, fail_fast=True)] | None = (
        None
    )


class ResponseOutput(BaseModel):
    """A tensor of a REST response."""

    name: str
    shape: list[int]
    datatype: str
    parameters: Parameters | None = None
    data: list[Any]


class InferenceResponse(BaseModel):
    """The JSON of a REST response."""

    model_name: str
    model_version: str | None = None
    id: str
    parameters: Parameters | None = None
    outputs: list[ResponseOutput]


class InputTensor(NamedTuple):
    """An input tensor: as numbers (`data`, or what is wrong with them), or as bytes (`raw`)."""

    name: str
    shape: list[int]
    datatype: str
    data: np.ndarray | str | None = None
    raw: bytes | memoryview | None = None


class RequestedOutput(NamedTuple):
    """An output that a request asks for, and whether as binary data."""

    name: str
    binary: bool = False


@dataclasses.dataclass
class InferRequest:
    """An inference request of either transport; all outputs are asked for if none is."""

    inputs: list[InputTensor]
    id: str | None = None
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    outputs: list[RequestedOutput] = dataclasses.field(default_factory=list)
    binary_outputs: bool = False


def decompress(body: bytes | bytearray, encoding: str, limit: int) -> Iterator[bytes]:
    """Yield the pieces of a body as it was before compression, by its Content-Encoding.

    Raises:
        TooLarge: where the result is larger than the limit, in bytes.
        UnsupportedEncoding: for an unknown encoding.
        InvalidInput: where the body is not compressed so.
    """
    kind = encoding.lower()
    if kind == "identity":
        yield bytes(body)
        return
    if kind not in ("gzip", "deflate"):
        raise UnsupportedEncoding(f"Content-Encoding {encoding!r}: gzip and deflate are known")
    reader = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # tells gzip from zlib by itself
    size = 0
    while not reader.eof:
        try:
            piece = reader.decompress(body, min(_UNPACKED, limit + 1 - size))
        except zlib.error as error:
            raise InvalidInput(f"the body is not {kind}: {error}") from error
        size += len(piece)
        if size > limit:
            raise TooLarge(f"the body is more than {limit} bytes when decompressed")
        if not piece and not reader.eof:
            raise InvalidInput(f"the body's {kind} data ends too early")
        yield piece
        body = reader.unconsumed_tail
    if reader.unused_data:
        raise InvalidInput(f"{len(reader.unused_data)} bytes after the body's {kind} data")


def json_size(size: int, json_length: str | None, limit: int = sys.maxsize) -> int:
    """Return how many of a body's bytes are JSON: all, unless the request's header gives a length.

    Raises:
        InvalidInput: where `json_length` is not a length within the body.
        TooLarge: above the limit.
    """
    length = size
    if json_length is not None:
        # Python refuses to read a number of thousands of digits.
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


def read_request(body: bytes | bytearray, json_length: str | None) -> InferRequest:
    """Read a REST body: JSON, which ends at `json_length` if binary tensors follow it.

    Raises InvalidInput where it is not such a body.
    """
    size = json_size(len(body), json_length)
    data: list[np.ndarray | str | None] = []
    try:
        value = orjson.loads(memoryview(body)[:size])
        given = value.get("inputs") if isinstance(value, dict) else None
        # Numbers become arrays before pydantic would look at each of them.
        for each in given if isinstance(given, list) else ():
            numbers = each.get("data") if isinstance(each, dict) else None
            data.append(None)
            if isinstance(numbers, list):
                data[-1] = array_or_error(numbers, each.get("shape"), each.get("datatype"))
                each["data"] = []
        request = InferenceRequest.model_validate(value)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"the body is not JSON: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = "".join(f"{part}: " for part in (".".join(map(str, first["loc"])),) if part)
        raise InvalidInput(f"the request is not as it should be: {where}{first['msg']}") from error
    binary = memoryview(body)[size:]
    inputs = []
    for each, numbers in zip(request.inputs, data, strict=True):
        raw = None
        check_parameters(f"input {each.name!r}", each.parameters, {"binary_data_size"})
        size = (each.parameters or {}).get("binary_data_size")
        if size is not None and each.data is not None:
            raise InvalidInput(f"input {each.name!r} has both data and a binary_data_size")
        if size is not None:
            if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(binary):
                raise InvalidInput(
                    f"input {each.name!r}: binary_data_size {size!r} does not fit the "
                    f"{len(binary)} bytes that are left after the JSON"
                )
            raw, binary = binary[:size], binary[size:]
        elif each.data is None:
            raise InvalidInput(f"input {each.name!r} has neither data nor a binary_data_size")
        inputs.append(InputTensor(each.name, each.shape, each.datatype.upper(), numbers, raw))
    if len(binary):
        raise InvalidInput(f"{len(binary)} bytes are left over after all binary tensors")
    parameters = request.parameters or {}
    # An output that does not say so is binary if the request says that all are.
    every = _boolean(parameters, "binary_data_output", False)
    outputs = []
    for each in request.outputs or ():
        check_parameters(f"output {each.name!r}", each.parameters, {"binary_data"})
        binary_output = _boolean(each.parameters or {}, "binary_data", every)
        outputs.append(RequestedOutput(each.name, binary_output))
    return InferRequest(inputs, request.id, parameters, outputs, every)


def array_or_error(data: Sequence[Any], shape: Any, datatype: Any) -> np.ndarray | str:
    """Return a tensor's data as an array of one axis, or what is wrong with them.

    Sizes and types are checked first, since NumPy converts whatever it is given, at a price.
    """
    try:
        types, what = _TYPES[str(datatype)[:1].upper()]
        # Of a shape without end even the product would take long.
        count = math.prod(map(int, shape[: _AXES + 1]))
        while len(data) and isinstance(data[0], list):
            if len(set(map(len, data))) > 1:
                return "nested lists have different lengths"
            data = list(itertools.chain.from_iterable(data))
        if len(data) != count:
            return f"it takes {count} elements, but {len(data)} came"
        # Nulls would become NaN, strings and booleans numbers.
        if not set(map(type, data)) <= types:
            return f"not all of it are {what}"
        if what == "numbers":
            with np.errstate(over="ignore"):
                return np.fromiter(data, np.float64, count).astype(np.float32)
        numbers = np.array(data, bool if what == "booleans" else None)
    except KeyError:
        return "its datatype is unknown"
    except (ValueError, OverflowError, TypeError) as error:
        return str(error)
    # Whole numbers may be of any size.
    return numbers if numbers.dtype.kind in "iub" else "some of it do not fit into 64 bits"


def queries_of(
    request: InferRequest, servable: Servable, most: int = sys.maxsize
) -> np.ndarray | dict[str, np.ndarray]:
    """Return a request's queries, (B, *shape), by name where the model takes a dict of arrays.

    Raises:
        InvalidInput: for anything but tensors of the names, types and shapes in the metadata.
        TooLarge: for more queries than `most`, for which there would never be room.
    """
    inputs = servable.inputs
    given = {each.name: each for each in request.inputs}
    try:
        inputs.check_names([each.name for each in request.inputs])
        arrays = {each.name: _read_tensor(given[each.name], each) for each in inputs.parts}
        inputs.check_sizes(arrays)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    some = arrays[inputs.parts[0].name]
    if len(some) > most:
        raise TooLarge(
            f"{len(some)} queries in one request; the queue of {servable.name} holds {most}"
        )
    return some if inputs.alone else arrays


def _read_tensor(given: InputTensor, wanted: Tensor) -> np.ndarray:
    """Return a tensor as an array. Raises ValueError where it is not the wanted one."""
    shape, dtype = tuple(given.shape), wanted.sent
    if given.datatype != wanted.datatype:
        raise ValueError(f"the model takes {wanted}, not {given.datatype}")
    if len(shape) != len(wanted.shape) + 1 or shape[1:] != wanted.shape or shape[0] < 1:
        raise ValueError(f"the model takes {wanted}, not of shape {list(shape)}")
    if given.raw is not None:
        size = dtype.itemsize * math.prod(shape)
        if len(given.raw) != size:
            raise ValueError(
                f"shape {list(shape)} takes {size} bytes of {wanted.datatype}, but "
                f"{len(given.raw)} came for {wanted.name!r}"
            )
        array = np.frombuffer(given.raw, np.uint8 if dtype.kind == "b" else dtype)
        return (array != 0 if dtype.kind == "b" else array).reshape(shape)
    if not isinstance(given.data, np.ndarray):
        raise ValueError(
            f"the data of {wanted.name!r} do not make a tensor of shape {list(shape)}: {given.data}"
        )
    return given.data.reshape(shape)


def answer_options(request: InferRequest) -> dict[str, Any]:
    """Return the keywords of `ServedModel.infer` that a request asks for.

    They are the parameters `nercc_exact` (a boolean), `nercc_deadline_ms`, and Triton's `timeout`
    in microseconds and `priority`, 1 or 2 (0 means the default).

    Raises:
        InvalidInput: for values of another kind, and other parameters.
    """
    parameters = request.parameters
    check_parameters("a request", parameters, _REQUEST_PARAMETERS)
    exact = _boolean(parameters, "nercc_exact", False)
    deadline = None
    for name, unit in (("timeout", _MICROSECONDS), ("nercc_deadline_ms", _MILLISECONDS)):
        if name not in parameters or (name == "timeout" and parameters[name] == 0):
            continue
        value = parameters[name]
        most = unit * MAX_DEADLINE_S
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
            raise InvalidInput(
                f"parameter {name} must be a positive number up to {most:.0f}, an hour, not "
                f"{value!r}"
            )
        deadline = value / unit
    priority = parameters.get("priority", 0)
    if isinstance(priority, bool) or priority not in (0, 1, 2):
        raise InvalidInput(f"parameter priority must be 1 (high) or 2 (as usual), not {priority!r}")
    return {"deadline": deadline, "exact": exact, "high": priority == 1}


def check_parameters(where: str, given: Mapping[str, Any] | None, known: Set[str]) -> None:
    """Raise InvalidInput for parameters that would be ignored, such as Triton's classification.

    Triton's clients send some of their own, of which nothing is lost: `triton_...`.
    """
    if unknown := [
        name for name in given or () if name not in known and not name.startswith("triton_")
    ]:
        raise InvalidInput(f"{where} has no parameters {unknown}, only {sorted(known)}")


def _boolean(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    """Return a boolean parameter. Raises InvalidInput where it is something else."""
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidInput(f"parameter {name} must be a boolean, not {value!r}")
    return value


def write_reply(
    reply: Reply, request: InferRequest, servable: Servable
) -> tuple[bytes, dict[str, str]]:
    """Return a REST body and its headers, with all outputs unless some are asked for."""
    asked = dict(request.outputs)
    outputs, binary = [], []
    for name, (datatype, array) in response_outputs(reply, request, servable).items():
        output = {"name": name, "shape": array.shape, "datatype": datatype}
        if asked.get(name, request.binary_outputs):
            raw = array.tobytes()
            output["parameters"] = {"binary_data_size": len(raw)}
            binary.append(raw)
        else:
            output["data"] = array.ravel().tolist()
        outputs.append(output)
    head = orjson.dumps(
        {
            "id": request.id or uuid.uuid4().hex,
            "model_name": servable.name,
            "model_version": servable.version,
            "outputs": outputs,
            "parameters": reply_parameters(reply),
        }
    )
    if not binary:
        return head, {"content-type": "application/json"}
    return b"".join([head, *binary]), {
        "content-type": "application/octet-stream",
        "inference-header-content-length": str(len(head)),
    }


def response_outputs(
    reply: Reply, request: InferRequest, servable: Servable
) -> dict[str, tuple[str, np.ndarray]]:
    """Return datatypes and arrays by name, of the outputs that are asked for (`check_outputs`)."""
    values = reply.values
    if servable.outputs.alone:
        values = {servable.outputs.parts[0].name: values}
    tensors = {
        **{part.name: (part.datatype, values[part.name]) for part in servable.outputs.parts},
        "exact": ("BOOL", reply.exact),
        "expected_disagreement": ("FP32", _tensor(reply.expected_disagreement)),
        "expected_error": ("FP32", _tensor(reply.expected_error)),
    }
    return {name: tensors[name] for name, _ in request.outputs} if request.outputs else tensors


def reply_parameters(reply: Reply) -> dict[str, Any]:
    """Return what the reply as a whole rests on: a response's parameters."""
    # By lists: NumPy takes longer for the numbers of one query.
    exact = reply.exact.tolist()
    return {
        "nercc_exact": all(exact),
        "nercc_approximate": exact.count(False),
        "nercc_predicted": sum(reply.predicted.tolist()),
        "nercc_reexecuted": sum(reply.reexecuted.tolist()),
        "nercc_suspicious": sum(reply.suspicious.tolist()),
        "nercc_workers_asked": sum(reply.asked.tolist()),
        "nercc_workers_responded": sum(reply.responded.tolist()),
        "nercc_expected_disagreement": max(_without_nan(reply.expected_disagreement)),
        "nercc_expected_error": max(_without_nan(reply.expected_error)),
        "nercc_queue_ms": 1e3 * reply.queued,
    }


def check_outputs(request: InferRequest, servable: Servable) -> None:
    """Raise InvalidInput where an output is asked for that there is not, or twice."""
    if not request.outputs:
        return
    known = [output["name"] for output in output_types(servable)]
    names = [name for name, _ in request.outputs]
    unknown = [name for name in names if name not in known]
    if unknown or len(set(names)) < len(names):
        raise InvalidInput(f"{servable.name} has outputs {known}, each once, not {names}")


def output_types(servable: Servable) -> list[dict[str, Any]]:
    """Return the outputs as the metadata have them, the server's own included."""
    added = (Tensor(name, "BOOL" if name == "exact" else "FP32", ()) for name in ADDED_OUTPUTS)
    return tensor_types((*servable.outputs.parts, *added))


def tensor_types(tensors: Iterable[Tensor]) -> list[dict[str, Any]]:
    return [
        {"name": each.name, "datatype": each.datatype, "shape": each.batch_shape}
        for each in tensors
    ]


def _without_nan(values: np.ndarray) -> list[float]:
    return [UNKNOWN if math.isnan(value) else value for value in values.tolist()]


def _tensor(values: np.ndarray) -> np.ndarray:
    return np.array(_without_nan(values), np.float32)
