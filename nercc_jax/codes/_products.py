"""Products of matrices with data, at full precision on every device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..splines.arrays import working_dtype

# TPUs and GPUs would round the factors of a float32 product.
FULL = jax.lax.Precision.HIGHEST


def multiply(
    matrix: Float[Array, "... a b"], x: Float[Array, "... b m"]
) -> Float[Array, "... a m"]:
    """Return matrix @ x in x's precision, float32 at least; one matrix may be for many groups."""
    dtype = working_dtype(x.dtype)
    matrix, x = matrix.astype(dtype), x.astype(dtype)
    one = matrix.ndim == 2 or matrix.shape[0] == 1
    if x.ndim != 3 or not one:
        return jnp.matmul(matrix, x, precision=FULL)
    matrix = matrix.reshape(matrix.shape[-2:])
    if x.shape[0] == 1:
        # Without the barrier XLA may read a matrix that lies in memory by columns, which its CPU
        # product does at half the speed (60 x 20 by 20 x 3,072, and 8 x 20 by 20 x 150,528).
        return jnp.matmul(jax.lax.optimization_barrier(matrix), x[0], precision=FULL)[None]
    # Left to itself, XLA makes one product of it, and moves the data for that: 1.9 ms against 0.3
    # for 8 x 20 by 64 x 20 x 1,000 on two CPU cores.
    each = jnp.broadcast_to(matrix, (x.shape[0], *matrix.shape))
    return jax.lax.dot_general(each, x, (((2,), (1,)), ((0,), (0,))), precision=FULL)
