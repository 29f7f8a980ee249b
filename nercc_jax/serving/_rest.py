"""The REST face: the Open Inference Protocol, the status page, metrics."""

import asyncio
import importlib.resources
from collections.abc import Mapping
from typing import Any

import fastapi
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CollectorRegistry, exposition
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ._inference import Inference, answer_to
from ._kserve import ServerNotReady, V2Endpoints, bodies
from ._plane import Plane
from ._protocol import VERSION
from ._statuses import INTERNAL, STATUS


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
    app.add_middleware(Inference, plane=plane)  # pyright: ignore[reportArgumentType]
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
        return answer_to(error)

    async def tell_wrong_way(request: fastapi.Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        told = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse({"error": told}, error.status_code, error.headers)

    async def tell_unexpected(request: fastapi.Request, error: Exception) -> Response:
        return JSONResponse({"error": INTERNAL}, 500)  # and the server raises it, to be logged

    for kind in STATUS:
        app.add_exception_handler(kind, tell)
    app.add_exception_handler(HTTPException, tell_wrong_way)
    app.add_exception_handler(Exception, tell_unexpected)


class _Error(BaseModel):
    error: str


class _ModelMetadata(bodies.ModelMetadataResponse):
    parameters: dict[str, bool | float | str]


_PATHS = ("/v2/models/{model_name}", "/v2/models/{model_name}/versions/{version}")


def _add_protocol(app: fastapi.FastAPI, plane: Plane) -> None:
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

    async def infer(model_name: str, version: str = VERSION) -> None:
        """For the description and its errors: `Inference` answers before it comes to this."""

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
