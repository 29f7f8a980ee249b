"""Decoding with adversaries: answers that do not fit the others are detected and left out."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from ..arrays import native, working_dtype
from ..codes import AbstractCode, Decoded, NeRCC, as_mask
from ..codes.code import checked_answers
from ..codes.decoding import decode_vectors, multiply
from ..codes.trees import join, to_device
from ..splines import smoothing_matrix
from ..splines.knots import gather_knots


def robust_decode(
    code: AbstractCode,
    y: PyTree[Float[ArrayLike, "num_workers ..."]],
    available: Bool[ArrayLike, " num_workers"],
    *,
    max_adversaries: int | Int[Array, ""],
    threshold: Float[ArrayLike, ""] | None = None,
) -> tuple[Decoded, Bool[Array, "*groups num_workers"]]:
    """Decode one group where up to `max_adversaries` of the workers may answer anything.

    The answers that fit their neighbours least are left out (`find_adversaries`), and the code
    decodes the others: without adversaries the result is that of plain decoding, unless an honest
    answer is suspected. The published decoder averages lies with their neighbours instead: it is
    the code with a lambda_dec of 4e-6 (A / n)^(8/5), or its own if that is larger, for A lies among
    n answers. Its rate is proven, but its error is far larger where the curve is rough, as for
    images in any order (docs/adversaries.md).

    Workers are judged better by several groups that they answered: put groups into a trailing axis,
    y (N, groups, ...), for predictions (K, groups, ...). Otherwise use `jax.vmap` over groups. One
    compilation serves every mask; predictions are differentiable in y. A worker whose answer is not
    finite counts as a straggler, as in `try_decode`, whose status is returned.

    Args:
        code: A regression code.
        y: The answers of N workers, or a pytree of arrays, judged together.
        available: Which workers answered.
        max_adversaries: The most workers that may lie, a minority of N. If it is an array, one
            compilation serves any number, and it is not checked.
        threshold: An answer is left out if its misfit exceeds the median misfit by this factor.
            Default: 4 + 6 / sqrt(m) for m outputs.

    Returns:
        Predictions, whose `responded` are the workers whose answers were used; and the suspected
        workers, whose finite answers came in time and were left out.

    Raises:
        ValueError: The code is not NeRCC, or `max_adversaries` is negative or not a minority of
            N; and as `try_decode`.

    Source: Moradi, Akbarinodehi and Maddah-Ali, arXiv 2502.08058: the rate of lambda_dec, from
    lambda^(3/4) = A^2 / (n^2 lambda^(1/2)), where smoothing and lies add equally to the squared
    error, which then falls as (A / n)^(6/5).
    """
    if not isinstance(code, NeRCC):
        raise ValueError(
            f"{type(code).__name__} decodes by no regression, so its answers do not tell which "
            "do not fit: use NeRCC, with points='repeated' for copies that vote"
        )
    if not isinstance(max_adversaries, jax.Array):
        most, whole = (code.num_workers - 1) // 2, isinstance(max_adversaries, int | np.integer)
        if not whole or isinstance(max_adversaries, bool) or not 0 <= max_adversaries <= most:
            raise ValueError(
                f"max_adversaries must be an integer from 0 to {most}, a minority of the workers, "
                f"not {max_adversaries!r}"
            )
    return _robust_decode(
        code,
        native(y, "y"),
        available,
        jnp.asarray(max_adversaries),
        None if threshold is None else jnp.asarray(threshold),
    )


@eqx.filter_jit
def _robust_decode(
    code: NeRCC,
    y: PyTree,
    available: ArrayLike,
    max_adversaries: Int[Array, ""],
    threshold: Array | None,
) -> tuple[Decoded, Array]:
    flat, form = join(to_device(checked_answers(code, y)), 1)
    answered = as_mask(available, (code.num_workers,)) & jnp.all(jnp.isfinite(flat), axis=1)
    flat = jnp.where(answered[:, None], flat, 0)

    # Answers are judged by a spline that smooths over half of the workers' gap, pi / n radians
    # for n Chebyshev points. On LeNet5's logits and RepVGG's probabilities at (100, 20), a
    # wider one takes the curve's own bends for noise and lets lies pass, and a narrower one
    # suspects honest answers next to lies. Where points repeat, copies should vote instead of
    # neighbours: the width falls with the third power of the share of distinct points.
    number = jnp.maximum(jnp.sum(answered), 1)
    distinct = gather_knots(code.beta, answered.astype(code.beta.dtype)).number / number
    length = 0.5 * jnp.pi / number * distinct**3
    if threshold is None:
        # The scatter of honest misfits, in units of the median one: it is larger for norms of
        # few outputs. Measured on the same models, for 10 outputs and for 250.
        threshold = jnp.asarray(4 + 6 / max(flat.shape[1], 1) ** 0.5)
    dtype = working_dtype(flat.dtype, code.beta.dtype)
    responded = answered & ~find_adversaries(
        jax.lax.stop_gradient(code.beta),
        jax.lax.stop_gradient(flat.astype(dtype)),
        answered,
        length**4,
        max_adversaries=max_adversaries,
        threshold=threshold,
    )
    clean = jnp.where(responded[:, None], flat, 0)
    decoded = decode_vectors(code, clean[None], responded[None])
    predictions = form.split(decoded.predictions[0])
    return Decoded(predictions, responded, decoded.recovered[0]), answered & ~responded


@jax.jit
def find_adversaries(
    points: Float[Array, " n"],
    y: Float[Array, "n m"],
    available: Bool[Array, " n"],
    lambda_: Float[ArrayLike, ""],
    *,
    max_adversaries: Int[ArrayLike, ""],
    threshold: Float[ArrayLike, ""],
) -> Bool[Array, " n"]:
    """Return which observations of a smoothing spline do not fit the others.

    The misfit of an observation is its distance from the spline through all others, in units of its
    expected size: |y_i - g_i| / sqrt(1 - S_ii) with the fit g = S y, the norm over all m
    coordinates. For one that is left out it is |y_j - g_j| / sqrt(1 + V_jj), with V_jj sigma^2 the
    posterior variance of g_j. (For the process whose posterior mean is the spline, all misfits have
    the same distribution.)

    First A = `max_adversaries` observations are left out, in two ways. The way is chosen whose fit
    of the remaining ones has less energy (penalised squares):

    - The worst is left out, A times, so that no lie is left that could hide others, make honest
      neighbours look bad, or make large misfits usual.
    - Those are left out that are farthest from the A-th nearest answer among their 2A neighbours on
      the line. An honest answer has at least A honest neighbours there, and a liar fewer than A
      that tell the same lie. So this way finds neighbours that agree on a lie, which the first way
      may believe.

    Then they are taken back, the least bad first, as long as their misfit is within `threshold`
    times the median of the others. Fewer than half of the available ones are left out, and at least
    four are kept.
    """
    fit = smoothing_matrix(points, points, lambda_, available=available)
    covariance = jnp.where(available[:, None], fit, 0)
    y = jnp.where(available[:, None], y, 0).astype(covariance.dtype)
    number = jnp.sum(available)
    most = jnp.minimum((number - 1) // 2, number - 4)

    # Misfits below this share of the largest number raise no suspicion: copies differ by rounding,
    # and where copies determine the spline nearly all misfits are nearly zero.
    negligible = 1e-3

    # Each answer's distance from the A-th nearest among its 2A neighbours on the line.
    scaled, _ = _in_units(y, available)
    square = jnp.sum(scaled**2, axis=1)
    distance = square[:, None] + square[None] - 2 * multiply(scaled, scaled.T)
    rank = jnp.argsort(jnp.argsort(jnp.where(available, points, jnp.inf)))
    apart = jnp.abs(rank[:, None] - rank[None])
    others = available[None] & (apart > 0)
    near = jnp.argsort(jnp.argsort(jnp.where(others, apart, len(points)), axis=1), axis=1)
    among = others & (near < 2 * max_adversaries)
    ordered = jnp.sort(jnp.where(among, distance, jnp.inf), axis=1)
    far = jnp.take(ordered, jnp.maximum(max_adversaries - 1, 0), axis=1)

    def leave_out(turn, state, distance=None):
        kept, covariance = state
        misfit = jnp.where(kept, _misfits(covariance, y, kept), -1)
        worst = jnp.argmax(misfit if distance is None else jnp.where(kept, distance, -1))
        row = covariance[worst]
        left = jnp.maximum(1 - row[worst], jnp.finfo(y.dtype).eps)
        without = covariance + jnp.outer(row, row) / left
        go = (turn < most) & (misfit[worst] > threshold * negligible)
        return kept.at[worst].set(kept[worst] & ~go), jnp.where(go, without, covariance)

    def take_back(_, state):
        kept, covariance = state
        misfit = _misfits(covariance, y, kept)
        usual = jnp.nanmedian(jnp.where(kept, misfit, jnp.nan))
        limit = threshold * jnp.maximum(usual, negligible)
        misfit = jnp.where(available & ~kept, misfit, jnp.inf)
        best = jnp.argmin(misfit)
        row = covariance[best]
        again = covariance - jnp.outer(row, row) / (1 + row[best])
        go = misfit[best] <= limit
        return kept.at[best].set(kept[best] | go), jnp.where(go, again, covariance)

    start = available, covariance
    by_fit = jax.lax.fori_loop(0, max_adversaries, leave_out, start)
    by_neighbours = jax.lax.fori_loop(
        0, max_adversaries, lambda turn, state: leave_out(turn, state, far), start
    )

    def log_energy(kept, covariance):
        """Return the logarithm of the penalised squares of the fit of the kept: y' (I - S) y."""
        known, unit = _in_units(y, kept)
        energy = jnp.sum(known * (known - multiply(covariance, known)))
        return jnp.log(jnp.maximum(energy, jnp.finfo(y.dtype).tiny)) + 2 * jnp.log(unit)

    better = log_energy(*by_neighbours) < log_energy(*by_fit)
    state = jax.tree.map(lambda a, b: jnp.where(better, a, b), by_neighbours, by_fit)
    kept, _ = jax.lax.fori_loop(0, max_adversaries, take_back, state)
    return available & ~kept


def _in_units(
    y: Float[Array, "n m"], kept: Bool[Array, " n"]
) -> tuple[Float[Array, "n m"], Float[Array, ""]]:
    """Return the kept answers in units of their largest number, zeros for others, and that unit."""
    # The square of a lie of 1e30 would overflow, and hide which worker lied. The unit is less than
    # the largest float: XLA multiplies with its reciprocal, which would be zero.
    largest = jnp.max(jnp.abs(y), where=kept[:, None], initial=0)
    unit = jnp.where(largest > 0, jnp.minimum(largest, jnp.finfo(y.dtype).max / 8), 1)
    return jnp.where(kept[:, None], y, 0) / unit, unit


def _misfits(
    covariance: Float[Array, "n n"], y: Float[Array, "n m"], kept: Bool[Array, " n"]
) -> Float[Array, " n"]:
    """Return the standardised distance of each observation from the spline through the others.

    Only kept observations count; the unit is the largest kept number.
    """
    known, unit = _in_units(y, kept)
    y = y / unit
    fitted = multiply(covariance, known)
    variance = jnp.diagonal(covariance)
    variance = jnp.where(kept, 1 - variance, 1 + variance)
    least = jnp.finfo(y.dtype).eps  # 1 - S_ii is 0 where no other observation informs on i
    return jnp.sqrt(jnp.sum((y - fitted) ** 2, axis=1) / jnp.maximum(variance, least))
