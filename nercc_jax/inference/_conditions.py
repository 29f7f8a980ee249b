"""The precision of workers, casts to it, and warnings where a calibration was made at another.

How often a label is wrong depends on how the workers round: what was calibrated on float32 answers
promises too much of bfloat16 ones, and a GPU or TPU rounds the products of a float32 model, too.
"""

import abc
import dataclasses
import functools
import types
import warnings
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from ..codes._kept import x64_enabled
from ..codes._trees import is_float
from ._models import Model, modules_of

_MOST_BITS = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CastModel:
    """A model whose float arrays are cast already; `cast_model` makes one.

    No Equinox module: those warn of fields like `jax.vmap(model)`.
    """

    func: Any
    dtype: str = dataclasses.field(metadata={"static": True})

    def __call__(self, batch: PyTree, *args: Any) -> PyTree:
        y = self.func(cast_floats(batch, self.dtype), *_cast(args, self.dtype))
        return cast_floats(y, jnp.float32)


def cast_model(model: Model | Sequence[Model], dtype: DTypeLike | None) -> Any:
    """Return the model, or each of several, as workers run it in `dtype`.

    It casts a batch's floats to `dtype`, and the answers to float32, in which they are decoded.
    Parts that are no floats stay. The model's own float arrays are cast, too, or JAX would promote
    all products with them to float32: those of Equinox and Flax NNX modules, of other pytrees, of
    `functools.partial` and bound methods of such, once, here; those in further arguments,
    `model(batch, *args)`, in each call. **Out of reach** are arrays that a function closes over
    (give them as arguments, or a module) and those of classes that are no pytree; and a layer with
    a dtype of its own (`nnx.Linear(dtype=jnp.float32)`) computes in that. There the inputs are
    rounded, and nothing is gained. Casts are differentiable.

    The cost is one rounding of inputs, weights and every layer's result: 2^-9 of the value in
    bfloat16, 2^-12 in float16, where a number larger than 65,504 is infinite, and so makes a
    straggler of its worker. The gain is half the bytes to send and to keep, and on accelerators
    faster products; CPUs are slower. `evaluate` measures the cost in labels.

    >>> import equinox as eqx, jax, jax.numpy as jnp
    >>> linear = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    >>> half = cast_model(eqx.filter_vmap(linear), "bfloat16")
    >>> half.func._fun.weight.dtype, half(jnp.ones((5, 2))).dtype
    (dtype(bfloat16), dtype('float32'))

    Args:
        model: A model, or several.
        dtype: A floating dtype of up to 32 bits; None returns the model as it is.

    Raises:
        ValueError: The dtype is another; or a module cannot be cast, as it is no pytree, or within
            a function that JAX made of it (`jax.vmap(model)`).
    """
    wanted = check_worker_dtype(dtype)
    if wanted is None:
        return model
    if not callable(model):
        return tuple(cast_model(each, dtype) for each in model)
    cast = _cast(model, wanted)
    for name, module in modules_of(cast):
        leaves = jax.tree.leaves(module)  # the module itself if it is no pytree
        if any(each is module or (_floats(each) and each.dtype != wanted) for each in leaves):
            raise ValueError(
                f"the arrays of {type(module).__name__}{f' at {name}' if name else ''} cannot be "
                f"cast to {wanted}: they are within a function that was made of it, or it is no "
                "pytree. Give the module, or eqx.filter_vmap(module) for one of single data points"
            )
    return CastModel(cast, wanted)


def check_worker_dtype(dtype: DTypeLike | None) -> str | None:
    """Return the name of a dtype that workers may run in, None for None.

    Raises:
        ValueError: It is any other.
    """
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    floating = found is not None and jnp.issubdtype(found, jnp.floating)
    if found is None or not floating or jnp.finfo(found).bits > _MOST_BITS:
        raise ValueError(
            "worker_dtype must be a floating dtype of at most 32 bits, such as 'bfloat16', "
            f"'float16' or 'float32', not {dtype!r}"
        )
    return found.name


def worker_dtype_of(model: Any) -> str | None:
    """Return what a model, or the first of several, was cast to by `cast_model`."""
    first = model if callable(model) else model[0]
    return first.dtype if isinstance(first, CastModel) else None


def cast_floats(tree: PyTree, dtype: DTypeLike | None) -> PyTree:
    """Return the tree with its float arrays in `dtype`, on the host or device where they are."""
    if dtype is None:
        return tree
    wanted = jnp.dtype(dtype)  # NumPy does not know bfloat16 by name
    return jax.tree.map(lambda leaf: leaf.astype(wanted) if _floats(leaf) else leaf, tree)


def _cast(node: Any, dtype: str) -> Any:
    """Return `cast_floats`, within functions, too, as far as they can be made again."""
    if isinstance(node, functools.partial) and not isinstance(node, jax.tree_util.Partial):
        func, args, keywords = (_cast(x, dtype) for x in (node.func, node.args, node.keywords))
        return functools.partial(func, *args, **keywords)
    if isinstance(node, types.MethodType):
        return types.MethodType(node.__func__, _cast(node.__self__, dtype))

    def cast(leaf: Any) -> Any:
        again = isinstance(leaf, functools.partial | types.MethodType)
        return _cast(leaf, dtype) if again else cast_floats(leaf, dtype)

    return jax.tree.map(cast, node)


def _floats(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray) and is_float(leaf)


UNKNOWN = "unknown"


class CalibrationWarning(UserWarning):
    """A calibrated object is used under other conditions than it was calibrated under.

    ```python
    import warnings

    from nercc_jax.inference import CalibrationWarning

    warnings.simplefilter("error", CalibrationWarning)  # fail instead of going on
    ```
    """


@dataclasses.dataclass(frozen=True)
class Conditions:
    """At which precision workers answer, and on what: each "unknown" unless it was recorded.

    `dtype` is the workers' (`worker_dtype`, else JAX's working precision; what a model makes of
    that by itself is the model's), `platform` is JAX's name for the kind of device, and
    `matmul_precision` is `jax.default_matmul_precision`'s, "default" if none is set.
    """

    dtype: str = UNKNOWN
    platform: str = UNKNOWN
    matmul_precision: str = UNKNOWN

    def __str__(self) -> str:
        return (
            f"{self.dtype} workers on platform {self.platform}, matmul precision "
            f"{self.matmul_precision}"
        )

    def differ(self, other: "Conditions") -> bool:
        """Return whether anything differs that is known of both."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return any(mine != theirs and UNKNOWN not in (mine, theirs) for mine, theirs in pairs)


class AbstractCalibrated(eqx.Module):
    """Something that was calibrated on answers."""

    @abc.abstractmethod
    def calibrated_under(self) -> Conditions:
        """Return the conditions of the answers of the calibration."""


def current_conditions(
    worker_dtype: DTypeLike | None = None, platform: str | None = None
) -> Conditions:
    """Return the conditions of workers that run here and now.

    They run on JAX's default device unless a platform is given.
    """
    working = "float64" if x64_enabled() else "float32"
    return Conditions(
        check_worker_dtype(worker_dtype) or working,
        platform or _default_platform(),
        matmul_precision() or "default",
    )


def matmul_precision() -> str | None:
    """Return `jax.default_matmul_precision` in this thread, None if none is set."""
    return jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]


def _default_platform() -> str:
    device: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def check_conditions(tree: PyTree, used: Conditions) -> None:
    """Warn of everything in a tree that was calibrated under other conditions."""
    found = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, AbstractCalibrated))
    for node in found:
        if isinstance(node, AbstractCalibrated):
            warn_if_other(type(node).__name__.strip("_"), node.calibrated_under(), used)


def warn_if_other(what: str, calibrated: Conditions, used: Conditions) -> None:
    """Warn where these conditions differ: `CalibrationWarning`."""
    if calibrated.differ(used):
        warnings.warn(
            f"{what} was calibrated on answers of {calibrated}, and is used with {used}: what it "
            "promises was not measured there. Calibrate again under the conditions of use "
            "(worker_dtype of calibrate_error_probability, make_forecast)",
            CalibrationWarning,
            stacklevel=3,
        )
