"""The REST application: the Open Inference Protocol, its description, the status page, metrics."""

import asyncio
import importlib.resources
from typing import Any

import fastapi
import orjson
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import create_model
from starlette.exceptions import HTTPException

from ..core._request import shorten
from ..protocol._messages import AS_JSON, INTERNAL, KINDS, InvalidInput, ServerNotReady
from ._http import error_response, read_body
from ._state import ServerState

ErrorResponse = create_model("ErrorResponse", error=str)  # for the description


def make_app(state: ServerState, registry: CollectorRegistry) -> fastapi.FastAPI:
    """Return the ASGI application that an `InferenceEndpoint` stands before."""
    repository = state.models
    app = fastapi.FastAPI(
        title="nercc_jax",
        description="Coded inference by the Open Inference Protocol (V2).",
        version=state.metadata()["version"],
        docs_url=None,  # FastAPI's pages load their scripts from elsewhere
        redoc_url=None,
    )

    def statuses(*which: int) -> Any:
        return {status: {"model": ErrorResponse} for status in which}

    # What the server says of itself and of its models, by either face.

    def add(path: str, name: str, method: str) -> None:
        def answer(model_name: str = "", version: str = "") -> Any:
            found = state.says[method](model_name, version)
            reason = found.pop("reason", "")
            if found.get("ready") is False:
                raise ServerNotReady(reason)
            return found

        async def of_server() -> Any:
            return answer()

        async def of_model(model_name: str, version: str = "") -> Any:
            return answer(model_name, version)

        of_one, described = "{" in path, "versions" not in path
        app.add_api_route(
            path,
            of_model if of_one else of_server,
            name=name,
            responses=statuses(404, 503) if of_one else statuses(503),
            include_in_schema=described,
        )

    for path, name, method in (
        ("/v2", "metadata", "ServerMetadata"),
        ("/v2/health/live", "live", "ServerLive"),
        ("/v2/health/ready", "ready", "ServerReady"),
    ):
        add(path, name, method)
    for where in ("/v2/models/{model_name}", "/v2/models/{model_name}/versions/{version}"):
        for suffix, name, method in (
            ("", "model_metadata", "ModelMetadata"),
            ("/ready", "model_ready", "ModelReady"),
        ):
            add(where + suffix, name, method)

    @app.get("/v2/models", responses=statuses(503))
    async def models() -> Any:
        return {"models": list(repository.versions)}

    # The model repository.

    async def field_of(request: fastapi.Request, name: str, kind: type, default: Any) -> Any:
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

    @app.post("/v2/repository/index", responses=statuses(503))
    async def index(request: fastapi.Request) -> Any:
        return repository.index(await field_of(request, "ready", bool, False))

    @app.post("/v2/repository/models/{model_name}/load", responses=statuses(400, 403, 404, 503))
    async def load(model_name: str, request: fastapi.Request) -> None:
        parameters = await field_of(request, "parameters", dict, {})
        await repository.control(model_name, parameters, load=True)

    @app.post("/v2/repository/models/{model_name}/unload", responses=statuses(400, 403, 404, 503))
    async def unload(model_name: str, request: fastapi.Request) -> None:
        parameters = await field_of(request, "parameters", dict, {})
        await repository.control(model_name, parameters, load=False)

    # Inference, which is only described here.

    async def infer(model_name: str, version: str = "") -> None:
        """Describe inference and its errors; `InferenceEndpoint` answers it."""

    schema = AS_JSON.json_schema(ref_template="#/components/schemas/{model}")
    describe, parts = app.openapi, schema.pop("$defs")  # which FastAPI does not know

    def describe_all() -> dict[str, Any]:
        description = describe()
        description["components"]["schemas"] |= parts
        return description

    app.openapi = describe_all
    refusals = sorted({each.http for each in KINDS.values()} - {403})
    for where in ("/v2/models/{model_name}", "/v2/models/{model_name}/versions/{version}"):
        app.add_api_route(
            f"{where}/infer",
            infer,
            methods=["POST"],
            responses=statuses(*refusals),
            openapi_extra={
                "requestBody": {
                    "content": {"application/json": {"schema": schema}},
                    "required": True,
                }
            },
            include_in_schema="versions" not in where,
        )

    # Pages, some of which other threads put together, because it takes milliseconds.

    page = importlib.resources.files("nercc_jax.serving").joinpath("status.html").read_text()

    @app.get("/", include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/status", include_in_schema=False)
    async def status() -> JSONResponse:
        content = await asyncio.to_thread(state.status)
        return JSONResponse(content, headers={"cache-control": "no-store"})

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        content = await asyncio.to_thread(generate_latest, registry)
        return Response(content, headers={"content-type": CONTENT_TYPE_LATEST})

    # Errors.

    async def known(request: fastapi.Request, error: Exception) -> Response:
        return error_response(error)

    async def no_such_path(request: fastapi.Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = shorten(f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse({"error": message}, error.status_code, error.headers)

    async def unexpected(request: fastapi.Request, error: Exception) -> Response:
        return JSONResponse({"error": INTERNAL}, 500)  # and the server raises it, to be logged

    for kind in KINDS:
        app.add_exception_handler(kind, known)
    app.add_exception_handler(HTTPException, no_such_path)
    app.add_exception_handler(Exception, unexpected)
    return app
