"""Models: callables on a batch; checks of their mode, precision and platform.

How often a label is wrong depends on how the workers round: a calibration on float32 answers
promises too much for bfloat16 ones, and GPUs and TPUs round the products of a float32 model, too.
"""

import dataclasses
import functools
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from ..codes.kept import x64_enabled
from ..codes.trees import is_float

Model: TypeAlias = Callable[..., Array]


def check_model(model: Model | Sequence[Model]) -> None:
    """Refuse a model, or several, with an Equinox or Flax NNX layer in training mode.

    Dropout would draw at random, and batch norm would mix the data points of a batch. Layers are
    searched in modules, their fields, and the functions around them (partial functions, bound
    methods, the results of JAX's transformations); not in closures.

    Raises:
        ValueError: The argument is not a callable or several, or a layer is in training mode. The
            message names it, and says how to put the model into evaluation mode.
    """
    models = model if isinstance(model, Sequence) and not callable(model) else (model,)
    if not models or not all(map(callable, models)):
        raise ValueError(f"a model is a callable on a batch, or several are, not {model!r}")
    defaults = {"p": 1.0, "rate": 0.0, "dropout_rate": 0.0}
    for name, layer in modules_of(model):
        rates = {field: getattr(layer, field, default) for field, default in defaults.items()}
        drops = [field for field, p in rates.items() if not isinstance(p, int | float) or p > 0]
        dropping = "rate" in drops or "dropout_rate" in drops
        averages = getattr(layer, "use_running_average", None) is False
        if getattr(layer, "inference", None) is False and "p" in drops:
            remedy = "eqx.nn.inference_mode(model)"
        elif averages or (getattr(layer, "deterministic", None) is False and dropping):
            remedy = "model.eval()"
        else:
            continue
        raise ValueError(
            f"the model is in training mode: its {type(layer).__name__}"
            f"{f' at {name}' if name else ''} answers for a data point otherwise than it will "
            f"when serving. Give the model in evaluation mode: {remedy}"
        )


def modules_of(
    node: Any, name: str = "", seen: dict[int, Any] | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield all modules in a model with their names; `check_model` says where they are searched.

    `node` is the part of the model with this `name`; `seen` holds visited nodes by their id.
    """
    seen = {} if seen is None else seen
    if id(node) in seen:
        return
    seen[id(node)] = node  # alive, so that no other gets its id
    children: dict[str, Any] = {}
    # A model with a module of Flax has imported it; importing it here would take most of a second.
    nnx = sys.modules.get("flax.nnx")
    if isinstance(node, eqx.Module) or (nnx is not None and isinstance(node, nnx.Module)):
        yield name, node
        children = {f".{field}": value for field, value in vars(node).items()}
    elif isinstance(node, dict):
        children = {f"[{key!r}]": value for key, value in node.items()}
    elif isinstance(node, list | tuple):
        children = {f"[{place}]": value for place, value in enumerate(node)}
    for field, value in children.items():
        yield from modules_of(value, f"{name}{field}".lstrip("."), seen)
    if callable(node) and not isinstance(node, type):
        inner = [getattr(node, field, None) for field in ("func", "__self__", "__wrapped__")]
        if isinstance(node, functools.partial):
            inner += [*node.args, *node.keywords.values()]
        for value in inner:
            yield from modules_of(value, name, seen)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CastModel:
    """A model whose float arrays are cast already; `cast_model` makes one.

    It is not an Equinox module, since those warn of fields like `jax.vmap(model)`.
    """

    func: Any
    dtype: str = dataclasses.field(metadata={"static": True})

    def __call__(self, batch: PyTree, *args: Any) -> PyTree:
        y = self.func(cast_floats(batch, self.dtype), *cast_floats(args, self.dtype))
        return cast_floats(y, jnp.float32)


def cast_model(model: Model | Sequence[Model], dtype: DTypeLike | None) -> Any:
    """Return the model, or each of several, as workers run it in `dtype`.

    The returned model casts a batch's floats to `dtype`, and answers to float32, in which they are
    decoded. Other dtypes are not cast. The model's own float arrays are cast, too, since JAX would
    promote all products with them to float32: once, here, those of Equinox and Flax NNX modules, of
    other pytrees, and of `functools.partial` and bound methods of these; in each call, those in
    further arguments, `model(batch, *args)`. **Not cast** are arrays that a function closes over
    (give them as arguments, or give a module) and arrays of classes that are not pytrees; and a
    layer with a dtype of its own (`nnx.Linear(dtype=jnp.float32)`) computes in that. There the
    inputs are rounded, and nothing is gained. Casts are differentiable.

    The cost is one rounding of inputs, weights and every layer's result: 2^-9 of the value in
    bfloat16, 2^-12 in float16, where a number above 65,504 is infinite, and its worker counts as a
    straggler. The gain is half the bytes to send and to store, and faster products on accelerators;
    CPUs are slower. `evaluate` measures the cost in labels.

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
    cast = cast_floats(model, wanted)
    for name, module in modules_of(cast):
        leaves = jax.tree.leaves(module)  # the module itself if it is no pytree
        arrays = [each for each in leaves if isinstance(each, jax.Array | np.ndarray)]
        cast_all = all(each.dtype == wanted for each in arrays if is_float(each))
        if not cast_all or any(each is module for each in leaves):
            raise ValueError(
                f"the arrays of {type(module).__name__}{f' at {name}' if name else ''} cannot be "
                f"cast to {wanted}: they are within a function that was made of it, or it is no "
                "pytree. Give the module, or eqx.filter_vmap(module) for one of single data points"
            )
    return CastModel(cast, wanted)


def check_worker_dtype(dtype: DTypeLike | None) -> str | None:
    """Return the name of a dtype in which workers may run, None for None.

    Raises:
        ValueError: Workers cannot run in this dtype.
    """
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    floating = found is not None and jnp.issubdtype(found, jnp.floating)
    if found is None or not floating or jnp.finfo(found).bits > 32:
        raise ValueError(
            "worker_dtype must be a floating dtype of at most 32 bits, such as 'bfloat16', "
            f"'float16' or 'float32', not {dtype!r}"
        )
    return found.name


def cast_floats(tree: PyTree, dtype: DTypeLike | None) -> PyTree:
    """Return the tree with its float arrays in `dtype`, on the host or device where they are.

    This includes the arrays in `functools.partial` and bound methods.
    """
    if dtype is None:
        return tree
    wanted = jnp.dtype(dtype)  # NumPy does not know bfloat16 by name

    def cast(leaf: Any) -> Any:
        if isinstance(leaf, functools.partial):
            parts = cast_floats((leaf.func, leaf.args, leaf.keywords), dtype)
            return functools.partial(parts[0], *parts[1], **parts[2])
        if isinstance(leaf, types.MethodType):
            return types.MethodType(leaf.__func__, cast_floats(leaf.__self__, dtype))
        floats = isinstance(leaf, jax.Array | np.ndarray) and is_float(leaf)
        return leaf.astype(wanted) if floats else leaf

    return jax.tree.map(cast, tree)


class CalibrationWarning(UserWarning):
    """The warning that a calibrated object is used under other conditions than it was fitted for.

    ```python
    import warnings

    from nercc_jax.inference import CalibrationWarning

    warnings.simplefilter("error", CalibrationWarning)  # fail instead of going on
    ```
    """


def current_conditions(worker_dtype: DTypeLike | None = None, platform: str | None = None) -> str:
    """Return the conditions under which workers run in this process, in words.

    They are the workers' dtype (by default JAX's working precision; casts within a model are not
    seen), JAX's name for the platform (by default that of the default device), and
    `jax.default_matmul_precision`.

    Example:
        >>> from nercc_jax.inference import current_conditions
        >>> current_conditions("bfloat16", "tpu")
        'bfloat16 workers on platform tpu, matmul precision default'
    """
    working = "float64" if x64_enabled() else "float32"
    device: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    default = jax.default_backend() if device is None else getattr(device, "platform", device)
    return (
        f"{check_worker_dtype(worker_dtype) or working} workers on platform {platform or default}, "
        f"matmul precision {matmul_precision() or 'default'}"
    )


def matmul_precision() -> str | None:
    """Return `jax.default_matmul_precision` in this thread, None if none is set."""
    return jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]


def check_conditions(used: str, *calibrated: Any) -> None:
    """Warn (`CalibrationWarning`) of objects that were calibrated under other conditions.

    Unknown conditions are empty and match all. None stands for a missing object.
    """
    for each in calibrated:
        if each is not None and used and each.conditions not in ("", used):
            warnings.warn(
                f"{type(each).__name__} was calibrated on answers of {each.conditions}, and is "
                f"used with {used}: what it promises was not measured there. Calibrate again under "
                "the conditions of use (worker_dtype of calibrate_error_probability)",
                CalibrationWarning,
                stacklevel=3,
            )
