"""The server: REST and gRPC faces of the Open Inference Protocol, status page, metrics, draining.

kserve's messages, health and metadata endpoints and gRPC service; an application of our own around
them, because kserve's own server maps an overload to 500, unloads models before it drains, and
always listens on all interfaces.
"""

import asyncio
import contextlib
import gc
import importlib.metadata
import importlib.resources
import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import fastapi
import grpc
import uvicorn
from fastapi.responses import HTMLResponse, JSONResponse, Response
from grpc_interceptor import AsyncExceptionToStatusInterceptor
from prometheus_client import CollectorRegistry, exposition
from prometheus_client.process_collector import ProcessCollector
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from ._kserve import (
    InferenceServicer,
    InferRequest,
    InferResponse,
    InvalidInput,
    ModelNotFound,
    ServerNotReady,
    V2Endpoints,
    add_service,
    bodies,
    messages,
)
from ._protocol import (
    VERSION,
    TooLarge,
    UnsupportedEncoding,
    decompress,
    input_types,
    output_types,
    plain_parameters,
    read_request,
    write_response,
)
from ._request import DeadlineExceeded, InferenceFailed, QueueFull, ServerClosing
from ._served import ServedModel
from ._settings import ServerSettings

_LOG = logging.getLogger(__name__)

# JSON of this size is read by another thread, so that other requests go on.
_LARGE = 2**18

# Seconds between looks at whether the server shall end.
_TICK = 0.02
# How long the last errors have to reach their clients, once draining has taken too long.
_LAST_WORDS = 3.0

# What an error is to clients of either face.
_STATUS: Mapping[type[Exception], tuple[int, grpc.StatusCode]] = {
    InvalidInput: (400, grpc.StatusCode.INVALID_ARGUMENT),
    ModelNotFound: (404, grpc.StatusCode.NOT_FOUND),
    TooLarge: (413, grpc.StatusCode.RESOURCE_EXHAUSTED),
    UnsupportedEncoding: (415, grpc.StatusCode.UNIMPLEMENTED),
    QueueFull: (429, grpc.StatusCode.RESOURCE_EXHAUSTED),
    NotImplementedError: (501, grpc.StatusCode.UNIMPLEMENTED),
    InferenceFailed: (502, grpc.StatusCode.INTERNAL),
    ServerClosing: (503, grpc.StatusCode.UNAVAILABLE),
    ServerNotReady: (503, grpc.StatusCode.UNAVAILABLE),
    DeadlineExceeded: (504, grpc.StatusCode.DEADLINE_EXCEEDED),
}


# Whoever asks has made a mistake.
_INVALID = (InvalidInput, TooLarge, UnsupportedEncoding)


# nginx's status for a client that went away while it sent its request.
_CLOSED = 499


class Plane:
    """What both faces ask: kserve's services call these methods, by these names."""

    def __init__(self, models: Mapping[str, ServedModel], access_log: bool = False):
        self.models = dict(models)
        self.access_log = access_log
        self.draining = False
        self.started = time.monotonic()

    @property
    def model_registry(self) -> "Plane":
        return self

    def get_models(self) -> Mapping[str, ServedModel]:
        return self.models

    def metadata(self) -> dict[str, Any]:
        version = importlib.metadata.version("nercc-jax")
        return {"name": "nercc_jax", "version": version, "extensions": ["binary_tensor_data"]}

    async def live(self) -> dict[str, str]:
        return {"status": "alive"}

    async def ready(self) -> bool:
        return not self.draining

    async def model_ready(self, model_name: str, *_: Any) -> bool:
        self.find(model_name)
        return not self.draining

    async def model_metadata(self, model_name: str) -> dict[str, Any]:
        servable = self.find(model_name).servable
        return {
            "name": model_name,
            "versions": [VERSION],
            "platform": "nercc_jax",
            "inputs": input_types(servable),
            "outputs": output_types(servable),
        }

    async def infer(
        self, model_name: str, request: InferRequest, headers: Any = None
    ) -> tuple[InferResponse, dict[str, str]]:
        return await self.find(model_name).infer(request), {}

    def find(self, name: str, version: str = VERSION) -> ServedModel:
        if name not in self.models:
            raise ModelNotFound(name)
        if version != VERSION:
            raise ModelNotFound(f"{name}, version {version}")
        return self.models[name]

    @contextlib.contextmanager
    def watch(self, model_name: str) -> Iterator[dict[str, Any]]:
        """Counts a request that is invalid; logs each with what is put here, if that is wished."""
        line: dict[str, Any] = {"model": model_name}
        begin = time.monotonic()
        try:
            yield line
        except BaseException as error:  # a client that goes away cancels its call
            if isinstance(error, _INVALID) and model_name in self.models:
                self.models[model_name].count_invalid()
            line["error"] = _words(error)
            raise
        finally:
            if self.access_log:
                line["seconds"] = round(time.monotonic() - begin, 6)
                _LOG.info("not answered" if "error" in line else "answered", extra=line)

    def status(self) -> dict[str, Any]:
        """All that the status page shows."""
        about = self.metadata()
        return {
            "server": {
                "name": about["name"],
                "version": about["version"],
                "state": "draining" if self.draining else "serving",
                "uptime_s": time.monotonic() - self.started,
            },
            "models": [model.status() for model in self.models.values()],
        }

    async def load(self, model_name: str) -> Any:
        """Of the model repository extension, which this server does not have."""
        raise NotImplementedError("models are configured when the server starts")

    unload = load


class Server:
    """Some models behind both faces. `run` it, or `await serve()` in a loop of your own."""

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        settings: ServerSettings,
        registry: CollectorRegistry,
    ):
        self.settings = settings
        self.plane = Plane(models, settings.access_log)
        self._open = dict(models)  # not yet closed
        with contextlib.suppress(ValueError):  # already there, in a server that was made anew
            ProcessCollector(registry=registry)
        self.app = make_app(self.plane, settings, registry)
        self.http_port = self.grpc_port = 0  # known once it listens
        self._http = uvicorn.Server(
            uvicorn.Config(
                self.app,
                host=settings.host,
                port=settings.http_port,
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_keep_alive=65,
                # Ours ends first, see `_drain`.
                timeout_graceful_shutdown=int(settings.drain_timeout_s + 2 * _LAST_WORDS) + 1,
            )
        )
        # Uvicorn would end at a signal, before it can be said that the server drains.
        self._http.capture_signals = contextlib.nullcontext  # pyright: ignore[reportAttributeAccessIssue]
        self._grpc: grpc.aio.Server | None = None
        self._at_once = False

    def run(self) -> None:
        """Serves until SIGTERM or SIGINT, then drains."""
        asyncio.run(self.serve())

    async def serve(self) -> None:
        """Serves until `stop`, or a signal if this is the main thread's loop; closes the models.

        Raises: OSError where a port is taken.
        """
        try:
            http = asyncio.create_task(self._serve_http())
            with self._catching_signals():
                while not self._http.started and not http.done():
                    await asyncio.sleep(0.01)
                if not http.done():
                    await self._listen()
                while not self.plane.draining and not http.done():
                    await asyncio.sleep(_TICK)
                if not http.done():
                    await self._drain(http)
            await http
        finally:
            await self._close_models()

    def stop(self) -> None:
        """Begins to drain: what has been accepted is answered, nothing new is. Twice: at once."""
        self._at_once = self.plane.draining
        self.plane.draining = True
        _LOG.info("ending at once" if self._at_once else "draining")

    async def _listen(self) -> None:
        self.http_port = self._http.servers[0].sockets[0].getsockname()[1]
        await self._start_grpc()
        gc.collect()
        gc.freeze()  # JAX leaves so many objects that collecting them stops all for 0.2 s
        _LOG.info(
            "listening",
            extra={
                "host": self.settings.host,
                "http_port": self.http_port,
                "grpc_port": self.grpc_port if self._grpc else None,
                "models": list(self.plane.models),
            },
        )

    async def _drain(self, http: asyncio.Task) -> None:
        """Says that it is not ready; then takes nothing new; whoever waits too long is told."""
        await self._wait(lambda: False, self.settings.drain_delay_s)
        self._http.should_exit = True
        ends = [http]
        if self._grpc is not None:
            grace = self.settings.drain_timeout_s + _LAST_WORDS
            ends.append(asyncio.create_task(self._grpc.stop(grace)))

        def ended() -> bool:
            return all(end.done() for end in ends)

        await self._wait(ended, self.settings.drain_timeout_s)
        if not ended():
            await self._close_models()
            await self._wait(ended, _LAST_WORDS)
        self._http.force_exit = True
        if self._grpc is not None:
            await self._grpc.stop(None)
        await asyncio.wait(ends)

    async def _wait(self, happened: Callable[[], bool], seconds: float) -> None:
        """Until it happened, but no longer, and not if all shall end at once."""
        end = time.monotonic() + seconds
        while not happened() and not self._at_once and time.monotonic() < end:
            await asyncio.sleep(_TICK)

    async def _close_models(self) -> None:
        """Nobody waits by now but for whom draining was too short."""
        while self._open:
            name, model = self._open.popitem()
            await asyncio.to_thread(model.close, 0.0)
            _LOG.info("model is closed", extra={"model": name})

    async def _serve_http(self) -> None:
        try:
            await self._http.serve()
        except SystemExit:  # uvicorn has told the log why
            address = f"{self.settings.host}:{self.settings.http_port}"
            raise OSError(f"cannot listen on {address}: is the port taken?") from None

    async def _start_grpc(self) -> None:
        if self.settings.grpc_port is None:
            return
        limit = self.settings.max_body_bytes
        server = grpc.aio.server(
            interceptors=[_Errors()],
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
            ],
        )
        add_service(_Service(self.plane), server)
        address = f"{self.settings.host}:{self.settings.grpc_port}"
        try:
            self.grpc_port = server.add_insecure_port(address)
        except RuntimeError as error:
            self._http.should_exit = True
            raise OSError(f"cannot listen on {address}: is the port taken?") from error
        await server.start()
        self._grpc = server

    @contextlib.contextmanager
    def _catching_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        caught = []
        with contextlib.suppress(ValueError, RuntimeError):  # not the main thread
            for each in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(each, self.stop)
                caught.append(each)
        try:
            yield
        finally:
            for each in caught:
                loop.remove_signal_handler(each)


def make_app(
    plane: Plane, settings: ServerSettings, registry: CollectorRegistry
) -> fastapi.FastAPI:
    """The REST face as an ASGI application: for this server, Ray Serve, or any other."""
    app = fastapi.FastAPI(
        title="nercc_jax",
        description="Coded inference by the Open Inference Protocol (V2).",
        version=plane.metadata()["version"],
        redoc_url=None,
    )
    _add_protocol(app, plane, settings)
    page = importlib.resources.files("nercc_jax.serving").joinpath("status.html").read_text()

    @app.get("/", include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/status", include_in_schema=False)
    async def status() -> JSONResponse:
        return JSONResponse(plane.status(), headers={"cache-control": "no-store"})

    @app.get("/metrics", include_in_schema=False)
    async def metrics(request: fastapi.Request) -> Response:
        write, content_type = exposition.choose_encoder(request.headers.get("accept", ""))
        return Response(write(registry), headers={"content-type": content_type})

    async def tell(request: fastapi.Request, error: Exception) -> Response:
        status, _ = _STATUS[type(error)]
        headers = {"retry-after": "1"} if status in (429, 503) else None
        return JSONResponse({"error": _words(error)}, status, headers)

    async def tell_nobody(request: fastapi.Request, error: Exception) -> Response:
        return Response(status_code=_CLOSED)

    for kind in _STATUS:
        app.add_exception_handler(kind, tell)
    app.add_exception_handler(ClientDisconnect, tell_nobody)
    return app


class _Error(BaseModel):
    error: str


def _add_protocol(app: fastapi.FastAPI, plane: Plane, settings: ServerSettings) -> None:
    endpoints = V2Endpoints(plane)  # pyright: ignore[reportArgumentType]
    missing: dict[int | str, dict[str, Any]] = {404: {"model": _Error}, 503: {"model": _Error}}
    for path, endpoint, answer in (
        ("/v2", endpoints.metadata, bodies.ServerMetadataResponse),
        ("/v2/health/live", endpoints.live, bodies.ServerLiveResponse),
        ("/v2/health/ready", endpoints.ready, bodies.ServerReadyResponse),
        ("/v2/models", endpoints.models, bodies.ListModelsResponse),
    ):
        app.add_api_route(path, endpoint, response_model=answer, responses={503: {"model": _Error}})

    async def model_metadata(model_name: str, version: str = VERSION) -> Any:
        plane.find(model_name, version)
        return await plane.model_metadata(model_name)

    async def model_ready(model_name: str, version: str = VERSION) -> Any:
        plane.find(model_name, version)
        if not await plane.model_ready(model_name):
            raise ServerNotReady("It is draining.")
        return {"name": model_name, "ready": True}

    async def infer(request: fastapi.Request, model_name: str, version: str = VERSION) -> Response:
        with plane.watch(model_name) as line:
            plane.find(model_name, version)
            body = await _read_body(request, settings.max_body_bytes)
            length = request.headers.get("inference-header-content-length")
            if len(body) > _LARGE and length is None:
                asked = await asyncio.to_thread(read_request, body, length, model_name)
            else:
                asked = read_request(body, length, model_name)
            response, _ = await plane.infer(model_name, asked)
            line.update({"id": response.id}, **response.parameters or {})
            content, headers = write_response(response)
        return Response(content, headers=dict(headers))

    errors = {status: {"model": _Error} for status, _ in _STATUS.values() if status != 501}
    schema = bodies.InferenceRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    _define(app, schema.pop("$defs"))
    body = {"content": {"application/json": {"schema": schema}}, "required": True}
    for path in ("/v2/models/{model_name}", "/v2/models/{model_name}/versions/{version}"):
        shown = "versions" not in path
        app.add_api_route(
            path,
            model_metadata,
            response_model=bodies.ModelMetadataResponse,
            responses=missing,
            include_in_schema=shown,
        )
        app.add_api_route(
            f"{path}/ready",
            model_ready,
            response_model=bodies.ModelReadyResponse,
            responses=missing,
            include_in_schema=shown,
        )
        app.add_api_route(
            f"{path}/infer",
            infer,
            methods=["POST"],
            response_class=JSONResponse,
            responses={200: {"model": bodies.InferenceResponse}, **errors},
            openapi_extra={"requestBody": body},
            include_in_schema=shown,
        )


def _define(app: fastapi.FastAPI, schemas: Mapping[str, Any]) -> None:
    """Adds what a schema that FastAPI did not make refers to."""
    describe = app.openapi

    def describe_all() -> dict[str, Any]:
        described = describe()
        described["components"]["schemas"] |= schemas
        return described

    app.openapi = describe_all


async def _read_body(request: fastapi.Request, limit: int) -> bytes:
    """The body, decompressed. Raises: `TooLarge` before more than the limit is held."""
    announced = request.headers.get("content-length", "0")
    if not announced.isdigit() or int(announced) > limit:
        raise TooLarge(f"the body has {announced} bytes; at most {limit} are taken")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise TooLarge(f"the body has more than {limit} bytes")
        parts.append(part)
    body = parts[0] if len(parts) == 1 else b"".join(parts)
    return decompress(body, request.headers.get("content-encoding"), limit)


class _Service(InferenceServicer):
    """kserve's service, and what it leaves out: versions, the access log."""

    def __init__(self, plane: Plane):
        self._plane = plane
        InferenceServicer.__init__(self, plane, plane)  # pyright: ignore[reportArgumentType]

    async def ModelReady(self, request: Any, context: Any) -> messages.ModelReadyResponse:
        self._plane.find(request.name, request.version or VERSION)
        return await InferenceServicer.ModelReady(self, request, context)

    async def ModelMetadata(self, request: Any, context: Any) -> messages.ModelMetadataResponse:
        self._plane.find(request.name, request.version or VERSION)
        answer = await InferenceServicer.ModelMetadata(self, request, context)
        answer.versions.append(VERSION)
        return answer

    async def ModelInfer(self, request: Any, context: Any) -> messages.ModelInferResponse:
        with self._plane.watch(request.model_name) as line:
            self._plane.find(request.model_name, request.model_version or VERSION)
            answer = await InferenceServicer.ModelInfer(self, request, context)
            line.update({"id": answer.id}, **plain_parameters(answer.parameters))
        return answer


class _Errors(AsyncExceptionToStatusInterceptor):
    """Errors as gRPC statuses."""

    async def handle_exception(
        self, ex: Exception, request_or_iterator: Any, context: Any, method_name: str
    ) -> Any:
        if type(ex) in _STATUS:
            await context.abort(_STATUS[type(ex)][1], _words(ex))
        if isinstance(ex, grpc.aio.AbortError):
            raise ex
        _LOG.exception("a gRPC call failed", extra={"method": method_name})
        await context.abort(grpc.StatusCode.INTERNAL, "internal error: see the server's log")


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__
