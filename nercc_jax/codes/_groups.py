"""Encoding and decoding of many groups at once, each with K data points and N answers."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree, Shaped

from ._decoding import Decoded, Matrices, decode_vectors, multiplied
from ._meshes import coded_on_mesh
from ._products import multiply
from ._trees import is_float, join


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

    return coded_on_mesh(encoded, (arrays, x, matrix), lambda names: _coded_specs(x, names))


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


def decode_groups_in_program(
    code: Any,
    y: PyTree[Float[Array, "groups num_workers ..."]],
    available: Bool[Array, "groups num_workers"],
    given: Matrices | None = None,
) -> Decoded:
    """Decode many groups as part of a program. See `decode_vectors`."""
    arrays, rest = eqx.partition(code, eqx.is_array)

    def decoded(
        arrays: PyTree, y: PyTree, available: Array, given: Matrices | None
    ) -> tuple[PyTree, Array, Array]:
        with jax.named_scope("nercc.decode"):
            flat, form = join(y, 2)
            made = decode_vectors(eqx.combine(arrays, rest), flat, available, given)
            return form.split(made.predictions), made.responded, made.recovered

    arguments = arrays, y, available, given
    return Decoded(*coded_on_mesh(decoded, arguments, lambda names: _decoded_specs(y, names)))


def multiply_groups(
    y: PyTree[Float[ArrayLike, "groups num_workers ..."]],
    available: Bool[ArrayLike, "groups num_workers"],
    given: Matrices,
) -> tuple[Decoded, Bool[Array, ""]]:
    """Decode groups by the product with these matrices; return also whether that is sound."""
    y = jax.tree.map(jnp.asarray, y)

    def decoded(y: PyTree, available: Array, given: Matrices) -> tuple[PyTree, ...]:
        with jax.named_scope("nercc.decode"):
            vectors, form = join(y, 2)
            made, sound = multiplied(vectors, available, given)
            return form.split(made.predictions), made.responded, made.recovered, sound

    def specs(names: Any) -> tuple[PyTree, ...]:
        return *_decoded_specs(y, names), PartitionSpec()

    *parts, sound = coded_on_mesh(decoded, (y, jnp.asarray(available), given), specs)
    return Decoded(*parts), sound


def _decoded_specs(y: PyTree, names: Any) -> tuple[PyTree, PartitionSpec, PartitionSpec]:
    """Return the sharding of decoded groups: that of the answers along groups and outputs."""
    groups = names(jax.tree.leaves(y)[0])[0]
    return _coded_specs(y, names), PartitionSpec(groups, None), PartitionSpec(groups, None)


def _coded_specs(tree: PyTree, names: Any) -> PyTree:
    """Return the sharding of arrays made of groups: theirs, but none along the second axis."""
    return jax.tree.map(lambda leaf: PartitionSpec(names(leaf)[0], None, *names(leaf)[2:]), tree)
