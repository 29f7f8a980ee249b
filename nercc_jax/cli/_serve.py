"""`nercc serve`: a coded prediction server."""

import importlib.util
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ._compiled import keep_programs
from ._config import as_toml
from ._errors import fail, told_plainly
from ._options import Outputs, check_shipped

if TYPE_CHECKING:
    from ..serving._settings import ModelSettings


def serve_command(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A shipped model, or module:function; several are served side by side. "
            "lenet5-digits unless the environment or --config names others."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file with settings.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1.")] = None,
    http_port: Annotated[int | None, typer.Option(help="REST, status page, metrics; 8000.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="gRPC; 8001.")] = None,
    pool: Annotated[
        Literal["devices", "ray"] | None,
        typer.Option(help="Workers: threads on this process's devices, or Ray actors."),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Workers of each model; N.")] = None,
    scheme: Annotated[
        Literal["nercc", "berrut", "replication", "uncoded"] | None,
        typer.Option(help="How queries are coded; nercc, or uncoded for what cannot be coded."),
    ] = None,
    num_data: Annotated[int | None, typer.Option(help="K: queries coded together; 4.")] = None,
    num_workers: Annotated[
        int | None, typer.Option(help="N: coded data points of K queries; 8.")
    ] = None,
    points: Annotated[
        Literal["interleaved", "repeated", "chebyshev", "uniform"] | None,
        typer.Option(help="Where the regression points lie; interleaved."),
    ] = None,
    code: Annotated[
        Path | None, typer.Option(help="A code that `nercc tune` wrote, instead.")
    ] = None,
    outputs: Annotated[
        Outputs | None, typer.Option(help="What a shipped model returns; logits.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Given to module:function, which then makes the model.")
    ] = None,
    input_shape: Annotated[
        str | None,
        typer.Option(
            help="Of one query of module:function: 28,28,1; by name where it takes a dict of "
            "arrays: image=28,28,1,meta=4."
        ),
    ] = None,
    input_datatype: Annotated[
        str | None,
        typer.Option(help="Of its inputs, FP32: INT64, or by name: ids=INT64,mask=BOOL."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Unlabelled inputs for module:function's error estimate: .npy, or .npz by name."
        ),
    ] = None,
    max_batch_size: Annotated[
        int | None, typer.Option(help="Queries in one worker call, at most; 8.")
    ] = None,
    batch_wait_timeout_s: Annotated[
        float | None, typer.Option(help="How long a group waits for more queries; 0.01.")
    ] = None,
    max_queue_size: Annotated[
        int | None, typer.Option(help="Queries that may wait; more are refused; 1024.")
    ] = None,
    deadline_s: Annotated[
        float | None, typer.Option(help="Of a request that does not say; 10.")
    ] = None,
    max_disagreement: Annotated[
        float | None,
        typer.Option(
            help="The share of stragglers' queries whose label may differ from the model's own, "
            "in the mean; what is too doubtful for that is sent again; 0.05."
        ),
    ] = None,
    max_reexecution: Annotated[
        float | None,
        typer.Option(help="The share of all queries that may be sent again for doubt; any."),
    ] = None,
    ordering: Annotated[
        bool | None,
        typer.Option(help="Whether queries that go out together lie beside their like; they do."),
    ] = None,
    service_delay: Annotated[
        float | None, typer.Option(help="On trial: seconds that every call takes longer.")
    ] = None,
    straggler_rate: Annotated[
        float | None, typer.Option(help="On trial: the share of calls that straggle ...")
    ] = None,
    straggler_delay: Annotated[
        float | None, typer.Option(help="... and by how many seconds; 1.")
    ] = None,
    death_rate: Annotated[
        float | None, typer.Option(help="On trial: the share of calls in which the worker dies.")
    ] = None,
    log_format: Annotated[
        Literal["json", "text"] | None, typer.Option(help="Of the log, on stderr; json.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only say whether the settings fit, and end.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Only print the settings as TOML, and end.")
    ] = False,
    max_connections: Annotated[
        int | None, typer.Option(help="Of REST, and calls by gRPC; more are refused; 2000.")
    ] = None,
    max_header_bytes: Annotated[
        int | None, typer.Option(help="Of one request's head, about; 32768.")
    ] = None,
    max_body_bytes: Annotated[
        int | None, typer.Option(help="Of one request, decompressed; 67108864.")
    ] = None,
    max_json_bytes: Annotated[
        int | None, typer.Option(help="Of one request, without its binary tensors; 8388608.")
    ] = None,
    max_bytes_in_flight: Annotated[
        int | None, typer.Option(help="Of all requests that are in hand; 536870912.")
    ] = None,
    head_timeout_s: Annotated[
        float | None, typer.Option(help="To send a request's head; 10.")
    ] = None,
    body_timeout_s: Annotated[
        float | None, typer.Option(help="To send a request's body; 60.")
    ] = None,
    compilation_cache: Annotated[
        bool | None,
        typer.Option(
            help="Whether compiled programs are kept, in JAX_COMPILATION_CACHE_DIR or the user's "
            "cache folder; they are."
        ),
    ] = None,
) -> None:
    """Serve models behind a code: Open Inference Protocol, REST and gRPC.

    Clients' queries are coded in groups; one whose worker straggles is decoded
    from the others' answers, and its response says so. All settings can also
    be given by environment (NERCC_...) and file; flags come first. SIGTERM
    answers what was accepted, and ends. It listens at once, and says that it is
    ready once its models are compiled.
    """
    with told_plainly():
        _check_extra()
        for each in model or ():
            if ":" not in each:
                check_shipped(each)
        from ..serving._settings import ModelSettings, read_settings

        flags = {
            "pool": pool,
            "workers": workers,
            "scheme": scheme,
            "num_data": num_data,
            "num_workers": num_workers,
            "points": points,
            "code": code,
            "outputs": outputs,
            "weights": weights,
            "input_shape": input_shape,
            "input_datatype": input_datatype,
            "calibration": calibration,
            "max_batch_size": max_batch_size,
            "batch_wait_timeout_s": batch_wait_timeout_s,
            "max_queue_size": max_queue_size,
            "deadline_s": deadline_s,
            "max_disagreement": max_disagreement,
            "max_reexecution": max_reexecution,
            "ordering": ordering,
            "service_delay_s": service_delay,
            "straggler_rate": straggler_rate,
            "straggler_delay_s": straggler_delay,
            "death_rate": death_rate,
        }
        flags = {key: value for key, value in flags.items() if value is not None}
        told: dict[str, Any] = {
            "host": host,
            "http_port": http_port,
            "grpc_port": grpc_port,
            "log_format": log_format,
            "max_connections": max_connections,
            "max_header_bytes": max_header_bytes,
            "max_body_bytes": max_body_bytes,
            "max_json_bytes": max_json_bytes,
            "max_bytes_in_flight": max_bytes_in_flight,
            "head_timeout_s": head_timeout_s,
            "body_timeout_s": body_timeout_s,
            "compilation_cache": compilation_cache,
            "models": [{"model": each} for each in model] if model else None,
            "defaults": flags or None,
        }
        settings = read_settings(
            config, **{key: value for key, value in told.items() if value is not None}
        )
        if not settings.models:
            settings.models = [ModelSettings(model="lenet5-digits")]
        # Flags come before what a file says of one model, too.
        chosen = [ModelSettings(**flags).over(each) for each in settings.resolved()]
        if any(each.pool == "ray" for each in chosen) and importlib.util.find_spec("ray") is None:
            raise ImportError("--pool ray needs Ray: pip install 'nercc-jax[ray]'")
        if print_config:
            typer.echo(as_toml(settings, chosen))
            return
        if check:
            _check(chosen)
            return
        _start_log(settings.log_format, settings.log_level)
        if settings.compilation_cache:
            keep_programs()
        # Until the server listens; as a container's first process it would be ignored.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        from prometheus_client import CollectorRegistry

        from ..serving._server import Server
        from ._serving_models import StartFailed, starts_of

        registry = CollectorRegistry()
        try:
            Server(starts_of(chosen, registry), settings, registry).run()
        except StartFailed as error:
            fail(str(error), 1)
        _leave()


def _leave() -> None:
    """Ends the process at once where a hung worker's thread is in a model's hands still.

    Python's own end stops such a thread when it comes back from compiled code, and XLA aborts then.
    """
    if any(thread.name.startswith("nercc-worker-") for thread in threading.enumerate()):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _check(chosen: "list[ModelSettings]") -> None:
    """Loads the models, but starts no workers. Raises: ValueError where something does not fit."""
    from ._serving_models import check_model

    for settings in chosen:
        check_model(settings)
        typer.echo(f"{settings.served_name} can be served")


def _check_extra() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"nercc serve needs {', '.join(missing)}: pip install 'nercc-jax[serve]'")


_NEEDED = ("grpc_health", "kserve", "prometheus_client", "pydantic_settings", "pythonjsonlogger")


def _start_log(log_format: str, level: str) -> None:
    """Everything goes to stderr, a JSON object a line unless a person wants to read it."""
    from pythonjsonlogger.json import JsonFormatter

    handler = logging.StreamHandler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(
            JsonFormatter(
                "%(asctime)s %(levelname)s %(name)s %(message)s",
                rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            )
        )
    else:
        handler.setFormatter(_WithFields("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    # gRPC's core would write lines of its own; what matters of them is told by exceptions.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # Uvicorn's word for each step of its life says less than ours; JAX misses TPUs everywhere.
    for name in ("uvicorn", "jax._src.xla_bridge"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level)))


class _WithFields(logging.Formatter):
    """For people: what was told beside the message comes after it."""

    usual = frozenset(vars(logging.makeLogRecord({}))) | {"asctime", "message"}

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = [(name, value) for name, value in vars(record).items() if name not in self.usual]
        text = logging.Formatter.formatMessage(self, record)
        return " ".join([text, *(f"{name}={value}" for name, value in fields)])
