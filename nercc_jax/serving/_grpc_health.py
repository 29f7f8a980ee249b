"""grpc.health.v1: what gRPC's own probes and load balancers ask."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from ._plane import Plane

# Names of the whole server; other names are models'.
_SERVER = ("", "inference.GRPCInferenceService")
_LOOK = 0.2  # seconds between looks for those who watch

_SERVING = HealthCheckResponse(status=HealthCheckResponse.SERVING)
_NOT_SERVING = HealthCheckResponse(status=HealthCheckResponse.NOT_SERVING)
_UNKNOWN = HealthCheckResponse(status=HealthCheckResponse.SERVICE_UNKNOWN)


class HealthService(health_pb2_grpc.HealthServicer):
    """Serving is whoever is ready."""

    def __init__(self, plane: Plane):
        self._plane = plane

    async def Check(self, request: HealthCheckRequest, context: Any) -> HealthCheckResponse:
        """Raises: ModelNotFound."""
        if request.service not in _SERVER:
            self._plane.check(request.service)
        return await self._status(request.service)

    async def Watch(
        self, request: HealthCheckRequest, context: Any
    ) -> AsyncIterator[HealthCheckResponse]:
        """Tells every change; ends when the server does, so that nobody keeps it alive."""
        told = None
        while told is None or not self._plane.draining:
            status = await self._status(request.service)
            if status is not told:
                yield status
                told = status
            await asyncio.sleep(_LOOK)
        if told is _SERVING:
            yield _NOT_SERVING

    async def _status(self, service: str) -> HealthCheckResponse:
        if service in _SERVER:
            ready = await self._plane.ready()
        elif service in self._plane.names:
            ready = await self._plane.model_ready(service)
        else:
            return _UNKNOWN
        return _SERVING if ready else _NOT_SERVING
