"""Compiled programs are kept between runs: to compile them is most of a start's time."""

import contextlib
import hashlib
import logging
import os
import platform
import sys
from pathlib import Path
from typing import Any

_LOG = logging.getLogger(__name__)


def keep_programs() -> None:
    """Tells JAX, here and in processes that are started from here, to keep what it compiles.

    In the folder JAX_COMPILATION_CACHE_DIR, or else in the user's cache folder, if there is one
    that can be written to. Before JAX compiles anything.
    """
    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = _cache_folder()
    try:
        told = _tell_processes(folder)
    except OSError as error:
        _LOG.info(
            "compiled programs are not kept", extra={"folder": str(folder), "why": str(error)}
        )
        return
    for name, value in told.items():
        jax.config.update(name, value)
    _LOG.info("compiled programs are kept", extra={"folder": str(folder)})


def keep_programs_of_commands() -> None:
    """As `keep_programs`, by the environment alone: JAX is not imported for a command's help.

    Where JAX is imported already, whoever did that says what is kept.
    """
    if "jax" in sys.modules or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    with contextlib.suppress(OSError):
        _tell_processes(_cache_folder())


def _tell_processes(folder: Path) -> dict[str, Any]:
    """Makes the folder, and leaves JAX's settings in the environment. Returns them.

    Raises: OSError where it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told = {
        "jax_compilation_cache_dir": str(folder),
        # Also the many that compile within a second: together they are the most.
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    os.environ.update({name.upper(): str(value) for name, value in told.items()})
    return told


def _cache_folder() -> Path:
    """One for each kind of processor: homes are shared, and programs are made for one."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    processor = hashlib.sha256(_processor().encode()).hexdigest()[:8]
    return Path(base) / "nercc_jax" / f"programs-{processor}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    told = ("vendor_id", "model name", "flags", "Features", "CPU part")
    return "".join(sorted({line for line in lines if line.startswith(told)}))
