"""The encoder's matrix at work on arrays of the host, on which workers of a pool answer."""

import numpy as np
from jaxtyping import Float, Shaped


def encode_on_host(
    encoder: Float[np.ndarray, "*groups num_workers num_data"],
    x: Shaped[np.ndarray, "groups num_data ..."],
) -> Shaped[np.ndarray, "num_workers groups ..."]:
    """Return coded data points, worker by worker; each group may have an encoder of its own.

    Integers and booleans only pass through rows that are one data point.
    """
    groups, num_data, *shape = x.shape
    num_workers = encoder.shape[-2]
    encoder, vectors = encoder.astype(x.dtype), x.reshape(groups, num_data, -1)
    if encoder.ndim == 2:  # one product for all groups
        coded = encoder @ np.moveaxis(vectors, 1, 0).reshape(num_data, -1)
    else:
        coded = np.moveaxis(encoder @ vectors, 1, 0)
    return coded.reshape(num_workers, groups, *shape)
