"""Encoding and decoding of trees of arrays with a code's two matrices, for one group or many.

Nearly always every answer is finite, the decoder is well conditioned and everything is recovered;
then decoding is one product. So the product is computed first, and checked: a value that is not
finite spoils every row of the product (0 * NaN is NaN), so looking at one row is enough.

Outside of any trace, where code, answers and masks are known, the matrices are cached or made on
the host, and one program multiplies and says whether the product is sound. If it is not, the host
decodes in float64, which loses no digit of float32. So a first decode compiles in a fraction of a
second, and a broken answer compiles no regression. In a program, both ways are part of it.

The derivative is that of the plain product: the decoder's matrix for the workers that responded
times their answers, zeros for all others. So a straggler's value reaches no gradient, and no branch
or loop is ever differentiated.

On a mesh with Explicit axes, the default of `jax.make_mesh`, every operation must say how its
result is sharded. Coding runs in Auto mode, where the compiler decides, and only its results have a
sharding: axes of groups and coordinates keep theirs, the axis of workers or data points has none.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree, Shaped

from ..arrays import native, where
from ..splines.platforms import alike_in_shard_map
from .kept import Matrices, kept_matrices
from .trees import any_tracer, join, to_device

# TPUs and GPUs would round the factors of a float32 product.
FULL = jax.lax.Precision.HIGHEST
State = TypeVar("State", bound=PyTree)


class Decoded(eqx.Module):
    """Predictions, and how they were obtained. With groups, every field has a leading axis.

    `recovered` says that answers determine a prediction, not that it is near the model's own: the
    more workers straggle, the larger the error. A prediction is NaN where `recovered` is false.
    `responded` marks the workers whose answers were used: available, and finite in every
    coordinate. `coded_inference` returns all fields in the order of the data points, except
    `responded`, which has a row for each group as it was sent.

    Attributes:
        predictions: Predictions of data points.
        responded: The workers that were used.
        recovered: Whether answers, or a surrogate, determine a prediction.
        deviation: The standard deviation of each prediction, in units of the outputs: 0 where it is
            an answer itself, infinite where nothing is known; None if it was not requested or the
            code has none.
        error_probability: The probability that the label differs from the model's own, 1 where
            nothing is recovered; None without a calibrated `ErrorProbability`.
    """

    predictions: PyTree[Float[Any, "..."]]
    responded: Bool[Any, "... num_workers"]
    recovered: Bool[Any, "..."]
    deviation: Float[Any, "..."] | None = None
    error_probability: Float[Any, "..."] | None = None

    def map_points(self, change: Callable[[Any], Any]) -> "Decoded":
        """Return a copy with `change` applied to all arrays of data points; `responded` stays."""
        parts = self.predictions, self.recovered, self.deviation, self.error_probability
        predictions, recovered, *trust = jax.tree.map(change, parts)
        return Decoded(predictions, self.responded, recovered, *trust)


class PlainMap(eqx.Module):
    """The linear map from answers to predictions for one straggler set, as its matrix.

    Every map that `AbstractCode.decoder_map` returns has a `matrix` and a method `apply`, which
    multiplies it by finite answers in the most accurate way, with the product's derivative.
    """

    matrix: Float[Array, "num_data num_workers"]

    def apply(self, y: Float[Array, "num_workers m"]) -> Float[Array, "num_data m"]:
        """Return matrix @ y."""
        return multiply(self.matrix, y)


def multiply(
    matrix: Float[Array, "... a b"], x: Float[Array, "... b m"]
) -> Float[Array, "... a m"]:
    """Return matrix @ x in x's precision, float32 at least; one matrix may be for many groups."""
    dtype = x.dtype if jnp.finfo(x.dtype).bits > 32 else jnp.float32
    matrix, x = matrix.astype(dtype), x.astype(dtype)
    if x.ndim != 3 or (matrix.ndim == 3 and matrix.shape[0] != 1):
        return jnp.matmul(matrix, x, precision=FULL)
    matrix = matrix.reshape(matrix.shape[-2:])
    if x.shape[0] == 1:
        # Without the barrier XLA may read a matrix that lies in memory by columns, which its CPU
        # product does at half the speed (60 x 20 by 20 x 3,072, and 8 x 20 by 20 x 150,528).
        return jnp.matmul(jax.lax.optimization_barrier(matrix), x[0], precision=FULL)[None]
    # By default XLA makes one product of these, and moves the data for it: 1.9 ms instead of 0.3
    # for 8 x 20 by 64 x 20 x 1,000 on two CPU cores.
    each = jnp.broadcast_to(matrix, (x.shape[0], *matrix.shape))
    return jax.lax.dot_general(each, x, (((2,), (1,)), ((0,), (0,))), precision=FULL)


def encode_groups(
    code: Any,
    x: PyTree[Shaped[Array, "groups num_data ..."]],
    matrix: Float[ArrayLike, "*groups num_workers num_data"] | None = None,
) -> PyTree[Shaped[Array, "groups num_workers ..."]]:
    """Return the coded data points of many groups, in x's dtype.

    `matrix` is the encoder's matrix, if it is known, or one for each group; `code` is then unused.
    """
    if explicit_mesh(code, x, matrix) is not None:

        def spec(leaf: Any) -> PartitionSpec:
            groups, _, *axes = axes_on_mesh(leaf)
            return PartitionSpec(groups, None, *axes)

        return in_auto_mode(encode_groups, (code, x, matrix), jax.tree.map(spec, x))
    leaves, structure = jax.tree.flatten(x)
    with jax.named_scope("nercc.encode"):
        rows = jnp.asarray(code.encoder_matrix() if matrix is None else matrix)
        for number, leaf in enumerate(leaves):
            coded = multiply(rows, leaf.reshape(*leaf.shape[:2], -1)).astype(leaf.dtype)
            leaves[number] = coded.reshape(leaf.shape[0], rows.shape[-2], *leaf.shape[2:])
    return jax.tree.unflatten(structure, leaves)


def decode_groups(
    code: Any,
    y: PyTree[Float[ArrayLike, "..."]],
    available: Bool[ArrayLike, "*masks num_workers"],
    given: Matrices | None = None,
    *,
    one: bool = False,
) -> Decoded:
    """Decode many groups, each with its own workers.

    Answers may be a pytree of arrays; predictions then have the same structure. Within `jax.jit`
    all of it is part of the program; outside, as little as possible is compiled.

    Args:
        code: The code.
        y: The answers of all groups. An unavailable worker's answer may hold anything; an available
            worker whose answer is not finite counts as a straggler in its own group.
        available: The workers of each group that answered, or one mask for all groups.
        given: The decoder's matrices for these workers, where they are known already.
        one: Whether y is one group, (N, ...), with its mask (N,), and so are the predictions.
    """
    if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(y)):
        y = native(y, "y")
    if any_tracer(code, y, available, given):
        return decode_in_program(code, y, available, given, one=one)[0]
    config: Any = jax.config
    # A straggler's NaN in a first product would be taken for a fault.
    debugs = config.jax_debug_nans or config.jax_debug_infs
    masks, kept = np.asarray(available), kept_matrices(code)
    if given is None and kept is not None:
        given = kept.decoders(masks, kept.many_sets)
    if given is None or debugs:
        decoded, sound = None, jnp.zeros((), bool)
    else:
        decoded, sound = _multiply(y, masks, given, one=one)
    if isinstance(sound, Tracer):  # in a trace, of something else
        return decode_in_program(code, y, available, given, one=one)[0]
    if decoded is not None and sound:
        return decoded

    # The host cannot decode if the code has no matrices by NumPy, or answers lie on several hosts.
    # For more straggler sets than are cached, a program makes the matrices faster.
    here = (leaf.is_fully_addressable for leaf in jax.tree.leaves(y) if isinstance(leaf, Array))
    if given is None or kept is None or not all(here):
        return compiled_decode(code, to_device(y), to_device(masks), one=one)
    vectors, form = join(jax.tree.map(np.asarray, to_device(y)), 1 if one else 2)
    vectors, masks = (vectors[None], masks[None]) if one else (vectors, masks)
    responded = masks & np.isfinite(vectors).all(axis=-1)
    dtype = np.result_type(vectors.dtype, np.float32)
    predictions = np.empty((len(vectors), code.num_data, vectors.shape[-1]), dtype)
    recovered, exact = np.empty(predictions.shape[:2], bool), {}
    for group, mask in enumerate(responded):
        if (name := mask.tobytes()) not in exact:
            made = kept.by_numpy("decoder_on_host", mask)
            exact[name] = made, np.any(made != 0, axis=1)
        decoder, recovered[group] = exact[name]
        with np.errstate(over="ignore"):  # it becomes infinite, as in a program
            predictions[group] = decoder[:, mask] @ vectors[group, mask].astype(np.float64)
    predictions[~recovered] = np.nan
    found = predictions, responded, recovered
    predictions, responded, recovered = to_device([each[0] for each in found] if one else found)
    return Decoded(form.split(predictions), responded, recovered)


def decode_in_program(
    code: Any,
    y: PyTree,
    available: ArrayLike,
    given: Matrices | None = None,
    *,
    one: bool = False,
) -> tuple[Decoded, Bool[Array, ""]]:
    """Decode as part of a program; return the predictions and whether they are sound.

    With a code they are always sound. Without one, they are the product with the given matrices.
    Answers are joined to vectors here, and predictions split. Arguments: see `decode_groups`.
    """
    y, available = jax.tree.map(jnp.asarray, y), jnp.asarray(available)
    if explicit_mesh(code, y, available, given) is not None:
        # Predictions lie as the answers along groups and outputs.
        leaves, structure = jax.tree.flatten(y)
        axes, lead = [*map(axes_on_mesh, leaves)], 0 if one else 1
        parts = [PartitionSpec(*each[:lead], None, *each[lead + 1 :]) for each in axes]
        status = PartitionSpec(*axes[0][:lead], None)
        specs = (jax.tree.unflatten(structure, parts), status, status), PartitionSpec()

        def function(*arguments: Any) -> Any:
            made, sound = decode_in_program(*arguments, one=one)
            return (made.predictions, made.responded, made.recovered), sound

        made, sound = in_auto_mode(function, (code, y, available, given), specs)
        return Decoded(*made), sound
    with jax.named_scope("nercc.decode"):
        vectors, form = join(y, 1 if one else 2)
        if one:
            vectors, available = vectors[None], available[None]
        if code is not None:
            made, sound = decode_vectors(code, vectors, available, given), jnp.ones((), bool)
        else:
            assert given is not None
            made, sound = multiplied(vectors, available, given)
        made = Decoded(form.split(made.predictions), made.responded, made.recovered)
        return jax.tree.map(lambda leaf: leaf[0], made) if one else made, sound


@eqx.filter_jit
def compiled_decode(*arguments: Any, one: bool) -> Decoded:
    """Decode in a program of its own; arguments are those of `decode_in_program`."""
    return decode_in_program(*arguments, one=one)[0]


_multiply = jax.jit(
    lambda *args, one: decode_in_program(None, *args, one=one), static_argnames="one"
)


def multiplied(
    y: Float[Array, "groups num_workers m"],
    available: Bool[Array, "groups_or_1 num_workers"],
    given: Matrices,
) -> tuple[Decoded, Bool[Array, ""]]:
    """Decode by the product with these matrices; return also whether that is sound.

    It is sound if all answers in it are finite, the matrices lose no digits, and every data point
    is recovered.
    """
    matrices, recovered = jnp.asarray(given.decoder), jnp.asarray(given.recovered)
    predictions = multiply(matrices, y)
    finite = jnp.all(jnp.isfinite(predictions[:, 0]))
    sound = finite & is_steady(matrices) & jnp.all(recovered)
    responded = jnp.broadcast_to(available, (y.shape[0], available.shape[1]))
    recovered = jnp.broadcast_to(recovered, predictions.shape[:2])
    return Decoded(predictions, responded, recovered), sound


def is_steady(matrices: Float[Array, "*sets num_data num_workers"]) -> Bool[Array, ""]:
    """Return whether the product with these matrices loses no digits.

    If the magnitudes of a row sum to more than 32, the product loses digits that the regression
    itself keeps: two close workers then determine the spline in a wide gap, and their entries are
    large and of opposite sign. 32 roundings of a unit are 2e-6 in float32.
    """
    return jnp.max(jnp.sum(jnp.abs(matrices), axis=-1), initial=0) <= 32


def decode_vectors(
    code: Any,
    y: Float[Array, "groups num_workers m"],
    available: Bool[Array, "groups_or_1 num_workers"],
    given: Matrices | None = None,
) -> Decoded:
    """Decode the answers of many groups in a program, each with its own workers.

    With one mask for all groups there is one matrix. A worker whose answer is not finite counts as
    a straggler in that group only.

    `given` are the matrices for these workers where they are known already. They are computed again
    for a derivative, which is also with respect to the code, and where an answer is not finite.
    """
    return _decoded(*alike_in_shard_map((code, y, available, given)))


@eqx.filter_custom_jvp
def _decoded(code: Any, y: Array, available: Array, given: Matrices | None) -> Any:
    leaves, rest = eqx.partition(code, eqx.is_array)

    def decode(leaves: Any, y: Array, available: Array, given: Matrices | None) -> Decoded:
        own = eqx.combine(leaves, rest)
        if given is None:
            maps, recovered = _fitted(own, available)
            given = Matrices(maps.matrix, recovered)
        attempt, sound = multiplied(y, available, given)
        return _unless(sound, attempt, lambda: _carefully(own, y, available, seldom=True))

    # `jax.vmap` gives it more groups. By default both ways would be computed for every group, and
    # one selected: 64 groups of (100, 20) and 1,000 coordinates took 80 ms on two CPU cores, and 8
    # ms by `decode_groups`.
    merged = jax.custom_batching.custom_vmap(decode)

    @merged.def_vmap
    def _(size: int, batched: Any, leaves: Any, y: Array, available: Array, given: Any) -> Any:
        of_leaves, of_y, of_mask, of_given = batched
        groups = y.shape[int(of_y)]

        def merge(leaf: Array, own: bool) -> Array:
            leaf = leaf if own else leaf[None]
            leaf = jnp.broadcast_to(leaf, (size, groups, *leaf.shape[2:]))
            return leaf.reshape(size * groups, *leaf.shape[2:])

        # Each group may have a code of its own; and groups that share a set have one matrix.
        shared = of_mask and not of_y and available.shape[1] == 1 != groups
        if any(jax.tree.leaves(of_leaves)) or shared:
            axes = jax.tree.map(lambda own: 0 if own else None, tuple(batched))
            found = jax.vmap(decode, axes, axis_size=size)(leaves, y, available, given)
        else:
            one_for_all = given is not None and not of_given.decoder and len(given.decoder) == 1
            given = given if one_for_all else jax.tree.map(merge, given, of_given)
            one_mask = not of_mask and available.shape[0] == 1
            available = available if one_mask else merge(available, of_mask)
            found = merged(leaves, merge(y, of_y), available, given)
            found = jax.tree.map(lambda leaf: leaf.reshape(size, groups, *leaf.shape[1:]), found)
        return found, jax.tree.map(lambda _: True, found)

    return merged(leaves, y, available, given)


@_decoded.def_jvp
def _(primals: Any, tangents: Any) -> Any:
    # Differentiate only what has a tangent: a code's derivative is half of the program.
    (*values, available, _), changes = primals, tangents[:2]
    moves = jax.tree.map(lambda change: change is not None, changes, is_leaf=lambda t: t is None)
    moving, still = eqx.partition(tuple(values), moves)

    def of_moving(moving: Any) -> Decoded:
        code, y = eqx.combine(moving, still)
        return _carefully(code, y, available)

    return jax.jvp(of_moving, (moving,), (changes,))


def _carefully(code: Any, y: Array, available: Array, *, seldom: bool = False) -> Decoded:
    """Decode answers of which some may be broken, or whose matrix would lose digits.

    `seldom` is for a branch that few calls take and that is not differentiated. It decodes group by
    group, since every call allocates the memory of all branches: all groups at once needed 74 MiB
    instead of 6 for 64 groups of (100, 20) and 1,000 coordinates, and every call took 11.0 ms
    instead of 9.0 on two CPU cores.
    """

    def of_group(group: tuple[Any, ...]) -> Array:
        own, y, responded, recovered = group
        clean = where(responded[:, None], y, 0)
        clean = clean.astype(y.dtype if jnp.finfo(y.dtype).bits > 32 else jnp.float32)

        def accurately(y: Array) -> Array:
            return where(recovered[:, None], own.apply(y), jnp.nan)

        def as_needed(y: Array) -> Array:
            matrix = where(recovered[:, None], own.matrix, jnp.nan)  # and so is a row's product
            attempt = multiply(matrix[None], y[None])[0]
            return _unless(is_steady(own.matrix), attempt, lambda: accurately(y))

        if not seldom:
            return accurately(clean)
        # On an accelerator, waiting for the condition takes longer than the accurate way itself.
        return jax.lax.platform_dependent(clean, cpu=as_needed, default=accurately)

    responded = available & jnp.all(jnp.isfinite(y), axis=-1)
    maps, recovered = _fitted(code, responded)
    groups = maps, y, responded, recovered
    if y.shape[0] == 1:
        predictions = of_group(jax.tree.map(lambda leaf: leaf[0], groups))[None]
    elif not seldom:
        predictions = jax.vmap(of_group)(groups)
    else:
        predictions = jax.lax.map(of_group, groups)
    return Decoded(predictions, responded, recovered)


@eqx.filter_jit  # so that a program that needs it twice holds it once
def _fitted(code: Any, responded: Bool[Array, "sets num_workers"]) -> tuple[Any, Array]:
    """Return the decoder's map of each set, and what it recovers."""

    def of_mask(mask: Bool[Array, " num_workers"]) -> tuple[Any, Array]:
        return code.decoder_map(mask), code.recovered(mask)

    if responded.shape[0] == 1:  # fewer operations to compile than of a batch
        return jax.tree.map(lambda leaf: leaf[None], of_mask(responded[0]))
    return jax.vmap(of_mask)(responded)


def _unless(sound: Bool[Array, ""], attempt: State, otherwise: Callable[[], State]) -> State:
    """Return the attempt if it is sound, else the result of `otherwise`.

    This is `jax.lax.cond` as a loop of zero or one turns: XLA reuses a loop's buffers, and copies
    those of a branch (150,528 coordinates from 20 workers on two CPU cores: 1.2 ms instead of 2.9,
    of which the product takes 0.7). Also, under `jax.vmap` a `cond` always computes both branches.
    To avoid copies, the attempt is made before the loop, and not in its first turn.
    """
    done = jnp.ones_like(sound)
    return jax.lax.while_loop(
        lambda state: ~state[1], lambda _: (otherwise(), done), (attempt, sound)
    )[0]


def explicit_mesh(*trees: PyTree) -> Any:
    """Return the mesh with Explicit axes that an array lies on, or else None."""
    for leaf in jax.tree.leaves(trees):
        here = isinstance(leaf, jax.Array)
        if here and (mesh := jax.typeof(leaf).sharding.mesh).explicit_axes:
            return mesh
    # An argument of a program may have no sharding yet.
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.explicit_axes and any_tracer(trees) else None


def axes_on_mesh(leaf: Any) -> tuple[Any, ...]:
    """Return the Explicit axes of a mesh along which each dimension of an array is sharded."""
    if isinstance(leaf, jax.Array) and (lies := jax.typeof(leaf).sharding).mesh.explicit_axes:
        return tuple(lies.spec)
    return (None,) * leaf.ndim


def in_auto_mode(
    function: Callable[..., PyTree], arguments: tuple[PyTree, ...], specs: PyTree
) -> PyTree:
    """Return `function(*arguments)`, with results sharded by `specs` if an array is on a mesh."""
    if (mesh := explicit_mesh(arguments)) is None:
        return function(*arguments)
    arrays, rest = eqx.partition(arguments, eqx.is_array)
    axes = tuple(mesh.explicit_axes)
    run = jax.sharding.auto_axes(
        lambda arrays: function(*eqx.combine(arrays, rest)), axes=axes, out_sharding=specs
    )
    # Without a mesh in the context, JAX cannot batch a loop over an axis that lies on this one.
    with jax.sharding.use_abstract_mesh(mesh):
        return run(arrays)
