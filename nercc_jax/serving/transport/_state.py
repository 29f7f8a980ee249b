"""The state of the server: its models and its load, and the answers that both faces give."""

import asyncio
import contextlib
import hmac
import importlib.metadata
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .._served_model import ServedModel
from .._tracing import RequestSpans, describe_reply
from ..core._request import DeadlineExceeded, InferenceFailed
from ..protocol._messages import (
    InferenceRequest,
    InvalidInput,
    Overloaded,
    Response,
    Unauthenticated,
    outcome_of,
    question_of,
    response_of,
)
from ..protocol._servable import ADDED
from ..settings import ServerSettings
from ._models import Models

_LOG = logging.getLogger(__name__)
# Bytes of JSON, or of a message, that take a millisecond or more to read.
_LARGE = 2**16


class ServerState:
    """The models of a server, and the answers to what clients ask.

    Attributes:
        max_connections: HTTP connections, silent ones included, and gRPC calls; more are refused.
        models: the models.
        settings: the server's settings.
        spans: a provider of OpenTelemetry's SDK, if there is one.
        bytes_held: the bytes of all requests, from their first byte to their answer.
        says: what the server says, as JSON has it, of a model's name and version, or of all, by the
            names of gRPC's methods.
    """

    max_connections = 10_000

    def __init__(
        self,
        starts: Mapping[str, Callable[[], ServedModel]],
        settings: ServerSettings,
        spans: Any = None,
    ):
        """Create the state of models that have not started."""
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
        """Raise Unauthenticated unless a header or gRPC's metadata have a token that is needed."""
        kind, _, token = authorization.strip().partition(b" ")
        known = [hmac.compare_digest(token.strip(), each) for each in self._tokens]
        if self._tokens and not (kind.lower() == b"bearer" and any(known)):
            raise Unauthenticated

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
        """Trace the request of this block by the span it gets, and count it if it is refused."""
        span, outcome, why = self._spans.start(name, headers), "ok", None
        try:
            yield span
        except BaseException as error:  # a client that goes away cancels its call
            outcome, why = outcome_of(error), error
            # What a model's batcher does not see is counted here.
            if outcome in ("invalid", "overloaded") and name in self.models.versions:
                model = self.models.started.get(self.models.key_of(name))
                if model is not None:  # it may still be starting
                    model.count(f"request_{outcome}")
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
        """Read a request and answer it.

        Nothing else happens while numbers in JSON or in a message are read. Of requests in which
        their `size` in bytes is large, one is read at a time; the others have three times as long
        after it. The time that it took is a part of the request's deadline.

        Raises:
            InvalidInput: where it does not fit the model.
            TooLarge: where it has more queries than the queue holds.
            Exception: as `read` and `ServedModel.infer`.
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
                model.count("request_deadline")
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

    # What the server says about itself.

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
            "versions": self.models.versions[name],
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
