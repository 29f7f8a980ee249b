"""The REST application: the Open Inference Protocol, its description, the status page, metrics."""

import asyncio
import html
import importlib.resources
import math
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

import fastapi
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CollectorRegistry, exposition
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from ..core._request import shorten
from ..protocol._errors import INTERNAL, KINDS, InvalidInput, ServerNotReady
from ..protocol._messages import InferenceRequest, InferenceResponse, check_parameters
from ._bodies import BodyLimits, read_body
from ._http import InferenceEndpoint, error_response
from ._state import ServerState


class ErrorResponse(BaseModel):
    """The body of every error."""

    error: str


class ServerMetadataResponse(BaseModel):
    """The server's metadata."""

    name: str
    version: str
    extensions: list[str]


class ServerLiveResponse(BaseModel):
    """The server is alive."""

    live: bool


class ServerReadyResponse(BaseModel):
    """The server is ready."""

    ready: bool


class ListModelsResponse(BaseModel):
    """The names of all models."""

    models: list[str]


class IndexRequest(BaseModel):
    """The models to list: all, or those that are ready."""

    ready: bool = False


class ControlRequest(BaseModel):
    """The body of loading and unloading."""

    parameters: dict[str, Any] = {}


Body = TypeVar("Body", bound=BaseModel)


class IndexEntry(BaseModel):
    """A model of the repository, and its state."""

    name: str
    version: str
    state: str
    reason: str


class MetadataTensor(BaseModel):
    """An input or output of a model."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadataResponse(BaseModel):
    """A model's metadata."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[MetadataTensor]
    outputs: list[MetadataTensor]
    parameters: dict[str, bool | float | str]


class ModelReadyResponse(BaseModel):
    """A model is ready."""

    name: str
    ready: bool


def make_app(state: ServerState, registry: CollectorRegistry) -> fastapi.FastAPI:
    """Return the ASGI application: for this server, Ray Serve, or any other."""
    app = fastapi.FastAPI(
        title="nercc_jax",
        description="Coded inference by the Open Inference Protocol (V2).",
        version=state.metadata()["version"],
        docs_url=None,  # FastAPI's pages load their scripts from elsewhere
        redoc_url=None,
    )
    _add_server(app, state)
    _add_models(app, state)
    _add_pages(app, state, registry)
    _add_errors(app)
    app.add_middleware(InferenceEndpoint, state=state)  # pyright: ignore[reportArgumentType]
    app.add_middleware(BodyLimits, settings=state.settings)  # pyright: ignore[reportArgumentType]
    return app


def _add_server(app: fastapi.FastAPI, state: ServerState) -> None:
    not_ready: dict[int | str, dict[str, Any]] = {503: {"model": ErrorResponse}}

    @app.get("/v2", responses=not_ready)
    async def metadata() -> ServerMetadataResponse:
        return ServerMetadataResponse(**state.metadata())

    @app.get("/v2/health/live", responses=not_ready)
    async def live() -> ServerLiveResponse:
        state.check_live()
        return ServerLiveResponse(live=True)

    @app.get("/v2/health/ready", responses=not_ready)
    async def ready() -> ServerReadyResponse:
        if not state.ready():
            raise ServerNotReady
        return ServerReadyResponse(ready=True)

    @app.get("/v2/models", responses=not_ready)
    async def models() -> ListModelsResponse:
        return ListModelsResponse(models=list(state.versions))

    async def parse(request: fastapi.Request, kind: type[Body]) -> Body:
        """Return a small body, which may be empty."""
        with state.memory.request() as add:
            body = await read_body(request.receive, add)
            try:
                return kind.model_validate_json(body or b"{}")
            except ValidationError as error:
                raise InvalidInput(error.errors()[0]["msg"]) from error

    @app.post("/v2/repository/index", responses=not_ready)
    async def index(request: fastapi.Request) -> list[IndexEntry]:
        asked = await parse(request, IndexRequest)
        return [IndexEntry(**each) for each in state.repository_index(asked.ready)]

    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse} for status in (400, 403, 404, 503)
    }

    @app.post("/v2/repository/models/{model_name}/load", responses=errors)
    async def load(model_name: str, request: fastapi.Request) -> None:
        asked = await parse(request, ControlRequest)
        check_parameters("loading a model", asked.parameters, set())
        await state.control.load(model_name)

    @app.post("/v2/repository/models/{model_name}/unload", responses=errors)
    async def unload(model_name: str, request: fastapi.Request) -> None:
        asked = await parse(request, ControlRequest)
        check_parameters("unloading a model", asked.parameters, {"unload_dependents"})
        await state.control.unload(model_name)

    # Before the models' own paths: one called `stats` has no metadata here.
    @app.get("/v2/models/stats", responses=not_ready)
    async def all_statistics() -> dict[str, Any]:
        return state.statistics()


def _add_models(app: fastapi.FastAPI, state: ServerState) -> None:
    async def model_metadata(model_name: str, version: str = "") -> Any:
        return state.model_metadata(model_name, version)

    async def model_config(model_name: str, version: str = "") -> dict[str, Any]:
        return state.configuration(model_name, version)

    async def model_statistics(model_name: str, version: str = "") -> dict[str, Any]:
        return state.statistics(model_name, version)

    async def model_ready(model_name: str, version: str = "") -> Any:
        state.find(model_name, version)
        if (trouble := state.trouble(model_name, version)) is not None:
            raise ServerNotReady(trouble)
        return {"name": model_name, "ready": True}

    async def infer(model_name: str, version: str = "") -> None:
        """Describe inference and its errors; `InferenceEndpoint` answers it."""

    missing: dict[int | str, dict[str, Any]] = {
        404: {"model": ErrorResponse},
        503: {"model": ErrorResponse},
    }
    errors = {each.http: {"model": ErrorResponse} for each in KINDS.values() if each.http != 403}
    schema = InferenceRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    describe, parts = app.openapi, schema.pop("$defs")  # which FastAPI does not know

    def describe_all() -> dict[str, Any]:
        description = describe()
        description["components"]["schemas"] |= parts
        return description

    app.openapi = describe_all
    body = {"content": {"application/json": {"schema": schema}}, "required": True}
    for path in ("/v2/models/{model_name}", "/v2/models/{model_name}/versions/{version}"):
        for suffix, endpoint, model in (
            ("", model_metadata, ModelMetadataResponse),
            ("/config", model_config, dict[str, Any]),
            ("/stats", model_statistics, dict[str, Any]),
            ("/ready", model_ready, ModelReadyResponse),
        ):
            app.add_api_route(
                path + suffix,
                endpoint,
                response_model=model,
                responses=missing,
                include_in_schema="versions" not in path,
            )
        app.add_api_route(
            f"{path}/infer",
            infer,
            methods=["POST"],
            response_class=JSONResponse,
            responses={200: {"model": InferenceResponse}, **errors},
            openapi_extra={"requestBody": body},
            include_in_schema="versions" not in path,
        )


def _add_pages(app: fastapi.FastAPI, state: ServerState, registry: CollectorRegistry) -> None:
    page = importlib.resources.files("nercc_jax.serving").joinpath("status.html").read_text()

    @app.get("/", include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/docs", include_in_schema=False)
    async def show_description() -> HTMLResponse:
        return HTMLResponse(_describe(app.openapi()))

    # Put together by other threads, because it takes milliseconds.

    @app.get("/status", include_in_schema=False)
    async def status() -> JSONResponse:
        content = await asyncio.to_thread(state.status)
        return JSONResponse(content, headers={"cache-control": "no-store"})

    checked = SharedAnswer(state.weights, seconds=10.0)

    @app.get("/weights", include_in_schema=False)
    async def weights() -> JSONResponse:
        return JSONResponse(await checked(), headers={"cache-control": "no-store"})

    @app.get("/metrics", include_in_schema=False)
    async def metrics(request: fastapi.Request) -> Response:
        write, content_type = exposition.choose_encoder(request.headers.get("accept", ""))
        content = await asyncio.to_thread(write, registry)
        return Response(content, headers={"content-type": content_type})


class SharedAnswer:
    """An answer that is expensive to find, found once for all that ask meanwhile or soon after.

    Else strangers could keep workers busy with it.
    """

    def __init__(self, find: Callable[[], Coroutine[Any, Any, Any]], seconds: float):
        """Create one; `seconds` after one beginning there may be another."""
        self._find, self._seconds, self._until = find, seconds, -math.inf
        self._task: asyncio.Task[Any] | None = None

    async def __call__(self) -> Any:
        """Return the answer; raise what finding it out raised."""
        now = asyncio.get_running_loop().time()
        if self._task is None or (self._task.done() and now >= self._until):
            self._task, self._until = asyncio.create_task(self._find()), now + self._seconds
        return await asyncio.shield(self._task)


def _describe(description: Mapping[str, Any]) -> str:
    """Return a page with all paths of a description, which loads nothing from elsewhere."""
    rows = []
    for path, methods in description["paths"].items():
        for method, about in methods.items():
            statuses = ", ".join(about["responses"])
            text = about.get("description") or about["summary"]
            cells = (method.upper(), path, text, statuses)
            rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    title = html.escape(description["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        "<style>body{font-family:sans-serif;margin:2rem}td,th{text-align:left;padding:.3rem 1rem "
        f".3rem 0}}</style><h1>{title}</h1><p>{html.escape(description['info']['description'])} "
        'All schemas: <a href="openapi.json">openapi.json</a>.</p>'
        "<table><tr><th>Method</th><th>Path</th><th>About</th><th>Statuses</th></tr><tr>"
        f"{'</tr><tr>'.join(rows)}</tr></table></html>"
    )


def _add_errors(app: fastapi.FastAPI) -> None:
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
