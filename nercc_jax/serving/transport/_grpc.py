"""The gRPC server: the Open Inference Protocol, and Triton's model repository.

Messages are those of `open_inference.proto`.
"""

import asyncio
import functools
import logging
import math
import time
from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from ..core._request import ServerClosing, message_of
from ..protocol._messages import (
    INTERNAL,
    KINDS,
    InferenceRequest,
    InvalidInput,
    RequestInput,
    RequestOutput,
    Response,
)
from . import open_inference_pb2 as messages
from ._state import ServerState

_LOG = logging.getLogger(__name__)

_SERVICE = messages.DESCRIPTOR.services_by_name["GRPCInferenceService"]
# By datatype, the field of a tensor's contents in a message.
_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
}
# By Python type, the field of a parameter. KServe's clients cannot read doubles.
_PARAMETERS = {bool: "bool_param", int: "int64_param", str: "string_param"}


class GrpcServer:
    """The gRPC server, which does not listen yet, and its graceful stop.

    When gRPC stops accepting, it cancels the calls that it has received but not handed over yet,
    and their clients see CANCELLED. So calls that arrive while the server stops are held first,
    until no more arrive; clients that wait for answers send nothing. Then gRPC stops accepting, and
    the calls that were held are refused as UNAVAILABLE.
    """

    # Seconds without a call after which gRPC stops accepting (under load, calls that were sent take
    # more than 0.1 s to arrive), and the most seconds until then.
    quiet_s, most_s = 0.2, 1.0

    def __init__(self, state: ServerState):
        self._state = state
        self._began = self._last = math.inf
        self._refuses = asyncio.Event()
        self.server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", state.settings.max_body_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
            ],
            maximum_concurrent_rpcs=state.max_connections,
        )
        handlers = {
            method.name: grpc.unary_unary_rpc_method_handler(
                functools.partial(self._guarded, method),  # pyright: ignore[reportArgumentType]
                response_serializer=GetMessageClass(method.output_type).SerializeToString,
            )
            for method in _SERVICE.methods
        }
        generic = grpc.method_handlers_generic_handler(_SERVICE.full_name, handlers)
        self.server.add_generic_rpc_handlers((generic,))

    async def _guarded(
        self, method: Any, given: bytes, context: grpc.aio.ServicerContext
    ) -> Message | None:
        """Answer a call, or abort it with the status of the error; check its token first."""
        try:
            if method.name not in ("ServerLive", "ServerReady"):  # probes have no token
                token = dict(context.invocation_metadata() or ()).get("authorization", "")
                self._state.check_token(token if isinstance(token, bytes) else token.encode())
            if self._began < math.inf:
                self._last = time.monotonic()
                await self._refuses.wait()
                raise ServerClosing("the server is shutting down")
            try:
                asked = GetMessageClass(method.input_type).FromString(given)
            except DecodeError as error:
                raise InvalidInput(f"these bytes are no {method.input_type.name}") from error
            return await self._answer(method, asked, context)
        except tuple(KINDS) as error:
            await context.abort(KINDS[type(error)].grpc, message_of(error))
        except Exception:
            _LOG.exception("a gRPC call failed", extra={"method": method.name})
            await context.abort(grpc.StatusCode.INTERNAL, INTERNAL)

    async def _answer(self, method: Any, asked: Any, context: Any) -> Message:
        state, name = self._state, method.name
        models = state.models
        if name == "ModelInfer":
            size = asked.ByteSize()
            headers = functools.partial(dict, context.invocation_metadata() or ())
            with state.watch(asked.model_name, headers) as span, state.hold() as add:
                add(size)
                model = models.find(asked.model_name, asked.model_version)
                add(int(model.servable.growth * size))
                slow = 0 if asked.raw_input_contents else size
                answer = await state.answer(model, lambda: read_message(asked), slow, span)
                return write_message(answer)
        if name == "RepositoryIndex":
            found: dict[str, Any] = {"models": models.index(asked.ready)}
        elif name in ("RepositoryModelLoad", "RepositoryModelUnload"):
            model_name = asked.triton_model_name or asked.model_name
            load = name == "RepositoryModelLoad"
            await models.control(model_name, asked.parameters, load=load)
            found = {"model_name": model_name, "isLoaded" if load else "isUnloaded": True}
        else:
            of_model = "name" in asked.DESCRIPTOR.fields_by_name
            found = state.says[name](*((asked.name, asked.version) if of_model else ("", "")))
        # These messages have no field for the metadata's parameters.
        response = GetMessageClass(method.output_type)()
        return ParseDict(found, response, ignore_unknown_fields=True)

    async def stop(self, *, at_once: bool = False) -> None:
        """Accept no more calls, and wait for accepted ones, or end them at once."""
        if self._began == math.inf:
            self._began = self._last = time.monotonic()
        end = self._began + self.most_s
        while time.monotonic() < min(self._last + self.quiet_s, end):
            await asyncio.sleep(self.quiet_s / 5)
        # An almost infinite grace period: the caller bounds the wait.
        stopping = asyncio.create_task(self.server.stop(None if at_once else 1e6))
        await asyncio.sleep(self.quiet_s / 5)
        self._refuses.set()
        await stopping


def read_message(message: messages.ModelInferRequest) -> InferenceRequest:
    """Return a message as a request.

    Raises InvalidInput if its raw contents do not fit its inputs.
    """
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise InvalidInput(f"{len(message.inputs)} inputs have {len(raw)} raw contents")

    def parameters_of(given: Mapping[str, Any]) -> Any:
        """Return the values of parameters, without their gRPC messages."""
        if not given:
            return None
        kinds = {name: value.WhichOneof("parameter_choice") for name, value in given.items()}
        odd = "of an unknown kind"  # an invalid value, which `question_of` refuses
        return {name: getattr(given[name], kind) if kind else odd for name, kind in kinds.items()}

    inputs, outputs = [], []
    for place, each in enumerate(message.inputs):
        if raw and each.HasField("contents"):
            raise InvalidInput(f"input {each.name!r} has both contents and raw contents")
        field = _CONTENTS.get(each.datatype.upper())
        typed = [] if raw or field is None else getattr(each.contents, field)
        made = RequestInput(
            name=each.name,
            shape=list(each.shape),
            datatype=each.datatype,
            parameters=parameters_of(each.parameters),
            data=raw[place] if raw else typed,
        )
        inputs.append(made)
    for each in message.outputs:
        about = parameters_of(each.parameters)
        outputs.append(RequestOutput(name=each.name, parameters=about))
    return InferenceRequest(
        id=message.id or None,
        parameters=parameters_of(message.parameters),
        inputs=inputs,
        outputs=outputs,
    )


def write_message(response: Response) -> messages.ModelInferResponse:
    servable = response.servable
    message = messages.ModelInferResponse(
        model_name=servable.name, model_version=servable.version, id=response.id
    )
    for name, value in response.parameters.items():
        if isinstance(value, float):
            value = f"{value:.6g}"
        setattr(message.parameters[name], _PARAMETERS[type(value)], value)
    for name, (datatype, array) in response.outputs.items():
        message.outputs.add(name=name, datatype=datatype, shape=array.shape)
        message.raw_output_contents.append(array.tobytes())
    return message
