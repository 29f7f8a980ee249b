"""The REST face: the Open Inference Protocol, the status page, metrics."""

import asyncio
import contextlib
import importlib.resources
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import fastapi
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CollectorRegistry, exposition
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from ._kserve import InferRequest, ServerNotReady, V2Endpoints, bodies
from ._plane import Plane
from ._protocol import (
    VERSION,
    BodyTimeout,
    TooLarge,
    decompress,
    json_size,
    read_request,
    write_response,
)
from ._request import words_of
from ._settings import ServerSettings
from ._statuses import INTERNAL, STATUS

# JSON of this size is read by another thread, so that other requests go on.
_LARGE = 2**18

_AGAIN = {"retry-after": "1"}
# Of errors. After 408 nobody reads the rest of the body.
_HEADERS = {408: {"connection": "close"}, 429: _AGAIN, 503: _AGAIN}

# nginx's status for a client that went away before it was answered.
_CLOSED = 499


def make_app(plane: Plane, registry: CollectorRegistry) -> fastapi.FastAPI:
    """The REST face as an ASGI application: for this server, Ray Serve, or any other."""
    app = fastapi.FastAPI(
        title="nercc_jax",
        description="Coded inference by the Open Inference Protocol (V2).",
        version=plane.metadata()["version"],
        redoc_url=None,
    )
    _add_protocol(app, plane)
    _add_pages(app, plane, registry)
    _add_errors(app)
    return app


def _add_pages(app: fastapi.FastAPI, plane: Plane, registry: CollectorRegistry) -> None:
    page = importlib.resources.files("nercc_jax.serving").joinpath("status.html").read_text()

    @app.get("/", include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page)

    # What is told is put together by other threads: it takes milliseconds.

    @app.get("/status", include_in_schema=False)
    async def status() -> JSONResponse:
        told = await asyncio.to_thread(plane.status)
        return JSONResponse(told, headers={"cache-control": "no-store"})

    @app.get("/metrics", include_in_schema=False)
    async def metrics(request: fastapi.Request) -> Response:
        write, content_type = exposition.choose_encoder(request.headers.get("accept", ""))
        content = await asyncio.to_thread(write, registry)
        return Response(content, headers={"content-type": content_type})


def _add_errors(app: fastapi.FastAPI) -> None:
    async def tell(request: fastapi.Request, error: Exception) -> Response:
        status, _ = STATUS[type(error)]
        return JSONResponse({"error": words_of(error)}, status, _HEADERS.get(status))

    async def tell_nobody(request: fastapi.Request, error: Exception) -> Response:
        return Response(status_code=_CLOSED)

    async def tell_wrong_way(request: fastapi.Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        told = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse({"error": told}, error.status_code, error.headers)

    async def tell_unexpected(request: fastapi.Request, error: Exception) -> Response:
        return JSONResponse({"error": INTERNAL}, 500)  # and the server raises it, to be logged

    for kind in STATUS:
        app.add_exception_handler(kind, tell)
    app.add_exception_handler(ClientDisconnect, tell_nobody)
    app.add_exception_handler(HTTPException, tell_wrong_way)
    app.add_exception_handler(Exception, tell_unexpected)


class _Error(BaseModel):
    error: str


class _ModelMetadata(bodies.ModelMetadataResponse):
    parameters: dict[str, bool | float | str]


_PATHS = ("/v2/models/{model_name}", "/v2/models/{model_name}/versions/{version}")


def _add_inference(app: fastapi.FastAPI, plane: Plane) -> Callable[..., Any]:
    """Plain routes, before all others: FastAPI's take a fifth of a small request's time.

    Returns what answers, for FastAPI to describe.
    """

    async def infer(request: fastapi.Request, model_name: str, version: str = VERSION) -> Response:
        with plane.watch(model_name, lambda: request.headers), plane.intake.hold() as take:
            plane.find(model_name, version)
            asked = await _read(request, model_name, plane.settings, take)
            async with _while_connected(request.receive):
                response, _ = await plane.infer(model_name, asked)
            content, headers = write_response(response)
        return Response(content, headers=dict(headers))

    async def infer_plainly(request: fastapi.Request) -> Response:
        return await infer(request, **request.path_params)

    for path in _PATHS:
        app.add_route(f"{path}/infer", infer_plainly, methods=["POST"], include_in_schema=False)
    return infer


def _add_protocol(app: fastapi.FastAPI, plane: Plane) -> None:
    infer = _add_inference(app, plane)
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

    async def model_config(model_name: str, version: str = VERSION) -> dict[str, Any]:
        return plane.configuration(model_name, version)

    async def model_statistics(model_name: str, version: str = VERSION) -> dict[str, Any]:
        return plane.statistics(model_name, version)

    async def all_statistics() -> dict[str, Any]:
        return plane.statistics()

    async def model_ready(model_name: str, version: str = VERSION) -> Any:
        plane.find(model_name, version)
        if not await plane.model_ready(model_name):
            raise ServerNotReady(plane.trouble(model_name))
        return {"name": model_name, "ready": True}

    # Before the models' own: one called `stats` has no metadata here.
    app.add_api_route("/v2/models/stats", all_statistics, responses={503: {"model": _Error}})
    errors = {status: {"model": _Error} for status, _ in STATUS.values() if status != 501}
    schema = bodies.InferenceRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    _define(app, schema.pop("$defs"))
    body = {"content": {"application/json": {"schema": schema}}, "required": True}
    for path in _PATHS:
        shown = "versions" not in path
        app.add_api_route(
            path,
            model_metadata,
            response_model=_ModelMetadata,
            responses=missing,
            include_in_schema=shown,
        )
        for name, endpoint in (("config", model_config), ("stats", model_statistics)):
            app.add_api_route(
                f"{path}/{name}", endpoint, responses=missing, include_in_schema=shown
            )
        app.add_api_route(
            f"{path}/ready",
            model_ready,
            response_model=bodies.ModelReadyResponse,
            responses=missing,
            include_in_schema=shown,
        )
        app.add_api_route(  # for the description; see `_add_inference`
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


async def _read(
    request: fastapi.Request, model: str, settings: ServerSettings, take: Callable[[int], None]
) -> InferRequest:
    """The request's message. What takes long is done by another thread.

    Raises: what `_read_body`, `decompress`, `json_size` and `read_request` do.
    """
    length = request.headers.get("inference-header-content-length")
    encoding = request.headers.get("content-encoding")
    _check_announced(request.headers, settings)
    body = await _read_body(request, settings, take)
    if encoding is not None:
        packed = len(body)
        body = await asyncio.to_thread(decompress, body, encoding, settings.max_body_bytes)
        take(max(len(body) - packed, 0))
    if json_size(len(body), length, settings.max_json_bytes) > _LARGE:
        return await asyncio.to_thread(read_request, body, length, model)
    return read_request(body, length, model)


def _check_announced(headers: Mapping[str, str], settings: ServerSettings) -> None:
    """What can be seen before the body is read. Raises: `TooLarge`."""
    announced, limit = headers.get("content-length", "0"), settings.max_body_bytes
    if not announced.isdigit() or int(announced) > limit:
        raise TooLarge(f"the body has {announced} bytes; at most {limit} are taken")
    if "content-encoding" not in headers and "inference-header-content-length" not in headers:
        json_size(int(announced), None, settings.max_json_bytes)


async def _read_body(
    request: fastapi.Request, settings: ServerSettings, take: Callable[[int], None]
) -> bytes:
    """The body as it comes. Raises: `TooLarge`, `Overloaded`, `BodyTimeout` before it is held."""
    limit, seconds = settings.max_body_bytes, settings.body_timeout_s
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                take(len(part))
                size += len(part)
                if size > limit:
                    raise TooLarge(f"the body has more than {limit} bytes")
                parts.append(part)
    except TimeoutError as error:
        raise BodyTimeout(f"the body did not come within {seconds:g} s") from error
    return parts[0] if len(parts) == 1 else b"".join(parts)


@contextlib.asynccontextmanager
async def _while_connected(receive: Receive) -> AsyncIterator[None]:
    """Ends what is done inside once the client has gone away: nobody waits for it.

    Raises: ClientDisconnect then.
    """
    asker = asyncio.current_task()
    assert asker is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        asker.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not gone or asker.uncancel():  # by somebody else
            raise
        raise ClientDisconnect from None
    finally:
        watcher.cancel()
