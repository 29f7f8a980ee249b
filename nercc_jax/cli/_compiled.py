"""How a command's programs are compiled, which takes most of the time that a command takes."""

import importlib.metadata
import logging
import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..compilation import enable_compilation_cache

if TYPE_CHECKING:
    import numpy as np

_LOG = logging.getLogger(__name__)

_FEW = 2e11  # operations, which take some seconds on two cores


def keep_programs() -> None:
    """Enable the compilation cache, where its folder can be written to."""
    try:
        folder = enable_compilation_cache()
    except OSError as error:
        _LOG.info("compiled programs are not kept", extra={"why": str(error)})
    else:
        _LOG.info("compiled programs are kept", extra={"folder": str(folder)})


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
