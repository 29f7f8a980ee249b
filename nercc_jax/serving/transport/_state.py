"""The state of the server: its models, and all that both transports ask of it."""

import asyncio
import contextlib
import hmac
import importlib.metadata
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from .._meter import ANSWERS, OUTCOMES
from .._policy import MAX_DEADLINE_S
from .._served_model import ServedModel
from .._settings import ServerSettings
from .._tracing import RequestLog, RequestTrace
from ..core._health import Health
from ..core._request import DeadlineExceeded, InferenceFailed, Reply
from ..protocol._errors import (
    InvalidInput,
    ModelNotFound,
    ServerNotReady,
    Unauthenticated,
    outcome_of,
)
from ..protocol._messages import (
    InferRequest,
    answer_options,
    check_outputs,
    output_types,
    queries_of,
    tensor_types,
)
from ..protocol._servable import model_key, name_and_version
from ._bodies import RequestMemory

_LOG = logging.getLogger(__name__)


class ModelControl:
    """Loads and unloads the models of a server; this one refuses to.

    `known` are the keys of all models that can be loaded, and `loading` of those that are being
    loaded, for which the server does not wait.
    """

    known: Sequence[str] = ()
    loading: frozenset[str] = frozenset()

    async def load(self, name: str) -> None:
        """Start all versions of a model that are not started. Raises as `unload`."""
        raise NotImplementedError("clients may load models only with --model-control explicit")

    async def unload(self, name: str) -> None:
        """Answer what was accepted by a model, and end it.

        Raises NotImplementedError where clients may not do so, and ModelNotFound.
        """
        raise NotImplementedError("clients may unload models only with --model-control explicit")


class ServerState:
    """The models of a server, and the answers to what clients ask.

    `models` are those that are started, by key (`Servable.key`), and `names` the keys of all that
    are started or will be. Without `tokens` clients need none.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        settings: ServerSettings,
        starting: Sequence[str] = (),
        spans: Any = None,
    ):
        """Create the state; `starting` are put into `models` once they answer. All are keys.

        Requests are `spans` by a provider of OpenTelemetry's SDK, if there is one.
        """
        self.models = dict(models)
        self.settings = settings
        self.names = [*models, *starting]
        self.control = ModelControl()
        self.memory = RequestMemory(settings.max_bytes_in_flight)
        self.tokens = settings.tokens()
        self._log = RequestLog(settings.request_log_rate, spans)
        self.draining = False
        self._started = time.monotonic()

    @property
    def phase(self) -> Literal["starting", "serving", "draining"]:
        if self.draining:
            return "draining"
        waits = any(
            key not in self.models and key not in self.control.loading for key in self.names
        )
        return "starting" if waits else "serving"

    def check_token(self, authorization: bytes) -> None:
        """Raise Unauthenticated unless a header or gRPC's metadata have a token that is needed."""
        kind, _, token = authorization.strip().partition(b" ")
        known = [hmac.compare_digest(token.strip(), each) for each in self.tokens]
        if self.tokens and not (kind.lower() == b"bearer" and any(known)):
            raise Unauthenticated

    # Health.

    def check_live(self) -> None:
        """Raise ServerNotReady where only a restart would help."""
        for name, health in self._health():
            if not health.live:
                raise ServerNotReady(f"{name}: {health.trouble}")

    def ready(self) -> bool:
        return self.phase == "serving" and all(health.ready for _, health in self._health())

    def trouble(self, name: str, version: str = "") -> str | None:
        """Return why a model would not answer now; None if it would. Raises ModelNotFound."""
        key = self.check(name, version)
        if self.draining:
            return "It is draining."
        if key not in self.models:
            return "It is being started."
        health = self.models[key].health()
        return None if health.ready else health.trouble or "It is not ready."

    def _health(self) -> Iterator[tuple[str, Health]]:
        return ((name, model.health()) for name, model in list(self.models.items()))

    # Models.

    @property
    def versions(self) -> dict[str, list[str]]:
        """The versions of each model that are started or will be, by name, the latest last."""
        found: dict[str, list[str]] = {}
        for key in self.names:
            name, version = name_and_version(key)
            found.setdefault(name, []).append(version)
        return {name: sorted(each, key=int) for name, each in found.items()}

    def check(self, name: str, version: str = "") -> str:
        """Return the key of a model's version, by default of the latest that is started.

        Raises ModelNotFound where there is no such model, nor will be.
        """
        key = model_key(name, version or "1")
        if key in self.names and (version or len(self.names) == 1):
            return key
        versions = self.versions.get(name)
        if versions is None:
            raise ModelNotFound(name)
        if version:
            raise ModelNotFound(f"{name}, version {version}")
        keys = [model_key(name, each) for each in versions]
        return next((key for key in reversed(keys) if key in self.models), keys[-1])

    def find(self, name: str, version: str = "") -> ServedModel:
        """Return a model's version, by default the latest that is started.

        Raises ModelNotFound, and ServerNotReady while it is started.
        """
        key = self.check(name, version)
        if key not in self.models:
            raise ServerNotReady(f"{key} is being started: come again later.")
        return self.models[key]

    async def answer(
        self,
        model: ServedModel,
        request: InferRequest,
        trace: RequestTrace | None,
        elapsed: float = 0.0,
    ) -> Reply:
        """Answer a request, of whose deadline some seconds have passed before it arrived.

        Raises:
            InvalidInput: where it does not fit the model.
            TooLarge: where it has more queries than the queue holds.
            Exception: as `ServedModel.infer`.
        """
        if trace is not None:
            trace.id = request.id = request.id or uuid.uuid4().hex
        check_outputs(request, model.servable)
        options = answer_options(request)
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
        queries = queries_of(request, model.servable, model.settings.max_queue_size)
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
        return reply

    @contextlib.contextmanager
    def watch(
        self, name: str, headers: Callable[[], Mapping[str, str]]
    ) -> Iterator[RequestTrace | None]:
        """Log and trace the request of this block, and count it if it is refused."""
        trace = self._log.start(name, headers)
        outcome = "ok"
        try:
            yield trace
        except BaseException as error:  # a client that goes away cancels its call
            outcome = outcome_of(error)
            # What a model's batcher does not see is counted here.
            if outcome in ("invalid", "overloaded") and name in self.versions:
                model = self.models.get(self.check(name))
                if model is not None:  # it may still be starting
                    model.count(f"request_{outcome}")
            if trace is not None:
                trace.error = str(error) or type(error).__name__
            raise
        finally:
            if trace is not None:
                self._log.end(trace, outcome)

    # What the server says about itself.

    def repository_index(self, ready: bool = False) -> list[dict[str, str]]:
        """Return all models with their states, by Triton's extension; or only those ready."""
        index = []
        for key in dict.fromkeys([*self.names, *self.control.known]):
            name, version = name_and_version(key)
            state, reason = "READY", ""
            if key not in self.names:
                state, reason = "UNAVAILABLE", "unloaded"
            elif (trouble := self.trouble(name, version)) is not None:
                state, reason = "UNAVAILABLE", trouble
                if key not in self.models and not self.draining:
                    state = "LOADING"
            if state == "READY" or not ready:
                entry = {"name": name, "version": version, "state": state, "reason": reason}
                index.append(entry)
        return index

    def metadata(self) -> dict[str, Any]:
        version = importlib.metadata.version("nercc-jax")
        triton = ("model_configuration", "model_repository", "schedule_policy", "statistics")
        extensions = ["binary_tensor_data", *triton]
        return {"name": "nercc_jax", "version": version, "extensions": extensions}

    def model_metadata(self, name: str, version: str = "") -> dict[str, Any]:
        """Return a model's metadata. Raises as `find` does."""
        model = self.find(name, version)
        coded = (
            {"nercc_coded": True}
            if model.uncoded is None
            else {"nercc_coded": False, "nercc_uncoded": model.uncoded}
        )
        return {
            "name": name,
            "versions": self.versions[name],
            "platform": "nercc_jax",
            "inputs": tensor_types(model.servable.inputs.parts),
            "outputs": output_types(model.servable),
            "parameters": {
                "nercc_max_queries": model.settings.max_queue_size,
                "nercc_deadline_ms": 1e3 * model.settings.deadline_s,
                "nercc_max_deadline_ms": 1e3 * MAX_DEADLINE_S,
                "nercc_outputs": model.outputs()["read_as"] or "not known yet",
                **coded,
            },
        }

    def configuration(self, name: str, version: str = "") -> dict[str, Any]:
        """Return a model's configuration by Triton's extension. Raises as `find` does.

        What has no counterpart here is left out. `max_batch_size` is that of a request, as
        `nercc_max_queries` in the metadata; `preferred_batch_size` are the batches that workers
        receive.
        """
        model = self.find(name, version)
        policy = model.settings.policy()

        def tensor(metadata: Mapping[str, Any]) -> dict[str, Any]:
            kind = {"BYTES": "STRING"}.get(metadata["datatype"], metadata["datatype"])
            without_batch = metadata["shape"][1:]
            return {"name": metadata["name"], "data_type": f"TYPE_{kind}", "dims": without_batch}

        return {
            "name": model.servable.name,
            "platform": "nercc_jax",
            "backend": "nercc_jax",
            "max_batch_size": policy.max_queue_size,
            "input": [tensor(each) for each in tensor_types(model.servable.inputs.parts)],
            "output": [tensor(each) for each in output_types(model.servable)],
            "dynamic_batching": {
                "preferred_batch_size": list(policy.batch_sizes),
                "max_queue_delay_microseconds": round(1e6 * policy.batch_wait_timeout_s),
                "priority_levels": 2,
                "default_priority_level": 2,
            },
        }

    def statistics(self, name: str = "", version: str = "") -> dict[str, Any]:
        """Return the statistics of one model, or of all started ones, by Triton's extension.

        They say how often something happened, and how long it took in total. `success` are requests
        that were answered, `fail` all others (the time of those refused at once is not measured).
        `queue` is from arrival until the first query is sent, `compute_infer` from then until the
        answer. Encoding and decoding are within that, and belong to groups: so `compute_input` and
        `compute_output`, which count as often (`perf_analyzer` insists), have no time.
        `execution_count` are workers' calls that answered in time, coded ones and copies included.
        There is no cache, and nothing by batch size. Raises as `find` does.
        """
        found = []
        for model in [self.find(name, version)] if name else list(self.models.values()):
            meter = model.meter
            answered, queued, computed = (
                meter.read(what)[:2] for what in ("request_ok", "queue_seconds", "compute_seconds")
            )
            failed = np.sum([meter.read(f"request_{each}")[:2] for each in OUTCOMES[1:]], axis=0)
            none = 0, 0.0
            durations = {
                "success": answered,
                "fail": (int(failed[0]), float(failed[1])),
                "queue": queued,
                "compute_input": (computed[0], 0.0),
                "compute_infer": computed,
                "compute_output": (computed[0], 0.0),
                "cache_hit": none,
                "cache_miss": none,
            }
            queries = sum(meter.read(f"query_{each}")[1] for each in ANSWERS)
            found.append(
                {
                    "name": model.servable.name,
                    "version": model.servable.version,
                    "last_inference": round(1e3 * meter.last_answer),
                    "inference_count": int(queries),
                    "execution_count": model.pool.report().answered,
                    "inference_stats": {
                        what: {"count": count, "ns": round(1e9 * seconds)}
                        for what, (count, seconds) in durations.items()
                    },
                    "batch_stats": [],
                }
            )
        return {"model_stats": found}

    async def weights(self) -> dict[str, dict[int, bool]]:
        """Return whether each worker that answers has the weights that it was given, by model."""
        pools = {name: model.pool for name, model in self.models.items()}
        longest = 10.0  # seconds in which a worker must answer what its weights are
        checks = (asyncio.to_thread(pool.check_weights, longest) for pool in pools.values())
        return dict(zip(pools, await asyncio.gather(*checks), strict=True))

    def status(self) -> dict[str, Any]:
        metadata = self.metadata()
        return {
            "server": {
                "name": metadata["name"],
                "version": metadata["version"],
                "state": self.phase,
                "uptime_s": time.monotonic() - self._started,
            },
            "models": [self.models[name].status() for name in self.names if name in self.models],
        }
