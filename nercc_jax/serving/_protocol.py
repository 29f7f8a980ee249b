"""The Open Inference Protocol's messages, to queries and from replies.

kserve has the messages' types and writes them. Reading REST bodies is done here: kserve's reader
turns each binary number into a Python object, and trusts what it reads.
"""

import math
import struct
import sys
import uuid
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

import numpy as np
import orjson
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from pydantic import BaseModel, ValidationError

from ._kserve import (
    InferInput,
    InferOutput,
    InferRequest,
    InferResponse,
    InvalidInput,
    RequestedOutput,
    bodies,
)
from ._policy import MAX_DEADLINE_S
from ._request import Reply
from ._servable import ADDED_OUTPUTS, Servable
from ._settings import ModelSettings
from ._signature import Tensor

VERSION = "1"
# What the protocol says for a probability or an error that is not known: JSON has no NaN.
UNKNOWN = -1.0

_MICROSECONDS, _MILLISECONDS = 1e6, 1e3

# By kind of dtype: kinds of what NumPy makes of JSON that will do, and what to call it.
_IN_JSON = {
    "f": ("fiu", "numbers"),
    "i": ("iu", "whole numbers"),
    "u": ("iu", "whole numbers"),
    "b": ("b", "booleans"),
}


class TooLarge(Exception):
    """A body or a batch is larger than the server takes."""


class BodyTimeout(Exception):
    """A body did not come in time."""


class UnsupportedEncoding(Exception):
    """A body is compressed in a way that is not known here."""


class _Input(BaseModel):
    name: str
    shape: list[int]
    datatype: str
    parameters: bodies.Parameters | None = None
    data: list[Any] | None = None


class _Request(BaseModel):
    id: str | None = None
    parameters: bodies.Parameters | None = None
    inputs: list[_Input]
    outputs: list[bodies.RequestOutput] | None = None


def decompress(body: bytes, encoding: str | None, limit: int) -> bytes:
    """A body as it was. Raises: `TooLarge`, `UnsupportedEncoding`, InvalidInput."""
    kind = (encoding or "identity").lower()
    if kind == "identity":
        return body
    if kind not in ("gzip", "deflate"):
        raise UnsupportedEncoding(f"Content-Encoding {encoding!r}: gzip and deflate are known")
    reader = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # tells gzip from zlib by itself
    try:
        plain = reader.decompress(body, limit + 1)
    except zlib.error as error:
        raise InvalidInput(f"the body is not {kind}: {error}") from error
    if len(plain) > limit:
        raise TooLarge(f"the body is more than {limit} bytes when decompressed")
    if not reader.eof:
        raise InvalidInput(f"the body's {kind} data ends too early")
    if reader.unused_data:
        raise InvalidInput(f"{len(reader.unused_data)} bytes after the body's {kind} data")
    return plain


def json_size(size: int, json_length: str | None, limit: int = sys.maxsize) -> int:
    """How many of a body's bytes are JSON: `json_length`, if binary tensors follow it.

    Raises: InvalidInput where it is no such length; `TooLarge` where it is above the limit.
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
            f"{length} bytes of JSON; at most {limit} are taken: send large tensors as binary data "
            "(the protocol's extension: binary_data_size)"
        )
    return length


def read_request(body: bytes, json_length: str | None, model: str) -> InferRequest:
    """A REST body: JSON, which ends at `json_length` if binary tensors follow it.

    Raises: InvalidInput where it is neither.
    """
    head = body if json_length is None else body[: json_size(len(body), json_length)]
    try:
        request = _Request.model_validate(orjson.loads(head))
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"the body is not JSON: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = "".join(f"{part}: " for part in (".".join(map(str, first["loc"])),) if part)
        raise InvalidInput(f"the request is not as it should be: {where}{first['msg']}") from error
    binary = memoryview(body)[len(head) :]
    inputs = []
    for each in request.inputs:
        data: Any = each.data
        one = InferInput(each.name, each.shape, each.datatype, data, each.parameters)
        size = (each.parameters or {}).get("binary_data_size")
        if size is not None and each.data is None:
            if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(binary):
                raise InvalidInput(
                    f"input {each.name!r}: binary_data_size {size!r} does not fit the "
                    f"{len(binary)} bytes that are left after the JSON"
                )
            one._raw_data, binary = binary[:size], binary[size:]
        elif each.data is None:
            raise InvalidInput(f"input {each.name!r} has neither data nor a binary_data_size")
        inputs.append(one)
    if len(binary):
        raise InvalidInput(f"{len(binary)} bytes are left over after all binary tensors")
    # An output that does not say so is binary if the request says that all are.
    usual = {"binary_data": (request.parameters or {}).get("binary_data_output", False)}
    outputs = [
        RequestedOutput(each.name, usual | (each.parameters or {}))
        for each in request.outputs or ()
    ]
    return InferRequest(
        model,
        inputs,
        request.id,
        parameters=request.parameters,
        request_outputs=outputs or None,
    )


def queries_of(
    request: InferRequest, servable: Servable, most: int = sys.maxsize
) -> np.ndarray | dict[str, np.ndarray]:
    """The request's queries: (B, *shape), or such by name where the model takes a dict of arrays.

    Raises: InvalidInput for anything but tensors of the names, types and shapes that the metadata
    says; `TooLarge` where B is more than `most`, for which there would never be room.
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


def _read_tensor(given: InferInput, wanted: Tensor) -> np.ndarray:
    """Raises: ValueError where it is another."""
    shape, dtype = tuple(given.shape), wanted.sent
    if given.datatype != wanted.datatype:
        raise ValueError(f"the model takes {wanted}, not {given.datatype}")
    if len(shape) != len(wanted.shape) + 1 or shape[1:] != wanted.shape or shape[0] < 1:
        raise ValueError(f"the model takes {wanted}, not of shape {list(shape)}")
    if given._raw_data is not None:
        size = dtype.itemsize * math.prod(shape)
        if len(given._raw_data) != size:
            raise ValueError(
                f"shape {list(shape)} takes {size} bytes of {wanted.datatype}, but "
                f"{len(given._raw_data)} came for {wanted.name!r}"
            )
        array = np.frombuffer(given._raw_data, np.uint8 if dtype.kind == "b" else dtype)
        return (array != 0 if dtype.kind == "b" else array).reshape(shape)
    try:
        # Nulls would become NaN, strings and booleans numbers.
        numbers = np.array(given.data)
        kinds, what = _IN_JSON[dtype.kind]
        if numbers.dtype.kind not in kinds:
            raise ValueError(f"not all of it are {what}")
        with np.errstate(over="ignore"):
            # What does not fit into integers is refused with the names of the queries, later.
            return (numbers.astype(dtype) if dtype.kind == "f" else numbers).reshape(shape)
    except (ValueError, OverflowError, TypeError) as error:
        raise ValueError(
            f"the data of {wanted.name!r} do not make a tensor of shape {list(shape)}: {error}"
        ) from error


class Demands(TypedDict):
    """How a request is to be answered: what `ServedModel.infer` takes beside queries."""

    deadline: float | None
    exact: bool
    high: bool


def demands(request: InferRequest) -> Demands:
    """The request's deadline in seconds, whether answers must be exact, or go ahead of others'.

    Parameters `nercc_exact` (a boolean), `nercc_deadline_ms`, and Triton's `timeout` in
    microseconds and `priority`, 1 or 2 (0: none is said). Raises: InvalidInput where they are
    something else.
    """
    parameters = plain_parameters(request.parameters or {})
    exact = parameters.get("nercc_exact", False)
    if not isinstance(exact, bool):
        raise InvalidInput(f"parameter nercc_exact must be a boolean, not {exact!r}")
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


def write_reply(
    reply: Reply, request: InferRequest, servable: Servable
) -> tuple[bytes, dict[str, str]]:
    """A REST body and its headers: all outputs unless some are asked for; see `check_outputs`.

    Not by kserve's writer, which takes ten times as long as this.
    """
    every = bool(request.use_binary_outputs)
    asked = {output.name: output.binary_data for output in request.request_outputs or ()}
    outputs, binary = [], []
    for name, (datatype, array) in _outputs(reply, request, servable).items():
        told = {"name": name, "shape": array.shape, "datatype": datatype}
        if asked.get(name, every):
            raw = array.tobytes()
            told["parameters"] = {"binary_data_size": len(raw)}
            binary.append(raw)
        else:
            told["data"] = array.ravel().tolist()
        outputs.append(told)
    head = orjson.dumps(
        {
            "id": request.id or uuid.uuid4().hex,
            "model_name": servable.name,
            "model_version": VERSION,
            "outputs": outputs,
            "parameters": _added(reply),
        }
    )
    if not binary:
        return head, {"content-type": "application/json"}
    return b"".join([head, *binary]), {
        "content-type": "application/octet-stream",
        "inference-header-content-length": str(len(head)),
    }


def response_of(reply: Reply, request: InferRequest, servable: Servable) -> InferResponse:
    """The reply as gRPC says it: all outputs unless some are asked for; see `check_outputs`."""
    outputs = []
    for name, (datatype, array) in _outputs(reply, request, servable).items():
        output = InferOutput(name, list(array.shape), datatype, array)
        # kserve's writer fails on arrays that are not bytes by then.
        output.set_data_from_numpy(array, binary_data=True)
        outputs.append(output)
    parameters = {  # its own know no floats
        key: f"{value:.6g}" if isinstance(value, float) else value
        for key, value in _added(reply).items()
    }
    return InferResponse(
        request.id or uuid.uuid4().hex,
        servable.name,
        outputs,
        VERSION,
        from_grpc=True,
        parameters=parameters,
        use_binary_outputs=bool(request.use_binary_outputs),
        requested_outputs=request.request_outputs,
    )


def _outputs(
    reply: Reply, request: InferRequest, servable: Servable
) -> dict[str, tuple[str, np.ndarray]]:
    """Types and arrays by name, those that are asked for."""
    values = reply.values
    if servable.outputs.alone:
        values = {servable.outputs.parts[0].name: values}
    tensors = {
        **{part.name: (part.datatype, values[part.name]) for part in servable.outputs.parts},
        "exact": ("BOOL", reply.exact),
        "expected_disagreement": ("FP32", _tensor(reply.expected_disagreement)),
        "expected_error": ("FP32", _tensor(reply.expected_error)),
    }
    asked = request.request_outputs
    return tensors if not asked else {each.name: tensors[each.name] for each in asked}


def _added(reply: Reply) -> dict[str, Any]:
    """What the reply as a whole rests on. By lists: of one query's numbers NumPy takes longer."""
    exact = reply.exact.tolist()
    return {
        "nercc_exact": all(exact),
        "nercc_approximate": exact.count(False),
        "nercc_predicted": sum(reply.predicted.tolist()),
        "nercc_reexecuted": sum(reply.reexecuted.tolist()),
        "nercc_workers_asked": sum(reply.asked.tolist()),
        "nercc_workers_heard": sum(reply.heard.tolist()),
        "nercc_expected_disagreement": max(_known(reply.expected_disagreement)),
        "nercc_expected_error": max(_known(reply.expected_error)),
        "nercc_queue_ms": 1e3 * reply.queued,
    }


def check_outputs(request: InferRequest, servable: Servable) -> None:
    """Raises: InvalidInput where an output is asked for that there is not, or twice."""
    if not request.request_outputs:
        return
    known = [output["name"] for output in output_types(servable)]
    names = [output.name for output in request.request_outputs]
    unknown = [name for name in names if name not in known]
    if unknown or len(set(names)) < len(names):
        raise InvalidInput(f"{servable.name} has outputs {known}, each once, not {names}")


def input_types(servable: Servable) -> list[dict[str, Any]]:
    return _types(servable.inputs.parts)


def output_types(servable: Servable) -> list[dict[str, Any]]:
    added = (Tensor(name, "BOOL" if name == "exact" else "FP32", ()) for name in ADDED_OUTPUTS)
    return _types((*servable.outputs.parts, *added))


def _types(tensors: Iterable[Tensor]) -> list[dict[str, Any]]:
    return [
        {"name": each.name, "datatype": each.datatype, "shape": each.batch_shape}
        for each in tensors
    ]


def limits(settings: ModelSettings) -> dict[str, int | float]:
    """What a model takes of one request: the metadata's parameters."""
    return {
        "nercc_max_queries": settings.max_queue_size,
        "nercc_deadline_ms": _MILLISECONDS * settings.deadline_s,
        "nercc_max_deadline_ms": _MILLISECONDS * MAX_DEADLINE_S,
    }


def coding(uncoded: str | None) -> dict[str, bool | str]:
    """Whether queries are coded, and if not, why: the metadata's parameters."""
    if uncoded is None:
        return {"nercc_coded": True}
    return {"nercc_coded": False, "nercc_uncoded": uncoded}


def _known(values: np.ndarray) -> list[float]:
    return [UNKNOWN if math.isnan(value) else value for value in values.tolist()]


def _tensor(values: np.ndarray) -> np.ndarray:
    return np.array(_known(values), np.float32)


def plain_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters without what gRPC wraps them in."""
    return {key: _plain(value) for key, value in parameters.items()}


def _plain(value: Any) -> Any:
    which = getattr(value, "WhichOneof", None)
    if which is None:
        return value
    kind = which("parameter_choice")
    return _of_triton(value) if kind is None else getattr(value, kind)


def _of_triton(value: Message) -> Any:
    """Triton's messages have two kinds more than kserve's: doubles, and unsigned integers."""
    for field in UnknownFieldSet(value):
        if field.field_number == 4 and isinstance(field.data, int):
            return struct.unpack("<d", struct.pack("<Q", field.data))[0]
        if field.field_number == 5:
            return field.data
    return None
