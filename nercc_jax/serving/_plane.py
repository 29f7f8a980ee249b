"""The plane of control: what both faces of the server ask, and all that it says of itself."""

import contextlib
import importlib.metadata
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from ._health import Health
from ._intake import Intake
from ._journal import Journal
from ._kserve import InferRequest, InferResponse, InvalidInput, ModelNotFound, ServerNotReady
from ._protocol import (
    VERSION,
    check_outputs,
    coding,
    demands,
    input_types,
    limits,
    output_types,
    queries_of,
    response_of,
)
from ._record import current
from ._request import DeadlineExceeded, Reply, words_of
from ._served import ServedModel
from ._settings import ServerSettings
from ._statuses import OUTCOME, REFUSED
from ._telemetry import Telemetry
from ._triton import EXTENSIONS, configuration, statistics


class Plane:
    """What both faces ask: kserve's services call these methods, by these names."""

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        settings: ServerSettings,
        starting: Sequence[str] = (),
        telemetry: Telemetry | None = None,
    ):
        """`starting`: names of further models, which are put into `models` once they answer."""
        self.models = dict(models)
        self.settings = settings
        self.names = (*models, *starting)
        self.intake = Intake(settings.max_bytes_in_flight)
        self.journal = Journal(settings.request_log_rate, telemetry)
        self.draining = False
        self.started = time.monotonic()

    @property
    def model_registry(self) -> "Plane":
        return self

    def get_models(self) -> Mapping[str, Any]:
        return dict.fromkeys(self.names)  # their names are asked for

    def metadata(self) -> dict[str, Any]:
        version = importlib.metadata.version("nercc-jax")
        extensions = ["binary_tensor_data", *EXTENSIONS]
        return {"name": "nercc_jax", "version": version, "extensions": extensions}

    async def live(self) -> dict[str, str]:
        """Raises: ServerNotReady where starting it anew would help, and nothing else."""
        for name, health in self._health():
            if not health.live:
                raise ServerNotReady(f"{name}: {health.trouble}")
        return {"status": "alive"}

    async def ready(self) -> bool:
        return self.state == "serving" and all(health.ready for _, health in self._health())

    async def model_ready(self, model_name: str, *_: Any) -> bool:
        if self.draining or model_name not in self.models:
            return False
        return self.models[model_name].health().ready

    def trouble(self, model_name: str) -> str:
        """Why a model is not ready."""
        if self.draining:
            return "It is draining."
        if model_name not in self.models:
            return "It is being started."
        return self.models[model_name].health().trouble or "It is ready again."

    def _health(self) -> Iterator[tuple[str, Health]]:
        return ((name, model.health()) for name, model in list(self.models.items()))

    async def model_metadata(self, model_name: str) -> dict[str, Any]:
        model = self.find(model_name)
        servable = model.servable
        return {
            "name": model_name,
            "versions": [VERSION],
            "platform": "nercc_jax",
            "inputs": input_types(servable),
            "outputs": output_types(servable),
            "parameters": limits(model.settings) | coding(model.uncoded),
        }

    def configuration(self, model_name: str, version: str = VERSION) -> dict[str, Any]:
        """By Triton's extension. Raises: what `find` does."""
        model = self.find(model_name, version)
        return configuration(model.servable, model.settings)

    def statistics(self, model_name: str = "", version: str = VERSION) -> dict[str, Any]:
        """By Triton's extension: of one model, or of all that are started.

        Raises: what `find` does.
        """
        models = [self.find(model_name, version)] if model_name else list(self.models.values())
        told = [statistics(m.servable, m.meter, m.pool.report()) for m in models]
        return {"model_stats": told}

    async def infer(
        self, model_name: str, request: InferRequest, headers: Any = None
    ) -> tuple[InferResponse, dict[str, str]]:
        """Answers a request by gRPC. Raises: what `find` and `answer` do."""
        model = self.find(model_name)
        reply = await self.answer(model, request)
        return response_of(reply, request, model.servable), {}

    async def answer(self, model: ServedModel, request: InferRequest, before: float = 0.0) -> Reply:
        """Answers a request, which was under way for some seconds before, of its deadline.

        Raises: InvalidInput, `TooLarge`, what `ServedModel.infer` does.
        """
        if (record := current.get()) is not None:
            record.id = request.id = request.id or uuid.uuid4().hex
        check_outputs(request, model.servable)
        demanded = demands(request)
        if before > 0:
            demanded["deadline"] = _left(model, demanded["deadline"], before)
        queries = queries_of(request, model.servable, model.settings.max_queue_size)
        try:
            return await model.infer(queries, **demanded)
        except ValueError as error:
            raise InvalidInput(str(error)) from error

    def check(self, name: str, version: str = VERSION) -> None:
        """Raises: ModelNotFound where there is no such model, nor will be."""
        if name not in self.names:
            raise ModelNotFound(name)
        if version != VERSION:
            raise ModelNotFound(f"{name}, version {version}")

    def find(self, name: str, version: str = VERSION) -> ServedModel:
        """Raises: ModelNotFound; ServerNotReady while the model is started."""
        self.check(name, version)
        if name not in self.models:
            raise ServerNotReady(f"{name} is being started: come again later.")
        return self.models[name]

    @property
    def state(self) -> Literal["starting", "serving", "draining"]:
        if self.draining:
            return "draining"
        return "serving" if len(self.models) == len(self.names) else "starting"

    @contextlib.contextmanager
    def watch(self, model_name: str, headers: Callable[[], Mapping[str, str]]) -> Iterator[None]:
        """Counts a request that is refused, and tells the journal of each."""
        record = self.journal.open(model_name, headers)
        outcome = "ok"
        try:
            yield
        except BaseException as error:  # a client that goes away cancels its call
            outcome = OUTCOME.get(type(error), "failed")
            if outcome in REFUSED and model_name in self.models:
                self.models[model_name].count(REFUSED[outcome])
            if record is not None:
                record.error = words_of(error)
            raise
        finally:
            if record is not None:
                self.journal.close(record, outcome)

    def status(self) -> dict[str, Any]:
        """All that the status page shows."""
        about = self.metadata()
        return {
            "server": {
                "name": about["name"],
                "version": about["version"],
                "state": self.state,
                "uptime_s": time.monotonic() - self.started,
            },
            "models": [self.models[name].status() for name in self.names if name in self.models],
        }

    async def load(self, model_name: str) -> Any:
        """Of the model repository extension, which this server does not have."""
        raise NotImplementedError("models are configured when the server starts")

    unload = load


def _left(model: ServedModel, deadline: float | None, before: float) -> float:
    """Seconds that are left of a request's deadline. Raises: DeadlineExceeded where none are."""
    deadline = model.settings.deadline_s if deadline is None else deadline
    if before >= deadline:
        model.count("request_deadline")
        raise DeadlineExceeded(
            f"its {deadline:g} s had passed before it came: it was under way for {before:.3f} s, "
            "by the proxy's X-Request-Start"
        )
    return deadline - before
