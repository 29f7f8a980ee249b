"""The server's life: it listens with both faces, starts its models, drains at a signal.

kserve's messages, health and metadata endpoints and gRPC service; an application of our own around
them, because kserve's own server maps an overload to 500, unloads models before it drains, and
always listens on all interfaces.
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
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grpc
import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.process_collector import ProcessCollector

from ._grpc import make_server
from ._http import BoundedHttp
from ._inference import Inference
from ._plane import Plane
from ._rest import make_app
from ._served import ServedModel
from ._settings import ServerSettings
from ._telemetry import Telemetry, telemetry_by_environment

try:  # it takes less of each request, and comes with kserve but for Windows
    from uvloop import new_event_loop
except ImportError:
    from asyncio import new_event_loop

_LOG = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ELSEWHERE = ValueError, RuntimeError  # where signals are told of: not in the main thread
# Seconds between looks at whether the server shall end.
_TICK = 0.02
# How long the last errors have to reach their clients, once draining has taken too long.
_LAST_WORDS = 3.0


class Server:
    """Some models behind both faces. `run` it, or `await serve()` in a loop of your own."""

    def __init__(
        self,
        starts: Mapping[str, Callable[[], ServedModel]],
        settings: ServerSettings,
        registry: CollectorRegistry,
        telemetry: Telemetry | None = None,
    ):
        """`starts` has for each model's name what starts it, which may take minutes; `telemetry`
        traces requests, and is closed at the end: unless given, as OpenTelemetry's variables say.

        Raises: ImportError where they ask for packages that are not there.
        """
        self.settings, self.starts = settings, dict(starts)
        self._telemetry = telemetry or telemetry_by_environment()
        self.plane = Plane({}, settings, list(starts), self._telemetry)
        self._open: dict[str, ServedModel] = {}  # not yet closed
        with contextlib.suppress(ValueError):  # already there, in a server that was made anew
            ProcessCollector(registry=registry)
        # In front of FastAPI's own layers, too. Ray Serve needs the application as FastAPI has it:
        # it looks at its routes, and adds handlers of its own errors.
        app = Inference(make_app(self.plane, registry), self.plane)
        self.http_port = self.grpc_port = 0  # known once it listens
        self._http = uvicorn.Server(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.http_port,
                http=functools.partial(BoundedHttp, settings),  # pyright: ignore[reportArgumentType]
                ws="none",
                log_config=None,
                access_log=False,
                proxy_headers=False,  # nothing asks whom a proxy speaks for
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
        self._signal: signal.Signals | None = None
        self._started = False

    def run(self) -> None:
        """Serves until SIGTERM or SIGINT, then drains.

        Raises: what `serve` does; SystemExit, with a shell's code, where a signal came before all
        models had started. A thread may be starting one still.
        """
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(self.serve())
        if self._signal is not None and not self._started:
            raise SystemExit(128 + self._signal)

    async def serve(self) -> None:
        """Listens, starts the models, serves until `stop`, or a signal if this is the main thread's
        loop; then drains, and closes the models.

        Raises: OSError where a port is taken; what starting a model does.
        """
        http = asyncio.create_task(self._serve_http())
        try:
            with self._catching_signals():
                while not self._http.started and not http.done():
                    await asyncio.sleep(0.01)
                if not http.done():
                    await self._answer(http)
            await http
        finally:
            await self._close_models()
            if self._telemetry is not None:
                await asyncio.to_thread(self._telemetry.close)

    async def _answer(self, http: asyncio.Task) -> None:
        try:
            await self._listen()
            await self._start_models()
            while not self.plane.draining and not http.done():
                if self._must_end():
                    self.stop()
                await asyncio.sleep(_TICK)
        except BaseException:
            self._at_once = True
            raise
        finally:
            await self._drain(http)

    def _must_end(self) -> bool:
        """Whether something will end this process soon: it answers what it has before that."""
        ends_at = min((each.ends_at for each in self._open.values()), default=math.inf)
        return ends_at - time.monotonic() < self.settings.drain_timeout_s + 2 * _LAST_WORDS

    def stop(self) -> None:
        """Begins to drain: what has been accepted is answered, nothing new is. Twice: at once."""
        self._at_once = self.plane.draining or not self.plane.models
        self.plane.draining = True
        _LOG.info("ending at once" if self._at_once else "draining")

    async def _listen(self) -> None:
        """Uvicorn does already."""
        self.http_port = self._http.servers[0].sockets[0].getsockname()[1]
        if self.settings.grpc_port is not None:
            server = make_server(self.plane)
            address = f"{self.settings.host}:{self.settings.grpc_port}"
            try:
                self.grpc_port = server.add_insecure_port(address)
            except RuntimeError as error:
                raise self.settings.cannot_listen(self.settings.grpc_port) from error
            await server.start()
            self._grpc = server
        _LOG.info("listening", extra=self._address())

    def _address(self) -> dict[str, Any]:
        return {
            "host": self.settings.host,
            "http_port": self.http_port,
            "grpc_port": self.grpc_port if self._grpc else None,
        }

    async def _start_models(self) -> None:
        """By a thread of its own; meanwhile clients are told to come again."""
        begin = time.monotonic()
        failures: list[BaseException] = []
        thread = threading.Thread(
            target=self._start_each, args=(failures,), name="nercc-start", daemon=True
        )
        thread.start()
        while thread.is_alive() and not self.plane.draining:
            self._catch_signals()
            await asyncio.sleep(_TICK)
        self._catch_signals()
        if failures:
            raise failures[0]
        if len(self.plane.models) < len(self.starts):  # it drains
            return
        self._started = True
        gc.collect()
        gc.freeze()  # JAX leaves so many objects that collecting them stops all for 0.2 s
        gc.enable()  # `nercc serve` starts without
        seconds = round(time.monotonic() - begin, 3)
        models = list(self.plane.models)
        _LOG.info("ready", extra={**self._address(), "models": models, "seconds": seconds})

    def _start_each(self, failures: list[BaseException]) -> None:
        try:
            for name, start in self.starts.items():
                if self.plane.draining:
                    return
                self._open[name] = self.plane.models[name] = start()
                if self.plane.draining:  # the others may have been closed by now
                    self._close(name)
        except BaseException as error:
            failures.append(error)

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
        for name in list(self._open):
            await asyncio.to_thread(self._close, name)

    def _close(self, name: str) -> None:
        model = self._open.pop(name, None)
        if model is not None:
            model.close(0.0)
            _LOG.info("model is closed", extra={"model": name})

    async def _serve_http(self) -> None:
        try:
            await self._http.serve()
        except SystemExit:  # uvicorn has told the log why
            raise self.settings.cannot_listen(self.settings.http_port) from None

    @contextlib.contextmanager
    def _catching_signals(self) -> Iterator[None]:
        self._catch_signals()
        try:
            yield
        finally:
            loop = asyncio.get_running_loop()
            with contextlib.suppress(*_ELSEWHERE):
                for each in _SIGNALS:
                    loop.remove_signal_handler(each)

    def _catch_signals(self) -> None:
        """Anew while models start: Ray, when it does, takes SIGTERM for a crash of its own."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(*_ELSEWHERE):
            for each in _SIGNALS:
                loop.add_signal_handler(each, self._interrupt, each)

    def _interrupt(self, which: signal.Signals) -> None:
        self._signal = which
        self.stop()
