"""The server's life: it listens by HTTP and gRPC, starts its models, and drains at a signal.

`serve` and `make_server` do from Python what `nercc serve` does.
"""

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
from ...pools.garbage import collect_all, short_collections
from .._metrics import Metrics
from .._served_model import ServedModel
from .._settings import ModelSettings, ServerSettings
from .._tracing import Telemetry, telemetry_from_environment
from ..adapt._predictor import Predictor
from ..protocol._errors import InvalidInput, ModelNotFound, ServerNotReady
from ..protocol._servable import Servable, make_servable, name_and_version
from ._bodies import BodyLimits
from ._grpc import GrpcServer
from ._http import InferenceEndpoint
from ._rest import make_app
from ._state import ModelControl, ServerState

try:  # it takes less time for each request; there is none for Windows
    from uvloop import new_event_loop
except ImportError:
    from asyncio import new_event_loop

_LOG = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_NOT_MAIN_THREAD = ValueError, RuntimeError  # raised where signals cannot be handled
# Seconds between looks at whether the server should end.
_TICK = 0.02
# Seconds in which the last errors may reach their clients, if draining takes too long.
_LAST_ERRORS = 3.0
# Seconds after draining at which nothing is waited for any more, whatever models do.
_LAST_WAIT = 4.5


class Server:
    """A server of some models, by REST and gRPC.

    `run` it, `await serve()` in a loop of your own, or use it as a context manager, which serves
    from a thread and enters once all models are ready. See `make_server`.

    Attributes:
        settings: the server's settings.
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
        telemetry: Telemetry | None = None,
    ):
        """Create a server that does not listen yet.

        By each model's key (`Servable.key`), a function starts it, which may take minutes.
        Telemetry makes spans of requests, and is closed at the end; by default it is as
        OpenTelemetry's variables say.

        Raises:
            ImportError: where they ask for packages that are missing.
            ValueError: for files of tokens or TLS that are missing.
        """
        self.settings, self.starts = settings or ServerSettings(), dict(starts)
        self._telemetry = telemetry or telemetry_from_environment()
        self.state = ServerState({}, self.settings, list(starts), self._telemetry)
        self._tls_pair = self.settings.tls_pair()
        if self.settings.model_control == "explicit":
            self.state.control = _ExplicitControl(self)
        self._open: dict[str, ServedModel] = {}  # not closed yet
        self._closing: dict[str, threading.Thread] = {}
        registry = registry or CollectorRegistry()
        with contextlib.suppress(ValueError):  # it is there already, if a server had the registry
            ProcessCollector(registry=registry)
        # In front of FastAPI's own layers, too. Ray Serve needs the application as FastAPI has it:
        # it looks at its routes, and adds handlers of its own errors.
        app = InferenceEndpoint(make_app(self.state, registry), self.state)
        app = BodyLimits(app, self.settings)
        self.http_port = self.grpc_port = 0
        drain = self.settings.drain_timeout_s
        self._http = uvicorn.Server(
            uvicorn.Config(
                app,
                host=self.settings.host,
                port=self.settings.http_port,
                http="httptools",
                ssl_certfile=self.settings.tls_certificate,
                ssl_keyfile=self.settings.tls_key,  # pyright: ignore[reportArgumentType]
                ws="none",
                log_config=None,
                access_log=False,
                proxy_headers=False,  # nothing asks for whom a proxy speaks
                lifespan="off",
                limit_concurrency=self.settings.max_connections,
                timeout_keep_alive=65,
                # Ours ends first, see `_drain`.
                timeout_graceful_shutdown=int(drain + 2 * _LAST_ERRORS) + 1,
            )
        )
        # Uvicorn would end at a signal, before the server can say that it drains.
        self._http.capture_signals = contextlib.nullcontext  # pyright: ignore[reportAttributeAccessIssue]
        self.ends_by = math.inf
        self.lost: dict[str, int] = {}
        self._grpc: GrpcServer | None = None
        self._at_once = False
        self._signal: signal.Signals | None = None
        self._started = False
        self._collections = contextlib.ExitStack()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain.

        Raises:
            SystemExit: with a shell's code, where a signal came before all models had started. A
                thread may still be starting one.
            Exception: as `serve`.
        """
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(self.serve())
        if self._signal is not None and not self._started:
            raise SystemExit(128 + self._signal)

    async def serve(self) -> None:
        """Listen, start the models, serve until `stop` or a signal, drain, and close the models.

        Signals are handled if this is the main thread's loop. A model that does not close in time
        is left behind, with its threads.

        Raises:
            OSError: where a port is taken.
            Exception: as starting a model does.
        """
        with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has none
            import resource  # each connection is a file

            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        http = asyncio.create_task(self._serve_http())
        try:
            self._catch_signals()
            try:
                while not self._http.started and not http.done():
                    await asyncio.sleep(0.01)
                if not http.done():
                    await self._answer(http)
            finally:
                with contextlib.suppress(*_NOT_MAIN_THREAD):
                    for each in _SIGNALS:
                        asyncio.get_running_loop().remove_signal_handler(each)
            with contextlib.suppress(asyncio.CancelledError):  # it did not end in time
                await http
        finally:
            ends = self._close_models()
            if self._telemetry is not None:
                ends["telemetry"] = _in_background(self._telemetry.close)
            self.ends_by = min(self.ends_by, time.monotonic() + _LAST_WAIT)
            while any(thread.is_alive() for thread in ends.values()):
                if time.monotonic() > self.ends_by:
                    left = [name for name, thread in ends.items() if thread.is_alive()]
                    _LOG.warning("left behind: it does not close", extra={"left": left})
                    break
                await asyncio.sleep(_TICK)

    def stop(self) -> None:
        """Drain: answer what was accepted, and nothing new. The second time, end at once."""
        self._at_once = self.state.draining or not self.state.models
        self.state.draining = True
        drain = self.settings.drain_delay_s + self.settings.drain_timeout_s
        last = time.monotonic() + _LAST_WAIT
        self.ends_by = min(self.ends_by, last if self._at_once else last + drain)
        _LOG.info("ending at once" if self._at_once else "draining")

    def __enter__(self) -> "Server":
        """Serve from a thread, and wait until all models are ready.

        Raises:
            Exception: as `serve`.
        """

        def run() -> None:
            try:
                self.run()
            except BaseException as error:
                self._failure = error

        self._thread = threading.Thread(target=run, name="nercc-server", daemon=True)
        self._thread.start()
        while self._thread.is_alive() and not self._started:
            time.sleep(_TICK)
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, *_: object) -> None:
        assert self._thread is not None
        self.stop()
        self._thread.join()

    async def _answer(self, http: asyncio.Task) -> None:
        try:
            await self._listen()
            await self._start_models()
            while not self.state.draining and not http.done():
                # Something will end this process soon.
                ends_at = min((each.ends_at for each in self._open.values()), default=math.inf)
                if ends_at - time.monotonic() < self.settings.drain_timeout_s + 2 * _LAST_ERRORS:
                    self.stop()
                await asyncio.sleep(_TICK)
        except BaseException:
            self._at_once = True
            raise
        finally:
            with self._collections:
                await self._drain(http)

    async def _listen(self) -> None:
        """Listen by gRPC; uvicorn listens already."""
        self.http_port = self._http.servers[0].sockets[0].getsockname()[1]
        if self.settings.grpc_port is not None:
            made = GrpcServer(self.state)
            server = made.server
            address = f"{self.settings.host}:{self.settings.grpc_port}"
            try:
                if self._tls_pair is None:
                    self.grpc_port = server.add_insecure_port(address)
                else:
                    credentials = grpc.ssl_server_credentials([self._tls_pair])
                    self.grpc_port = server.add_secure_port(address, credentials)
            except RuntimeError as error:
                raise self.settings.cannot_listen(self.settings.grpc_port) from error
            await server.start()
            self._grpc = made
        _LOG.info("listening", extra=self._address())

    def _address(self) -> dict[str, Any]:
        return {
            "host": self.settings.host,
            "http_port": self.http_port,
            "grpc_port": self.grpc_port if self._grpc else None,
        }

    async def _start_models(self) -> None:
        """Start the models in a thread; meanwhile clients are told to come again."""
        begin = time.monotonic()
        failures: list[BaseException] = []

        def start_each() -> None:
            try:
                for name in self.starts:
                    if self.state.draining:
                        return
                    self._start(name)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=start_each, name="nercc-start", daemon=True)
        thread.start()
        while thread.is_alive() and not self.state.draining:
            self._catch_signals()
            await asyncio.sleep(_TICK)
        self._catch_signals()
        if failures:
            raise failures[0]
        if len(self.state.models) < len(self.starts):  # it drains
            return
        self._started = True
        self._collections.enter_context(short_collections())
        gc.enable()  # `nercc serve` starts without
        seconds = round(time.monotonic() - begin, 3)
        models = list(self.state.models)
        _LOG.info("ready", extra={**self._address(), "models": models, "seconds": seconds})

    def _start(self, name: str) -> None:
        self._open[name] = self.state.models[name] = self.starts[name]()
        if self.state.draining:  # the others may have been closed by now
            self._close(name)

    async def _drain(self, http: asyncio.Task) -> None:
        """Be not ready, then accept nothing new, and fail what takes too long."""
        await self._wait(lambda: False, self.settings.drain_delay_s)
        self._http.should_exit = True
        ends = [http]
        if self._grpc is not None:
            ends.append(asyncio.create_task(self._grpc.stop()))

        def ended() -> bool:
            return all(end.done() for end in ends)

        await self._wait(ended, self.settings.drain_timeout_s)
        if not ended():
            found = {name: model.in_flight for name, model in self._open.items()}
            self.lost = {name: number for name, number in found.items() if number}
            if self.lost:
                _LOG.warning("requests are lost: draining took too long", extra={"lost": self.lost})
            self._close_models()
            await self._wait(ended, _LAST_ERRORS)
        self._http.force_exit = True
        if self._grpc is not None:
            ends.append(asyncio.create_task(self._grpc.stop(at_once=True)))
        await asyncio.wait(ends, timeout=1.0)
        http.cancel()

    async def _wait(self, happened: Callable[[], bool], seconds: float) -> None:
        """Wait until it happened, but no longer, and not if the server should end at once."""
        end = time.monotonic() + seconds
        while not happened() and not self._at_once and time.monotonic() < end:
            await asyncio.sleep(_TICK)

    def _close_models(self) -> dict[str, threading.Thread]:
        """Begin to close all models, and return the threads that do so.

        A model that hangs may never be closed, so that nobody may have to wait for them.
        """
        for name in list(self._open):
            self._closing[name] = _in_background(functools.partial(self._close, name))
        return dict(self._closing)

    def _close(self, name: str, drain: float = 0.0) -> None:
        model = self._open.pop(name, None)
        if model is not None:
            model.close(drain)
            _LOG.info("model is closed", extra={"model": name})

    async def _serve_http(self) -> None:
        try:
            await self._http.serve()
        except SystemExit:  # uvicorn has logged why
            raise self.settings.cannot_listen(self.settings.http_port) from None

    def _catch_signals(self) -> None:
        """Handle signals. Repeated while models start: Ray would take SIGTERM for its own crash."""

        def interrupt(which: signal.Signals) -> None:
            self._signal = which
            self.stop()

        loop = asyncio.get_running_loop()
        with contextlib.suppress(*_NOT_MAIN_THREAD):
            for each in _SIGNALS:
                loop.add_signal_handler(each, interrupt, each)


class _ExplicitControl(ModelControl):
    """Loads and unloads the models that a server was started with, for the event loop's thread."""

    def __init__(self, server: Server):
        self._server, self._state = server, server.state
        self.known = list(server.starts)
        self._turn = asyncio.Lock()  # one at a time

    async def load(self, name: str) -> None:
        # To its end, although the client may go away.
        await asyncio.shield(asyncio.ensure_future(self._load(self._keys(name))))

    async def unload(self, name: str) -> None:
        await asyncio.shield(asyncio.ensure_future(self._unload(self._keys(name))))

    async def _load(self, keys: Sequence[str]) -> None:
        server, state = self._server, self._state
        failures: list[Exception] = []

        def start(key: str) -> None:
            try:
                server._start(key)
            except Exception as error:
                failures.append(error)

        async with self._turn:
            for key in keys:
                if key in state.names:
                    continue
                self.loading |= {key}
                state.names.append(key)
                await _ended(_in_background(functools.partial(start, key)))
                self.loading -= {key}
                if failures:
                    state.names.remove(key)
                    _LOG.error("not loaded", exc_info=failures[0], extra={"model": key})
                    own = isinstance(failures[0], ValueError)  # the server's own words
                    why = failures[0] if own else "see the server's log"
                    raise InvalidInput(f"{key} does not load: {why}")
                gc.freeze()  # as when the server starts
                _LOG.info("model is loaded", extra={"model": key})

    async def _unload(self, keys: Sequence[str]) -> None:
        server, state = self._server, self._state
        async with self._turn:
            for key in keys:
                if key in state.models:
                    state.names.remove(key)
                    del state.models[key]
                    close = functools.partial(server._close, key, server.settings.drain_timeout_s)
                    server._closing[key] = _in_background(close)
                    await _ended(server._closing.pop(key))
            await _ended(_in_background(collect_all))

    def _keys(self, name: str) -> list[str]:
        """Return the keys of a model's versions. Raises ModelNotFound, and ServerNotReady."""
        keys = [key for key in self.known if name_and_version(key)[0] == name]
        if not keys:
            raise ModelNotFound(name)
        if self._state.phase == "draining" or not self._server._started:
            raise ServerNotReady(f"It is {self._state.phase}.")
        return keys


async def _ended(thread: threading.Thread) -> None:
    while thread.is_alive():
        await asyncio.sleep(_TICK)


def _in_background(work: Callable[[], Any]) -> threading.Thread:
    """Begin work in a thread that a process does not wait for when it ends."""
    thread = threading.Thread(target=work, name="nercc-closing", daemon=True)
    thread.start()
    return thread


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

    `serve` runs it; as a context manager it serves from a thread:

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
        code: the code of its queries; by default NeRCC with K and N from `settings`, or none where
            inputs or outputs cannot be coded.
        shape: the shape of one query without the batch axis; not for a `Servable`.
        name: the name that clients use; not for a `Servable`.
        calibration: unlabelled inputs, (points, *shape), or a function that returns them, from
            which the error of decoded answers is estimated; by default from the traffic.
        predictor: a surrogate that answers stragglers' queries.
        settings: the model's settings, such as workers and batching.
        server_settings: the server's settings, such as ports and limits.

    Raises:
        ValueError: for a model without a shape, or that cannot be served (`make_servable`).
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
    return Server({model.key: start}, server_settings, registry)


def serve(
    model: Model | Servable,
    code: AbstractCode | None = None,
    shape: Sequence[int] | None = None,
    **options: Any,
) -> None:
    """Serve a model behind a code until SIGTERM or SIGINT, as `nercc serve` does.

    Arguments are those of `make_server`.

    Raises:
        OSError: where a port is taken.
        ValueError: as `make_server`.
        RuntimeError: where the workers do not start.
    """
    make_server(model, code, shape, **options).run()
