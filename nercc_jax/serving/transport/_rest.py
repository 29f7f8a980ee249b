"""The REST application: the Open Inference Protocol but for inference, the status page, metrics."""

import asyncio
import importlib.resources
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from ..core._request import shorten
from ..protocol._messages import INTERNAL, KINDS, InvalidInput, ServerNotReady
from ._http import error_response, read_body
from ._state import ServerState


def make_app(state: ServerState, registry: CollectorRegistry) -> Starlette:
    """Return the ASGI application that an `InferenceEndpoint` stands before."""
    models = state.models

    def said(method: str) -> Callable[[Request], Awaitable[Response]]:
        """Return the endpoint of what the server says, by the name of gRPC's method."""

        async def endpoint(request: Request) -> Response:
            path = request.path_params
            found = state.says[method](path.get("name", ""), path.get("version", ""))
            reason = found.pop("reason", "")
            if found.get("ready") is False:
                raise ServerNotReady(reason)
            return JSONResponse(found)

        return endpoint

    async def list_models(request: Request) -> Response:
        return JSONResponse({"models": list(models.versions)})

    async def infer(request: Request) -> Response:
        raise NotImplementedError  # `InferenceEndpoint` answers it

    # The model repository.

    async def field_of(request: Request, name: str, kind: type, default: Any) -> Any:
        """Return a field of a small body, which may be empty."""
        with state.hold() as add:
            body = await read_body(request.receive, add)
            try:
                content = orjson.loads(body or b"{}")
            except orjson.JSONDecodeError as error:
                raise InvalidInput(f"the body is not JSON: {error}") from error
        found = content.get(name, default) if isinstance(content, dict) else None
        if not isinstance(found, kind):
            raise InvalidInput(f"the body is an object; {name} is a {kind.__name__}, not {found!r}")
        return found

    async def index(request: Request) -> Response:
        return JSONResponse(models.index(await field_of(request, "ready", bool, False)))

    async def load(request: Request, load: bool = True) -> Response:
        parameters = await field_of(request, "parameters", dict, {})
        await models.control(request.path_params["name"], parameters, load=load)
        return Response()

    async def unload(request: Request) -> Response:
        return await load(request, load=False)

    # Pages, which other threads put together, because it takes milliseconds.

    page = importlib.resources.files("nercc_jax.serving").joinpath("status.html").read_text()

    async def show_page(request: Request) -> Response:
        return HTMLResponse(page)

    async def status(request: Request) -> Response:
        content = await asyncio.to_thread(state.status)
        return JSONResponse(content, headers={"cache-control": "no-store"})

    async def metrics(request: Request) -> Response:
        content = await asyncio.to_thread(generate_latest, registry)
        return Response(content, headers={"content-type": CONTENT_TYPE_LATEST})

    # Errors.

    async def known(request: Request, error: Exception) -> Response:
        return error_response(error)

    async def no_such_path(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = shorten(f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse({"error": message}, error.status_code, error.headers)

    async def unexpected(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": INTERNAL}, 500)  # and the server raises it, to be logged

    routes = [
        Route("/", show_page),
        Route("/status", status),
        Route("/metrics", metrics),
        Route("/v2", said("ServerMetadata")),
        Route("/v2/health/live", said("ServerLive")),
        Route("/v2/health/ready", said("ServerReady")),
        Route("/v2/models", list_models),
        Route("/v2/repository/index", index, methods=["POST"]),
        Route("/v2/repository/models/{name}/load", load, methods=["POST"]),
        Route("/v2/repository/models/{name}/unload", unload, methods=["POST"]),
    ]
    for where in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        routes.append(Route(where, said("ModelMetadata")))
        routes.append(Route(f"{where}/ready", said("ModelReady")))
        routes.append(Route(f"{where}/infer", infer, methods=["POST"]))
    handlers: dict[Any, Any] = dict.fromkeys(KINDS, known)
    handlers |= {HTTPException: no_such_path, Exception: unexpected}
    return Starlette(routes=routes, exception_handlers=handlers)
