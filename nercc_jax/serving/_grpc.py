"""The gRPC face: kserve's service, and errors as statuses."""

import logging
from typing import Any

import grpc
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_interceptor import AsyncExceptionToStatusInterceptor

from ._grpc_health import HealthService
from ._grpc_triton import add_extensions
from ._kserve import InferenceServicer, add_service, messages
from ._plane import Plane
from ._protocol import VERSION
from ._request import words_of
from ._statuses import INTERNAL, STATUS

_LOG = logging.getLogger(__name__)


class Service(InferenceServicer):
    """kserve's service, and what it leaves out: versions, the access log."""

    def __init__(self, plane: Plane):
        self._plane = plane
        InferenceServicer.__init__(self, plane, plane)  # pyright: ignore[reportArgumentType]

    async def ModelReady(self, request: Any, context: Any) -> messages.ModelReadyResponse:
        self._plane.check(request.name, request.version or VERSION)
        return await InferenceServicer.ModelReady(self, request, context)

    async def ModelMetadata(self, request: Any, context: Any) -> messages.ModelMetadataResponse:
        self._plane.find(request.name, request.version or VERSION)
        answer = await InferenceServicer.ModelMetadata(self, request, context)
        answer.versions.append(VERSION)
        return answer

    async def ModelInfer(self, request: Any, context: Any) -> messages.ModelInferResponse:
        def metadata() -> dict[str, Any]:
            return dict(context.invocation_metadata() or ())

        with self._plane.watch(request.model_name, metadata), self._plane.intake.hold() as take:
            take(request.ByteSize())
            self._plane.find(request.model_name, request.model_version or VERSION)
            return await InferenceServicer.ModelInfer(self, request, context)


class Errors(AsyncExceptionToStatusInterceptor):
    """Errors as gRPC statuses."""

    async def handle_exception(
        self, ex: Exception, request_or_iterator: Any, context: Any, method_name: str
    ) -> Any:
        if type(ex) in STATUS:
            await context.abort(STATUS[type(ex)][1], words_of(ex))
        if isinstance(ex, grpc.aio.AbortError):
            raise ex
        _LOG.exception("a gRPC call failed", extra={"method": method_name})
        await context.abort(grpc.StatusCode.INTERNAL, INTERNAL)


def make_server(plane: Plane) -> grpc.aio.Server:
    """The gRPC face, which listens nowhere yet."""
    settings = plane.settings
    server = grpc.aio.server(
        interceptors=[Errors()],
        options=[
            ("grpc.max_receive_message_length", settings.max_body_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", settings.max_header_bytes),
            ("grpc.absolute_max_metadata_size", settings.max_header_bytes),
            ("grpc.server_handshake_timeout_ms", int(1000 * settings.head_timeout_s)),
            ("grpc.so_reuseport", 0),
        ],
        maximum_concurrent_rpcs=settings.max_connections,
    )
    add_service(Service(plane), server)
    add_extensions(plane, server)
    add_HealthServicer_to_server(HealthService(plane), server)
    return server
