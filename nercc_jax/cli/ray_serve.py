"""The server's REST face as a Ray Serve application; the models' workers are actors beside it.

serve run nercc_jax.cli.ray_serve:app model=lenet5-digits workers=8
serve run docs/deploy/ray-serve.yaml
NERCC_MODELS='[{"model": "lenet5-digits"}]' serve build nercc_jax.cli.ray_serve:application
"""

import asyncio
import gc
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from prometheus_client.process_collector import ProcessCollector
from ray import serve
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from ..serving._arrival import HEADER
from ..serving._plane import Plane
from ..serving._rest import make_app
from ..serving._settings import ModelSettings, ServerSettings, read_settings
from ..serving._telemetry import Telemetry, telemetry_by_environment
from ._serving_models import start_models

# What the application takes of a server's settings; Ray Serve itself listens, and keeps the log.
_OF_REQUESTS = (
    *("max_body_bytes", "max_json_bytes", "max_bytes_in_flight", "body_timeout_s"),
    "request_log_rate",
)
_TAKEN = ("models", "defaults", "drain_timeout_s", *_OF_REQUESTS)
_CHECK_EVERY, _CHECK_TIMEOUT = 2.0, 15.0  # seconds: a replica's health
_ENDING = 10.0  # seconds for the workers to end, after everything is answered


def app(args: dict[str, Any]) -> serve.Application:
    """The application, for `serve run` and for a configuration file.

    Arguments are the settings of `nercc serve`: `model`, anything that a model is told (it goes for
    all models), `models` and `defaults` as in a TOML file, the limits of bodies, the drain timeout
    and the share of requests that the log has a line of as there, and `config`, the path of such a
    file. Models run on Ray actors unless `pool` says otherwise.

    There is one replica unless the configuration's `deployments` say `num_replicas`: groups are
    made of the queries that come to one process, and each replica has workers of its own. Two go
    on where one is killed; for speed, give the models more workers instead.

    Raises: ValueError for arguments that are not known, or out of range.
    """
    settings = _settings(args)
    chosen = settings.resolved()
    # Not fewer than the queues hold, so that too many are told 429 at once by the queue, and do not
    # wait without a deadline in Ray's proxy.
    calls = sum(
        each.max_queue_size + 2 * each.max_batch_size * (each.workers or each.num_workers)
        for each in chosen
    )
    deployment: Any = serve.deployment(
        CodedServer,
        name="CodedServer",
        num_replicas=1,
        # A replica that is killed is noticed by the next of these, and started anew.
        health_check_period_s=_CHECK_EVERY,
        health_check_timeout_s=_CHECK_TIMEOUT,
        max_ongoing_requests=calls + 100,  # metrics, status and health
        graceful_shutdown_timeout_s=settings.drain_timeout_s + _ENDING,
        graceful_shutdown_wait_loop_s=0.5,
    )
    return deployment.bind(chosen, {name: getattr(settings, name) for name in _OF_REQUESTS})


@serve.ingress()
class CodedServer:
    """What the replica's process runs."""

    _plane: Plane | None = None
    _telemetry: Telemetry | None = None

    async def __init__(self, models: Sequence[ModelSettings], limits: Mapping[str, Any]):
        _log_by_serve()
        settings = read_settings(None, **limits)
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        # By another thread, so that Serve hears meanwhile that the replica lives.
        served = await asyncio.to_thread(start_models, models, self._registry)
        self._telemetry = telemetry_by_environment()
        self._plane = Plane(served, settings, telemetry=self._telemetry)
        gc.collect()
        gc.freeze()  # as in `Server.serve`

    def __serve_build_asgi_app__(self) -> FastAPI:
        assert self._plane is not None
        return make_app(self._plane, self._registry)

    async def check_health(self) -> None:
        """Serve starts the replica anew after three failures."""
        for name, model in ({} if self._plane is None else self._plane.models).items():
            if all(worker.state == "starting" for worker in model.pool.report().workers):
                raise RuntimeError(f"{name}: none of its workers is ready")

    async def __del__(self) -> None:
        """Serve has waited until everything was answered; or it never started."""
        plane, self._plane = self._plane, None
        for model in () if plane is None else plane.models.values():
            await asyncio.to_thread(model.close, 0.0)
        if self._telemetry is not None:
            await asyncio.to_thread(self._telemetry.close)


def stamp() -> list[Middleware]:
    """For Serve's proxies, which tell replicas by this when a request came: deadlines count thence.

    They call it where their nodes are started with the variable
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=nercc_jax.cli.ray_serve.stamp.
    """
    return [Middleware(_Stamp)]


class _Stamp:
    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and all(name != HEADER for name, _ in scope["headers"]):
            stamp = HEADER, f"t={time.time():.6f}".encode()
            scope = {**scope, "headers": [*scope["headers"], stamp]}
        await self._app(scope, receive, send)


def _log_by_serve() -> None:
    """Our lines go where Serve's own do, and at its level; else those of INFO would go nowhere."""
    ours, serves = logging.getLogger("nercc_jax"), logging.getLogger("ray.serve")
    ours.handlers, ours.propagate = serves.handlers, False
    ours.setLevel(serves.getEffectiveLevel())


def __getattr__(name: str) -> serve.Application:
    """`application` is `app` by the environment alone (NERCC_MODELS), for `serve build`."""
    if name != "application":
        raise AttributeError(f"{__name__} has no {name}")
    return app({})


def _settings(args: Mapping[str, Any]) -> ServerSettings:
    summary = dict(args)
    file = summary.pop("config", None)
    if "model" in summary:
        summary["models"] = [{"model": summary.pop("model")}]
    defaults = dict(summary.get("defaults", {}))
    defaults |= {
        name: summary.pop(name) for name in list(summary) if name in ModelSettings.model_fields
    }
    unknown = sorted(set(summary) - set(_TAKEN))
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: the application takes what a model is told, "
            f"{', '.join(_TAKEN)} and config; the address, the port and the log are Ray Serve's "
            "(http_options, logging_config)"
        )
    summary["defaults"] = defaults
    settings = read_settings(None if file is None else Path(file), **summary)
    if "pool" not in settings.defaults.model_fields_set:
        settings.defaults.pool = "ray"
    return settings
