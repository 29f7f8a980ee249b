"""The gRPC server: the Open Inference Protocol, Triton's extensions, and gRPC's health service.

Messages are those of `open_inference.proto`.
"""

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from ..core._request import Reply, ServerClosing, message_of
from ..protocol._errors import INTERNAL, KINDS, InvalidInput, ModelNotFound, Unauthenticated
from ..protocol._messages import (
    InferRequest,
    InputTensor,
    RequestedOutput,
    array_or_error,
    check_parameters,
    reply_parameters,
    response_outputs,
)
from ..protocol._servable import Servable
from . import open_inference_pb2 as messages
from ._state import ServerState

_LOG = logging.getLogger(__name__)

_SERVICE = messages.DESCRIPTOR.services_by_name["GRPCInferenceService"]
# By datatype, the field of a tensor's contents.
_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
# By Python type, the field of a parameter. KServe's clients know no doubles.
_PARAMETERS = {bool: "bool_param", int: "int64_param", str: "string_param"}

_FOREVER = 1e6  # seconds: whoever stops the server ends it in time

Method = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]


class InferenceService:
    """The methods of the protocol's service, by their names in it."""

    def __init__(self, state: ServerState):
        self._state = state

    async def ServerLive(self, request: Any, context: Any) -> messages.ServerLiveResponse:
        self._state.check_live()
        return messages.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> messages.ServerReadyResponse:
        return messages.ServerReadyResponse(ready=self._state.ready())

    async def ServerMetadata(self, request: Any, context: Any) -> messages.ServerMetadataResponse:
        return messages.ServerMetadataResponse(**self._state.metadata())

    async def ModelReady(self, request: Any, context: Any) -> messages.ModelReadyResponse:
        trouble = self._state.trouble(request.name, request.version)
        return messages.ModelReadyResponse(ready=trouble is None)

    async def ModelMetadata(self, request: Any, context: Any) -> messages.ModelMetadataResponse:
        metadata = self._state.model_metadata(request.name, request.version)
        del metadata["parameters"]  # which these messages do not have
        return messages.ModelMetadataResponse(**metadata)

    async def ModelConfig(self, request: Any, context: Any) -> messages.ModelConfigResponse:
        config = self._state.configuration(request.name, request.version)
        return ParseDict({"config": config}, messages.ModelConfigResponse())

    async def ModelStatistics(self, request: Any, context: Any) -> messages.ModelStatisticsResponse:
        statistics = self._state.statistics(request.name, request.version)
        return ParseDict(statistics, messages.ModelStatisticsResponse())

    async def RepositoryIndex(self, request: Any, context: Any) -> messages.RepositoryIndexResponse:
        models = self._state.repository_index(request.ready)
        return ParseDict({"models": models}, messages.RepositoryIndexResponse())

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        check_parameters("loading a model", request.parameters, set())
        name = request.triton_model_name or request.model_name
        await self._state.control.load(name)
        return messages.RepositoryModelLoadResponse(model_name=name, isLoaded=True)

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:
        check_parameters("unloading a model", request.parameters, {"unload_dependents"})
        name = request.triton_model_name or request.model_name
        await self._state.control.unload(name)
        return messages.RepositoryModelUnloadResponse(model_name=name, isUnloaded=True)

    async def ModelInfer(self, request: Any, context: Any) -> messages.ModelInferResponse:
        def metadata() -> dict[str, Any]:
            return dict(context.invocation_metadata() or ())

        state = self._state
        with (
            state.watch(request.model_name, metadata) as trace,
            state.memory.request() as add,
        ):
            add(request.ByteSize())
            model = state.find(request.model_name, request.model_version)
            add(int(model.servable.growth * request.ByteSize()))
            given = read_message(request)
            reply = await state.answer(model, given, trace)
            return write_message(reply, given, model.servable)


class HealthService(health_pb2_grpc.HealthServicer):
    """gRPC's own health service (grpc.health.v1), for its probes and load balancers."""

    # Names of the whole server; other names are models'.
    _SERVER = ("", _SERVICE.full_name)
    _LOOK = 0.2  # seconds between looks for those who watch

    def __init__(self, state: ServerState):
        self._state = state

    async def Check(self, request: HealthCheckRequest, context: Any) -> HealthCheckResponse:
        return await _with_statuses(self._check)(request, context)

    async def _check(self, request: HealthCheckRequest, context: Any) -> HealthCheckResponse:
        if request.service not in self._SERVER:
            self._state.check(request.service)
        return HealthCheckResponse(status=self._status(request.service))

    async def Watch(
        self, request: HealthCheckRequest, context: Any
    ) -> AsyncIterator[HealthCheckResponse]:
        """Yield every change, and end when the server does, so that no client keeps it alive."""
        last = None
        while last is None or not self._state.draining:
            status = self._status(request.service)
            if status != last:
                yield HealthCheckResponse(status=status)
                last = status
            await asyncio.sleep(self._LOOK)
        if last == HealthCheckResponse.SERVING:
            yield HealthCheckResponse(status=HealthCheckResponse.NOT_SERVING)

    def _status(self, service: str) -> Any:
        if service in self._SERVER:
            ready = self._state.ready()
        else:
            try:
                ready = self._state.trouble(service) is None
            except ModelNotFound:
                return HealthCheckResponse.SERVICE_UNKNOWN
        return HealthCheckResponse.SERVING if ready else HealthCheckResponse.NOT_SERVING


class _Authentication(grpc.aio.ServerInterceptor):
    """Refuses calls without a token that the server knows, except those of health."""

    _OPEN = (
        f"/{_SERVICE.full_name}/ServerLive",
        f"/{_SERVICE.full_name}/ServerReady",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
    )

    def __init__(self, state: ServerState):
        self._state = state

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Return the method's handler, or one that refuses."""
        given = dict(handler_call_details.invocation_metadata or ()).get("authorization", "")
        given = given if isinstance(given, bytes) else given.encode()
        try:
            if handler_call_details.method not in self._OPEN:
                self._state.check_token(given)
        except Unauthenticated as error:
            status, message = KINDS[Unauthenticated].grpc, str(error)

            async def refuse(request: Any, context: grpc.aio.ServicerContext) -> None:
                await context.abort(status, message)

            return grpc.unary_unary_rpc_method_handler(refuse)  # pyright: ignore[reportArgumentType]
        return await continuation(handler_call_details)


class GrpcServer:
    """The gRPC server, which listens nowhere yet, and how it stops.

    When gRPC stops accepting, it cancels the calls that it has received and not handed over yet,
    which their clients would see as CANCELLED. So calls that come while the server stops are taken
    and held first, until none comes any more: clients that wait for answers send nothing. Then gRPC
    stops accepting, and the calls that were held are refused as UNAVAILABLE.
    """

    # Seconds without a call after which gRPC stops accepting, and after which it does anyway.
    _QUIET, _MOST = 0.05, 1.0

    def __init__(self, state: ServerState):
        self._began = self._last = math.inf
        self._refuses = asyncio.Event()
        settings = state.settings
        self.server = grpc.aio.server(
            interceptors=[_Authentication(state)] if settings.token_file is not None else None,
            options=[
                ("grpc.max_receive_message_length", settings.max_body_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
            ],
            maximum_concurrent_rpcs=settings.max_connections,
        )
        service = InferenceService(state)
        handlers = {
            method.name: grpc.unary_unary_rpc_method_handler(
                _with_statuses(self._held(getattr(service, method.name))),  # pyright: ignore[reportArgumentType]
                request_deserializer=GetMessageClass(method.input_type).FromString,
                response_serializer=GetMessageClass(method.output_type).SerializeToString,
            )
            for method in _SERVICE.methods
        }
        generic = grpc.method_handlers_generic_handler(_SERVICE.full_name, handlers)
        self.server.add_generic_rpc_handlers((generic,))
        health_pb2_grpc.add_HealthServicer_to_server(HealthService(state), self.server)

    async def stop(self, *, at_once: bool = False) -> None:
        """Accept no more calls, and wait for those that were accepted, or end them at once."""
        if self._began == math.inf:
            self._began = self._last = time.monotonic()
        end = self._began + self._MOST
        while time.monotonic() < min(self._last + self._QUIET, end):
            await asyncio.sleep(self._QUIET / 5)
        stopping = asyncio.create_task(self.server.stop(None if at_once else _FOREVER))
        await asyncio.sleep(self._QUIET / 5)
        self._refuses.set()
        await stopping

    def _held(self, method: Method) -> Method:
        async def answer(request: Any, context: grpc.aio.ServicerContext) -> Any:
            if self._began < math.inf:
                self._last = time.monotonic()
                await self._refuses.wait()
                raise ServerClosing("the server is shutting down")
            return await method(request, context)

        return answer


def _with_statuses(method: Method) -> Method:
    """Return the method with its errors as gRPC statuses."""

    async def answer(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await method(request, context)
        except tuple(KINDS) as error:
            await context.abort(KINDS[type(error)].grpc, message_of(error))
        except Exception:
            _LOG.exception("a gRPC call failed", extra={"method": method.__qualname__})
            await context.abort(grpc.StatusCode.INTERNAL, INTERNAL)

    return answer


def read_message(request: messages.ModelInferRequest) -> InferRequest:
    """Return a message as an `InferRequest`.

    Raises InvalidInput where raw contents do not fit the inputs.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidInput(
            f"the number of inputs ({len(request.inputs)}) does not match the expected number of "
            f"raw input contents ({len(raw)}) for model {request.model_name!r}."
        )
    inputs = []
    # Those of REST mean nothing here, but kserve's client sends them.
    for each in request.inputs:
        check_parameters(f"input {each.name!r}", each.parameters, {"binary_data_size"})
    for each in request.outputs:
        check_parameters(f"output {each.name!r}", each.parameters, {"binary_data"})
    for place, each in enumerate(request.inputs):
        datatype, data = each.datatype.upper(), None
        if raw and each.HasField("contents"):
            raise InvalidInput(
                "contents field must not be specified when using raw_input_contents for input "
                f"{each.name!r} for model {request.model_name!r}"
            )
        if not raw:
            field = _CONTENTS.get(datatype)
            values = [] if field is None else getattr(each.contents, field)
            data = array_or_error(values, list(each.shape), datatype)
        content = raw[place] if raw else None
        inputs.append(InputTensor(each.name, list(each.shape), datatype, data, content))
    outputs = [RequestedOutput(each.name) for each in request.outputs]
    # Without what gRPC wraps parameters in; None for unknown kinds.
    parameters = {}
    for name, value in request.parameters.items():
        kind = value.WhichOneof("parameter_choice")
        parameters[name] = None if kind is None else getattr(value, kind)
    return InferRequest(inputs, request.id or None, parameters, outputs)


def write_message(
    reply: Reply, request: InferRequest, servable: Servable
) -> messages.ModelInferResponse:
    """Return a reply's message, with all outputs unless some are asked for."""
    response = messages.ModelInferResponse(
        model_name=servable.name, model_version=servable.version, id=request.id or uuid.uuid4().hex
    )
    for name, value in reply_parameters(reply).items():
        if isinstance(value, float):
            value = f"{value:.6g}"
        setattr(response.parameters[name], _PARAMETERS[type(value)], value)
    for name, (datatype, array) in response_outputs(reply, request, servable).items():
        response.outputs.add(name=name, datatype=datatype, shape=array.shape)
        response.raw_output_contents.append(array.tobytes())
    return response
