"""The server's life: it listens with both faces, drains at a signal, and closes its models.

kserve's messages, health and metadata endpoints and gRPC service; an application of our own around
them, because kserve's own server maps an overload to 500, unloads models before it drains, and
always listens on all interfaces.
"""

import asyncio
import contextlib
import gc
import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping

import grpc
import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.process_collector import ProcessCollector

from ._grpc import Errors, Service
from ._kserve import add_service
from ._plane import Plane
from ._rest import make_app
from ._served import ServedModel
from ._settings import ServerSettings

_LOG = logging.getLogger(__name__)

# Seconds between looks at whether the server shall end.
_TICK = 0.02
# How long the last errors have to reach their clients, once draining has taken too long.
_LAST_WORDS = 3.0


class Server:
    """Some models behind both faces. `run` it, or `await serve()` in a loop of your own."""

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        settings: ServerSettings,
        registry: CollectorRegistry,
    ):
        self.settings = settings
        self.plane = Plane(models, settings.access_log)
        self._open = dict(models)  # not yet closed
        with contextlib.suppress(ValueError):  # already there, in a server that was made anew
            ProcessCollector(registry=registry)
        self.app = make_app(self.plane, settings, registry)
        self.http_port = self.grpc_port = 0  # known once it listens
        self._http = uvicorn.Server(
            uvicorn.Config(
                self.app,
                host=settings.host,
                port=settings.http_port,
                log_config=None,
                access_log=False,
                ws="none",
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

    def run(self) -> None:
        """Serves until SIGTERM or SIGINT, then drains."""
        asyncio.run(self.serve())

    async def serve(self) -> None:
        """Serves until `stop`, or a signal if this is the main thread's loop; closes the models.

        Raises: OSError where a port is taken.
        """
        try:
            http = asyncio.create_task(self._serve_http())
            with self._catching_signals():
                while not self._http.started and not http.done():
                    await asyncio.sleep(0.01)
                if not http.done():
                    await self._listen()
                while not self.plane.draining and not http.done():
                    await asyncio.sleep(_TICK)
                if not http.done():
                    await self._drain(http)
            await http
        finally:
            await self._close_models()

    def stop(self) -> None:
        """Begins to drain: what has been accepted is answered, nothing new is. Twice: at once."""
        self._at_once = self.plane.draining
        self.plane.draining = True
        _LOG.info("ending at once" if self._at_once else "draining")

    async def _listen(self) -> None:
        self.http_port = self._http.servers[0].sockets[0].getsockname()[1]
        await self._start_grpc()
        gc.collect()
        gc.freeze()  # JAX leaves so many objects that collecting them stops all for 0.2 s
        _LOG.info(
            "listening",
            extra={
                "host": self.settings.host,
                "http_port": self.http_port,
                "grpc_port": self.grpc_port if self._grpc else None,
                "models": list(self.plane.models),
            },
        )

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
        while self._open:
            name, model = self._open.popitem()
            await asyncio.to_thread(model.close, 0.0)
            _LOG.info("model is closed", extra={"model": name})

    async def _serve_http(self) -> None:
        try:
            await self._http.serve()
        except SystemExit:  # uvicorn has told the log why
            address = f"{self.settings.host}:{self.settings.http_port}"
            raise OSError(f"cannot listen on {address}: is the port taken?") from None

    async def _start_grpc(self) -> None:
        if self.settings.grpc_port is None:
            return
        limit = self.settings.max_body_bytes
        server = grpc.aio.server(
            interceptors=[Errors()],
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
            ],
        )
        add_service(Service(self.plane), server)
        address = f"{self.settings.host}:{self.settings.grpc_port}"
        try:
            self.grpc_port = server.add_insecure_port(address)
        except RuntimeError as error:
            self._http.should_exit = True
            raise OSError(f"cannot listen on {address}: is the port taken?") from error
        await server.start()
        self._grpc = server

    @contextlib.contextmanager
    def _catching_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        caught = []
        with contextlib.suppress(ValueError, RuntimeError):  # not the main thread
            for each in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(each, self.stop)
                caught.append(each)
        try:
            yield
        finally:
            for each in caught:
                loop.remove_signal_handler(each)
