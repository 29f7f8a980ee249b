"""Regression points: the positions of data points (alpha) and workers (beta) on [-1, 1].

All points are computed in float64 with NumPy and rounded once, so that an alpha and a beta that
coincide are equal to the last bit.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ..arrays import check_counts, namespace, where
from .code import AbstractNumpyCode
from .trees import to_device

Layout: TypeAlias = Literal[
    "chebyshev", "approxifer", "sbacc", "uniform", "interleaved", "repeated"
]
Points: TypeAlias = str | tuple[ArrayLike | Sequence[float], ArrayLike | Sequence[float]]
LAYOUTS: tuple[str, ...] = get_args(Layout)
_KNOWN = ", ".join([*LAYOUTS, "mixed:SHARE"])


def regression_points(
    num_data: int, num_workers: int, points: Points = "chebyshev"
) -> tuple[Float[Array, " num_data"], Float[Array, " num_workers"]]:
    """Return the points (alpha, beta) of the layout with this name, or check given ones.

    - "chebyshev": alpha_k = cos((2k-1) pi / 2K), beta_n = cos((n-1) pi / (N-1)) (arXiv 2402.04377).
    - "approxifer": the same alpha, beta_n = cos((n-1) pi / N) (ApproxIFER, AAAI 2022).
    - "sbacc": the same alpha, beta_n = cos((2n-1) pi / 2N) (SBACC, arXiv 2507.01330).
    - "uniform": alpha_k = (2k-1)/K - 1, beta evenly from 1 to -1.
    - "interleaved": Chebyshev alphas, each of which is also a beta; the other workers are spread
      evenly over the gaps. Under interpolation, a data point whose worker answered is exact.
    - "repeated": Chebyshev alphas, each of which is a beta once or more, as replication places
      copies.
    - "mixed:0.5": Chebyshev alphas, each of which is also a beta; of the other workers this share
      (0 to 1) repeat an alpha, and the rest lie in the gaps, both spread evenly. "mixed:0" is
      "interleaved", and "mixed:1" is "repeated".
    - (alpha, beta): your own points in any order, within [-1, 1]; alphas must be distinct.

    Raises:
        ValueError: The name is unknown, a share is out of range, a layout cannot serve these
            counts, or given points have the wrong shape, are out of range or not finite, or alphas
            coincide.
    """
    num_data, num_workers = check_counts(num_data=num_data, num_workers=num_workers)
    if isinstance(points, str):
        alpha, beta = _layout(num_data, num_workers, points)
        dtype = jax.dtypes.canonicalize_dtype(float)
        return to_device((alpha.astype(dtype), beta.astype(dtype)))
    try:
        alpha, beta = points
    except (TypeError, ValueError):
        raise ValueError(
            f"points must be one of {_KNOWN} or a pair (alpha, beta), not {points!r}"
        ) from None
    alpha = _given("alpha", alpha, num_data)
    beta = _given("beta", beta, num_workers)
    if not isinstance(alpha, Tracer):
        gap = np.diff(np.sort(np.asarray(alpha, np.float64)))
        if np.any(gap <= 4 * jnp.finfo(alpha.dtype).eps):
            raise ValueError(f"alphas must be distinct, but two of {alpha} coincide")
    return alpha, beta


class AbstractPointsCode(AbstractNumpyCode):
    """A code with regression points on a line.

    Attributes:
        num_data: K.
        num_workers: N.
        alpha: Regression points of the data points; a leaf.
        beta: Regression points of the workers; a leaf.
    """

    num_data: int = eqx.field(static=True)
    num_workers: int = eqx.field(static=True)
    alpha: Float[Array, " num_data"]
    beta: Float[Array, " num_workers"]

    def __init__(self, num_data: int, num_workers: int, *, points: Points = "chebyshev"):
        """Make a code with points by layout name or as (alpha, beta): see `regression_points`.

        Raises:
            ValueError: As `regression_points`.
        """
        self.alpha, self.beta = regression_points(num_data, num_workers, points)
        self.num_data, self.num_workers = len(self.alpha), len(self.beta)


def copies(num_data: int, num_workers: int) -> Int[np.ndarray, " num_workers"]:
    """Return the data point of which each worker holds a copy: all once, then all again, ...

    The last, incomplete round is spread evenly. If K divides N, worker n has data point n mod K.

    Raises:
        ValueError: There are fewer workers than data points.
    """
    num_data, num_workers = check_counts(num_data=num_data, num_workers=num_workers)
    if num_workers < num_data:
        raise ValueError(
            f"{num_data} data points, each with a worker of its own, need at least {num_data} "
            f"workers, not {num_workers}"
        )
    rounds, rest = divmod(num_workers, num_data)
    return np.concatenate([np.tile(np.arange(num_data), rounds), _spread(rest, num_data)])


def coincident(points: Float[Any, " n"], others: Float[Any, " k"]) -> Bool[Any, " n"]:
    """Return which points equal one of the others up to a few roundings, as `gather_knots` does."""
    xp = namespace(points, others)
    tolerance = 4 * np.finfo(points.dtype).eps
    return xp.min(xp.abs(points[:, None] - others[None]), axis=1) <= tolerance


def mean_gap(points: Float[Any, " n"], available: Bool[Any, "*sets n"]) -> Float[Any, "*sets"]:
    """Return the mean length, in radians, of the gap that contains a random point of the circle.

    A point t lies on the unit circle at the angles +-arccos(t), where Chebyshev points are evenly
    spaced. For gaps g with the sum 2 pi the mean is sum g^2 / 2 pi, one for each set of available
    points. The gap over an end of [-1, 1] is twice the angle of the outermost point. With no point
    it is the whole circle.

    Differentiable in the points, except at -1 and 1, where the angle has no derivative and zero is
    returned instead.
    """
    xp = namespace(points, available)
    inside = xp.abs(points) < 1
    angles = where(inside, xp.arccos(where(inside, points, 0)), where(points > 0, 0, np.pi))
    angles, place = angles.astype(points.dtype), np.arange(points.shape[0])
    here, there = angles[:, None], angles[None]
    # All pairs instead of a sort: on an accelerator, and in the derivative, that is one kernel. No
    # point follows the last one; its gap over the interval's end counts as two squares.
    later = (there > here) | ((there == here) & (place[None] > place[:, None]))
    follows = available[..., None, :] & later.reshape(*(1,) * (available.ndim - 1), *later.shape)
    steps = xp.min(where(follows, there - here, 2**0.5 * (np.pi - here)), axis=-1)
    first = xp.min(where(available, angles, np.pi), axis=-1)
    squares = xp.sum(where(available, steps**2, 0), axis=-1) + 2 * first**2
    return (squares / np.pi).astype(points.dtype)


def _layout(num_data: int, num_workers: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    k, n = np.arange(1, num_data + 1), np.arange(num_workers)
    alpha = _cosine((2 * k - 1) / (2 * num_data))
    chebyshev = _cosine(n / (num_workers - 1) if num_workers > 1 else np.array([0.5]))
    if name == "chebyshev":
        return alpha, chebyshev
    if name == "approxifer":
        return alpha, _cosine(n / num_workers)
    if name == "sbacc":
        return alpha, _cosine((2 * n + 1) / (2 * num_workers))
    if name == "uniform":
        return (2 * k - 1) / num_data - 1, np.linspace(1, -1, num_workers)

    # Layouts with a worker on each data point.
    family, _, text = {"interleaved": "mixed:0", "repeated": "mixed:1"}.get(name, name).partition(
        ":"
    )
    try:
        share = float(text)
    except ValueError:
        share = None
    if family != "mixed" or share is None:
        raise ValueError(f"points must be one of {_KNOWN} (as in 'mixed:0.5'), not {name!r}")
    if not 0 <= share <= 1:
        raise ValueError(f"the share in {name!r} must be between 0 and 1")
    if num_workers < num_data:
        raise ValueError(
            f"{name} points give a data point a worker of its own: "
            f"{num_data} data points need at least {num_data} workers, not {num_workers}"
        )
    # Further workers repeat data points, or lie in the gaps between them.
    further = num_workers - num_data
    repeats = further if num_data == 1 else round(share * further)
    if further >= num_data:
        again = copies(num_data, num_data + repeats)[num_data:]
        gaps = _spread(further - repeats, num_data - 1)
    else:
        # Repeats and gaps alternate along the line: spread separately, two might lie side by side.
        turns = (np.arange(further + 1) * repeats + further // 2) // max(further, 1)
        repeat = np.diff(turns) > 0
        again, gaps = _spread(further, num_data)[repeat], _spread(further, num_data - 1)[~repeat]
    counts = np.bincount(gaps, minlength=num_data)  # of points, spread evenly in their gap
    between = [g + 1 + np.arange(1, c + 1) / (c + 1) for g, c in enumerate(counts)]
    half_turns = (2 * np.concatenate(between) - 1) / (2 * num_data)
    return alpha, np.concatenate([alpha, alpha[again], _cosine(half_turns)])


def _spread(number: int, slots: int) -> Int[np.ndarray, " number"]:
    """Return `number` of the slots, spread evenly, in order."""
    return (2 * np.arange(number) + 1) * slots // (2 * max(number, 1))


def _cosine(half_turns: np.ndarray) -> np.ndarray:
    """Return cos(pi x), symmetric to the last bit: as sin(pi (1/2 - x))."""
    return np.sin(np.pi * (0.5 - half_turns))


def _given(name: str, values, count: int) -> Array:
    values = values if isinstance(values, jax.Array) else to_device(np.asarray(values))
    if not jnp.issubdtype(values.dtype, jnp.floating):
        values = values.astype(float)
    if values.shape != (count,):
        raise ValueError(f"{name} must have shape ({count},), not {values.shape}")
    if not isinstance(values, Tracer) and not np.all(np.abs(np.asarray(values)) <= 1):
        raise ValueError(f"{name} must lie in [-1, 1]: got {values}")
    return values
