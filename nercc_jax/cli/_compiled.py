"""Compiled programs are kept between runs: to compile them is most of a start's time."""

import contextlib
import hashlib
import importlib.metadata
import logging
import math
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_LOG = logging.getLogger(__name__)

_FEW = 2e11  # operations, which take some seconds on two cores


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


def compile_plainly() -> None:
    """Has XLA's CPU programs of this process made the plainer way, before JAX starts a backend.

    Nearly all of a command's time with a small model is compilation: of a step of `nercc tune` 7.6
    s, and 5.4 s without the fusion emitters, at the same speed (RepVGG, ViT and LeNet5, too).
    Versions that do not know the flag abort at it.
    """
    flag = "--xla_cpu_use_fusion_emitters"
    version = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
    if version < (0, 11) and flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}=false".strip()


def keep_lapack_to_one_thread() -> None:
    """Has OpenBLAS, whose LAPACK JAX calls on CPUs, run on one thread, unless it is told otherwise.

    Its threads wait busily for the next call, on the cores that XLA's own then lack: on two cores,
    beside a QR decomposition of 1,024 x 32 numbers, a learner's update and prediction took 11.8 ms,
    and take 6.4. A factor of 1,024 rows takes 29 ms on one thread, and 33 on two.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def compile_quickly(model: Callable[..., Any], x: "np.ndarray", rows: int) -> bool:
    """Has programs compiled without most of LLVM's optimisations where they have little to do.

    Returns whether that is so.

    That is where a model, which runs on `rows` like those of `x` in all, takes but seconds on a
    CPU. Beside `compile_plainly` a step of `nercc tune` then compiles in 1.6 s, and runs in 33 ms
    instead of 6. How often a loop turns is not known here, so a model with loops is left alone.
    """
    import equinox as eqx
    import jax

    if jax.default_backend() != "cpu":
        return False
    jitted: Any = eqx.filter_jit(model)
    lowered = jitted.lower(x[:1]).lowered
    cost: Any = lowered.cost_analysis() or {}
    few = "stablehlo.while" not in lowered.as_text() and rows * cost.get("flops", math.inf) <= _FEW
    if few:
        jax.config.update("jax_disable_most_optimizations", True)
    return few


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
