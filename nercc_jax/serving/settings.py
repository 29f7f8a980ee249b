"""The settings of a server, from flags, the environment and a TOML file, in order of precedence.

# server.toml                                     NERCC_HTTP_PORT=9000
http_port = 8000                                  NERCC_DEFAULTS__POOL=ray
[defaults]                                        NERCC_MODELS='[{"model": "lenet5-digits"}]'
num_workers = 8
[[models]]
model = "lenet5-digits"

The two models below, with the text below each field, are the only description of the settings: the
flags of `nercc serve`, the variables, the file, `--print-config` and `docs/deploy/server.toml` are
generated from them. A model's settings include those of `BatchingPolicy`.
"""

import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

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

from ._policy import MAX_DEADLINE_S, BatchingPolicy, Outputs

DAY_S = 86_400.0
_setting: Any = Field  # so that a type checker sees that each setting has a default

# Tables and lists of a file may also be text, from a flag or an environment variable.


def _read_text(value: Any) -> Any:
    """Return a list or a table that may be TOML text, with or without its brackets.

    Examples of such text are 28, 28, 1 and num_gpus = 0.5.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]  # pydantic has read a variable that is one number
    if not isinstance(value, str):
        return value
    text, pair = value.strip(), "{}" if "=" in value else "[]"
    try:
        text = text if text.startswith(tuple("{[")) else text.join(pair)
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        raise ValueError(
            f"28, 28, 1 or a table as in TOML is needed, {{num_gpus = 0.5}}, not {value!r}"
        ) from error


def _read_shape(value: Any) -> Any:
    """Return the shape of one input, or of several by name: image = [28, 28, 1], meta = [4]."""
    value = _read_text(value)
    if isinstance(value, Mapping):
        return {name: _read_shape(each) for name, each in value.items()}
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(type(n) is int and n > 0 for n in value):
        raise ValueError(f"positive numbers are needed, 28, 28, 1, not {value!r}")
    return tuple(value)


def _read_faults(value: Any) -> Any:
    """Return a table of faults, checked if it is not empty."""
    table = _read_text(value)
    if not table or not isinstance(table, Mapping):
        return table
    from ..pools.options import check_faults  # late, since it imports JAX

    return check_faults(table)


Shapes: TypeAlias = Annotated[
    tuple[int, ...] | dict[str, tuple[int, ...]] | None, BeforeValidator(_read_shape)
]
Datatypes: TypeAlias = Annotated[
    str | dict[str, str] | None,
    BeforeValidator(lambda value: _read_text(value) if "=" in str(value) else value),
]
Table = BeforeValidator(_read_text)
Faults = BeforeValidator(_read_faults)
# TOML has no null, and the environment has only strings.
PortOrNone: TypeAlias = Annotated[
    int | None, BeforeValidator(lambda value: None if value == "none" else value)
]


class _OwnSettings(BaseModel):
    """The settings of a model besides its policy's: its tensors, its code and its workers."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    # The titles of the panels of `nercc serve --help`, by their first settings.
    panels: ClassVar[dict[str, str]] = {
        "model": "Model",
        "scheme": "Code",
        "pool": "Workers",
        "surrogate": "Surrogate",
        "faults": "Fault injection",
        "max_batch_size": "Queue and batching",
        "straggler_threshold": "Stragglers",
        "tolerance": "Accuracy and redundancy",
    }

    model: str | None = None
    "Model to serve: a shipped one, your own as module:name, or hf:owner/name."
    name: str | None = _setting(None, examples=["classifier"])
    "Name that clients use (default: that of the model, with a dot for a colon)."
    version: int = _setting(1, ge=1)
    "Version of the model, which its metadata and answers contain."
    weights: Path | None = _setting(None, examples=["weights.npz"])
    "Weights passed to the function module:name, which returns the model: a path, or hf:."
    input_shape: Shapes = _setting(None, examples=[[28, 28, 1]])
    """Shape of one query without the batch axis, such as 28,28,1; for several inputs a TOML table,
    {image = [28, 28, 1], meta = [4]} (default: the shape of --inputs)."""
    input_datatype: Datatypes = _setting(None, examples=["INT64"])
    """Datatype of the inputs, such as INT64, or a TOML table, {ids = 'INT64'} (default: FP32).
    Queries of other datatypes are not coded, unless preprocess turns them into floats."""
    preprocess: str | None = _setting(None, examples=["images:prepare"])
    """Function module:function that turns a batch of inputs, such as bytes of images, into the
    model's floats before queries are coded (default: none)."""
    inputs: Path | None = _setting(None, examples=["inputs.npy"])
    """File of unlabelled inputs to calibrate on: .npy of shape (points, *input_shape), or .npz by
    name (default: example_inputs() of the module, if it has that)."""
    scheme: Literal["nercc", "berrut", "berrut-spline", "replication", "uncoded"] | None = _setting(
        None, examples=["nercc"]
    )
    "Code of the queries (default: nercc, or uncoded for models that cannot be coded)."
    num_data: int = _setting(4, ge=1, le=10_000)
    "K: number of queries that are coded together."
    num_workers: int = _setting(8, ge=1, le=10_000)
    "N: number of coded data points of K queries."
    points: Literal["interleaved", "repeated"] = "interleaved"
    "Layout of the regression points."
    code: Path | None = _setting(None, examples=["code.json"])
    "File of a code written by `nercc tune`, instead of the settings above (default: none)."
    pool: Literal["devices", "ray"] = "devices"
    "Kind of workers: threads on this process's devices, or Ray actors."
    workers: int | None = _setting(None, examples=[8], ge=1, le=10_000)
    "Number of workers of each model (default: N)."
    actor_options: Annotated[dict[str, Any], Table] = {}
    """Ray's options for actors, as a TOML table: {num_cpus = 1, num_gpus = 0.5, resources =
    {TPU = 4}} (default: at most 0.5 CPUs; if the cluster has GPUs, 1 or an equal share)."""
    worker_dtype: Literal["float32", "bfloat16", "float16"] | None = _setting(
        None, examples=["bfloat16"]
    )
    "Dtype of workers' inputs and weights (default: the model's)."
    hang_timeout_s: float = _setting(60.0, gt=0, le=DAY_S)
    "Seconds after which a worker counts as hung and is replaced."
    surrogate: str | None = _setting(None, examples=["learn"])
    """Surrogate that answers stragglers' queries if it is certain enough: `learn`, a learner from
    the traffic; `student`, the shipped student; a file written by `nercc distill`; module:function,
    with the model's outputs; or `none` (default: none)."""
    faults: Annotated[dict[str, Any], Faults] = {}
    """Faults to inject for trials, as a TOML table: {straggler_rate = 0.05, straggler_delay_s =
    0.5}. Delays in seconds: service_delay_s of every call, straggler_delay_s (default: 1). Shares
    of the calls: straggler_rate, death_rate, wrong_rate (default: 1). straggler_score is a
    module:function that scores rows; calls with the largest scores straggle. wrong_workers,
    {swap = [1]}, swap rows. fault_seed is the seed (default: 0)."""


class ModelSettings(BatchingPolicy, _OwnSettings):
    """The settings of one model: its name and tensors, its code, its workers, and its policy.

    A setting that is not set has the value of the server's `defaults`, or the default here.
    """

    @property
    def served_name(self) -> str:
        """The name that clients use, without slash and colon, which proxies may interpret."""
        return self.name or str(self.model).rpartition("/")[2].replace(":", ".")

    def policy(self, outputs: Outputs | None = None) -> BatchingPolicy:
        """Return the batching policy of a model with these outputs (default: the settings' own).

        Raises:
            ValueError: for values out of range, and for limits that do not fit the outputs.
        """
        fields = {name: getattr(self, name) for name in BatchingPolicy.model_fields}
        fields["outputs"] = outputs = outputs or self.outputs
        if self.max_disagreement is None and outputs in ("logits", "probabilities"):
            fields["max_disagreement"] = 0.05
        return BatchingPolicy(**fields)

    def over(self, defaults: "ModelSettings") -> "ModelSettings":
        """Return these settings, with `defaults` for those that are not set.

        The default limits for labels do not apply to a model whose outputs are set to values.
        """
        given, own = defaults.model_fields_set, self.model_fields_set
        if self.outputs == "values" or self.tolerance is not None:
            given = given - {"outputs", "max_disagreement"}
        values = {name: getattr(defaults, name) for name in given}
        return ModelSettings(**values | {name: getattr(self, name) for name in own})


class ServerSettings(BaseSettings):
    """The settings of a server, and those of its models."""

    model_config = SettingsConfigDict(
        env_prefix="NERCC_",
        env_nested_delimiter="__",
        extra="forbid",
        use_attribute_docstrings=True,
    )
    panels: ClassVar[dict[str, str]] = {
        "host": "Addresses and Ray",
        "token_file": "Authentication and TLS",
        "model_control": "Model repository",
        "max_body_bytes": "Limits",
        "drain_delay_s": "End",
    }

    host: str = "127.0.0.1"
    "Address to listen on; 0.0.0.0 for all interfaces of the machine."
    http_port: int = _setting(8000, ge=0, le=65535)
    "Port of REST, status page and metrics; 0 for any free one."
    grpc_port: PortOrNone = _setting(8001, ge=0, le=65535)
    "Port of gRPC; 0 for any free one, none for no gRPC."
    address: str | None = _setting(None, examples=["auto"])
    "Ray cluster: HOST:6379, ray://HOST:10001, auto, local (default: RAY_ADDRESS, or this machine)."
    runtime_env: Annotated[dict[str, Any], Table] = {}
    """Ray's runtime environment, as a TOML table: {working_dir = '.'} sends a folder to the nodes
    (default: none)."""
    token_file: Path | None = _setting(None, examples=["tokens"])
    """File of bearer tokens, one a line; each request needs one of them (default: no tokens).
    Health checks need none."""
    tls_certificate: Path | None = _setting(None, examples=["tls.pem"])
    "PEM file with the key, the certificate and its chain, which enables TLS (default: no TLS)."
    model_control: Literal["none", "explicit"] = "none"
    "Whether clients may load and unload models by the model repository's API: none or explicit."
    max_body_bytes: int = _setting(64 * 2**20, gt=0, le=2**40)
    "Maximum bytes of a request's body."
    max_bytes_in_flight: int = _setting(2**29, gt=0, le=2**40)
    "Maximum bytes of all requests in progress."
    drain_delay_s: float = _setting(0.0, ge=0, le=MAX_DEADLINE_S)
    "Seconds after SIGTERM during which the server still accepts requests, but is not ready."
    drain_timeout_s: float = _setting(30.0, ge=0, le=MAX_DEADLINE_S)
    "Seconds after drain_delay_s to answer accepted requests."

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

    def tokens(self) -> frozenset[bytes]:
        """Return the tokens that clients may send; an empty set if none is needed.

        Raises:
            ValueError: if the file is missing or empty.
        """
        if self.token_file is None:
            return frozenset()
        found = frozenset(filter(None, map(bytes.strip, _content(self.token_file).splitlines())))
        if not found:
            raise ValueError(f"{self.token_file} has no token")
        return found

    def tls_pem(self) -> bytes | None:
        """Return the certificate's key, the certificate and its chain; None without TLS.

        Raises:
            ValueError: if the file is missing, or has no key or no certificate.
        """
        found = None if self.tls_certificate is None else _content(self.tls_certificate)
        if found is not None and not (b"PRIVATE KEY-----" in found and b"CERTIFICATE--" in found):
            raise ValueError(
                f"{self.tls_certificate} needs the key, the certificate and its chain "
                "(cat tls.key tls.crt > tls.pem)"
            )
        return found

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources in the order of their precedence."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    def cannot_listen(self, port: int) -> OSError:
        """Return the error for a port that cannot be listened on."""
        return OSError(f"cannot listen on {self.host}:{port}: is the port taken?")

    def resolved(self) -> list[ModelSettings]:
        """Return every model's settings, with defaults filled in.

        Raises:
            ValueError: if there is no model, one lacks `model`, or two have the same name.
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


for _kind in (ModelSettings, ServerSettings):
    for _field in _kind.model_fields.values():  # in one line
        _field.description = " ".join(str(_field.description).split())


def _content(file: Path) -> bytes:
    """Return a file's content. Raises ValueError if it cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error


def read_settings(file: Path | None, **flags: Any) -> ServerSettings:
    """Read settings from flags, the environment and a file.

    Settings of a model among the flags are `defaults` of all models; `model` names one, or several.

    Raises:
        ValueError: for a file that is missing, unknown names of settings or variables, and values
            out of range.
    """
    if file is not None and not file.is_file():
        raise ValueError(f"there is no configuration file {file}")
    # Variables with our prefix that are not settings: those of the tests, and those that Kubernetes
    # sets in containers for a service whose name begins with the prefix.
    tests = "NERCC_REQUIRE_EXTRAS", "NERCC_COMPILE_AS_USERS_DO"
    kubernetes = r"NERCC_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP)(_\w+)?)"
    for name, value in os.environ.items():
        setting = name.removeprefix("NERCC_").lower().partition("__")[0]
        theirs = re.fullmatch(kubernetes, name) or value.startswith(("tcp://", "udp://"))
        if not name.startswith("NERCC_") or name in tests or theirs:
            continue
        if setting not in ServerSettings.model_fields:
            raise ValueError(f"the environment has {name}: there is no such setting")

    class FromFile(ServerSettings):  # pydantic-settings takes the file's path from the class
        model_config = SettingsConfigDict(toml_file=file)

    of_all = {name: flags.pop(name) for name in [*flags] if name in ModelSettings.model_fields}
    if names := of_all.pop("model", ()):
        names = [names] if isinstance(names, str) else names
        flags["models"] = [{"model": each} for each in names]
    if of_all:
        flags["defaults"] = dict(flags.get("defaults", {})) | of_all
    try:
        return FromFile(**flags)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is no TOML: {error}") from error
    except SettingsError as error:
        raise ValueError(f"{error}: {error.__cause__}") from error
    except ValidationError as error:
        raise ValueError(_describe(error)) from error


def _describe(error: ValidationError) -> str:
    """Return a message of one line: each wrong setting, and what is wrong with it."""
    faults = []
    for fault in error.errors(include_url=False):
        where, what = ".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            what = "there is no such setting"
        elif fault["type"] != "value_error":
            what = f"{what[:1].lower()}{what[1:].partition(', unable')[0]}, not {fault['input']!r}"
        faults.append(f"{where}: {what}")
    return "; ".join(faults)


def as_toml(server: ServerSettings, models: Sequence[ModelSettings]) -> str:
    """Return a configuration file with all settings of the server and of each model."""
    of_server = server.model_dump(exclude={"defaults", "models"})
    if server.grpc_port is None:
        of_server["grpc_port"] = "none"
    tables = [("", of_server), *(("\n[[models]]\n", model.model_dump()) for model in models)]
    # TOML has no null, so settings that are None are left out.
    return "\n".join(
        head + "\n".join(f"{k} = {to_toml(v)}" for k, v in values.items() if v is not None)
        for head, values in tables
    )


def to_toml(value: Any) -> str:
    """Return a value as TOML text."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {to_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False)
    return str(value).lower()  # numbers, infinity and booleans
