"""Functions whose algorithm is chosen when a program is lowered, by the platform it is lowered for.

A CPU compiles and runs a loop fastest. An accelerator launches kernels in each turn of a loop, and
wants to do many steps at once. Which one a program needs is known when it is lowered: a
process that has only CPUs may export for a TPU. `jax.lax.platform_dependent` would do, but traces
all its branches, and that of a spline takes as long as the rest of decoding. So `by_platform` is a
primitive: JAX sees one operation, whose function is traced when it is lowered. Derivatives and
batches of the operation are the same operation with one step more, which is applied to the function
at that time, too.

Inside `jax.shard_map` the operation varies over all axes that any of its arguments varies over. Its
function never sees the mesh.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array

Flat = Callable[..., tuple[Array, ...]]
Shape = tuple[tuple[Any, ...], Any]  # an array's, with its dtype


def by_platform(
    function: Callable[..., tuple[Array, ...]],
    options: tuple[Any, ...],
    arguments: Sequence[Array],
    shapes: Sequence[Shape],
) -> tuple[Array, ...]:
    """Return `function(platform, *options, *arguments)`; platforms are "cpu", "tpu" and "other".

    Args:
        function: A pure function that returns arrays of these shapes and dtypes. It is traced when
            the program is lowered, so it must be hashable, and close over no array.
        options: Its further arguments that are hashable.
        arguments: Its arguments that are arrays.
        shapes: The shapes and dtypes of what it returns.
    """
    x64 = bool(jax.config.jax_enable_x64)  # pyright: ignore[reportAttributeAccessIssue]
    return tuple(_bind(_Call(function, options, x64), arguments, shapes))


@dataclasses.dataclass(frozen=True)
class _Call:
    """A function, its options, and the steps that its derivatives and batches have added."""

    function: Callable[..., tuple[Array, ...]]
    options: tuple[Any, ...]
    x64: bool  # whether the caller works in float64
    steps: tuple[Callable[[Flat], Flat], ...] = ()

    def then(self, step: Callable[[Flat], Flat]) -> "_Call":
        return dataclasses.replace(self, steps=(*self.steps, step))

    def on(self, platform: str) -> Flat:
        def flat(*arguments: Array) -> tuple[Array, ...]:
            return self.function(platform, *self.options, *arguments)

        for step in self.steps:
            flat = step(flat)
        return flat


@dataclasses.dataclass(frozen=True)
class _Batched:
    """The function of batches along these axes of its arguments, and axis 0 of its results."""

    axes: tuple[int | None, ...]

    def __call__(self, function: Flat) -> Flat:
        return jax.vmap(function, in_axes=self.axes)


@dataclasses.dataclass(frozen=True)
class _Tangents:
    """The tangents of these outputs, by the arguments and the tangents of those that move."""

    moving: tuple[int, ...]
    outputs: tuple[int, ...]

    def __call__(self, function: Flat) -> Flat:
        def tangents(*given: Array) -> tuple[Array, ...]:
            count = len(given) - len(self.moving)
            primals = given[:count]

            def by_moving(*moved: Array) -> tuple[Array, ...]:
                now = dict(zip(self.moving, moved, strict=True))
                made = function(*(now.get(place, each) for place, each in enumerate(primals)))
                return tuple(made[place] for place in self.outputs)

            return jax.jvp(
                by_moving, tuple(primals[place] for place in self.moving), given[count:]
            )[1]

        return tangents


@dataclasses.dataclass(frozen=True)
class _Cotangents:
    """The cotangents of arguments that a function is linear in, by those of its outputs."""

    linear: tuple[int, ...]
    shapes: tuple[Shape, ...]
    count: int  # of the function's arguments

    def __call__(self, function: Flat) -> Flat:
        fixed = [place for place in range(self.count) if place not in self.linear]

        def cotangents(*given: Array) -> tuple[Array, ...]:
            known = dict(zip(fixed, given, strict=False))

            def by_linear(*linear: Array) -> tuple[Array, ...]:
                now = known | dict(zip(self.linear, linear, strict=True))
                return function(*(now[place] for place in range(self.count)))

            shapes = [jax.ShapeDtypeStruct(*shape) for shape in self.shapes]
            return jax.linear_transpose(by_linear, *shapes)(tuple(given[len(fixed) :]))

        return cotangents


_primitive = Primitive("nercc_by_platform")
_primitive.multiple_results = True


def _bind(call: _Call, arguments: Sequence[Any], shapes: Sequence[Shape]) -> list[Array]:
    shapes = tuple((tuple(shape), jnp.dtype(dtype)) for shape, dtype in shapes)
    return _primitive.bind(*alike_in_shard_map(*arguments), call=call, shapes=shapes)


def alike_in_shard_map(*arrays: Any) -> tuple[Any, ...]:
    """Return the arrays, each varying over all of the manual axes that any of them varies over.

    What a loop carries must do so, for example, where `jax.shard_map` checks it.
    """
    varies = [_varies_over(array) for array in arrays]
    everywhere = frozenset().union(*varies)
    return tuple(
        jax.lax.pcast(array, tuple(everywhere - own), to="varying") if everywhere - own else array
        for array, own in zip(arrays, varies, strict=True)
    )


def _varies_over(array: Any) -> frozenset[str]:
    kind = jax.typeof(array)
    # The name differs between versions of JAX.
    manual = getattr(kind, "manual_axis_type", None)
    return frozenset(kind.vma if manual is None else manual.varying)


@_primitive.def_abstract_eval
def _(*arguments: Any, call: _Call, shapes: tuple[Shape, ...]) -> list[Any]:
    del call
    one = arguments[0]  # all have the mesh, and vary over its axes, alike

    def plain(shape: tuple[Any, ...], dtype: Any) -> Any:
        spec = PartitionSpec(*(None for _ in shape))
        sharding = one.sharding.update(spec=spec)
        return one.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)

    return [plain(*shape) for shape in shapes]


@_primitive.def_impl
def _(*arguments: Any, **parameters: Any) -> list[Array]:
    with jax.disable_jit(False):  # what is chosen by lowering has no other way to run
        return jax.jit(lambda *given: _primitive.bind(*given, **parameters))(*arguments)


@functools.lru_cache(maxsize=256)
def _traced_once(call: _Call, platform: str) -> Flat:
    """Return the function, which is not traced again for the next program that needs it."""
    return jax.jit(call.on(platform), inline=True)


def _lowered_for(platform: str) -> Callable[..., Any]:
    def lower(ctx: Any, *values: Any, call: _Call, shapes: tuple[Shape, ...]) -> Any:
        del shapes
        plain = [ShapedArray(each.shape, each.dtype) for each in ctx.avals_in]
        function = mlir.lower_fun(_traced_once(call, platform))
        no_mesh = jax.sharding.use_abstract_mesh(AbstractMesh((), ()))
        # What the user's own program may not promote (strict dtypes, ranks) is not this function's.
        promotion = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
        with no_mesh, jax.enable_x64(call.x64), promotion[0], promotion[1]:
            return function(ctx.replace(avals_in=plain), *values)

    return lower


mlir.register_lowering(_primitive, _lowered_for("other"))
for _platform in ("cpu", "tpu"):
    mlir.register_lowering(_primitive, _lowered_for(_platform), platform=_platform)


def _batch(arguments: Any, axes: Any, *, call: _Call, shapes: tuple[Shape, ...]) -> Any:
    size = next(
        each.shape[axis] for each, axis in zip(arguments, axes, strict=True) if axis is not None
    )
    batched = [((size, *shape), dtype) for shape, dtype in shapes]
    return _bind(call.then(_Batched(tuple(axes))), arguments, batched), [0] * len(shapes)


batching.primitive_batchers[_primitive] = _batch


def _jvp(primals: Any, tangents: Any, *, call: _Call, shapes: tuple[Shape, ...]) -> Any:
    made = _bind(call, primals, shapes)
    moving = tuple(place for place, each in enumerate(tangents) if not isinstance(each, ad.Zero))
    outputs = tuple(
        place for place, (_, dtype) in enumerate(shapes) if jnp.issubdtype(dtype, jnp.floating)
    )
    found = _bind(
        call.then(_Tangents(moving, outputs)),
        [*primals, *(tangents[place] for place in moving)],
        [shapes[place] for place in outputs],
    )
    by_place = dict(zip(outputs, found, strict=True))
    return made, [
        by_place.get(place, ad.Zero(jax.typeof(each).to_tangent_aval()))
        for place, each in enumerate(made)
    ]


ad.primitive_jvps[_primitive] = _jvp


def _transpose(cotangents: Any, *arguments: Any, call: _Call, shapes: tuple[Shape, ...]) -> Any:
    linear = tuple(place for place, each in enumerate(arguments) if ad.is_undefined_primal(each))
    wanted = tuple((arguments[place].aval.shape, arguments[place].aval.dtype) for place in linear)
    known = [each for place, each in enumerate(arguments) if place not in linear]
    given = [
        ad.instantiate_zeros(each) if isinstance(each, ad.Zero) else each for each in cotangents
    ]
    step = _Cotangents(linear, wanted, len(arguments))
    found = dict(zip(linear, _bind(call.then(step), [*known, *given], wanted), strict=True))
    return [found.get(place) for place in range(len(arguments))]


ad.primitive_transposes[_primitive] = _transpose
