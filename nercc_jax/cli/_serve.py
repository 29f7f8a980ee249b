"""`nercc serve`: a coded prediction server."""

import contextlib
import functools
import gc
import importlib.util
import inspect
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._command import PlainCommand, parameter
from ._errors import fail, report_errors
from ._options import Options
from ._process import keep_programs, leave
from ._ray_job import RayJob, end_at_once, leave_accelerators

if TYPE_CHECKING:
    from ..serving._settings import ModelSettings, ServerSettings
    from ..serving.transport._server import Server

_NEEDED = (
    *("fastapi", "grpc", "grpc_health", "httptools", "orjson", "prometheus_client"),
    *("pydantic_settings", "pythonjsonlogger", "uvicorn"),
)
# Seconds that the server may take longer to end than it should.
_MOMENT = 0.25


def serve_command(arguments: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Serve models behind a code: Open Inference Protocol, REST and gRPC.

    Clients' queries are coded in groups; one whose worker straggles is decoded
    from the others' answers, and its response says so, or it is sent again. All
    settings can also be given by environment (NERCC_...) and file; flags come
    first. SIGTERM answers what was accepted, and ends. It listens at once, and
    says that it is ready once its models are compiled.
    """
    # Imports and programs leave little garbage, and to look for it takes a tenth of a start. Once
    # the server is ready, it looks again.
    gc.disable()
    try:
        with report_errors():
            missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
            if missing:
                raise ImportError(
                    f"nercc serve needs {', '.join(missing)}: pip install '.[serve]' in a clone"
                )
        command_with_options()(arguments or [], prog_name="nercc serve")
    finally:
        gc.enable()


# A newcomer's options, which come first, in the panel without a title of its own.
_FIRST = ("scheme", "num_data", "num_workers", "pool", "workers", "http_port")
# Models are named by `--model`; the flags are the defaults of all of them.
_NO_FLAGS = {"model", "models", "defaults"}


def command_with_options() -> Any:
    """Return Typer's command, with an option for each setting, which takes a while to import."""
    from pydantic import BeforeValidator

    from ..serving._settings import ModelSettings, ServerSettings

    several = (
        "Model to serve, as in all commands; repeat it for several (default: lenet5-digits, unless "
        "the environment or --config name any)."
    )
    checked, printed = "Check the settings and the models, and end.", "Print all settings as TOML."
    found = [
        parameter("model", list[str] | None, None, several, "Options"),
        parameter("config", Path | None, None, "TOML file with settings.", "Options"),
        parameter("check", bool, False, checked, "Options", "--check"),
        parameter("print_config", bool, False, printed, "Options", "--print-config"),
    ]
    for settings in (ModelSettings, ServerSettings):
        panel = ""
        for name, field in settings.model_fields.items():
            panel = settings.panels.get(name, panel)
            kind, default = field.annotation, field.default
            if any(isinstance(each, BeforeValidator) for each in field.metadata):
                kind, default = str, default or None  # it reads text by itself
            if name not in _NO_FLAGS:
                # The first sentence; docs/deploy/server.toml has all of it.
                text = re.match(r".*?[.)](?= [A-Z]|$)", str(field.description), re.DOTALL)
                shown = "Options" if name in _FIRST else panel
                found.append(parameter(name, kind, default, text[0] if text else "", shown))

    def call(ctx, **arguments):  # Typer takes types from here before it looks at the signature
        given = {n for n in arguments if ctx.get_parameter_source(n).name == "COMMANDLINE"}
        _serve(**{name: arguments[name] for name in given})

    ctx = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    call.__signature__ = inspect.Signature([*found, ctx])  # pyright: ignore
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=serve_command.__doc__, cls=PlainCommand)(call)
    return typer.main.get_command(app)


def _serve(
    model: Sequence[str] = (),
    config: Path | None = None,
    check: bool = False,
    print_config: bool = False,
    **flags: Any,
) -> None:
    """Run the command; `flags` are the settings on the command line, by name."""
    with report_errors():
        for each in model:
            Options(each)
        settings, chosen = _read(model, config, flags)
        if print_config:
            from ..serving._settings import as_toml

            typer.echo(as_toml(settings, chosen))
        elif check:
            from ._serving_models import check_loadable

            settings.tokens()
            settings.tls_pair()
            for each in chosen:
                check_loadable(each)  # without workers
                typer.echo(f"{each.served_name} can be served")
        else:
            _run(settings, chosen)


def _read(
    names: Sequence[str], config: Path | None, flags: dict[str, Any]
) -> "tuple[ServerSettings, list[ModelSettings]]":
    """Return the settings of the server and of each model, from all sources.

    Raises:
        ValueError: for settings that are wrong.
        ImportError: where a pool's package is missing.
    """
    from ..serving._settings import ModelSettings, read_settings

    of_all = {name: each for name, each in flags.items() if name in ModelSettings.model_fields}
    try:
        settings = read_settings(config, model=names, **flags)
    except ValueError as error:
        message = str(error)
        for name in flags:
            flag = f"--{name.replace('_', '-')}: "
            message = re.sub(rf"(?:(?<=; )|^)(?:defaults\.)?{name}: ", flag, message)
        raise ValueError(message) from error
    if not settings.models:
        settings.models = [ModelSettings(model="lenet5-digits")]
    # Flags come before what a file says of one model, too.
    chosen = [ModelSettings(**of_all).over(each) for each in settings.resolved()]
    if any(each.pool == "ray" for each in chosen) and importlib.util.find_spec("ray") is None:
        raise ImportError("--pool ray needs Ray: pip install '.[ray]' in a clone")
    return settings, chosen


def _run(settings: "ServerSettings", chosen: "list[ModelSettings]") -> None:
    """Serve until the end. Raises ValueError and OSError where something does not fit."""
    job = RayJob(settings.address, settings.working_dir, settings.py_modules, settings.runtime_env)
    _start_log(settings.log_format, settings.log_level)
    _check_ports(settings)
    with contextlib.suppress(ImportError, OSError, ValueError):  # ImportError: Windows
        import resource

        # As many files as this process may open: connections are files.
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if all(each.pool == "ray" for each in chosen):
        leave_accelerators()
    if settings.compilation_cache:
        keep_programs()
    # Until the server listens; as a container's first process it would be ignored.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    from prometheus_client import CollectorRegistry

    from ..serving.transport._server import Server
    from ._serving_models import StartFailed, starts_of

    registry = CollectorRegistry()
    try:
        join = functools.cache(lambda: job.connect([str(each.model) for each in chosen]))
        server = Server(starts_of(chosen, registry, join), settings, registry)
        with _leaving_in_time(server):
            server.run()
    except StartFailed as error:
        fail(str(error), 1)
    code = int(bool(server.lost))
    end_at_once(code)
    if any(thread.name.startswith("nercc-worker-") for thread in threading.enumerate()):
        # Python's own end stops a hung worker's thread when it comes back from compiled code, and
        # XLA aborts then.
        leave(code)
    sys.exit(code)


def _check_ports(settings: "ServerSettings") -> None:
    """Raise OSError where a port cannot be listened on, before JAX is imported for seconds."""
    for port in filter(None, (settings.http_port, settings.grpc_port)):
        try:
            family, *_, address = socket.getaddrinfo(
                settings.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            socket.create_server(address, family=family).close()
        except OSError as error:
            raise settings.cannot_listen(port) from error


@contextlib.contextmanager
def _leaving_in_time(server: "Server") -> Iterator[None]:
    """End the process should the server not have ended a moment after it should have."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_MOMENT):
            if time.monotonic() > server.ends_by + _MOMENT:
                logging.getLogger(__name__).warning("ending with something left behind")
                leave(1)

    threading.Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _start_log(log_format: str, level: str) -> None:
    """Log to stderr: a JSON object a line, or text for people."""
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
    # gRPC's core would write lines of its own; exceptions report what matters of them.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # Uvicorn's word for each step of its life says less than ours; JAX misses TPUs everywhere.
    for name in ("uvicorn", "jax._src.xla_bridge"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level)))


class _WithFields(logging.Formatter):
    """A format for people, with the fields that JSON would have after the message.

    Fields that begin with an underscore are left out: Ray puts its own clock into each record.
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
