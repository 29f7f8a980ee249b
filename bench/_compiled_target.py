"""Compiling for devices that are not there: jax compiles for a description of them.

Nothing here runs what it compiles. The environment must be set before jax is imported.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import time
from pathlib import Path
from typing import Any

_ENVIRONMENT = {
    "tpu": {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    },
    "cuda": {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""},
}
_NEEDED = {
    "tpu": (("libtpu",), "jax[tpu]"),
    "cuda": (("jax_cuda12_plugin", "jax_cuda13_plugin"), "jax[cuda12]"),
}
CARD = Path(__file__).with_name("h100_sxm.txtpb")


def prepare(platform: str) -> None:
    """Set the environment; raise ImportError that says what to install."""
    modules, package = _NEEDED[platform]
    if not any(importlib.util.find_spec(module) for module in modules):
        raise ImportError(
            f"compiling for {platform} needs {' or '.join(modules)}, which is missing: "
            f"pip install '{package}=={importlib.metadata.version('jax')}'"
        )
    os.environ.update(_ENVIRONMENT[platform])


def devices(platform: str) -> list[Any]:
    """Four described devices: of a TPU v5e, or H100s."""
    # Late, as below: the environment comes first.
    from jax.experimental.topologies import get_topology_desc

    if platform == "tpu":
        return list(get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices)
    card = CARD.read_text()
    described = get_topology_desc(platform="cuda", target_config=card, topology="1x1x4")
    return list(described.devices)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program as it was sent to the compiler and as it came back."""

    seconds: float
    stablehlo: str
    hlo: str
    temp_bytes: int


def compile_program(program: Any, devices: list[Any]) -> Compiled:
    """Compile a `Program` for the first of the devices, or for its mesh.

    What the compiler raises is passed on.
    """
    import equinox as eqx
    import jax
    import numpy as np

    if program.mesh is None:
        where = jax.sharding.SingleDeviceSharding(devices[0])
    else:
        where = jax.sharding.NamedSharding(program.mesh, jax.sharding.PartitionSpec())

    def is_array(leaf: Any) -> bool:
        return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)

    arrays, static = eqx.partition(program.arguments, is_array)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), arrays
    )

    def run(arrays: Any) -> Any:
        return eqx.filter(program.function(*eqx.combine(arrays, static)), eqx.is_array)

    start = time.perf_counter()
    lowered = jax.jit(run).lower(shapes)
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory: Any = compiled.memory_analysis()
    return Compiled(
        seconds, lowered.as_text(), compiled.as_text() or "", int(memory.temp_size_in_bytes)
    )
