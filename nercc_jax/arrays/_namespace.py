"""NumPy or jax.numpy, by a function's arguments: one function for the host and for programs.

Values that are known before a program runs are computed on the host, where nothing is compiled;
traced ones become part of the program. Functions that begin with `xp = namespace(...)` are for
both. All arrays of users pass through `native`.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, PyTree

Function = TypeVar("Function", bound=Callable[..., Any])


def native(tree: PyTree, name: str = "an argument") -> PyTree:
    """Return the tree with NumPy's arrays in the machine's byte order.

    JAX 0.10 looks compiled programs up by shape and kind of number, and reads the bytes of a
    big-endian array (FITS, netCDF) in the machine's order. JAX's arrays, and leaves that are not
    arrays, are returned unchanged.

    Raises:
        ValueError: An array has masked values, or holds objects, text, times, or numbers of a type
            that JAX does not have.
    """
    leaves, structure = jax.tree.flatten(tree)
    for number, leaf in enumerate(leaves):
        is_array = hasattr(leaf, "__array__") or isinstance(leaf, memoryview)
        if isinstance(leaf, jax.Array) or not is_array:
            continue
        if np.ma.is_masked(leaf):
            raise ValueError(
                f"{name} has {np.ma.count_masked(leaf)} masked values: fill them (`.filled(...)`) "
                "or leave these data points out"
            )
        array = np.asarray(leaf)
        if array.dtype.kind in "OSUMm" or array.dtype.char in "gG":
            raise ValueError(
                f"{name} is {array.dtype}, which JAX has no type for: convert it first, for "
                "example by `.astype(np.float32)`"
            )
        native = array.dtype.isnative
        leaves[number] = array if native else array.astype(array.dtype.newbyteorder("="))
    return jax.tree.unflatten(structure, leaves)


def working_dtype(*dtypes: Any) -> Any:
    """Return the dtype to which all promote, float32 at least, also under strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes, jnp.dtype(jnp.float32))


def jitted(function: Function, **options: Any) -> Function:
    """Return `jax.jit(function, **options)` on `native` arguments; `__wrapped__` is the former."""
    compiled: Any = jax.jit(function, **options)

    @functools.wraps(compiled)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled(*native(args), **native(kwargs))

    return call  # pyright: ignore[reportReturnType]


def namespace(*arrays: Any) -> Any:
    """Return `jax.numpy` if any of the arrays is one of JAX's, else `numpy`."""
    return jnp if any(isinstance(array, jax.Array) for array in arrays) else np


def constant(value: Any) -> Any:
    """Return the value without its derivative."""
    return jax.lax.stop_gradient(value) if isinstance(value, jax.Array) else value


def where(condition: Any, yes: Any, no: Any) -> Any:
    """Return `yes` where the condition holds, else `no`.

    `jnp.where` would add a function to the program for each shape, which takes time to compile.
    """
    if namespace(condition, yes, no) is np:
        return np.where(condition, yes, no)
    dtype = jnp.result_type(yes, no)
    shape = jnp.broadcast_shapes(*map(jnp.shape, (condition, yes, no)))

    def full(value: Any, dtype: Any) -> Any:
        if jnp.ndim(value) == 0 and not isinstance(value, jax.Array):
            # Without an operation of its own, whose result `jax_debug_nans` would check.
            return np.broadcast_to(np.asarray(value, dtype), shape)
        value = jnp.asarray(value, dtype)
        return value if value.shape == shape else jnp.broadcast_to(value, shape)

    return jax.lax.select(full(condition, bool), full(yes, dtype), full(no, dtype))


def taken(array: Any, index: Any, axis: int = 0) -> Any:
    """Return the entries at these indices along an axis; they must be in range and not negative.

    `array[index]` would have three more operations, which take time to compile.
    """
    place = (slice(None),) * axis + (index,)
    if namespace(array, index) is np:
        return array[place]
    known = {"mode": "promise_in_bounds", "wrap_negative_indices": False}
    return jnp.asarray(array).at[place].get(**known)


def product(a: Any, b: Any) -> Any:
    """Return a @ b at full precision: by default, TPUs and GPUs round the factors."""
    if namespace(a, b) is np:
        return a @ b
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def safe_sqrt(square: Float[Any, "..."]) -> Float[Any, "..."]:
    """Return the square root, which is 0 below 0 and has a derivative of 0 there."""
    xp, positive = namespace(square), square > 0
    return xp.where(positive, xp.sqrt(xp.where(positive, square, 1)), 0)


def root_mean_square(
    x: Float[Any, "..."], axis: int | None = None, where: Bool[Any, "..."] | None = None
) -> Float[Any, "..."]:
    """Return the root of the mean square; 0 for none.

    Numbers are scaled before they are squared: float32 cannot hold squares of 1e20 or 1e-23.
    """
    xp = namespace(x)
    where = xp.ones((), bool) if where is None else where
    x = xp.where(where, x, 0)
    size = constant(xp.max(xp.abs(x), axis=axis, keepdims=True, initial=0))
    unit = xp.where((size > 0) & xp.isfinite(size), size, 1)
    count = xp.sum(xp.broadcast_to(where, x.shape), axis=axis)
    square = xp.sum((x / unit) ** 2, axis=axis) / xp.maximum(count, 1)
    return xp.squeeze(unit, axis=axis) * safe_sqrt(square)
