"""What a server is told: by flags, by the environment, by a TOML file, in this order of precedence.

# server.toml                                     NERCC_HTTP_PORT=9000
http_port = 8000                                  NERCC_DEFAULTS__POOL=ray
[defaults]                                        NERCC_MODELS='[{"model": "lenet5-digits"}]'
num_workers = 8
[[models]]
model = "lenet5-digits"
"""

import dataclasses
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from ._policy import MAX_DEADLINE_S, BatchingPolicy
from ._settings_text import datatype, none, paths, shape, table

_POLICY = BatchingPolicy()


class ModelSettings(BaseModel):
    """One model: what it is, how it is coded, and who runs it. Unset: `defaults`, or as here."""

    model_config = ConfigDict(extra="forbid")
    # Of `nercc serve --help`: the first setting of each panel, and what it is called.
    panels: ClassVar[dict[str, str]] = {
        "model": "Model",
        "scheme": "Code",
        "pool": "Workers",
        "max_batch_size": "Queue and batching",
        "patience": "Stragglers",
        "surrogate": "What is known",
        "service_delay_s": "Faults on trial",
    }

    model: str | None = Field(
        default=None, description="A shipped one, module:name of yours, or hf:owner/name."
    )
    name: str | None = Field(
        default=None,
        description="What clients call it; unless set as `model`, with a dot for a colon.",
    )
    weights: Path | None = Field(
        default=None, description="Given to module:name, which makes the model; a path, or hf:."
    )
    input_shape: Annotated[
        tuple[int, ...] | dict[str, tuple[int, ...]] | None, BeforeValidator(shape)
    ] = Field(
        default=None,
        description="Of one query without the batch: 28,28,1; of a dict image=28,28,1,meta=4. "
        "Unless set, that of the inputs.",
    )
    input_datatype: Annotated[str | dict[str, str] | None, BeforeValidator(datatype)] = Field(
        default=None,
        description="FP32 unless set: INT64, or by name, ids=INT64,mask=BOOL. Others than FP32 are "
        "served uncoded.",
    )
    output_name: str | None = Field(
        default=None, description="Of the only output; of several without names, before places."
    )
    outputs: Literal["logits", "probabilities"] = Field(
        default="logits", description="What is served: logits, or their softmax."
    )
    inputs: Path | None = Field(
        default=None,
        description="Unlabelled inputs for the error estimate: .npy, (points, *input_shape), or "
        ".npz by name. Unless set, example_inputs() of the module, if it has that.",
    )

    scheme: Literal["nercc", "berrut", "replication", "uncoded"] | None = Field(
        default=None,
        description="How queries are coded; nercc unless set, and uncoded for what cannot be.",
    )
    num_data: int = Field(default=4, ge=1, description="K: queries coded together.")
    num_workers: int = Field(default=8, ge=1, description="N: coded data points of K queries.")
    points: Literal["interleaved", "repeated", "chebyshev", "uniform"] = Field(
        default="interleaved", description="Where the regression points lie."
    )
    code: Path | None = Field(default=None, description="A code that `nercc tune` wrote, instead.")

    pool: Literal["devices", "ray"] = Field(
        default="devices", description="Threads on this process's devices, or Ray actors."
    )
    workers: int | None = Field(
        default=None, ge=1, description="Workers of each model; N unless set."
    )
    worker_cpus: float | None = Field(
        default=None,
        ge=0,
        description="Of Ray's, that an actor takes; half of one or less unless set.",
    )
    worker_gpus: float | None = Field(
        default=None,
        ge=0,
        description="Of Ray's, that an actor takes; one, or an equal part, where there are GPUs.",
    )
    worker_resources: Annotated[dict[str, float], BeforeValidator(table)] = Field(
        default={}, description="Further ones of Ray's, that an actor takes: {TPU = 4}."
    )
    actor_options: Annotated[dict[str, Any], BeforeValidator(table)] = Field(
        default={}, description="Others of Ray's options of actors: {max_concurrency = 3}."
    )
    worker_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="Workers run in it, on inputs and weights that are cast to it."
    )
    max_attempts: int = Field(
        default=3, ge=1, description="Workers that may fail at a data point before it is lost."
    )
    hang_timeout_s: float = Field(
        default=60.0, gt=0, description="A worker that takes longer hangs, and is replaced."
    )

    max_batch_size: int = Field(
        default=_POLICY.max_batch_size,
        description="Queries in one worker call, at most; a power of two.",
    )
    batch_wait_timeout_s: float = Field(
        default=_POLICY.batch_wait_timeout_s,
        description="How long a group waits for more queries.",
    )
    max_queue_size: int = Field(
        default=_POLICY.max_queue_size, description="Queries that may wait; more are refused."
    )
    deadline_s: float = Field(
        default=_POLICY.deadline_s,
        gt=0,
        le=MAX_DEADLINE_S,
        description="Of a request that does not say.",
    )
    priority_lead_s: float = Field(
        default=_POLICY.priority_lead_s,
        ge=0,
        le=MAX_DEADLINE_S,
        description="Requests of high priority go ahead of those that came up to so long earlier.",
    )
    ordering: bool = Field(
        default=_POLICY.ordering,
        description="Whether queries that go out together lie beside their like.",
    )

    patience: float = Field(
        default=_POLICY.patience,
        description="Who takes so many times the median straggles.",
    )
    quantile: float = Field(
        default=_POLICY.quantile, description="Of answer times, instead of the median."
    )
    wait_for: int | None = Field(
        default=_POLICY.wait_for,
        description="Answers of a group that will do where no error is estimated; by the code "
        "unless set.",
    )
    max_disagreement: float | None = Field(
        default=0.05,
        le=1,
        description="The share of stragglers' queries whose label may differ from the model's own, "
        "in the mean; what is too doubtful for that is sent again. 1 takes what `wait_for` answers "
        "give.",
    )
    max_reexecution: float | None = Field(
        default=_POLICY.max_reexecution,
        description="The share of all queries that may be sent again for doubt; any unless set.",
    )
    copies: int = Field(
        default=_POLICY.copies,
        description="Workers that may have the same query in hand when the first straggles.",
    )

    surrogate: str | None = Field(
        default=None,
        description="What answers a straggler's query where it is sure enough: `learn`, a learner "
        "from what is served; `student`, the shipped one; a file that `nercc distill` wrote; or "
        "module:function, with the model's outputs. `none`, or unset: nothing does.",
    )
    tolerance: float | None = Field(
        default=_POLICY.tolerance,
        description="For functions: a surrogate answers where it is off by no more, in units of "
        "the outputs, in nine of ten cases. Then nothing is decoded.",
    )
    redundancy: Literal["always", "doubtful"] = Field(
        default=_POLICY.redundancy,
        description="What a code has beyond the queries goes out always, or only where the "
        "surrogate could not answer.",
    )
    max_redundancy: float | None = Field(
        default=_POLICY.max_redundancy,
        description="With doubtful: calls for that, as a share of all queries; any unless set.",
    )
    max_calls: float | None = Field(
        default=_POLICY.max_calls,
        description="Calls a query that may be spent: then patience and redundancy are picked by "
        "the tail that is measured, again and again. Fixed unless set.",
    )

    service_delay_s: float = Field(
        default=0.0, ge=0, description="Seconds that every call takes longer."
    )
    straggler_rate: float = Field(
        default=0.0, ge=0, le=1, description="The share of calls that straggle ..."
    )
    straggler_delay_s: float = Field(default=1.0, gt=0, description="... and by how many seconds.")
    death_rate: float = Field(
        default=0.0, ge=0, le=1, description="The share of calls in which the worker dies."
    )
    fault_seed: int = Field(default=0, description="The same seed, the same faults.")

    @model_validator(mode="after")
    def _check(self) -> "ModelSettings":
        self.policy()
        return self

    @property
    def served_name(self) -> str:
        """What clients call it. No slash, and no colon: some proxies look for a verb behind one."""
        return self.name or str(self.model).rpartition("/")[2].replace(":", ".")

    def ray_options(self) -> dict[str, Any]:
        """Of a worker that is an actor."""
        taken = {"num_cpus": self.worker_cpus, "num_gpus": self.worker_gpus}
        taken = {name: amount for name, amount in taken.items() if amount is not None}
        named = {"resources": self.worker_resources} if self.worker_resources else {}
        return self.actor_options | taken | named

    def policy(self) -> BatchingPolicy:
        limit = self.max_disagreement
        if self.tolerance is not None and "max_disagreement" not in self.model_fields_set:
            limit = None  # a function's outputs are no label
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(BatchingPolicy)}
        fields["max_disagreement"] = None if limit is None or limit >= 1 else limit
        return BatchingPolicy(**fields)

    def over(self, defaults: "ModelSettings") -> "ModelSettings":
        """These settings, with `defaults` where nothing was set."""
        told = {
            name: getattr(each, name) for each in (defaults, self) for name in each.model_fields_set
        }
        return ModelSettings(**told)


class ServerSettings(BaseSettings):
    """The whole server."""

    model_config = SettingsConfigDict(
        env_prefix="NERCC_",
        env_nested_delimiter="__",
        extra="forbid",
    )
    panels: ClassVar[dict[str, str]] = {
        "host": "Addresses",
        "max_connections": "Limits",
        "address": "Ray",
        "compilation_cache": "Start and end",
        "log_format": "Log",
    }

    host: str = Field(
        default="127.0.0.1", description="To listen on; 0.0.0.0 is all of the machine's."
    )
    http_port: int = Field(
        default=8000, ge=0, le=65535, description="REST, status page, metrics; 0: any free one."
    )
    grpc_port: Annotated[int | None, BeforeValidator(none)] = Field(
        default=8001, ge=0, le=65535, description="gRPC; 0: any free one, none: no gRPC."
    )

    max_connections: int = Field(
        default=2000, ge=1, description="Of REST, and calls by gRPC; more are refused."
    )
    max_header_bytes: int = Field(
        default=2**15, ge=2**10, description="Of one request's head, about."
    )
    max_body_bytes: int = Field(
        default=64 * 2**20, gt=0, description="Of one request, decompressed."
    )
    max_json_bytes: int = Field(
        default=8 * 2**20, gt=0, description="Of one request, without its binary tensors."
    )
    max_bytes_in_flight: int = Field(
        default=2**29, gt=0, description="Of all requests that are read or answered at a time."
    )
    head_timeout_s: float = Field(
        default=10.0, gt=0, le=MAX_DEADLINE_S, description="To send a request's head."
    )
    body_timeout_s: float = Field(
        default=60.0, gt=0, le=MAX_DEADLINE_S, description="To send a request's body."
    )

    address: str | None = Field(
        default=None,
        description="Of the Ray of actors: HOST:6379, ray://HOST:10001, auto or local; unless set "
        "RAY_ADDRESS, what runs on this machine, or a new one.",
    )
    working_dir: Path | None = Field(
        default=None,
        description="Sent to Ray's nodes; the folder of a module:function that is not installed "
        "unless set.",
    )
    py_modules: Annotated[list[Path], BeforeValidator(paths)] = Field(
        default=[], description="Modules that are sent to Ray's nodes, with commas."
    )
    runtime_env: Path | None = Field(
        default=None, description="A file with Ray's runtime environment: .yaml, .json, .toml."
    )

    compilation_cache: bool = Field(
        default=True,
        description="Whether compiled programs, and calibrations, are kept, in "
        "JAX_COMPILATION_CACHE_DIR or the user's cache folder.",
    )
    drain_delay_s: float = Field(
        default=0.0, ge=0, description="After SIGTERM: not ready, but answering, for so long."
    )
    drain_timeout_s: float = Field(
        default=30.0, ge=0, description="Then: for what has been accepted."
    )

    log_format: Literal["json", "text"] = Field(
        default="json", description="Of the log, on stderr."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="What is less than that is not logged."
    )
    request_log_rate: float = Field(
        default=0.0, ge=0, le=1, description="Share of the requests that the log has a line of."
    )

    defaults: ModelSettings = ModelSettings()
    models: list[ModelSettings] = []

    @model_validator(mode="after")
    def _check(self) -> "ServerSettings":
        if self.max_body_bytes > self.max_bytes_in_flight:
            raise ValueError(
                f"max_body_bytes {self.max_body_bytes} must not be more than max_bytes_in_flight "
                f"{self.max_bytes_in_flight}"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    def cannot_listen(self, port: int) -> OSError:
        """What is raised where one of the ports cannot be listened on."""
        return OSError(f"cannot listen on {self.host}:{port}: is the port taken?")

    def resolved(self) -> list[ModelSettings]:
        """Every model's settings, defaults filled in.

        Raises: ValueError where there is no model, one is not named, or two have the same name.
        """
        models = [model.over(self.defaults) for model in self.models]
        if not models:
            raise ValueError("there is no model to serve: --model, NERCC_MODELS or [[models]]")
        if any(model.model is None for model in models):
            raise ValueError("each of the models needs `model`: a shipped one, or module:function")
        names = [model.served_name for model in models]
        if len(set(names)) < len(names):
            raise ValueError(f"models must have different names (`name`), not {names}")
        return models


def read_settings(file: Path | None, **told: Any) -> ServerSettings:
    """Settings from flags (`told`), the environment and a file.

    Raises: ValueError for a file that is not there, names that are unknown, of variables, too, and
    values out of range.
    """
    if file is not None and not file.is_file():
        raise ValueError(f"there is no configuration file {file}")
    _check_variables(os.environ)

    class FromFile(ServerSettings):  # pydantic-settings takes the file's path from the class
        model_config = SettingsConfigDict(toml_file=file)

    try:
        return FromFile(**told)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is no TOML: {error}") from error
    except SettingsError as error:
        raise ValueError(f"{error}: {error.__cause__}") from error
    except ValidationError as error:
        raise ValueError(_in_words(error)) from error


# Variables with our prefix that are not the server's: of the tests, and those that Kubernetes gives
# containers beside a service whose name begins so.
_TESTS = {"NERCC_REQUIRE_EXTRAS", "NERCC_COMPILE_AS_USERS_DO"}
_KUBERNETES = re.compile(
    r"NERCC_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP)(_\w+)?)"
)


def _check_variables(environment: Mapping[str, str]) -> None:
    """Raises: ValueError for a variable that looks like a setting, and is none."""
    for name, value in environment.items():
        setting = name.removeprefix("NERCC_").lower().partition("__")[0]
        theirs = _KUBERNETES.fullmatch(name) or value.startswith(("tcp://", "udp://"))
        if not name.startswith("NERCC_") or name in _TESTS or theirs:
            continue
        if setting not in ServerSettings.model_fields:
            raise ValueError(f"the environment has {name}: there is no such setting")


def _in_words(error: ValidationError) -> str:
    """What is wrong with which settings, in one line."""
    faults = []
    for fault in error.errors(include_url=False):
        where, what = ".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            what = "there is no such setting"
        elif fault["type"] != "value_error":
            what = f"{what[:1].lower()}{what[1:].partition(', unable')[0]}, not {fault['input']!r}"
        faults.append(f"{where}: {what}")
    return "; ".join(faults)
