"""`nercc serve`: a coded prediction server."""

import functools
import gc
import importlib.util
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._config import as_toml
from ._errors import PlainCommand, fail, told_plainly
from ._options import check_model
from ._process import keep_programs
from ._ray_job import RayJob, end_at_once, leave_accelerators

if TYPE_CHECKING:
    from ..serving._settings import ModelSettings, ServerSettings


def serve_command(arguments: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Serve models behind a code: Open Inference Protocol, REST and gRPC.

    Clients' queries are coded in groups; one whose worker straggles is decoded
    from the others' answers, and its response says so. All settings can also
    be given by environment (NERCC_...) and file; flags come first. SIGTERM
    answers what was accepted, and ends. It listens at once, and says that it is
    ready once its models are compiled.
    """
    # Imports and programs leave little garbage, and to look for it takes a tenth of a start. Once
    # the server is ready, it looks again.
    gc.disable()
    try:
        with told_plainly():
            _check_extra()
        command_with_options()(arguments or [], prog_name="nercc serve")
    finally:
        gc.enable()


def command_with_options() -> Any:
    """The command as Typer has it, once the settings are imported, which takes its time."""
    from ._serve_options import with_settings

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=serve_command.__doc__, cls=PlainCommand)(with_settings(_serve))
    return typer.main.get_command(app)


def _serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A shipped model, module:name of yours, or hf:owner/name; several are served side "
            "by side. lenet5-digits unless the environment or --config names others.",
            rich_help_panel="Model",
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file with settings.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only say whether the settings fit, and end.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Only print the settings as TOML, and end.")
    ] = False,
    **flags: Any,
) -> None:
    """`flags` are settings of the server and of all models, by name: those that are told."""
    with told_plainly():
        for each in model or ():
            check_model(each, None, None)
        settings, chosen = _read(model, config, flags)
        if print_config:
            typer.echo(as_toml(settings, chosen))
        elif check:
            _check(chosen)
        else:
            _run(settings, chosen)


def _read(
    names: list[str] | None, config: Path | None, summary: dict[str, Any]
) -> "tuple[ServerSettings, list[ModelSettings]]":
    """The server's settings, and each model's, all sources put together.

    Raises: ValueError for settings that are wrong, ImportError for a pool that is not there.
    """
    from ..serving._settings import ModelSettings, read_settings

    of_all = {
        name: summary.pop(name) for name in list(summary) if name in ModelSettings.model_fields
    }
    if names:
        summary["models"] = [{"model": each} for each in names]
    if of_all:
        summary["defaults"] = of_all
    try:
        settings = read_settings(config, **summary)
    except ValueError as error:
        raise ValueError(_by_flags(str(error), (*summary, *of_all))) from error
    if not settings.models:
        settings.models = [ModelSettings(model="lenet5-digits")]
    # Flags come before what a file says of one model, too.
    chosen = [ModelSettings(**of_all).over(each) for each in settings.resolved()]
    if any(each.pool == "ray" for each in chosen) and importlib.util.find_spec("ray") is None:
        raise ImportError("--pool ray needs Ray: pip install 'nercc-jax[ray]'")
    return settings, chosen


def _by_flags(summary: str, names: Iterable[str]) -> str:
    """What is wrong, with the flags' own names for the settings that the command line has."""
    for name in names:
        flag = f"--{name.replace('_', '-')}: "
        summary = re.sub(rf"(?:(?<=; )|^)(?:defaults\.)?{name}: ", flag, summary)
    return summary


def _run(settings: "ServerSettings", chosen: "list[ModelSettings]") -> None:
    """Serves until the end. Raises: ValueError and OSError where something does not fit."""
    job = RayJob(settings.address, settings.working_dir, settings.py_modules, settings.runtime_env)
    _start_log(settings.log_format, settings.log_level)
    _check_ports(settings)
    if all(each.pool == "ray" for each in chosen):
        leave_accelerators()
    if settings.compilation_cache:
        keep_programs()
    # Until the server listens; as a container's first process it would be ignored.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    from prometheus_client import CollectorRegistry

    from ..serving._server import Server
    from ._serving_models import StartFailed, starts_of

    registry = CollectorRegistry()
    try:
        join = functools.cache(lambda: job.connect([str(each.model) for each in chosen]))
        Server(starts_of(chosen, registry, join), settings, registry).run()
    except StartFailed as error:
        fail(str(error), 1)
    end_at_once(0)
    _leave()


def _check_ports(settings: "ServerSettings") -> None:
    """Whether they can be listened on: told before JAX and the server are imported, for seconds.

    Raises: OSError where one cannot.
    """
    for port in filter(None, (settings.http_port, settings.grpc_port)):
        try:
            family, *_, address = socket.getaddrinfo(
                settings.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            socket.create_server(address, family=family).close()
        except OSError as error:
            raise settings.cannot_listen(port) from error


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
    """For people: what was told beside the message comes after it, as in JSON.

    Not what begins with an underscore: Ray puts its own clock into each record.
    """

    usual = frozenset(vars(logging.makeLogRecord({}))) | {"asctime", "message"}

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = [
            (name, value)
            for name, value in vars(record).items()
            if name not in self.usual and not name.startswith("_")
        ]
        text = logging.Formatter.formatMessage(self, record)
        return " ".join([text, *(f"{name}={value}" for name, value in fields)])
