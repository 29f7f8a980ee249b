"""`nercc serve`: a coded prediction server."""

import contextlib
import dataclasses
import functools
import gc
import importlib.util
import logging
import os
import re
import signal
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._command import Option, fail
from ._options import COMMANDS, Options
from ._process import keep_programs, leave
from ._ray_job import RayJob, leave_accelerators

if TYPE_CHECKING:
    from ..serving._settings import ModelSettings, ServerSettings
    from ..serving.transport._server import Server

_NEEDED = (
    *("fastapi", "grpc", "grpc_health", "httptools", "orjson", "prometheus_client"),
    *("pydantic_settings", "pythonjsonlogger", "uvicorn"),
)
# Seconds that the server may take longer to end than it should.
_MOMENT = 0.25


# A newcomer's options, which come first, in the panel without a title of its own.
_FIRST = ("scheme", "num_data", "num_workers", "pool", "workers", "http_port")


def options() -> list[Option]:
    """Return an option for each setting, which takes a while to import.

    Models are named by `--model`; the flags are the defaults of all of them. Options that `run` has
    with the same words are only listed.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"nercc serve needs {', '.join(missing)}: pip install '.[serve]' in a clone"
        )
    gc.disable()  # imports and programs leave little garbage; `Server` enables it
    from ..serving._settings import ModelSettings, ServerSettings

    several = "Model to serve, as in all commands; repeat it for several (default: lenet5-digits)."
    checked, printed = "Check the settings and the models, and end.", "Print all settings as TOML."
    found = [
        Option("model", list[str], None, several, "Options", ["--model"]),
        Option("config", Path, None, "TOML file with settings.", "Options", ["--config"]),
        Option("check", bool, False, checked, "Options", ["--check"]),
        Option("print_config", bool, False, printed, "Options", ["--print-config"]),
    ]
    same = {(each.name, each.help) for each in COMMANDS["run"].options()}
    for settings in (ModelSettings, ServerSettings):
        panel = ""
        for name, field in settings.model_fields.items():
            panel = settings.panels.get(name, panel)
            if name in ("model", "models", "defaults"):
                continue
            # The first sentence, or as much of it as fits a line; docs/deploy/server.toml has all.
            words = re.match(r".*?[.)](?= [A-Z]|$)", str(field.description), re.DOTALL)
            text, shown = words[0] if words else "", "Options" if name in _FIRST else panel
            if (name, words and words[0]) in same and name not in _FIRST:
                text, shown = "", "As in `nercc run`"
            flag, kind = f"--{name.replace('_', '-')}", field.annotation
            if kind is not bool and ("Literal" not in str(kind) or "dict" in str(kind)):
                kind = str  # as the environment has it; the settings convert it
            flags = [flag, f"--no-{flag[2:]}"] if kind is bool else [flag]
            made = Option(name, kind, field.default, text, shown, flags)
            room = 94 - len(made.line()[1]) + len(text) - max(len(made.line()[0]) - 22, 0)
            short = textwrap.shorten(text, room, placeholder=" ...")
            found.append(dataclasses.replace(made, help=short))
    return found


def serve_models(given: Mapping[str, Any]) -> None:
    """Run the command with the settings of the command line, by name."""
    flags = dict(given)
    names, config = flags.pop("model", ()), flags.pop("config", None)
    check, print_config = flags.pop("check", False), flags.pop("print_config", False)
    try:
        for each in names:
            Options(each)
        settings, chosen = _read(names, config, flags)
        if print_config:
            from ..serving._settings import as_toml

            print(as_toml(settings, chosen))
        elif check:
            from ._serving_models import check_loadable

            settings.tokens()
            settings.tls_pair()
            for each in chosen:
                check_loadable(each)  # without workers
                print(f"{each.served_name} can be served")
        else:
            _run(settings, chosen)
    finally:
        gc.enable()


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
    sys.exit(int(bool(server.lost)))


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
