"""Coded inference: encode, model, decode as one jitted program."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, PyTree, Shaped

from ..codes import AbstractCode, Decoded, as_mask, decode_groups, encode_groups
from ..codes._code import deviations
from ..codes._decoding import Matrices, mask_mixed_groups
from ..codes._groups import multiply_groups
from ..codes._kept import CachedMatrices, known_matrices
from ..codes._meshes import coded_on_mesh
from ..codes._trees import any_tracer, check_finite, groups_of, is_float, join, points_of, to_device
from ..splines.arrays import native
from ._conditions import cast_model, check_conditions, current_conditions
from ._groups import as_groups
from ._models import Model, check_model
from ._spmd import Placed, enter, place, place_inputs, spmd_answers, spmd_decoded
from ._workers import run_workers

# What becomes of groups of data points at the workers: all their answers, (groups, N, ...). Beside
# the groups it takes their encoders, (groups, N, K), or None for the code's.
Work: TypeAlias = Callable[[PyTree, Array | None], PyTree]


class AbstractScheme(eqx.Module):
    """A code with what is added to it: another way from waiting data points to a result.

    `infer` is pure, and part of one program with the workers. It returns an Equinox module whose
    field `decoded` holds the predictions in the order in which the data points came; all its other
    arrays have a first axis of points too, but for what is `responded`.
    """

    code: eqx.AbstractVar[AbstractCode]

    @abc.abstractmethod
    def infer(
        self,
        work: Work,
        x: PyTree[Shaped[Array, "points ..."]],
        available: Bool[Array, "groups num_workers"],
        known: CachedMatrices,
    ) -> Any:
        """Return predictions of data points (whole groups of K), with what `work` makes of groups.

        `known` are the code's matrices where they are made already: the decoder's for these masks.
        """


def coded_predictions(
    model: Model | Sequence[Model],
    code: AbstractCode,
    x: PyTree[Shaped[ArrayLike, "groups num_data ..."]],
    available: Bool[ArrayLike, "groups num_workers"],
    *args: Any,
    known: CachedMatrices | None = None,
) -> Decoded:
    """Encode groups of K data points, run the model on all coded ones at once, and decode.

    This is a pure function: jit it, and differentiate it in x, the code, the model and its
    arguments. x and the model's answers may be pytrees. A group in which a part that is not coded
    (integers) differs is not recovered. Models, and the errors raised for them, are those of
    `run_workers`. `known` are the code's matrices for these masks, where they are made already.

    Source: arXiv 2402.04377, the three steps of NeRCC.
    """
    known = known or CachedMatrices()
    x = to_device(x)
    y = run_workers(model, code, encode_groups(code, x, known.encoder), *args)
    available = as_mask(available, jax.tree.leaves(y)[0].shape[:2])
    return decode_groups(code, y, *mask_mixed_groups(x, available, known.decoders))


def coded_inference(
    model: Model | Sequence[Model],
    code: AbstractCode | AbstractScheme,
    *,
    with_status: bool = False,
    with_error: bool = False,
    grouped: bool | None = None,
    mesh: Mesh | None = None,
    axis: str | None = None,
    worker_dtype: DTypeLike | None = None,
) -> "CodedInference":
    """Return one jitted function `(x, available, *args) -> predictions` for a model behind a code.

    >>> import jax.numpy as jnp
    >>> from nercc_jax import NeRCC, coded_inference
    >>> infer = coded_inference(lambda x: jnp.sin(x), NeRCC(4, 8))
    >>> x = jnp.linspace(0, 1, 4)[:, None]
    >>> bool(jnp.max(jnp.abs(infer(x, jnp.arange(8) != 3) - jnp.sin(x))) < 0.05)
    True

    The function takes x, (K, ...) for one group or (groups, K, ...), of a float dtype, and
    available, a mask (N,) for all groups or one for each (groups, N). Predictions have x's axes;
    they are NaN where nothing can be recovered: in a group with a data point that is not finite, or
    where no worker is available. Data points and answers may be pytrees of arrays, each leaf with
    these axes; a leaf of x that is no float is not coded, and must be the same for all data points
    of a group.

    Behind a **scheme** (`nercc_jax.Scheme`), x is (points, ...), any number of whole groups in any
    order; masks are of groups as they are sent.

    One compilation serves every straggler set; groups with sets of their own take another one, and
    more than a few different sets in a call a third. The encoder's matrix is made once, on the
    host's CPU, and so is the decoder's for each mask that is given outside jit, unless a call has
    many: the last thousands are kept. Then the program is encode, model and one product, and the
    call waits for its result to see whether the product is enough. It composes with jit, grad,
    vmap, with a mesh, too; `lower` compiles ahead of time.

    Args:
        model: Any callable on a batch. One that JAX cannot trace, since it works on NumPy arrays
            or looks at values, runs on the host (`jax.pure_callback`) and has no derivative; it is
            called once more, on one data point of zeros, for the shape of its output. If it is a
            pytree (an Equinox or NNX module, a `jax.tree_util.Partial`), its arrays are arguments
            of the program, not constants in it. `args` are passed on to it: `model(batch, *args)`.
            A code whose workers run further models takes all of them, (served, further...).
        code: A code or a scheme.
        with_status: Whether to return `Decoded`, with the workers that were used and the
            predictions that were recovered; for a scheme what it knows in addition, such as its
            error probability.
        with_error: Whether `Decoded` is returned with `expected_error`, how far each prediction may
            be off, for the codes that are regressions (`AbstractCode.decode`). It takes a product
            with all answers more, and on a mesh all answers on each device.
        grouped: Whether x has an axis of groups. Default: by its axes.
        mesh: Spread the coded data points over an axis of this mesh, any N on any number of
            devices; predictions come back on all of them. Arrays of the model and of the code are
            placed once, here: those that lie on just this mesh's devices keep their sharding,
            others are replicated; `args` are placed likewise, on each call. Several processes
            (`jax.distributed`) all call with the same x and mask.
        axis: The name of that axis, of Explicit or Auto type. Default: `workers`, or the only one
            there is.
        worker_dtype: A dtype such as "bfloat16" or "float16" that workers run in: coded data points
            are cast to it, and so are `args` and, once, here, the arrays of the model, as far as
            `cast_model` reaches them; answers are decoded in float32. It costs some RelAcc, which
            `evaluate` measures. Encoder, decoder and a scheme's parts stay as they are; what is
            calibrated at another precision, or on another platform, warns (`CalibrationWarning`).

    Raises:
        ValueError: Shapes or dtypes do not fit, before anything runs; the model is in training
            mode, or cannot be cast; the mesh lacks the axis; `with_error` is asked of a scheme; or,
            behind a scheme, outside jit, data points are not finite.
    """
    check_model(model)
    if with_error and isinstance(code, AbstractScheme):
        raise ValueError("a scheme's result has deviations of its own: give with_status=True")
    scheme = code if isinstance(code, AbstractScheme) else None
    inner = code.code if isinstance(code, AbstractScheme) else code
    model = cast_model(model, worker_dtype)
    workers = model if mesh is None else place(model, inner, mesh, axis)
    if scheme is not None:
        platform = None if mesh is None else mesh.devices.flat[0].platform
        check_conditions(scheme, current_conditions(worker_dtype, platform))
    return CodedInference(workers, code, grouped, with_status, with_error)


@dataclasses.dataclass(frozen=True, eq=False)  # by identity, as functions are, for `jax.jit`
class CodedInference:
    """A model behind a code or a scheme, as one function: see `coded_inference`, which makes it.

    `workers` are the models, or models and code placed on a mesh.
    """

    workers: Any
    code: AbstractCode | AbstractScheme
    grouped: bool | None
    with_status: bool
    with_error: bool

    def __call__(self, x: PyTree, available: ArrayLike, *args: Any) -> Any:
        """Return the predictions, or all that is known of them `with_status`."""
        args = native(args, "an argument of the model")
        if isinstance(self.code, AbstractScheme):
            grouped = self.grouped or False
            result = _infer_scheme(self.workers, self.code, grouped, x, available, args)
            return result if self.with_status else result.decoded.predictions
        result = _infer(self.workers, self.code, self.grouped, x, available, args, self.with_error)
        return result if self.with_status or self.with_error else result.predictions

    def lower(self, x: PyTree, available: Any, *args: Any) -> Any:
        """Return the program for these arguments, arrays or their `jax.ShapeDtypeStruct`, lowered.

        The result is that of `equinox.filter_jit(...).lower`, with JAX's own as `lowered`, and
        `compiled` once it is compiled. The model's arrays are arguments of the program, which
        callers need not give, and so is the mask: one program serves every straggler set.

        >>> import jax, jax.numpy as jnp
        >>> from nercc_jax import NeRCC, coded_inference
        >>> infer = coded_inference(lambda x: jnp.sin(x), NeRCC(4, 8))
        >>> x, mask = jnp.ones((4, 3)), jnp.arange(8) != 3
        >>> run = infer.lower(x, mask).compile()
        >>> run(x, mask).shape
        (4, 3)
        """

        def infer(workers: Any, *args: Any) -> Any:
            return dataclasses.replace(self, workers=workers)(*args)

        def stand_in(leaf: Any) -> Any:  # Equinox would take a bare shape for a constant
            shape_only = isinstance(leaf, jax.ShapeDtypeStruct)
            return np.zeros(leaf.shape, leaf.dtype) if shape_only else leaf

        arguments = jax.tree.map(stand_in, (x, available, *args))
        program: Any = eqx.filter_jit(eqx.Partial(infer, self.workers))
        return program.lower(*arguments)


def _infer(
    workers: Any,
    code: AbstractCode,
    grouped: bool | None,
    x: PyTree,
    available: ArrayLike,
    args: tuple,
    with_error: bool,
) -> Decoded:
    known = known_matrices(code, available)
    x, available, grouped = as_groups(code, x, available, grouped)
    if isinstance(workers, Placed):

        def on_mesh(x: PyTree, available: ArrayLike, args: tuple) -> Decoded:
            share = not with_error
            inputs, shape = place_inputs(workers, x, available, args, known.decoders, share=share)
            with enter(workers, inputs):
                if not with_error:
                    return _run_on_mesh(workers, *inputs, grouped, shape)
                x, available, args, given = inputs
                there = CachedMatrices(decoders=given)
                return _run_with_error(workers, code, x, available, args, grouped, there)

        if not any_tracer(x, available, args):
            return on_mesh(x, available, args)
        return coded_on_mesh(on_mesh, (x, available, args), lambda _: PartitionSpec())
    if with_error:
        return _run_with_error(workers, code, x, available, args, grouped, known)
    decoded = _infer_at_hand(workers, code, x, available, args, known)
    if decoded is None:
        return _run(workers, code, x, available, args, grouped, known)
    return decoded if grouped else _first(decoded)


@eqx.filter_jit
def _run_with_error(
    workers: Any,
    code: AbstractCode,
    x: PyTree,
    available: ArrayLike,
    args: tuple,
    grouped: bool,
    known: CachedMatrices,
) -> Decoded:
    x = jax.tree.map(jnp.asarray, x)
    if isinstance(workers, Placed):
        y = spmd_answers(workers, x, args)
    else:
        y = run_workers(workers, code, encode_groups(code, x, known.encoder), *args)
    there, given = mask_mixed_groups(x, jnp.asarray(available), known.decoders)
    decoded = decode_groups(code, y, there, given)
    try:
        errors = deviations(code, join(y, 2)[0], decoded.responded)
    except ValueError:  # no regression
        errors = None
    decoded = Decoded(decoded.predictions, decoded.responded, decoded.recovered, errors)
    return decoded if grouped else _first(decoded)


def _infer_at_hand(
    model: Model | Sequence[Model],
    code: AbstractCode,
    x: PyTree,
    available: ArrayLike,
    args: tuple,
    known: CachedMatrices,
) -> Decoded | None:
    """Infer by a program with no regression in it, or return None where that does not do."""
    floats = all(map(is_float, jax.tree.leaves(x)))
    if known.decoders is None or not floats or any_tracer(model, code, x, available, args):
        return None
    decoded, sound, y = _run_known(model, code, x, available, args, known)
    if isinstance(sound, Tracer):  # of what the model closes over
        return None
    return decoded if sound else decode_groups(code, y, available)


@eqx.filter_jit
def _run_known(
    model: Model | Sequence[Model],
    code: AbstractCode,
    x: PyTree,
    available: ArrayLike,
    args: tuple,
    known: CachedMatrices,
) -> tuple[Decoded, Array, PyTree]:
    """Return predictions by one product, whether that is sound, and the answers."""
    x = to_device(x)
    y = run_workers(model, code, encode_groups(code, x, known.encoder), *args)
    assert known.decoders is not None
    decoded, sound = multiply_groups(y, available, known.decoders)
    return decoded, sound, y


@eqx.filter_jit
def _run(
    model: Model | Sequence[Model],
    code: AbstractCode,
    x: PyTree,
    available: ArrayLike,
    args: tuple,
    grouped: bool,
    known: CachedMatrices,
) -> Decoded:
    decoded = coded_predictions(model, code, x, available, *args, known=known)
    return decoded if grouped else _first(decoded)


@eqx.filter_jit
def _run_on_mesh(
    placed: Placed,
    x: PyTree,
    available: ArrayLike,
    args: tuple,
    given: Matrices | None,
    grouped: bool,
    shape: tuple[int, ...] | None,
) -> Decoded:
    """Run on a mesh; `shape` is the data points' where x holds shares of their coordinates."""
    there, given = mask_mixed_groups(x, jnp.asarray(available), given)
    decoded = spmd_decoded(placed, x, there, args, shape, given)
    return decoded if grouped else _first(decoded)


def _infer_scheme(
    workers: Any,
    scheme: AbstractScheme,
    grouped: bool,
    x: PyTree,
    available: ArrayLike,
    args: tuple,
) -> Any:
    known = known_matrices(scheme.code, available)
    x, available = _points(scheme.code, x, available, grouped)
    if not isinstance(workers, Placed):
        return _run_scheme(workers, scheme, x, available, args, grouped, known)
    inputs, _ = place_inputs(workers, x, available, (args, scheme, known), share=False)
    with enter(workers, inputs):
        x, available, (args, scheme, known), _ = inputs
        return _run_scheme(workers, scheme, x, available, args, grouped, known)


@eqx.filter_jit
def _run_scheme(
    model: Model | Sequence[Model] | Placed,
    scheme: AbstractScheme,
    x: PyTree,
    available: ArrayLike,
    args: tuple,
    grouped: bool,
    known: CachedMatrices,
) -> Any:
    code = scheme.code

    def work(groups: PyTree, encoders: Array | None) -> PyTree:
        if isinstance(model, Placed):
            return spmd_answers(model, groups, args, encoders)
        encoder = known.encoder if encoders is None else encoders
        return run_workers(model, code, encode_groups(code, groups, encoder), *args)

    result = scheme.infer(work, x, jnp.asarray(available), known)
    if not grouped:
        return result
    points, groups = len(jax.tree.leaves(x)[0]), np.shape(available)[0]

    def by_group(leaf: Array) -> Array:
        of_points = leaf.shape[:1] == (points,)
        return leaf.reshape(groups, code.num_data, *leaf.shape[1:]) if of_points else leaf

    responded = result.decoded.responded
    result = jax.tree.map(by_group, result)
    return eqx.tree_at(lambda r: r.decoded.responded, result, responded)


def _points(
    code: AbstractCode, x: PyTree, available: ArrayLike, grouped: bool
) -> tuple[PyTree, Bool[Array | np.ndarray, "groups num_workers"]]:
    """Return data points in a row, and a mask for each group; raise as `coded_inference`."""
    x = to_device(x)
    if not grouped:
        shapes = [leaf.shape for leaf in jax.tree.leaves(x)]
        points = {shape[0] if shape else 0 for shape in shapes}
        if len(points) != 1 or 0 in points or min(points) % code.num_data:
            raise ValueError(
                f"x of shape {', '.join(map(str, shapes))} is no whole groups of {code.num_data} "
                "data points"
            )
        x = groups_of(x, code.num_data)
    groups, available, _ = as_groups(code, x, available, True)
    points = points_of(groups)
    check_finite(points, 1)
    return points, available


def _first(decoded: Decoded) -> Decoded:
    return jax.tree.map(lambda leaf: leaf[0], decoded)
