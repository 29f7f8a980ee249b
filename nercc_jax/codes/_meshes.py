"""Coding of arrays that lie on a mesh with Explicit axes, the default of `jax.make_mesh`.

There every operation says how its result is sharded. Coding leaves that to the compiler, in the
Auto mode, and says it of its results only: axes of groups and of coordinates stay as they were, and
the axis of workers or data points is on all devices.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from ._trees import any_tracer


def coded_on_mesh(
    function: Callable[..., PyTree],
    arguments: tuple[PyTree, ...],
    specs: Callable[[Callable[[Any], tuple[Any, ...]]], PyTree],
) -> PyTree:
    """Return `function(*arguments)`, in Auto mode if an array lies on a mesh with Explicit axes.

    Args:
        function: Takes and returns pytrees of arrays.
        arguments: What it takes.
        specs: Returns how the results are sharded, from a function that says of an array by which
            axes each of its dimensions is.
    """
    meshes = {
        mesh
        for leaf in jax.tree.leaves(arguments)
        if isinstance(leaf, jax.Array) and (mesh := jax.typeof(leaf).sharding.mesh).explicit_axes
    }
    if not meshes and any_tracer(arguments):  # an argument of a program may lie nowhere yet
        meshes = {mesh for mesh in [jax.sharding.get_abstract_mesh()] if mesh.explicit_axes}
    if not meshes:
        return function(*arguments)
    mesh = next(iter(meshes))

    def names(leaf: Any) -> tuple[Any, ...]:
        if isinstance(leaf, jax.Array) and (lies := jax.typeof(leaf).sharding).mesh.explicit_axes:
            return tuple(lies.spec)
        return (None,) * leaf.ndim

    axes = tuple(mesh.explicit_axes)
    run = jax.sharding.auto_axes(function, axes=axes, out_sharding=specs(names))
    # Without a mesh in the context, JAX cannot batch a loop over an axis that lies on this one.
    with jax.sharding.use_abstract_mesh(mesh):
        return run(*arguments)
