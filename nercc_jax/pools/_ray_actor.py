"""What runs in the process of one of Ray's workers."""

import dataclasses
import os
import signal
import threading
from typing import Any

import jax
from jaxtyping import PyTree

from ._ray_cluster import ray_module
from ._ray_weights import Packed
from ._worker import Program, Worker, warm_up


@dataclasses.dataclass(frozen=True)
class Whereabouts:
    """Where a worker is: its process, JAX's platform there, and Ray's node."""

    process: int
    platform: str
    node: str


class Actor:
    """A worker: there as soon as Ray has found it a place, and ready once it has loaded."""

    def where(self) -> Whereabouts:
        """Where it is."""
        node = ray_module().get_runtime_context().get_node_id()
        return Whereabouts(os.getpid(), jax.default_backend(), node)

    def load(self, load: Packed, precision: tuple[Any, Any], worker: int, life: int) -> None:
        """Takes the models, and compiles them."""
        x64, products = precision
        jax.config.update("jax_enable_x64", x64)
        jax.config.update("jax_default_matmul_precision", products)
        models, example, compiled, faults = _unpack(load)
        self._program = Program(models, jax.local_devices()[0], compiled)
        warm_up([self._program], len(models), example)
        self._worker = Worker(self._program, faults, worker, life, _die)

    def run(self, kind: int, batch: PyTree) -> PyTree:
        """Answers a batch, from model `kind`."""
        with self._program.at_home():
            return self._worker(kind, batch)

    def wait_for_death(self) -> None:
        """Never answers: the caller hears when this process is gone."""
        threading.Event().wait()


def _unpack(load: Packed) -> Any:
    try:
        return load.unpack()
    except ImportError as error:
        raise RuntimeError(cannot_import(str(error), f"node {_address()}")) from error


def cannot_import(reason: str, where: str) -> str:
    """What is told where a worker cannot import what it needs."""
    return (
        f"a worker cannot import what it needs on {where}: {reason}. Install it there, or send it "
        "along: --working-dir FOLDER or --py-modules FOLDER of `nercc`, runtime_env={'working_dir':"
        " FOLDER} of RayPool or ray.init"
    )


def _address() -> str:
    return ray_module().util.get_node_ip_address()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
