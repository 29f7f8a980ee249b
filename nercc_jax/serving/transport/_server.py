"""The server: listens by HTTP and gRPC, starts its models, and drains at a signal."""

import asyncio
import contextlib
import functools
import gc
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.process_collector import ProcessCollector

from ...codes import AbstractCode, NeRCC, Uncoded
from ...inference.models import Model
from .._served_model import ServedModel
from .._tracing import provider_from_environment
from ..adapt._predictor import Predictor
from ..metrics import Metrics
from ..protocol.servable import Servable, make_servable
from ..settings import ModelSettings, ServerSettings
from ._grpc import GrpcServer
from ._rest import RestApp
from ._state import TICK, ServerState, in_background

try:  # uvloop is faster; it does not exist for Windows
    from uvloop import new_event_loop
except ImportError:
    from asyncio import new_event_loop

_LOG = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_NOT_MAIN_THREAD = ValueError, RuntimeError  # raised where signals cannot be handled
# Seconds in which the last errors may reach clients if draining takes too long, and seconds after
# draining after which the server no longer waits for models to close.
_LAST_ERRORS, _LAST_WAIT = 3.0, 4.5


class Server:
    """A server of some models, by REST and gRPC.

    Call `run`, `await serve()` in an event loop of your own, or use it as a context manager, which
    serves from a thread and enters once all models are ready. See `make_server`.

    Attributes:
        settings: the server's settings.
        starts: by model name, the function that starts the model.
        state: its models and its load.
        http_port: the port of REST; 0 before it listens.
        grpc_port: the port of gRPC; 0 before it listens.
        ends_by: the monotonic time by which `run` and `serve` return; infinite before it drains.
        lost: by model, the number of requests that were accepted, but not answered at the end.
    """

    def __init__(
        self,
        starts: Mapping[str, Callable[[], ServedModel]],
        settings: ServerSettings | None = None,
        registry: CollectorRegistry | None = None,
        spans: Any = None,
    ):
        """Create a server that does not listen yet.

        `starts` has, by model name, a function that starts the model, which may take minutes.
        `spans` is a provider of OpenTelemetry's SDK, which is shut down at the end (default: one
        configured by OpenTelemetry's environment variables).

        Raises:
            ImportError: if these variables need packages that are missing.
            ValueError: if a file of tokens or TLS is missing.
        """
        self.settings, self.starts = settings or ServerSettings(), dict(starts)
        spans = spans or provider_from_environment()
        self.state = ServerState(self.starts, self.settings, spans)
        self.settings.tls_pem()
        registry = registry or CollectorRegistry()
        with contextlib.suppress(ValueError):  # an earlier server has registered it
            ProcessCollector(registry=registry)
        self._http = uvicorn.Server(
            uvicorn.Config(
                RestApp(self.state, registry),
                host=self.settings.host,
                port=self.settings.http_port,
                http="httptools",
                ssl_certfile=self.settings.tls_certificate,
                ws="none",
                log_config=None,
                access_log=False,
                proxy_headers=False,  # the client's address is not used
                lifespan="off",
                limit_concurrency=self.state.max_connections,
                timeout_keep_alive=65,
                # The server's own timeouts end first: see `_drain`.
                timeout_graceful_shutdown=int(self.settings.drain_timeout_s + 2 * _LAST_ERRORS) + 1,
            )
        )
        # Uvicorn would end at a signal, before the server can report that it drains.
        self._http.capture_signals = contextlib.nullcontext  # pyright: ignore[reportAttributeAccessIssue]
        self._grpc: GrpcServer | None = None
        self.http_port = self.grpc_port = 0
        self.ends_by = math.inf
        self.lost: dict[str, int] = {}
        self._at_once = False
        self._signal: signal.Signals | None = None
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain.

        Raises:
            SystemExit: with a shell's exit code, if a signal came before all models had started. A
                thread may still be starting one.
            Exception: as `serve` does.
        """
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(self.serve())
        if self._signal is not None and not self.state.models.complete:
            raise SystemExit(128 + self._signal)

    async def serve(self) -> None:
        """Listen, start the models, serve until `stop` or a signal, drain, and close the models.

        Signals are handled if this is the main thread's loop. A model that does not close in time
        is abandoned, with its threads.

        Raises:
            OSError: if a port is taken.
            Exception: as starting a model does.
        """
        with contextlib.suppress(ImportError, OSError, ValueError):  # Windows lacks `resource`
            import resource  # each connection is an open file

            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

        async def serve_http() -> None:
            try:
                await self._http.serve()
            except SystemExit:  # uvicorn has logged why
                raise self.settings.cannot_listen(self.settings.http_port) from None

        http, models = asyncio.create_task(serve_http()), self.state.models
        try:
            self._catch_signals()
            while not self._http.started and not http.done():
                await asyncio.sleep(0.01)
            if not http.done():
                try:
                    await self._answer(http)
                except BaseException:
                    self._at_once = True
                    raise
                finally:
                    await self._drain(http)
            with contextlib.suppress(asyncio.CancelledError):  # it did not end in time
                await http
        finally:
            with contextlib.suppress(*_NOT_MAIN_THREAD):
                for each in _SIGNALS:
                    asyncio.get_running_loop().remove_signal_handler(each)
            ends = models.close_all()
            if self.state.spans is not None:
                ends["spans"] = in_background(self.state.spans.shutdown)
            self.ends_by = min(self.ends_by, time.monotonic() + _LAST_WAIT)
            if ends:
                await asyncio.wait(ends.values(), timeout=self.ends_by - time.monotonic())
            if left := [name for name, end in ends.items() if not end.done()]:
                _LOG.warning("left behind: it does not close", extra={"left": left})

    def stop(self) -> None:
        """Drain: answer only requests accepted before. A second call ends the server at once."""
        models = self.state.models
        self._at_once = models.draining or not models.started
        models.draining = True
        drain = self.settings.drain_delay_s + self.settings.drain_timeout_s
        last = time.monotonic() + _LAST_WAIT
        self.ends_by = min(self.ends_by, last if self._at_once else last + drain)
        _LOG.info("ending at once" if self._at_once else "draining")

    def __enter__(self) -> "Server":
        """Serve from a thread, and wait until all models are ready.

        Raises:
            Exception: as `serve`.
        """
        failures: list[BaseException] = []

        def run() -> None:
            try:
                self.run()
            except BaseException as error:
                failures.append(error)

        self._thread = threading.Thread(target=run, name="nercc-server", daemon=True)
        self._thread.start()
        while self._thread.is_alive() and not self.state.models.complete:
            time.sleep(TICK)
        if failures:
            raise failures[0]
        return self

    def __exit__(self, *_: object) -> None:
        assert self._thread is not None
        self.stop()
        self._thread.join()

    async def _answer(self, http: asyncio.Task) -> None:
        """Listen by gRPC, start the models, and serve until the server drains."""
        models, begin, settings = self.state.models, time.monotonic(), self.settings
        self.http_port = self._http.servers[0].sockets[0].getsockname()[1]
        if settings.grpc_port is not None:
            made, pem = GrpcServer(self.state), settings.tls_pem()
            where = f"{settings.host}:{settings.grpc_port}"
            try:
                if pem is None:
                    self.grpc_port = made.server.add_insecure_port(where)
                else:
                    credentials = grpc.ssl_server_credentials([(pem, pem)])
                    self.grpc_port = made.server.add_secure_port(where, credentials)
            except RuntimeError as error:
                raise settings.cannot_listen(settings.grpc_port) from error
            await made.server.start()
            self._grpc = made
        address: dict[str, Any] = {"host": settings.host, "http_port": self.http_port}
        address["grpc_port"] = self.grpc_port if self._grpc else None
        _LOG.info("listening", extra=address)
        await models.start_all(self._catch_signals)  # repeated, since Ray sets its own handlers
        self._catch_signals()
        if models.complete:
            # A full garbage collection would stop all threads and visit all compiled code.
            gc.collect()
            gc.freeze()
            address["seconds"] = round(time.monotonic() - begin, 3)
            _LOG.info("ready", extra={**address, "models": list(models.started)})
        while not models.draining and not http.done():
            # Drain in time before Ray ends this process.
            left = models.ends_at - time.monotonic()
            if left < settings.drain_timeout_s + 2 * _LAST_ERRORS:
                self.stop()
            await asyncio.sleep(TICK)

    async def _drain(self, http: asyncio.Task) -> None:
        """Stay unready for `drain_delay_s`; then accept no more, and fail slow requests."""
        ends: list[asyncio.Future[Any]] = []

        async def wait(seconds: float) -> bool:
            """Return True once all transports have ended; False at a timeout, or to end at once."""
            end = time.monotonic() + seconds
            while not (ends and all(face.done() for face in ends)):
                if self._at_once or time.monotonic() >= end:
                    return False
                await asyncio.sleep(TICK)
            return True

        await wait(self.settings.drain_delay_s)
        self._http.should_exit = True
        ends.append(http)
        if self._grpc is not None:
            ends.append(asyncio.create_task(self._grpc.stop()))
        if not await wait(self.settings.drain_timeout_s):
            running = self.state.models.started
            self.lost = {key: number for key in running if (number := running[key].in_flight)}
            if self.lost:
                _LOG.warning("requests are lost: draining took too long", extra={"lost": self.lost})
            self.state.models.close_all()
            await wait(_LAST_ERRORS)
        self._http.force_exit = True
        if self._grpc is not None:
            ends.append(asyncio.create_task(self._grpc.stop(at_once=True)))
        await asyncio.wait(ends, timeout=1.0)
        http.cancel()

    def _catch_signals(self) -> None:
        """Handle signals; repeated while models start, since Ray installs a handler of its own."""

        def interrupt(which: signal.Signals) -> None:
            self._signal = which
            self.stop()

        loop = asyncio.get_running_loop()
        with contextlib.suppress(*_NOT_MAIN_THREAD):
            for each in _SIGNALS:
                loop.add_signal_handler(each, interrupt, each)


def make_server(
    model: Model | Servable,
    code: AbstractCode | None = None,
    shape: Sequence[int] | None = None,
    *,
    name: str = "model",
    calibration: np.ndarray | Callable[[], np.ndarray] | None = None,
    predictor: Predictor | None = None,
    settings: ModelSettings | None = None,
    server_settings: ServerSettings | None = None,
) -> Server:
    """Return a server of one model, which does not listen yet.

    `run` serves until SIGTERM; as a context manager it serves from a thread:

        >>> import json
        >>> import urllib.request
        >>> import jax.numpy as jnp
        >>> from nercc_jax import NeRCC
        >>> from nercc_jax.serving import ServerSettings, make_server
        >>> free_port = ServerSettings(http_port=0, grpc_port=None)
        >>> code = NeRCC(2, 4, points="interleaved")
        >>> with make_server(jnp.tanh, code, (3,), server_settings=free_port) as server:
        ...     x = {"name": "input", "datatype": "FP32", "shape": [1, 3], "data": [0.0, 0.5, 1.0]}
        ...     response = urllib.request.urlopen(
        ...         f"http://127.0.0.1:{server.http_port}/v2/models/model/infer",
        ...         json.dumps({"inputs": [x]}).encode(),
        ...     )
        ...     print([round(y, 2) for y in json.load(response)["outputs"][0]["data"]])
        [0.0, 0.46, 0.76]

    Args:
        model: a callable on a batch, or the result of `make_servable`.
        code: the code of its queries (default: NeRCC with K and N from `settings`, or none if
            inputs or outputs cannot be coded).
        shape: the shape of one query without the batch axis; ignored for a `Servable`.
        name: the name that clients use; ignored for a `Servable`.
        calibration: unlabelled inputs, (points, *shape), or a function that returns them, from
            which the error of decoded answers is estimated (default: from the traffic). Ignored for
            a `Servable`.
        predictor: a surrogate that answers stragglers' queries (default: none).
        settings: the model's settings, such as workers and batching.
        server_settings: the server's settings, such as ports and limits.

    Raises:
        ValueError: if a model has no shape, or cannot be served (`make_servable`).
    """
    if not isinstance(model, Servable):
        if shape is None:
            raise ValueError("give the shape of one query, without the batch axis")
        model = make_servable(name, model, shape, calibration=calibration)
    settings = settings or ModelSettings()
    if code is None and model.uncodable is None:
        code = NeRCC(settings.num_data, settings.num_workers, points="interleaved", lambda_dec=0.0)
    code = code or Uncoded(1)
    if "num_workers" not in settings.model_fields_set:
        settings = ModelSettings(num_workers=code.num_workers).over(settings)
    registry = CollectorRegistry()
    start = functools.partial(
        ServedModel, model, code, settings, Metrics(registry), predictor=predictor
    )
    return Server({model.name: start}, server_settings, registry)
