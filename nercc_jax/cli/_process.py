"""A command's process: how it exits, and settings of XLA and JAX."""

import contextlib
import importlib.metadata
import os
import sys
import threading
from typing import Any, NoReturn

from ..compilation import enable_compilation_cache


def end(code: Any) -> NoReturn:
    """Exit the process, immediately if Python's normal exit would crash, hang, or take minutes.

    That would crash after JAX was interrupted while compiling (0.10), or when a hung worker's
    thread returns from compiled code; it would wait for a learner's thread, or a lost Ray head.
    """
    threads = [each.name for each in threading.enumerate()]
    ray = sys.modules.get("nercc_jax.pools")
    at_work = any(name.startswith(("nercc-learner", "nercc-worker-")) for name in threads)
    if code in (130, 143) or at_work or (ray is not None and ray.ray_is_lost()):
        leave(code or 0)
    sys.exit(code)


def leave(code: int) -> NoReturn:
    """Exit the process immediately, without waiting for threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def keep_programs() -> None:
    """Enable the compilation cache if its folder is writable."""
    with contextlib.suppress(OSError):
        enable_compilation_cache()


def compile_plainly() -> None:
    """Disable XLA's fusion emitters for this process's CPU programs; call it before JAX starts.

    Nearly all of a command's time with a small model is compilation: 7.6 s for a step of `nercc
    tune`, and 5.4 s without the fusion emitters, at the same speed (RepVGG, ViT and LeNet5, too).
    Versions that do not know the flag would abort.
    """
    flag = "--xla_cpu_use_fusion_emitters"
    version = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
    if version < (0, 11) and flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}=false".strip()


def leave_accelerators() -> None:
    """Keep this process's own JAX on the CPU, unless JAX_PLATFORMS says otherwise.

    Workers are separate processes, and this one would take most of an accelerator's memory.
    """
    import jax

    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
