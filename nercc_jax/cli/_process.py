"""A command's process: settings of the compiler, work on other threads, missing packages."""

import importlib.metadata
import logging
import math
import os
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from ..compilation import enable_compilation_cache

if TYPE_CHECKING:
    import numpy as np

_LOG = logging.getLogger(__name__)

_FEW = 2e11  # operations, which take some seconds on two cores
_EXTRA = ("matplotlib", "rich", "safetensors", "sklearn")  # packages of the extra "demo"


def end(code: Any) -> NoReturn:
    """End the process; at once where Python's own end would crash, hang, or wait for minutes.

    It would crash where JAX is interrupted while compiling (0.10), or where a hung worker's thread
    comes back from compiled code; and wait for a learner of rows, or for the head of a lost Ray.
    """
    threads = [each.name for each in threading.enumerate()]
    ray = sys.modules.get("nercc_jax.pools")
    at_work = any(name.startswith(("nercc-learner", "nercc-worker-")) for name in threads)
    if code in (130, 143) or at_work or (ray is not None and ray.ray_is_lost()):
        leave(code or 0)
    sys.exit(code)


def leave(code: int) -> NoReturn:
    """End the process at once, whatever threads it has."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def keep_programs() -> None:
    """Enable the compilation cache, where its folder can be written to."""
    try:
        folder = enable_compilation_cache()
    except OSError as error:
        _LOG.info("compiled programs are not kept", extra={"why": str(error)})
    else:
        _LOG.info("compiled programs are kept", extra={"folder": str(folder)})


def compile_plainly() -> None:
    """Have XLA compile this process's CPU programs without fusion emitters, before JAX starts.

    Nearly all of a command's time with a small model is compilation: 7.6 s for a step of `nercc
    tune`, and 5.4 s without the fusion emitters, at the same speed (RepVGG, ViT and LeNet5, too).
    Versions that do not know the flag abort at it.
    """
    flag = "--xla_cpu_use_fusion_emitters"
    version = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
    if version < (0, 11) and flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}=false".strip()


def keep_lapack_to_one_thread() -> None:
    """Have OpenBLAS, whose LAPACK JAX calls on CPUs, run on one thread, unless set otherwise.

    Its threads wait busily for the next call, on cores that XLA's own threads then lack. On two
    cores, next to a QR decomposition of 1,024 x 32 numbers, a learner's update and prediction took
    11.8 ms before and 6.4 ms after. A factor of 1,024 rows takes 29 ms on one thread, 33 on two.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def compile_quickly(model: Callable[..., Any], x: "np.ndarray", rows: int) -> bool:
    """Have programs compiled without most of LLVM's optimisations where they have little to do.

    They have little to do if the model, on so many rows in all, takes only seconds on a CPU. With
    `compile_plainly`, a step of `nercc tune` then compiles in 1.6 s, and runs in 33 ms instead of
    6. The number of turns of a loop is not known here, so a model with loops is left alone.

    Return whether they have little to do; on an accelerator, anything is.
    """
    import equinox as eqx
    import jax

    from ..inference.models import call_model

    if jax.default_backend() != "cpu":
        return True
    jitted: Any = eqx.filter_jit(call_model)
    lowered = jitted.lower(model, x[:1]).lowered
    cost: Any = lowered.cost_analysis() or {}
    little = rows * cost.get("flops", math.inf) <= _FEW
    if little and "stablehlo.while" not in lowered.as_text():
        jax.config.update("jax_disable_most_optimizations", True)
    return little


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """Return what to install for a missing package; None if it is none of the extra's."""
    name = str(error.name).partition(".")[0]
    if name not in _EXTRA:
        return None
    return f"nercc needs {name}, which is missing: pip install '.[demo]' in a clone"
