"""The state of the server: its models and its load, and the answers for both transports.

`Models` starts and closes the models, and reports their health.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import gc
import hmac
import importlib.metadata
import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from starlette.requests import ClientDisconnect

from .._served_model import ServedModel
from .._tracing import RequestSpans, describe_reply
from ..core._request import DeadlineExceeded, InferenceFailed
from ..protocol._messages import (
    KINDS,
    InferenceRequest,
    InvalidInput,
    ModelNotFound,
    Overloaded,
    Response,
    ServerNotReady,
    Unauthenticated,
    check_parameters,
    question_of,
    response_of,
)
from ..protocol.servable import ADDED
from ..settings import ServerSettings

_LOG = logging.getLogger(__name__)
# The polling interval, in seconds.
TICK = 0.02


class Models:
    """The models of a server, by name, for the event loop's thread.

    Attributes:
        starts: by name, a function that starts the model, which may take minutes.
        started: the models that have started, by name.
        names: the names of the models that have started or will start.
        complete: whether all models have started, when the server started.
        draining: whether the server accepts no new requests any more.
    """

    def __init__(self, settings: ServerSettings, starts: Mapping[str, Callable[[], ServedModel]]):
        self.starts, self.names = starts, [*starts]
        self.started: dict[str, ServedModel] = {}
        self.complete, self.draining = not starts, False
        self._settings = settings
        self._closing: dict[str, asyncio.Future[Any]] = {}
        self._turn = asyncio.Lock()  # one is loaded or unloaded at a time

    # Health.

    @property
    def phase(self) -> Literal["starting", "serving", "draining"]:
        if self.draining:
            return "draining"
        return "serving" if self.complete else "starting"

    def check_live(self) -> None:
        """Raise ServerNotReady if a model is not live, so that only a restart would help."""
        for key, model in list(self.started.items()):
            if not (health := model.health()).live:
                raise ServerNotReady(f"{key}: {health.trouble}")

    @property
    def ready(self) -> bool:
        healthy = (model.health().ready for model in list(self.started.values()))
        return self.phase == "serving" and all(healthy)

    def trouble(self, name: str, version: str = "") -> str | None:
        """Return why a model would not answer now; None if it would. Raises ModelNotFound."""
        self._check(name, version)
        if self.draining:
            return "It is draining."
        if name not in self.started:
            return "It is being started."
        health = self.started[name].health()
        return None if health.ready else health.trouble or "It is not ready."

    @property
    def ends_at(self) -> float:
        """The monotonic time at which Ray will end this process; infinite if it will not."""
        return min((model.pool.ends_at for model in self.started.values()), default=math.inf)

    # Names.

    def _check(self, name: str, version: str) -> None:
        """Raise ModelNotFound if there is no such model or version, started or to be started."""
        if name not in self.names:
            raise ModelNotFound(name)
        if version and name in self.started and version != self.started[name].servable.version:
            raise ModelNotFound(f"{name}, version {version}")

    def find(self, name: str, version: str = "") -> ServedModel:
        """Return a model. Raises ModelNotFound, and ServerNotReady while it is started."""
        self._check(name, version)
        if name not in self.started:
            raise ServerNotReady(f"{name} is being started: come again later.")
        return self.started[name]

    def index(self, ready: bool = False) -> list[dict[str, str]]:
        """Return all models, or only `ready` ones, with their states, as in Triton's extension."""
        index = []
        for name in self.starts:
            state, why = "READY", self.trouble(name) if name in self.names else "unloaded"
            version = self.started[name].servable.version if name in self.started else ""
            if why is not None:
                starting = name in self.names and not version and not self.draining
                state = "LOADING" if starting else "UNAVAILABLE"
            if state == "READY" or not ready:
                entry = {"name": name, "version": version, "state": state, "reason": why or ""}
                index.append(entry)
        return index

    # Starts and ends.

    def _start(self, key: str) -> None:
        self.started[key] = self.starts[key]()
        if self.draining:  # `close_all` may have run before
            self._close(key, self.started[key])

    def _close(self, key: str, model: ServedModel, drain: float = 0.0) -> None:
        model.close(drain)
        _LOG.info("model is closed", extra={"model": key})

    async def start_all(self, meanwhile: Callable[[], None]) -> None:
        """Start the models one by one, until all have started or the server drains.

        `meanwhile` is called every few milliseconds. Raises as the start of a model does.
        """
        for key in self.starts:
            if self.draining:
                break
            start = in_background(functools.partial(self._start, key))
            while not start.done() and not self.draining:
                meanwhile()
                await asyncio.wait([start], timeout=TICK)
            if not start.done():
                break
            await start
        self.complete = len(self.started) == len(self.starts)

    def close_all(self) -> dict[str, asyncio.Future[Any]]:
        """Begin to close all models; return a future of each one's end.

        A model that hangs may never close, so a wait for these futures needs a timeout.
        """
        for key, model in list(self.started.items()):
            if key not in self._closing:
                self._closing[key] = in_background(functools.partial(self._close, key, model))
        return dict(self._closing)

    async def control(self, name: str, parameters: Mapping[str, Any], *, load: bool) -> None:
        """Load a model, or unload it after it has answered its accepted requests.

        This is completed even if the client disconnects. `parameters` are those of the request.

        Raises:
            NotImplementedError: if clients may not load or unload models.
            ModelNotFound: if the server was not started with this model.
            ServerNotReady: if the server starts or drains.
            InvalidInput: if the model does not start, or a parameter is unknown.
        """
        verb = "load" if load else "unload"
        # Triton's clients always send `unload_dependents`; models here have none.
        check_parameters(f"to {verb} a model", parameters, {"unload_dependents"})
        if self._settings.model_control != "explicit":
            raise NotImplementedError(
                f"clients may {verb} models only with --model-control explicit"
            )
        if name not in self.starts:
            raise ModelNotFound(name)
        if self.draining or not self.complete:
            raise ServerNotReady(f"It is {self.phase}.")

        async def to_its_end() -> None:
            async with self._turn:
                if load and name not in self.names:
                    self.names.append(name)
                    try:
                        await in_background(functools.partial(self._start, name))
                    except Exception as error:
                        self.names.remove(name)
                        _LOG.exception("not loaded", extra={"model": name})
                        own = isinstance(error, ValueError)  # the server's own message
                        why = error if own else "see the server's log"
                        raise InvalidInput(f"{name} does not load: {why}") from error
                    gc.freeze()  # as after the server's start
                elif not load and name in self.started:
                    self.names.remove(name)
                    drain = self._settings.drain_timeout_s
                    model = functools.partial(self._close, name, self.started.pop(name), drain)
                    self._closing[name] = in_background(model)
                    del model  # a reference to the model, which must be freed
                    await self._closing[name]
                    del self._closing[name]
                    gc.unfreeze()  # so that the model's frozen objects are freed
                    await in_background(gc.collect)
                    gc.freeze()

        await asyncio.shield(asyncio.ensure_future(to_its_end()))


def in_background(work: Callable[[], Any]) -> asyncio.Future[Any]:
    """Run work in a daemon thread, for which the process does not wait when it ends."""
    ended: concurrent.futures.Future[Any] = concurrent.futures.Future()
    ended.set_running_or_notify_cancel()  # so that a cancelled wait does not cancel it

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            ended.set_exception(error)
        else:
            ended.set_result(result)

    future = asyncio.wrap_future(ended)
    threading.Thread(target=run, name="nercc-background", daemon=True).start()
    return future


# Bytes of JSON, or of a message, that take a millisecond or more to read.
_LARGE = 2**16


class ServerState:
    """The models of a server, its admission limits, and the answers to requests.

    Attributes:
        max_connections: the most HTTP connections, idle ones included, and the most gRPC calls.
        models: the models.
        settings: the server's settings.
        spans: a provider of OpenTelemetry's SDK, if there is one.
        bytes_held: the bytes of all requests, from their first byte to their answer.
        says: by gRPC method name, a function of a model's name and version that returns the health
            or metadata, of the model or the server, as JSON values.
    """

    max_connections = 10_000

    def __init__(
        self,
        starts: Mapping[str, Callable[[], ServedModel]],
        settings: ServerSettings,
        spans: Any = None,
    ):
        """Create the state, in which no model has started."""
        self.models = models = Models(settings, starts)
        self.settings, self.spans = settings, spans
        self.bytes_held = 0
        self._tokens = settings.tokens()
        self._spans = RequestSpans(spans)
        self._reading = asyncio.Lock()
        self._since = time.monotonic()
        self.says: dict[str, Callable[[str, str], dict[str, Any]]] = {
            "ServerLive": lambda *_: {"live": models.check_live() is None},
            "ServerReady": lambda *_: {"ready": models.ready},
            "ServerMetadata": lambda *_: self.metadata(),
            "ModelReady": lambda name, version: {
                "name": name,
                "ready": (trouble := models.trouble(name, version)) is None,
                "reason": trouble,
            },
            "ModelMetadata": self._model_metadata,
        }

    # Admission.

    def check_token(self, authorization: bytes) -> None:
        """Raise Unauthenticated if a token is needed, and the Authorization header has none."""
        kind, _, token = authorization.strip().partition(b" ")
        known = [hmac.compare_digest(token.strip(), each) for each in self._tokens]
        if self._tokens and not (kind.lower() == b"bearer" and any(known)):
            raise Unauthenticated("a token is needed: Authorization: Bearer TOKEN")

    @contextlib.contextmanager
    def hold(self) -> Iterator[Callable[[int], None]]:
        """Count one request's bytes until the end of the block.

        Yields:
            A function that adds a number of bytes; it raises `Overloaded` above the limit.
        """
        own, limit = 0, self.settings.max_bytes_in_flight

        def add(size: int) -> None:
            nonlocal own
            if self.bytes_held + size > limit:
                raise Overloaded(
                    f"the requests in hand have {self.bytes_held} bytes and {size} more came; at "
                    f"most {limit} are held: come again later"
                )
            own += size
            self.bytes_held += size

        try:
            yield add
        finally:
            self.bytes_held -= own

    @contextlib.contextmanager
    def watch(self, name: str, headers: Callable[[], Mapping[str, str]]) -> Iterator[Any]:
        """Trace the request of this block with a span, which is yielded; count refused requests."""
        span, outcome, why = self._spans.start(name, headers), "ok", None
        try:
            yield span
        except BaseException as error:  # a client that disconnects cancels its call
            gone = isinstance(error, ClientDisconnect | asyncio.CancelledError)
            kind = KINDS.get(type(error))  # pyright: ignore[reportArgumentType]
            outcome, why = "failed" if kind is None else kind.outcome, error
            outcome = "cancelled" if gone else outcome
            # Requests that do not reach a model's batcher are counted here.
            model = self.models.started.get(name)
            if outcome in ("invalid", "overloaded") and model is not None:
                model.meter.observe(f"request_{outcome}", 0.0)
            raise
        finally:
            if span is not None:
                self._spans.end(span, outcome, why)

    # Inference.

    async def answer(
        self,
        model: ServedModel,
        read: Callable[[], InferenceRequest],
        size: int,
        span: Any,
    ) -> Response:
        """Read a request with `read`, and answer it.

        Reading numbers from JSON or a message blocks the event loop. Of requests with a large
        `size`, in bytes of such numbers, one is read at a time, followed by a pause of three times
        as long for other work. This time counts towards the request's deadline.

        Raises:
            InvalidInput: if the request does not fit the model.
            TooLarge: if it has more queries than the queue holds.
            Exception: as `read` and `ServedModel.infer` do.
        """
        begin = time.monotonic()
        large = size > _LARGE
        async with self._reading if large else contextlib.nullcontext():
            start = time.monotonic()
            try:
                request = read()
                if span is not None:
                    request.id = request.id or uuid.uuid4().hex
                    describe_reply(span, request.id)
                most = model.settings.max_queue_size
                queries, options = question_of(request, model.servable, most)
            finally:
                if large:
                    await asyncio.sleep(3 * (time.monotonic() - start))
        if large:
            deadline, elapsed = options["deadline"], time.monotonic() - begin
            deadline = model.settings.deadline_s if deadline is None else deadline
            if elapsed >= deadline:
                model.meter.observe("request_deadline", 0.0)
                raise DeadlineExceeded(f"its {deadline:g} s had passed before it was read")
            options["deadline"] = deadline - elapsed
        try:
            reply = await model.infer(queries, **options)
        except ValueError as error:
            raise InvalidInput(str(error)) from error
        except InferenceFailed as error:
            request.id = request.id or uuid.uuid4().hex
            about = {"model": model.servable.name, "id": request.id, "why": str(error)}
            _LOG.warning("inference failed", extra=about)
            error.public += f": the server's log says why, by id {request.id}"
            raise
        if span is not None:
            describe_reply(span, request.id or "", reply)
        return response_of(reply, request, model.servable)

    # Metadata and status.

    def metadata(self) -> dict[str, Any]:
        version = importlib.metadata.version("nercc-jax")
        extensions = ["binary_tensor_data", "model_repository"]
        return {"name": "nercc_jax", "version": version, "extensions": extensions}

    def _model_metadata(self, name: str, version: str) -> dict[str, Any]:
        """Return a model's metadata. Raises as `Models.find` does."""
        model = self.models.find(name, version)
        why = model.uncoded
        return {
            "name": name,
            "versions": [model.servable.version],
            "platform": "nercc_jax",
            "inputs": [each.about for each in model.servable.inputs.parts],
            "outputs": [each.about for each in (*model.servable.outputs.parts, *ADDED)],
            "parameters": {
                "nercc_coded": why is None,
                **({} if why is None else {"nercc_uncoded": why}),
            },
        }

    def status(self) -> dict[str, Any]:
        about = self.metadata()
        started = self.models.started
        return {
            "server": {
                "name": about["name"],
                "version": about["version"],
                "state": self.models.phase,
                "uptime_s": time.monotonic() - self._since,
            },
            "models": [started[key].status() for key in self.models.names if key in started],
        }
