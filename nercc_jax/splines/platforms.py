"""Functions whose algorithm depends on the platform for which a program is lowered.

A CPU compiles and runs a loop fastest. An accelerator launches kernels in each turn of a loop, so
there it is faster to do many steps at once. Only lowering decides which platform a program is for:
a process that has only CPUs may export for a TPU. `jax.lax.platform_dependent` traces all its
branches, and tracing a spline's takes as long as the rest of decoding. So `by_platform` is a
primitive: JAX sees one operation, whose function is traced when it is lowered. A batch of the
operation is the same operation under one more `jax.vmap`. It has no derivative.

Inside `jax.shard_map` the operation varies over all axes over which any of its arguments varies.
Its function never sees the mesh.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, PyTree

Tree = TypeVar("Tree")
Shape = tuple[tuple[Any, ...], Any]  # an array's, with its dtype


class _Call(NamedTuple):
    """A function, its options, and the batch axes of its leaves for each `jax.vmap`."""

    function: Callable[..., tuple[Array, ...]]
    options: tuple[Any, ...]
    structure: Any  # of the arguments
    x64: bool  # whether the caller works in float64
    axes: tuple[tuple[int | None, ...], ...] = ()


_primitive = Primitive("nercc_by_platform")
_primitive.multiple_results = True


def by_platform(
    function: Callable[..., tuple[Array, ...]],
    options: tuple[Any, ...],
    arguments: tuple[PyTree[Array], ...],
    shapes: Sequence[Shape],
) -> tuple[Array, ...]:
    """Return `function(platform, *options, *arguments)`; platforms are "cpu", "tpu" and "other".

    Derivatives stop here.

    Args:
        function: A pure function that returns arrays of these shapes and dtypes. It is traced when
            the program is lowered, so it must be hashable, and close over no array.
        options: Its hashable arguments.
        arguments: Its arguments that are pytrees of arrays.
        shapes: The shapes and dtypes of its results.
    """
    x64 = bool(jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]
    leaves, structure = jax.tree.flatten(jax.lax.stop_gradient(arguments))
    return tuple(_bind(_Call(function, options, structure, x64), leaves, shapes))


def _bind(call: _Call, arguments: Sequence[Any], shapes: Sequence[Shape]) -> list[Array]:
    shapes = tuple((tuple(shape), jnp.dtype(dtype)) for shape, dtype in shapes)
    return _primitive.bind(*alike_in_shard_map(list(arguments)), call=call, shapes=shapes)


def alike_in_shard_map(tree: Tree) -> Tree:
    """Return the tree with every array varying over all manual axes over which any of them varies.

    Inside `jax.shard_map`, the arrays that a loop carries must do so, for example.
    """
    varies: dict[int, frozenset[str]] = {}
    for array in filter(eqx.is_array, jax.tree.leaves(tree)):
        kind = jax.typeof(array)
        # The name differs between versions of JAX.
        manual = getattr(kind, "manual_axis_type", None)
        varies[id(array)] = frozenset(kind.vma if manual is None else manual.varying)
    everywhere = frozenset().union(*varies.values())

    def spread(leaf: Any) -> Any:
        missing = everywhere - varies.get(id(leaf), everywhere)
        return jax.lax.pcast(leaf, tuple(missing), to="varying") if missing else leaf

    return jax.tree.map(spread, tree)


def unsharded(*arrays: Any) -> tuple[Any, ...]:
    """Return the arrays resharded so that no Explicit axis of a mesh shards them."""
    return tuple(
        jax.sharding.reshard(array, PartitionSpec(*(None for _ in array.shape)))
        if any(axis is not None for axis in jax.typeof(array).sharding.spec)
        else array
        for array in arrays
    )


@_primitive.def_abstract_eval
def _(*arguments: Any, call: _Call, shapes: tuple[Shape, ...]) -> list[Any]:
    del call
    one = arguments[0]  # all have the mesh, and vary over its axes, alike
    found = []
    for shape, dtype in shapes:
        sharding = one.sharding.update(spec=PartitionSpec(*(None for _ in shape)))
        found.append(one.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding))
    return found


@_primitive.def_impl
def _(*arguments: Any, **parameters: Any) -> list[Array]:
    with jax.disable_jit(False):  # only lowering chooses the algorithm
        return jax.jit(lambda *given: _primitive.bind(*given, **parameters))(*arguments)


def _batch(arguments: Any, axes: Any, *, call: _Call, shapes: tuple[Shape, ...]) -> Any:
    size = next(
        each.shape[axis] for each, axis in zip(arguments, axes, strict=True) if axis is not None
    )
    batched = [((size, *shape), dtype) for shape, dtype in shapes]
    call = call._replace(axes=(*call.axes, tuple(axes)))
    return _bind(call, arguments, batched), [0] * len(shapes)


batching.primitive_batchers[_primitive] = _batch


@functools.lru_cache(maxsize=256)
def _traced_once(call: _Call, platform: str) -> Callable[..., tuple[Array, ...]]:
    """Return the function for a platform, traced once for all programs that use it."""

    def flat(*leaves: Array) -> tuple[Array, ...]:
        arguments = jax.tree.unflatten(call.structure, leaves)
        return call.function(platform, *call.options, *arguments)

    for axes in call.axes:
        flat = jax.vmap(flat, in_axes=axes)
    return jax.jit(flat, inline=True)


def _lower(ctx: Any, *values: Any, platform: str, call: _Call, shapes: tuple[Shape, ...]) -> Any:
    del shapes
    plain = [ShapedArray(each.shape, each.dtype) for each in ctx.avals_in]
    function = mlir.lower_fun(_traced_once(call, platform))
    no_mesh = jax.sharding.use_abstract_mesh(AbstractMesh((), ()))
    # The user's own rules of promotion (strict dtypes, ranks) do not apply to this function.
    promotion = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with no_mesh, jax.enable_x64(call.x64), promotion[0], promotion[1]:
        return function(ctx.replace(avals_in=plain), *values)


mlir.register_lowering(_primitive, functools.partial(_lower, platform="other"))
for _platform in ("cpu", "tpu"):
    _lowering = functools.partial(_lower, platform=_platform)
    mlir.register_lowering(_primitive, _lowering, platform=_platform)
