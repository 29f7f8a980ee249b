"""Coded inference on a pool: encode, dispatch, wait, decode."""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PyTree, Shaped

from ..codes import AbstractCode, Decoded, decode_groups
from ..codes.kept import CachedMatrices, encoder_of, known_matrices
from ..codes.trees import check_finite, groups_of, points_of, to_device
from ..codes.workers import encode_on_host
from ..inference.coded import as_groups
from ..inference.models import check_conditions
from ..schemes import Scheme
from ..schemes.scheme import PreparedInputs
from ._pool import AbstractPool
from .batch import BatchAnswers, Enough, check_deadline
from .worker import no_mesh, off_meshes


@dataclasses.dataclass(frozen=True)
class PoolResult:
    """Predictions with their status, and the answers from which they were decoded.

    Attributes:
        decoded: Predictions, the mask of the recovered ones, and their expected errors.
        answers: The answers to coded data points.
    """

    decoded: Decoded
    answers: BatchAnswers


@no_mesh()
def pool_inference(
    pool: AbstractPool,
    code: AbstractCode | Scheme,
    *,
    with_status: bool = False,
    grouped: bool | None = None,
) -> Callable[..., Any]:
    """Return a function `(x, enough=None, deadline=60.0) -> predictions` for a code on a pool.

    Its arguments: `x` is (K, ...) for one group, or (groups, K, ...), with finite floats, or a
    pytree of such arrays as for `coded_inference`; every worker gets its coded data points of all
    groups as one batch. `enough` says when to decode: at a number of answers (default: all N), or
    when a function of their mask returns True, such as `Answers.below`. After `deadline` seconds
    the answers that have arrived are decoded. Predictions are (K, ...) or (groups, K, ...), NaN
    where a data point cannot be recovered.

    A `Scheme` is carried out as a whole: its order (over all data points of a call), its surrogate
    or learner, the regression points of its redundant workers, and its error probability, which is
    in `PoolResult.decoded`. Use `reexecute` to replace predictions that are too uncertain.

    The encoder and the decoder are compiled once, for every straggler set. A scheme calibrated
    under other `conditions` than the pool's causes a `CalibrationWarning`.

    Args:
        pool: The workers.
        code: A code or a scheme.
        with_status: Whether to return a `PoolResult` instead of predictions only.
        grouped: Whether x has an axis of groups (default: by the axis of length K, if only one has
            it).

    Raises:
        ValueError: From the function, before anything is sent: if x does not fit or is not finite,
            or the deadline is not positive.
        TimeoutError: From the function, if no prediction can be recovered at the deadline.
        RuntimeError: From the function, if no worker answers and none will.

    Example:
        >>> from nercc_jax import NeRCC
        >>> from nercc_jax.pools import DevicePool
        >>> with DevicePool(jnp.tanh, 6) as pool:
        ...     infer = pool_inference(pool, NeRCC(4, 6), with_status=True)
        ...     result = infer(jnp.ones((4, 3)), 5, deadline=60.0)  # decodes 5 of 6 answers
        >>> int(result.answers.available.sum()) >= 5
        True
    """
    scheme = off_meshes(code) if isinstance(code, Scheme) else None
    plain: AbstractCode = off_meshes(code) if scheme is None else scheme.code
    encoder = encoder_of(plain)
    if scheme is not None:
        check_conditions(pool.conditions, scheme.error_probability, scheme.bars)
    kinds = plain.worker_models.tolist()

    @no_mesh()
    def infer(x: PyTree, enough: Enough | None = None, deadline: float = 60.0):
        deadline = check_deadline(deadline)
        x, _, many = as_groups(plain, jax.tree.map(np.asarray, x), grouped=grouped)
        check_finite(x if many else jax.tree.map(lambda leaf: leaf[0], x), 2 if many else 1)
        points, prepared = points_of(x), None
        if scheme is None:  # encoded on the host, with NumPy
            coded = jax.tree.map(lambda leaf: encode_on_host(encoder, leaf), x)
        else:
            prepared, coded = _encode(scheme, points, encoder)
        needed = None if enough is None or callable(enough) else operator.index(enough)
        with pool.dispatch(coded, kinds=kinds, needed=needed) as batch:
            answers = batch.wait(enough, deadline)
        if answers.values is None:
            report = pool.report()
            seen = f"{report.busy} workers are busy, {report.starting} are started again"
            if number := len(answers.failures):
                last = answers.failures[-1]
                seen += f"; {number} failures, the last at worker {last.worker}: {last.reason}"
            if answers.waited < deadline:
                raise RuntimeError(f"no worker answered, and none will: {seen}")
            raise TimeoutError(f"no worker answered within {deadline} s: {seen}")

        # The scheme is an argument, so one whose learner was updated is not compiled again.
        values, available = answers.values, answers.available
        if scheme is None:
            y = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), values)
            found = decode_groups(plain, y, available[None])
        else:
            assert prepared is not None
            # If each group has regression points of its own, no decoder is cached.
            given = known_matrices(plain, available).decoders if prepared.beta is None else None
            matrices = CachedMatrices(encoder, given)
            found = _decode(scheme, points, prepared, values, available, matrices)
        found = jax.tree.map(np.asarray, found)
        if not np.any(found.recovered):
            raise TimeoutError(
                f"no prediction can be recovered from the {answers.available.sum()} of "
                f"{plain.num_workers} answers that were in after {deadline} s"
            )
        if not many:
            found = jax.tree.map(lambda leaf: leaf[0], found)
        return PoolResult(found, answers) if with_status else found.predictions

    return infer


@eqx.filter_jit
def _encode(
    scheme: Scheme, points: PyTree, encoder: ArrayLike
) -> tuple[PreparedInputs, PyTree[Shaped[Array, "num_workers groups ..."]]]:
    prepared, coded = scheme.encode(to_device(points), encoder)
    return prepared, jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), coded)


@eqx.filter_jit
def _decode(
    scheme: Scheme,
    points: PyTree,
    prepared: PreparedInputs,
    values: PyTree,
    available: ArrayLike,
    known: CachedMatrices,
) -> Decoded:
    y = jax.tree.map(lambda leaf: jnp.swapaxes(jnp.asarray(leaf), 0, 1), values)
    groups = len(jax.tree.leaves(y)[0])
    masks = jnp.broadcast_to(available, (groups, scheme.code.num_workers))
    found = scheme.decode(to_device(points), prepared, y, masks, known)
    return found.map_points(lambda leaf: groups_of(leaf, scheme.code.num_data))
