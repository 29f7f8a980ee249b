"""The server's REST face as a Ray Serve application; the models' workers are actors beside it.

serve run nercc_jax.cli.ray_serve:app model=lenet5-digits workers=8
serve run docs/deploy/ray-serve.yaml
NERCC_MODELS='[{"model": "lenet5-digits"}]' serve build nercc_jax.cli.ray_serve:application
"""

import asyncio
import contextlib
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

from ..pools.garbage import short_collections
from ..serving import ModelSettings
from ..serving._tracing import provider_from_environment
from ..serving.settings import read_settings
from ..serving.transport._http import REQUEST_START
from ..serving.transport._rest import make_app
from ..serving.transport._state import ServerState
from ._serving_models import starts_of

# The server's settings that the application takes; Ray Serve itself listens, and logs.
_OF_REQUESTS = ("max_body_bytes", "max_bytes_in_flight")


def app(args: dict[str, Any]) -> serve.Application:
    """Return the application, for `serve run` and for a configuration file.

    There is one replica unless the configuration's `deployments` set `num_replicas`: groups are
    made of the queries that come to one process, and each replica has workers of its own. With two,
    one goes on if the other is killed; for speed, give the models more workers instead.

    Args:
        args: settings of `nercc serve`: `model`; any setting of a model, for all models; `models`
            and `defaults` as in a TOML file; the limits of bodies and `drain_timeout_s`; and
            `config`, the path of such a file. Models run on Ray actors unless `pool` is set.

    Raises:
        ValueError: for arguments that are unknown or out of range.
    """
    given = dict(args)
    file, taken = (
        given.pop("config", None),
        ("models", "defaults", "drain_timeout_s", *_OF_REQUESTS),
    )
    if unknown := sorted(set(given) - {*taken, *ModelSettings.model_fields}):
        raise ValueError(
            f"{', '.join(unknown)}: the application takes a model's settings, {', '.join(taken)} "
            "and config; the address, the port and the log are Ray Serve's (http_options, "
            "logging_config)"
        )
    settings = read_settings(None if file is None else Path(file), **given)
    if "pool" not in settings.defaults.model_fields_set:
        settings.defaults.pool = "ray"
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
        health_check_period_s=2.0,
        health_check_timeout_s=15.0,
        max_ongoing_requests=calls + 100,  # metrics, status and health
        # Workers end after everything is answered.
        graceful_shutdown_timeout_s=settings.drain_timeout_s + 10.0,
        graceful_shutdown_wait_loop_s=0.5,
    )
    return deployment.bind(chosen, {name: getattr(settings, name) for name in _OF_REQUESTS})


@serve.ingress()
class CodedServer:
    """A replica: the server's REST application in Ray Serve's own server."""

    _server_state: ServerState | None = None

    async def __init__(self, models: Sequence[ModelSettings], limits: Mapping[str, Any]):
        """Start the models; `limits` are the server's settings of requests, by name."""
        # Where Serve logs, and at its level; otherwise lines of INFO would be lost.
        ours, serves = logging.getLogger("nercc_jax"), logging.getLogger("ray.serve")
        ours.handlers, ours.propagate = serves.handlers, False
        ours.setLevel(serves.getEffectiveLevel())
        settings = read_settings(None, **limits)
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        served: dict[str, Any] = {}
        with contextlib.ExitStack() as undo:  # if one does not start, the others are closed
            for name, start in starts_of(models, self._registry).items():
                # By another thread, so that Serve hears meanwhile that the replica lives.
                served[name] = await asyncio.to_thread(start)
                undo.callback(served[name].close, 0.0)
            undo.pop_all()
        self._server_state = ServerState(served, settings, spans=provider_from_environment())
        self._collections = contextlib.ExitStack()
        self._collections.enter_context(short_collections())

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application, which Serve asks for."""
        assert self._server_state is not None
        return make_app(self._server_state, self._registry)

    async def check_health(self) -> None:
        """Raise RuntimeError where no worker is ready: Serve restarts the replica after three."""
        state = self._server_state
        for name, model in ({} if state is None else state.models.started).items():
            if all(worker.state == "starting" for worker in model.pool.report().workers):
                raise RuntimeError(f"{name}: none of its workers is ready")

    async def __del__(self) -> None:
        """Close the models. Serve has waited until all was answered, or it never started."""
        state, self._server_state = self._server_state, None
        for model in () if state is None else state.models.started.values():
            await asyncio.to_thread(model.close, 0.0)
        if state is not None and state.spans is not None:
            await asyncio.to_thread(state.spans.shutdown)


def stamp() -> list[Middleware]:
    """Return the middleware with which Serve's proxies tell replicas when a request came.

    Deadlines count from that time. Proxies call this where their nodes are started with the
    variable RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=nercc_jax.cli.ray_serve.stamp.
    """

    def stamped(app: ASGIApp) -> ASGIApp:
        async def call(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and all(n != REQUEST_START for n, _ in scope["headers"]):
                now = REQUEST_START, f"t={time.time():.6f}".encode()
                scope = {**scope, "headers": [*scope["headers"], now]}
            await app(scope, receive, send)

        return call

    return [Middleware(stamped)]


def __getattr__(name: str) -> serve.Application:
    """Return `application`, which is `app` by the environment alone, for `serve build`."""
    if name != "application":
        raise AttributeError(f"{__name__} has no {name}")
    return app({})
