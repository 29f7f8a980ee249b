"""Encoding and decoding of what users have: trees of arrays, of one group or of many.

Where code, answers and masks are at hand, outside of any trace, decoding is nothing but a product.
The matrices are kept, or made on the host, and one program multiplies and says whether that is all
there is to it. It nearly always is. If not, an answer was broken or a matrix is ill-conditioned,
and the host decodes, in float64, which loses no digit of float32. So a first decode compiles in a
fraction of a second, and a broken answer compiles no regression.
"""

import itertools
from functools import partial
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree, Shaped

from ..splines.arrays import native, working_dtype
from ._decoding import Decoded, Matrices, decode_vectors, multiplied, multiply
from ._kept import KeptMatrices, kept_matrices, known_decoders
from ._meshes import coded_on_mesh
from ._trees import any_tracer, is_float, join, to_device

# Answers of one group (N, ...) with a mask (N,), of groups (groups, N, ...) with a mask for each,
# or of groups that are decoded under each of several sets: results (sets, groups, ...).
Layout: TypeAlias = Literal["group", "groups", "sets"]


def encode_groups(
    code: Any,
    x: PyTree[Shaped[Array, "groups num_data ..."]],
    matrix: Float[ArrayLike, "*groups num_workers num_data"] | None = None,
) -> PyTree[Shaped[Array, "groups num_workers ..."]]:
    """Return the coded data points of many groups, in x's dtype.

    `matrix` is the encoder's, if it is made, or one for each group. What is no float is taken to be
    the same for all data points of a group: see `same_within_group`.
    """
    arrays, rest = eqx.partition(code, eqx.is_array)

    def encoded(arrays: PyTree, x: PyTree, matrix: ArrayLike | None) -> PyTree:
        with jax.named_scope("nercc.encode"):
            own = eqx.combine(arrays, rest)
            rows = own.encoder_matrix() if matrix is None else jnp.asarray(matrix)
            return jax.tree.map(lambda leaf: encode_leaf(rows, leaf), x)

    def specs(names: Any) -> PyTree:
        return jax.tree.map(lambda leaf: PartitionSpec(names(leaf)[0], None, *names(leaf)[2:]), x)

    return coded_on_mesh(encoded, (arrays, x, matrix), specs)


def encode_leaf(
    matrix: Float[Array, "*groups rows num_data"], x: Shaped[Array, "groups num_data ..."]
) -> Shaped[Array, "groups rows ..."]:
    """Return one leaf of groups times an encoder's matrix, or each group's.

    A leaf that is no float is repeated for each row.
    """
    shape = (x.shape[0], matrix.shape[-2], *x.shape[2:])
    if not is_float(x):
        return jnp.broadcast_to(x[:, :1], shape)
    return multiply(matrix, x.reshape(*x.shape[:2], -1)).astype(x.dtype).reshape(shape)


def decode_groups(
    code: Any,
    y: PyTree[Float[ArrayLike, "groups num_workers ..."]],
    available: Bool[ArrayLike, "groups num_workers"],
    given: Matrices | None = None,
) -> Decoded:
    """Decode many groups, each with its own workers.

    Answers may be a pytree of arrays, whose predictions come in the same form. In a program
    (`jax.jit`) this is part of it; outside, as little as possible is compiled.

    Args:
        code: The code.
        y: The answers of all groups. An unavailable worker's may hold anything, and one that is not
            finite makes its worker a straggler in its own group.
        available: The workers of each group that answered.
        given: The decoder's matrices for these workers, where they are made already.
    """
    return decode_answers(code, native(y, "y"), available, "groups", given)


def decode_sets(
    code: Any,
    y: Float[ArrayLike, "groups num_workers m"],
    available: Bool[ArrayLike, "sets num_workers"],
) -> Decoded:
    """Decode the answers of all groups under each straggler set: leading axes (sets, groups).

    Each set's matrix is made once. An answer that is not finite makes its worker a straggler in its
    own group only, as everywhere; if there is one, or for a derivative, the groups get matrices of
    their own.
    """
    return decode_answers(code, native(y, "y"), available, "sets")


def decode_answers(
    code: Any, y: PyTree, available: ArrayLike, layout: Layout, given: Matrices | None = None
) -> Decoded:
    """Decode in any layout: at hand where nothing is traced, else as part of the program."""
    if any_tracer(code, y, available, given):
        return _in_program(code, y, available, given, layout)[0]
    config: Any = jax.config
    # A straggler's NaN in a first product would be taken for a fault.
    debugs = config.jax_debug_nans or config.jax_debug_infs
    masks = np.asarray(available)
    known = known_decoders(code, masks, KeptMatrices.many_sets) if given is None else given
    if known is None or debugs:
        decoded, sound = None, jnp.zeros((), bool)
    else:
        decoded, sound = _multiply(y, masks, known, layout=layout)
    if isinstance(sound, Tracer):  # in a trace, of something else
        return _in_program(code, y, available, given, layout)[0]
    if decoded is not None and sound:
        return decoded

    # The host cannot where a code has no matrices by NumPy, or answers lie on several hosts. Of
    # more sets than are kept a program makes the matrices faster.
    kept = kept_matrices(code)
    here = (leaf.is_fully_addressable for leaf in jax.tree.leaves(y) if isinstance(leaf, Array))
    if known is None or kept is None or not kept.on_host or not all(here):
        return _decode(code, to_device(y), to_device(masks), None, layout)[0]
    vectors, form = join(jax.tree.map(np.asarray, to_device(y)), 1 if layout == "group" else 2)
    sets = masks[:, None] if layout == "sets" else masks
    responded = sets & np.isfinite(vectors).all(axis=-1)
    clean = np.broadcast_to(vectors, (*responded.shape, vectors.shape[-1]))
    shape = *responded.shape[:-1], code.num_data
    predictions = np.empty((*shape, vectors.shape[-1]), working_dtype(vectors.dtype))
    recovered, exact = np.empty(shape, bool), {}
    for place in itertools.product(*map(range, shape[:-1])):
        mask = responded[place]
        if (name := mask.tobytes()) not in exact:
            exact[name] = kept.by_numpy("decoder_on_host", mask)
        decoder, recovered[place] = exact[name]
        with np.errstate(over="ignore"):  # it becomes infinite, as in a program
            predictions[place] = decoder[:, mask] @ clean[place][mask].astype(np.float64)
    predictions[~recovered] = np.nan
    predictions, responded, recovered = to_device((predictions, responded, recovered))
    return Decoded(form.split(predictions), responded, recovered)


def _in_program(
    code: Any,
    y: PyTree,
    available: ArrayLike,
    given: Matrices | None = None,
    layout: Layout = "groups",
) -> tuple[Decoded, Bool[Array, ""]]:
    """Decode as part of a program: by whichever way the answers need, which is sound.

    Without a code it is the product with the given matrices, and whether that is sound. Answers are
    joined to vectors here, and predictions split.
    """
    one, sets = layout == "group", layout == "sets"
    y, available = jax.tree.map(jnp.asarray, (y, available))
    arrays, rest = eqx.partition((code, y, available, given), eqx.is_array)

    def decoded(arrays: PyTree) -> Any:
        with jax.named_scope("nercc.decode"):
            code, y, available, given = eqx.combine(arrays, rest)
            vectors, form = join(y, 1 if one else 2)
            if one:
                vectors, available = vectors[None], available[None]
            if code is None:
                made, sound = multiplied(vectors, available, given, sets=sets)
            else:
                made = decode_vectors(code, vectors, available, given, sets=sets)
                sound = jnp.ones((), bool)
            made = form.split(made.predictions), made.responded, made.recovered
            return jax.tree.map(lambda leaf: leaf[0], made) if one else made, sound

    def specs(names: Any) -> Any:
        # That of the answers along groups and outputs.
        leaves, structure = jax.tree.flatten(y)
        axes, first, lead = [*map(names, leaves)], (None,) * sets, 0 if one else 1
        parts = [PartitionSpec(*first, *each[:lead], None, *each[lead + 1 :]) for each in axes]
        status = PartitionSpec(*first, *axes[0][:lead], None)
        return (jax.tree.unflatten(structure, parts), status, status), PartitionSpec()

    made, sound = coded_on_mesh(decoded, (arrays,), specs)
    return Decoded(*made), sound


# `multiply_groups(y, available, given)` decodes by the product alone.
multiply_groups = partial(_in_program, None)
_multiply = jax.jit(multiply_groups, static_argnames="layout")
_decode = eqx.filter_jit(_in_program)
