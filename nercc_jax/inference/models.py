"""Models: callables on a batch, what workers run of them, at which precision and on what.

How often a label is wrong depends on how the workers round: what was calibrated on float32 answers
promises too much of bfloat16 ones, and a GPU or TPU rounds the products of a float32 model, too.
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
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree, Shaped

from ..codes import AbstractCode
from ..codes._kept import x64_enabled
from ..codes._trees import check_floats, is_float, leaves_of
from ..splines.arrays import native

Model: TypeAlias = Callable[..., Array]

# Raised by JAX where a function does not take tracers.
_UNTRACEABLE = (
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerBoolConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.ConcretizationTypeError,
)


class NoDerivative(TypeError, ValueError):
    """A derivative is asked of a model that runs on the host.

    JAX raises TypeErrors for such models; commands print the ValueErrors in a line.
    """


def check_model(model: Model | Sequence[Model]) -> None:
    """Refuse a model, or several, that holds an Equinox or Flax NNX layer in training mode.

    Dropout would draw at random, and batch norm would mix the data points of a batch. Layers are
    looked for in modules, what those hold, and the functions around them (partial ones, bound
    methods, what JAX's transformations make); not in closures.

    Raises:
        ValueError: A layer is in training mode; the message names it, and says how to put the model
            into evaluation mode.
    """
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
    """Yield all modules that a model holds, with their names in it; where, see `check_model`.

    Of a node of a model by this `name`; `seen` are nodes by their id.
    """
    seen = {} if seen is None else seen
    if id(node) in seen:
        return
    seen[id(node)] = node  # alive, so that no other gets its id
    children: dict[str, Any] = {}
    # Whoever has a module of Flax has imported it, which takes most of a second.
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


def call_model(model: Model, batch: PyTree, *args: Any, rows: bool = False) -> Any:
    """Return `model(batch, *args)`.

    A model that JAX cannot trace, since it works on NumPy arrays or looks at values, is called on
    the host whenever the program runs. It is called once more when the program is traced, on one
    data point of zeros (or ones), for the shapes of its outputs. A list that it returns is an array
    of rows. It has no derivative.

    Args:
        model: The model.
        batch: A batch of data points.
        *args: Further arguments of the model.
        rows: Whether to refuse answers that are not arrays with as many rows as the batch.

    Raises:
        ValueError: The model takes one data point instead of a batch (from the model's own error),
            JAX cannot trace it and it raises at zeros and ones, or there are other `rows`; else
            what the model raises.
        NoDerivative: A derivative is taken of a model that JAX cannot trace.
    """

    def traces(x: PyTree) -> bool:
        try:
            eqx.filter_eval_shape(lambda x: model(x, *args), x)
        except Exception:
            return False
        return True

    try:
        y = model(batch, *args)
    except _UNTRACEABLE:
        y = _call_on_host(model, batch, args)
    except Exception as error:
        # What fails on the batch while running only says nothing of shapes.
        if not traces(batch) and traces(jax.tree.map(lambda leaf: leaf[0], batch)):
            raise ValueError(
                "the model takes one data point, not a batch of them: give jax.vmap(model)"
            ) from error
        raise
    size = jax.tree.leaves(batch)[0].shape[0] if rows else 0  # which may be symbolic, for an export
    for label, leaf in leaves_of("the model's answer", y) if rows else ():
        if not isinstance(leaf, jax.Array) or leaf.ndim < 1 or leaf.shape[0] != size:
            got = leaf.shape if isinstance(leaf, jax.Array) else type(leaf).__name__
            given = ", ".join(str(each.shape) for each in jax.tree.leaves(batch))
            raise ValueError(
                f"the model must map a batch of {size} to arrays of as many answers: for input "
                f"{given}, {label} was {got}"
            )
    return y


def _call_on_host(model: Model, batch: PyTree, args: tuple) -> Any:
    arrays, static = eqx.partition((model, args), eqx.is_array)

    def call(arrays: PyTree, batch: PyTree) -> PyTree:
        arrays, batch = jax.tree.map(np.asarray, (arrays, batch))
        function, further = eqx.combine(arrays, static)
        answer = function(batch, *further)
        answer = np.asarray(answer) if isinstance(answer, list) else answer
        answer = jax.tree.map(np.asarray, native(answer, "the model's answer"))
        return jax.tree.map(lambda y: y.astype(jax.dtypes.canonicalize_dtype(y.dtype)), answer)

    # The form of its answers: those to one data point of zeros; of ones, if it raises at zeros.
    known = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, Tracer) else leaf, arrays
    )
    example, raised = None, None
    with jax.ensure_compile_time_eval():  # what the model does with JAX is no part of the program
        for number in (0, 1):
            one = jax.tree.map(lambda x: np.full((1, *x.shape[1:]), number, x.dtype), batch)  # noqa: B023
            try:
                example = call(known, one)
                break
            except Exception as error:
                raised = raised or error
        else:
            raise ValueError(
                "JAX cannot trace the model, which was therefore called on one data point of "
                f"zeros, and on one of ones, for the shape of its answers, and raised: {raised!r}"
            ) from raised
    size = len(jax.tree.leaves(batch)[0])
    answers = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), example
    )

    def answer(arrays: PyTree, batch: PyTree) -> PyTree:
        # Whole numbers by JSON are integers.
        cast = lambda leaf, form: leaf.astype(form.dtype, casting="same_kind")  # noqa: E731
        return jax.tree.map(cast, call(arrays, batch), answers)

    @jax.custom_jvp
    def answered(arrays: PyTree, batch: PyTree) -> PyTree:
        return jax.pure_callback(answer, answers, arrays, batch, vmap_method="sequential")

    @answered.defjvp
    def _(*_: Any) -> Any:
        raise NoDerivative(
            "JAX cannot trace the model, since it works on NumPy arrays or looks at values. So it "
            "runs on the host and has no derivative: tuning and gradients need a model of jax.numpy"
        )

    return answered(arrays, batch)


def check_number_of_models(kinds: Int[np.ndarray, " slots"], number: int) -> None:
    """Raise ValueError where another number of models came than workers run."""
    needed = int(kinds.max()) + 1
    if number != needed:
        wanted = "alone" if needed == 1 else f"and {needed - 1} further, in this order"
        raise ValueError(
            f"the workers of this code run {needed} model{'s' * (needed > 1)}, but {number} "
            f"came: give the served model {wanted}"
        )


def run_workers(
    model: Model | Sequence[Model],
    code: AbstractCode | Int[np.ndarray, " slots"],
    coded: PyTree[Shaped[Array, "groups slots ..."]],
    *args: Any,
) -> PyTree[Float[Array, "groups slots ..."]]:
    """Return all workers' answers: each runs its own model on its coded data point of every group.

    Args:
        model: A function `model(batch, *args)`, (B, ...) to (B, ...), of floats, which is called
            once; both may be pytrees of such arrays. For a code whose workers run several
            (`worker_models`), a sequence of such, the served model first; each is called once, on
            the coded data points of all its workers.
        code: The code; or the number of the model that runs in each place of work.
        coded: Coded data points.
        *args: Further arguments of the models.

    Raises:
        ValueError: The number of models is not the code's, one returns another first axis or no
            floats, or their answers differ in shape.
    """
    kinds = code if isinstance(code, np.ndarray) else code.worker_models
    models = (model,) if callable(model) else tuple(model)
    check_number_of_models(kinds, len(models))
    parts = []
    for kind, each in enumerate(models):
        theirs = coded
        if len(models) > 1:
            theirs = jax.tree.map(lambda leaf: leaf[:, kinds == kind], coded)  # noqa: B023
        shape = jax.tree.leaves(theirs)[0].shape[:2]
        batch = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), theirs)
        with jax.named_scope("nercc.model"):
            y = call_model(each, batch, *args, rows=True)
        check_floats("the model's answer", y)
        parts.append(jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), y))  # noqa: B023
    if len(parts) == 1:
        return parts[0]

    forms = [jax.tree.map(lambda leaf: leaf.shape[2:], part) for part in parts]
    if any(form != forms[0] for form in forms):
        raise ValueError(f"the models' answers differ in shape, served model first: {forms}")
    order = np.argsort(kinds, kind="stable")
    together = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *parts)
    if np.all(np.diff(order) == 1):
        return together
    return jax.tree.map(lambda leaf: leaf[:, np.argsort(order)], together)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CastModel:
    """A model whose float arrays are cast already; `cast_model` makes one.

    No Equinox module: those warn of fields like `jax.vmap(model)`.
    """

    func: Any
    dtype: str = dataclasses.field(metadata={"static": True})

    def __call__(self, batch: PyTree, *args: Any) -> PyTree:
        y = self.func(cast_floats(batch, self.dtype), *cast_floats(args, self.dtype))
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
    cast = cast_floats(model, wanted)
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
    if found is None or not floating or jnp.finfo(found).bits > 32:
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
    """Return the tree with its float arrays in `dtype`, on the host or device where they are.

    `functools.partial` and bound methods in it are made again of what they hold.
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
        return leaf.astype(wanted) if _floats(leaf) else leaf

    return jax.tree.map(cast, tree)


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


class AbstractCalibrated(eqx.Module):
    """Something that was calibrated on answers, under these conditions."""

    conditions: eqx.AbstractVar[Conditions]


def current_conditions(
    worker_dtype: DTypeLike | None = None, platform: str | None = None
) -> Conditions:
    """Return the conditions of workers that run here and now.

    They run on JAX's default device unless a platform is given.
    """
    working = "float64" if x64_enabled() else "float32"
    device: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    default = jax.default_backend() if device is None else getattr(device, "platform", device)
    return Conditions(
        check_worker_dtype(worker_dtype) or working,
        platform or default,
        matmul_precision() or "default",
    )


def matmul_precision() -> str | None:
    """Return `jax.default_matmul_precision` in this thread, None if none is set."""
    return jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]


def check_conditions(tree: PyTree, used: Conditions) -> None:
    """Warn of everything in a tree that was calibrated under other conditions."""
    found = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, AbstractCalibrated))
    for node in found:
        if isinstance(node, AbstractCalibrated):
            warn_if_other(type(node).__name__, node.conditions, used)


def warn_if_other(what: str, calibrated: Conditions, used: Conditions) -> None:
    """Warn where anything differs that is known of both conditions: `CalibrationWarning`."""
    pairs = zip(dataclasses.astuple(calibrated), dataclasses.astuple(used), strict=True)
    if any(mine != theirs and UNKNOWN not in (mine, theirs) for mine, theirs in pairs):
        said = [
            f"{each.dtype} workers on platform {each.platform}, matmul precision "
            f"{each.matmul_precision}"
            for each in (calibrated, used)
        ]
        warnings.warn(
            f"{what} was calibrated on answers of {said[0]}, and is used with {said[1]}: what it "
            "promises was not measured there. Calibrate again under the conditions of use "
            "(worker_dtype of calibrate_error_probability, record_answers)",
            CalibrationWarning,
            stacklevel=3,
        )
