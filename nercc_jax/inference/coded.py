"""Coded inference: encode, model, decode as one jitted program."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import ArrayLike, Bool, PyTree, Shaped

from ..arrays import native
from ..codes import AbstractCode, decode_groups, encode_groups
from ..codes.code import check_mask
from ..codes.decoding import compiled_decode, in_auto_mode
from ..codes.kept import CachedMatrices, known_matrices
from ..codes.trees import (
    any_tracer,
    check_data,
    check_finite,
    groups_of,
    is_float,
    leaves_of,
    points_of,
)
from ..codes.workers import answer_groups, run_workers
from ._mesh import Placed, place
from .models import Model, cast_model, check_conditions, check_model, current_conditions


def coded_inference(
    model: Model | Sequence[Model],
    code: Any,
    *,
    with_status: bool = False,
    grouped: bool | None = None,
    mesh: Mesh | None = None,
    axis: str | None = None,
    worker_dtype: DTypeLike | None = None,
) -> Callable[..., Any]:
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
    these axes. Values that all data points share, such as a flag, are further arguments of the
    model.

    With a **scheme** (`nercc_jax.Scheme`), x is (points, ...), any number of whole groups in any
    order; masks are those of the groups as they are sent.

    One compilation serves every straggler set. Groups with different sets need a second one, and
    more than a few different sets in a call a third. The encoder's matrix is made once, on the
    host's CPU, and so is the decoder's for each mask that is given outside jit, unless a call has
    many; thousands of the latest are cached. Then two programs run, encoder with model, and one
    product, and the call waits for the product to check that it is accurate. The function composes
    with jit, grad and vmap, also on a mesh; `jax.jit(infer).lower(x, available)` compiles ahead of
    time.

    Args:
        model: Any callable on a batch. One that JAX cannot trace, since it works on NumPy arrays
            or looks at values, runs on the host (`jax.pure_callback`) and has no derivative; it is
            also called once on one data point of zeros, for the shape of its output. If it is a
            pytree (an Equinox or NNX module, a `jax.tree_util.Partial`), its arrays are arguments
            of the program, not constants in it. `args` are passed on to it: `model(batch, *args)`.
            If a code's workers run several models, give all of them, (served, further...).
        code: A code or a scheme (`nercc_jax.Scheme`).
        with_status: Whether to return `Decoded`, with the workers that were used and the
            predictions that were recovered; for a scheme, also with each prediction's deviation and
            error probability.
        grouped: Whether x has an axis of groups. Default: as its shape says.
        mesh: Spread the coded data points over an axis of this mesh, any N on any number of
            devices; all devices hold the predictions. Arrays of the model and of the code are
            placed once, here: those that lie on exactly this mesh's devices keep their sharding,
            others are replicated; `args` are placed likewise, in each call. All processes
            (`jax.distributed`) must call with the same x and mask.
        axis: The name of that axis, of Explicit or Auto type. Default: `workers`, or the only
            axis.
        worker_dtype: The dtype of the workers, such as "bfloat16" or "float16": coded data points
            and `args` are cast to it in each call, the arrays of the model once, here, as far as
            `cast_model` reaches them; answers are decoded in float32. It changes some labels, as
            `evaluate` measures. Encoder, decoder and a scheme's parts are not cast. A part that was
            calibrated at another precision, or on another platform, warns (`CalibrationWarning`).

    Raises:
        ValueError: Shapes or dtypes do not fit (before anything runs); the model is in training
            mode, or cannot be cast; the mesh lacks the axis; or, with a scheme and outside jit,
            data points are not finite.
    """
    check_model(model)
    workers: Any = cast_model(model, worker_dtype)
    scheme = not isinstance(code, AbstractCode)
    plain: Any = code
    if scheme:
        plain = getattr(code, "code", None)
        if not isinstance(plain, AbstractCode):
            raise ValueError(f"code must be a code or a scheme, not {type(code).__name__}")
        platform = None if mesh is None else mesh.devices.flat[0].platform
        conditions = current_conditions(worker_dtype, platform)
        check_conditions(conditions, code.error_probability, code.bars)
    if mesh is not None:
        workers = place(workers, code, plain, mesh, axis)

    def infer(x: PyTree, available: ArrayLike, *args: Any) -> Any:
        """Return the predictions, or with `with_status` their `Decoded`."""
        x, masks, many = as_groups(plain, x, available, grouped, in_a_row=scheme)
        if scheme:
            check_finite(points_of(x), 1)
        args = native(args, "an argument of the model") if args else args
        known, one = known_matrices(plain, available), not many

        def run(x: PyTree, masks: ArrayLike, args: tuple) -> Any:
            if not isinstance(workers, Placed):
                return _run(workers, code, x, masks, args, known, one)
            here = known if scheme else CachedMatrices(decoders=known.decoders)
            inputs = workers.inputs(x, masks, args, here)
            # The context's mesh must be that of the arrays, unless a caller's trace has set one.
            ours = not any_tracer(workers, inputs)
            with jax.set_mesh(workers.mesh) if ours else contextlib.nullcontext():
                return _run(workers, workers.coder, *inputs, one)

        if not scheme and not isinstance(workers, Placed):
            y = answer_groups(workers, plain, x, args, known.encoder, one)
            # A program makes the decoders of many straggler sets at once.
            decode = compiled_decode if known.decoders is None else decode_groups
            mask = masks[0] if one else masks
            result: Any = decode(plain, y, mask, known.decoders, one=one)
        elif not any_tracer(x, masks, args):
            result = run(x, masks, args)
        else:
            result = in_auto_mode(run, (x, masks, args), PartitionSpec())
        return result if with_status else result.predictions

    return infer


@eqx.filter_jit
def _run(
    workers: Any,
    coder: Any,
    x: PyTree[Shaped[ArrayLike, "groups num_data ..."]],
    available: Bool[ArrayLike, "groups num_workers"],
    args: tuple,
    known: CachedMatrices,
    one: bool,
) -> Any:
    """Return the result of a scheme, or of a code on a mesh."""
    x, available = jax.tree.map(jnp.asarray, x), jnp.asarray(available)
    if isinstance(coder, AbstractCode):
        result = workers.decode(workers.answer(x, args), available, known.decoders)
        return jax.tree.map(lambda leaf: leaf[0], result) if one else result

    code, points = coder.code, points_of(x)
    prepared = coder.prepare(points)
    groups, encoders = coder.groups(points, prepared), coder.encoders(prepared)
    if isinstance(workers, Placed):
        y = workers.of_workers(workers.answer(groups, args, encoders))
    else:
        coded = encode_groups(code, groups, known.encoder if encoders is None else encoders)
        y = run_workers(workers, code, coded, *args)
    result = coder.decode(points, prepared, y, available, known)
    return result if one else result.map_points(lambda leaf: groups_of(leaf, code.num_data))


def as_groups(
    code: AbstractCode,
    x: PyTree,
    available: ArrayLike | None = None,
    grouped: bool | None = None,
    *,
    in_a_row: bool = False,
) -> tuple[PyTree, Any, bool]:
    """Return data points as groups (groups, K, ...), a mask for each, and whether x had groups.

    Arrays that are not on a device stay on the host.

    Args:
        code: The code.
        x: A pytree of arrays (K, ...) or (groups, K, ...).
        available: A mask (N,) for all groups, or one for each; None if there is none yet.
        grouped: Whether x has the axis of groups. Default: as the shapes of x or masks say.
        in_a_row: Whether x without that axis holds the data points of many groups, (points, ...).

    Raises:
        ValueError: Shapes or dtypes do not fit, or there is no group.
    """
    num_data, num_workers = code.num_data, code.num_workers
    in_a_row = in_a_row and not grouped
    leaves, structure = jax.tree.flatten(native(x, "x"))
    leaves = [leaf if isinstance(leaf, jax.Array) else np.asarray(leaf) for leaf in leaves]
    x, shapes = jax.tree.unflatten(structure, leaves), [leaf.shape for leaf in leaves]
    given = lambda: ", ".join(f"{at} of shape {a.shape}" for at, a in leaves_of("x", x))  # noqa: E731
    many = in_a_row
    if not in_a_row:
        each = {False, True} if grouped is None else {grouped}
        if available is not None and np.ndim(available) == 2:
            each.discard(False)
        fits = [m for m in each if all(shape[m : m + 1] == (num_data,) for shape in shapes)]
        if len(fits) != 1:
            wanted = " or ".join(("(K, ...)", "(groups, K, ...)")[m] for m in sorted(each))
            whole = True in each and all(s and s[0] and not s[0] % num_data for s in shapes)
            remedy = "; x.reshape(-1, K, *x.shape[1:]) has whole groups" if whole else ""
            raise ValueError(
                f"{given()} may be one group of {num_data} or {shapes[0][0]} groups: say which "
                "with grouped=True or grouped=False, or give a mask per group, (groups, N)"
                if fits
                else f"{given()}: with this code, mask and `grouped` it must be "
                f"{wanted or 'another'}, K = {num_data}{remedy}"
            )
        (many,) = fits
    if not all(map(is_float, leaves)):
        check_data(x)  # says which
    empty = any(isinstance(size, int) and size == 0 for shape in shapes for size in shape)
    same = not many or len({shape[:1] for shape in shapes}) == 1
    if empty or not same or (in_a_row and (not shapes[0] or shapes[0][0] % num_data)):
        raise ValueError(
            f"{given()} is no whole groups of {num_data} data points, as many in each part"
        )
    for number, leaf in enumerate(leaves):
        if not isinstance(leaf, jax.Array):  # in JAX's working precision
            leaves[number] = leaf.astype(jax.dtypes.canonicalize_dtype(leaf.dtype), copy=False)
    x = jax.tree.unflatten(structure, leaves)
    x = groups_of(x, num_data) if in_a_row else x if many else jax.tree.map(lambda a: a[None], x)
    if available is None:
        return x, None, many

    on_host = not (isinstance(available, jax.Array) or any_tracer(x))
    masks = np.asarray(available) if on_host else jnp.asarray(available)
    groups = jax.tree.leaves(x)[0].shape[0]
    check_mask(masks, (groups, num_workers) if masks.ndim == 2 else (num_workers,))
    broadcast = np.broadcast_to if on_host else jnp.broadcast_to
    return x, broadcast(masks, (groups, num_workers)), many and not in_a_row
