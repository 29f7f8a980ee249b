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

from .._metrics import ANSWERS, OUTCOMES, Measure
from .._policy import MAX_DEADLINE_S
from .._served_model import ServedModel
from .._tracing import RequestSpans, RequestTrace
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
        started: Mapping[str, ServedModel],
        settings: ServerSettings,
        starts: Mapping[str, Callable[[], ServedModel]] | None = None,
        spans: Any = None,
    ):
        """Create the state of models that have started, and of those that `starts` will start."""
        self.models = models = Models(settings, {} if starts is None else starts, started)
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
            "ModelConfig": self._configuration,
            "ModelStatistics": self._statistics,
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
    def watch(
        self, name: str, headers: Callable[[], Mapping[str, str]]
    ) -> Iterator[RequestTrace | None]:
        """Trace the request of this block, and count it if it is refused."""
        trace, outcome = self._spans.start(name, headers), "ok"
        try:
            yield trace
        except BaseException as error:  # a client that goes away cancels its call
            outcome = outcome_of(error)
            # What a model's batcher does not see is counted here.
            if outcome in ("invalid", "overloaded") and name in self.models.versions:
                model = self.models.started.get(self.models.key_of(name))
                if model is not None:  # it may still be starting
                    model.count(f"request_{outcome}")
            if trace is not None:
                trace.error = str(error) or type(error).__name__
            raise
        finally:
            if trace is not None:
                self._spans.end(trace, outcome)

    # Inference.

    async def answer(
        self,
        model: ServedModel,
        read: Callable[[], InferenceRequest],
        size: int,
        trace: RequestTrace | None,
        elapsed: float = 0.0,
    ) -> Response:
        """Read a request and answer it; some seconds of its deadline passed before it arrived.

        Nothing else happens while numbers in JSON or in a message are read. Of requests in which
        their `size` in bytes is large, one is read at a time; the others have three times as long
        after it.

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
                if trace is not None:
                    trace.id = request.id = request.id or uuid.uuid4().hex
                most = model.settings.max_queue_size
                queries, options = question_of(request, model.servable, most)
            finally:
                if large:
                    await asyncio.sleep(3 * (time.monotonic() - start))
        if large:
            elapsed += time.monotonic() - begin

        if elapsed > 0:
            deadline = options["deadline"]
            deadline = model.settings.deadline_s if deadline is None else deadline
            if elapsed >= deadline:
                model.count("request_deadline")
                raise DeadlineExceeded(
                    f"its {deadline:g} s had passed before it was read: it was under way for "
                    f"{elapsed:.3f} s, by the proxy's X-Request-Start and the time that reading "
                    "took"
                )
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
        if trace is not None:
            trace.reply = reply
        return response_of(reply, request, model.servable)

    # What the server says about itself.

    def metadata(self) -> dict[str, Any]:
        version = importlib.metadata.version("nercc-jax")
        triton = ("model_configuration", "model_repository", "schedule_policy", "statistics")
        extensions = ["binary_tensor_data", *triton]
        return {"name": "nercc_jax", "version": version, "extensions": extensions}

    def _model_metadata(self, name: str, version: str) -> dict[str, Any]:
        """Return a model's metadata. Raises as `Models.find` does."""
        model = self.models.find(name, version)
        coded: dict[str, Any] = {"nercc_coded": model.uncoded is None}
        if model.uncoded is not None:
            coded["nercc_uncoded"] = model.uncoded
        return {
            "name": name,
            "versions": self.models.versions[name],
            "platform": "nercc_jax",
            "inputs": [each.about for each in model.servable.inputs.parts],
            "outputs": [each.about for each in (*model.servable.outputs.parts, *ADDED)],
            "parameters": {
                "nercc_max_queries": model.settings.max_queue_size,
                "nercc_deadline_ms": 1e3 * model.settings.deadline_s,
                "nercc_max_deadline_ms": 1e3 * MAX_DEADLINE_S,
                "nercc_outputs": model.outputs()["read_as"],
                **coded,
            },
        }

    def _configuration(self, name: str, version: str) -> dict[str, Any]:
        """Return a model's configuration by Triton's extension. Raises as `Models.find` does.

        What has no counterpart here is left out. `max_batch_size` is that of a request, as
        `nercc_max_queries` in the metadata; `preferred_batch_size` are the batches that workers
        receive.
        """
        about, model = self._model_metadata(name, version), self.models.find(name, version)
        policy = model.settings.policy()
        inputs, outputs = (
            [
                {
                    "name": each["name"],
                    "data_type": f"TYPE_{each['datatype']}",
                    "dims": each["shape"][1:],
                }
                for each in about[tensors]
            ]
            for tensors in ("inputs", "outputs")
        )
        return {
            "name": name,
            "platform": "nercc_jax",
            "backend": "nercc_jax",
            "max_batch_size": policy.max_queue_size,
            "input": inputs,
            "output": outputs,
            "dynamic_batching": {
                "preferred_batch_size": list(policy.batch_sizes),
                "max_queue_delay_microseconds": round(1e6 * policy.batch_wait_timeout_s),
                "priority_levels": 2,
                "default_priority_level": 2,
            },
        }

    def _statistics(self, name: str, version: str) -> dict[str, Any]:
        """Return the statistics of one model, or of all started ones, by Triton's extension.

        They say how often something happened, and how long it took in total. `success` are requests
        that were answered, `fail` all others (the time of those refused at once is not measured).
        `queue` is from arrival until the first query is sent, `compute_infer` from then until the
        answer. Encoding and decoding are within that, and belong to groups: so `compute_input` and
        `compute_output`, which count as often (`perf_analyzer` insists), have no time.
        `execution_count` are workers' calls that answered in time, coded ones and copies included.
        There is no cache, and nothing by batch size. Raises as `Models.find` does.
        """
        found = []
        for model in [self.models.find(name, version)] if name else [*self.models.started.values()]:
            meter = model.meter
            failed = [meter.read(f"request_{each}") for each in OUTCOMES[1:]]
            computed = meter.read("compute_seconds")
            durations = {
                "success": meter.read("request_ok"),
                "fail": Measure(sum(e.count for e in failed), sum(e.total for e in failed)),
                "queue": meter.read("queue_seconds"),
                "compute_input": Measure(computed.count),
                "compute_infer": computed,
                "compute_output": Measure(computed.count),
                "cache_hit": Measure(),
                "cache_miss": Measure(),
            }
            queries = sum(meter.read(f"query_{each}").total for each in ANSWERS)
            found.append(
                {
                    "name": model.servable.name,
                    "version": model.servable.version,
                    "last_inference": round(1e3 * meter.last_answer),
                    "inference_count": int(queries),
                    "execution_count": model.pool.report().answered,
                    "inference_stats": {
                        what: {"count": each.count, "ns": round(1e9 * each.total)}
                        for what, each in durations.items()
                    },
                    "batch_stats": [],
                }
            )
        return {"model_stats": found}

    async def weights(self) -> dict[str, dict[int, bool]]:
        """Return whether each worker that answers has the weights that it was given, by model."""
        pools = {name: model.pool for name, model in self.models.started.items()}
        longest = 10.0  # seconds in which a worker must answer what its weights are
        checks = (asyncio.to_thread(pool.check_weights, longest) for pool in pools.values())
        return dict(zip(pools, await asyncio.gather(*checks), strict=True))

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
