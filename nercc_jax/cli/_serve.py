"""`nercc serve`: a coded prediction server."""

import functools
import importlib.util
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._command import Option, fail
from ._options import Options
from ._process import keep_programs, leave, leave_accelerators

_NEEDED = (
    *("grpc", "httptools", "orjson", "prometheus_client", "pydantic_settings"),
    *("pythonjsonlogger", "starlette", "uvicorn"),
)
# The most common settings, which come first in `--help`.
_FIRST = ("scheme", "num_data", "num_workers", "pool", "workers", "http_port")


def options() -> list[Option]:
    """Return an option for each setting; importing the settings takes a while.

    `--model` names the models; the other flags are defaults for all of them.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"nercc serve needs {', '.join(missing)}: pip install '.[serve]' in a clone"
        )
    from ..serving import ModelSettings, ServerSettings

    several = "Model to serve, as in all commands; repeat it for several (default: lenet5-digits)."
    checked, printed = "Check the settings and the models, and end.", "Print all settings as TOML."
    found = [
        Option("model", list[str], None, several, "Options", ["--model"]),
        Option("config", Path, None, "TOML file with settings.", "Options", ["--config"]),
        Option("check", bool, False, checked, "Options", ["--check"]),
        Option("print_config", bool, False, printed, "Options", ["--print-config"]),
    ]
    for settings in (ModelSettings, ServerSettings):
        panel = ""
        for name, field in settings.model_fields.items():
            panel = settings.panels.get(name, panel)
            if name in ("model", "models", "defaults"):
                continue
            # The first sentence only; docs/deploy/server.toml has the full text.
            words = re.match(r".*?[.)](?= [A-Z]|$)", str(field.description), re.DOTALL)
            text, shown = words[0] if words else "", "Options" if name in _FIRST else panel
            flag, kind = f"--{name.replace('_', '-')}", field.annotation
            if kind is not bool and ("Literal" not in str(kind) or "dict" in str(kind)):
                kind = str  # text, as in the environment; the settings convert it
            flags = [flag, f"--no-{flag[2:]}"] if kind is bool else [flag]
            found.append(Option(name, kind, field.default, text, shown, flags))
    return found


def serve_models(given: Mapping[str, Any]) -> None:
    """Serve models behind a code, by the Open Inference Protocol over REST and gRPC.

    Settings also come from the environment (NERCC_...) and a file (docs/deploy/server.toml has
    all); flags take precedence. After SIGTERM, accepted requests are answered before the end.
    """
    from ..serving import ModelSettings
    from ..serving.settings import as_toml, read_settings

    flags = dict(given)
    names, config = flags.pop("model", ()), flags.pop("config", None)
    check, print_config = flags.pop("check", False), flags.pop("print_config", False)
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
    # Flags take precedence over a file's settings of a single model, too.
    chosen = [ModelSettings(**of_all).over(each) for each in settings.resolved()]
    if print_config:
        return print(as_toml(settings, chosen))
    for each in chosen:
        Options(str(each.model), pool=each.pool)  # reports errors before JAX is imported
    if check:
        from ._serving_models import load_parts

        settings.tokens()
        settings.tls_pem()
        for each in chosen:
            load_parts(each)  # without workers
            print(f"{each.served_name} can be served")
        return None

    _start_log()
    if all(each.pool == "ray" for each in chosen):
        leave_accelerators()
    keep_programs()
    # Until the server handles signals itself: a container's first process ignores SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    from prometheus_client import CollectorRegistry

    from ..pools.ray_cluster import join_ray
    from ..serving import Server
    from ._serving_models import StartFailed, starts_of

    registry, moment = CollectorRegistry(), 0.25
    join = functools.cache(lambda: join_ray(settings.address, settings.runtime_env))
    server = Server(starts_of(chosen, registry, join), settings, registry)

    def watch() -> None:
        """Exit the process if the server has not ended a moment after `ends_by`."""
        while time.monotonic() <= server.ends_by + moment:
            time.sleep(moment)
        logging.getLogger(__name__).warning("ending with something left behind")
        leave(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        server.run()
    except StartFailed as error:
        fail(str(error), 1)
    sys.exit(int(bool(server.lost)))


def _start_log() -> None:
    """Log to stderr, one JSON object a line."""
    from pythonjsonlogger.json import JsonFormatter

    renamed = {"asctime": "time", "levelname": "level", "name": "logger"}
    fields = "%(asctime)s %(levelname)s %(name)s %(message)s"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(fields, rename_fields=renamed))
    # gRPC's core would write lines that are not JSON; exceptions report what matters.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # Uvicorn's messages repeat the server's own; JAX warns of missing TPUs on every machine.
    for name in ("uvicorn", "jax._src.xla_bridge"):
        logging.getLogger(name).setLevel(logging.WARNING)
