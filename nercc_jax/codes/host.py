"""Both matrices of a code at work on arrays of the host, on which workers of a pool answer."""

import jax
import numpy as np
from jaxtyping import Bool, Float, PyTree, Shaped

from ._code import AbstractCode, Decoded
from ._groups import decode_groups
from ._trees import is_float


def encode_on_host(
    encoder: Float[np.ndarray, "*groups num_workers num_data"],
    x: Shaped[np.ndarray, "groups num_data ..."],
) -> Shaped[np.ndarray, "num_workers groups ..."]:
    """Return coded data points, worker by worker; each group may have an encoder of its own."""
    groups, num_data, *shape = x.shape
    num_workers = encoder.shape[-2]
    if not is_float(x):  # it is the same for all data points of a group, and goes to all workers
        return np.broadcast_to(x[:, 0], (num_workers, groups, *shape))
    encoder, vectors = encoder.astype(x.dtype), x.reshape(groups, num_data, -1)
    if encoder.ndim == 2:  # one product for all groups
        coded = encoder @ np.moveaxis(vectors, 1, 0).reshape(num_data, -1)
    else:
        coded = np.moveaxis(encoder @ vectors, 1, 0)
    return coded.reshape(num_workers, groups, *shape)


def decode_shared(
    code: AbstractCode,
    values: PyTree[Float[np.ndarray, "num_workers groups ..."]],
    available: Bool[np.ndarray, " num_workers"],
) -> Decoded:
    """Decode answers, worker by worker, of groups that share a mask."""
    y = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), values)
    groups = len(jax.tree.leaves(y)[0])
    masks = np.broadcast_to(np.asarray(available), (groups, code.num_workers))
    return decode_groups(code, y, masks)
