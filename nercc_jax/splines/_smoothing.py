"""Smoothing splines as linear operators: a fit's two faces."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, ArrayLike, Bool, Float

from ._ends import Ends, check_ends
from ._fit import LinearMap, fit, hermite, observations_of, regression_of, rows_of
from ._knots import Knots
from ._platforms import Shape, by_platform
from ._responses import Solutions, solution_shapes
from ._root_information import Rows
from .arrays import jitted


class SmoothingSpline(eqx.Module):
    """A fitted cubic spline: its value and slope at each knot.

    Knots beyond the last that carried an observation only continue the straight line.
    """

    knots: Float[Array, " n"]
    values: Float[Array, "n *m"]
    slopes: Float[Array, "n *m"]

    @jitted
    def evaluate(self, t: Float[ArrayLike, " k"]) -> Float[Array, "k *m"]:
        """Return the spline at the points t; straight lines beyond the outermost observed knots."""
        at = jnp.asarray(t, self.knots.dtype)
        return hermite(self.knots, self.values, self.slopes, at)


@partial(jitted, static_argnames="ends")
def smoothing_spline(
    t: Float[ArrayLike, " n"],
    y: Float[ArrayLike, "n *m"],
    lambda_: Float[ArrayLike, ""],
    *,
    weights: Float[ArrayLike, " n"] | None = None,
    available: Bool[ArrayLike, " n"] | None = None,
    end_weights: Float[ArrayLike, "2"] | None = None,
    ends: Ends = "natural",
) -> SmoothingSpline:
    """Fit the natural cubic smoothing spline.

        argmin_u  1/W sum_i w_i |u(t_i) - y_i|^2 + lambda integral |u''(t)|^2 dt,   W = sum_i w_i,

    plus, with `end_weights` (a, b), lambda (a |u'(first)|^2 + b |u'(last)|^2), over the available
    observations, in O(n) operations per coordinate.

    It is differentiable in t, y, lambda and all weights; one compilation serves every mask; batch
    with `jax.vmap`. With one observation the fit is a constant. With none it is zero; callers must
    know that case. On a CPU, and with not-a-knot ends, knots are eliminated one after the other,
    elsewhere in parallel, without a loop: the same to rounding.

    Args:
        t: The points, in any order. Coincident ones act as one knot with the mean of their
            observations and the sum of their weights.
        y: The observations, of any trailing shape. Unavailable ones are never read, NaN included.
        lambda_: From 0 (interpolation) to infinity (the straight line of least squares), in units
            of t^3.
        weights: Non-negative; 1 unless given.
        available: Which observations count; all unless given.
        end_weights: Non-negative, in units of 1/t: the penalty of the slopes at the smallest and
            the largest available point, with which the spline goes on as a straight line beyond
            them. A natural spline (0) becomes one that ends flat (infinity).
        ends: "natural", or "not-a-knot", whose first two gaps have one cubic, and its last two:
            near the ends of a smooth curve an error of the fourth power of the gaps, where a
            natural spline's is of the second. Of fewer than four distinct observations it is
            natural.

    Raises:
        ValueError: Where shapes do not agree, and for unknown `ends`.

    Source: arXiv 2402.04377, eqs. of the encoding and decoding regression; Green and Silverman
    1994, section 2.3.
    """
    given = regression_of(t, lambda_, weights, available, end_weights)
    flat = observations_of(y, given[0], given[2])
    knots = (max(len(given[0]), 2),)
    columns = (*knots, flat.shape[1])
    dtype = flat.dtype
    shapes = ((knots, dtype), (columns, dtype), (columns, dtype))
    with jax.named_scope("nercc.fit"):
        made = by_platform(_spline, (check_ends(ends),), (*given, flat), shapes)
    found, values, slopes = made
    shape = (*knots, *jnp.shape(y)[1:])
    return SmoothingSpline(found, values.reshape(shape), slopes.reshape(shape))


def _spline(platform: str, ends: Ends, *arguments: Array) -> tuple[Array, ...]:
    *given, flat = arguments
    found = fit(*given, ends=ends, rows=rows_of(platform, ends))
    return found.knots.t, *found.values(flat)


@partial(jitted, static_argnames="ends")
def smoothing_matrix(
    t: Float[ArrayLike, " n"],
    at: Float[ArrayLike, " k"],
    lambda_: Float[ArrayLike, ""],
    *,
    weights: Float[ArrayLike, " n"] | None = None,
    available: Bool[ArrayLike, " n"] | None = None,
    end_weights: Float[ArrayLike, "2"] | None = None,
    ends: Ends = "natural",
) -> Float[Array, "k n"]:
    """Return the matrix that maps observations at t to the fitted spline at the points `at`.

    It is `smoothing_spline(t, y, ...).evaluate(at)` written as `matrix @ y`, for many coordinates
    with the same points. Columns of unavailable observations are zero. Rows sum to one, unless
    nothing is available: then the matrix is zero. Arguments, errors and source as there.
    """
    return smoothing_map(
        t,
        at,
        lambda_,
        weights=weights,
        available=available,
        end_weights=end_weights,
        ends=ends,
    ).matrix


def smoothing_map(
    t: Float[ArrayLike, " n"],
    at: Float[ArrayLike, " k"],
    lambda_: Float[ArrayLike, ""],
    *,
    weights: Float[ArrayLike, " n"] | None = None,
    available: Bool[ArrayLike, " n"] | None = None,
    end_weights: Float[ArrayLike, "2"] | None = None,
    ends: Ends = "natural",
) -> LinearMap:
    """Return `smoothing_matrix` with a way to apply it that loses no digits, from the same fit."""
    given = regression_of(t, lambda_, weights, available, end_weights)
    at = jnp.asarray(at, given[0].dtype)
    (number,), (count,), slots = given[0].shape, at.shape, max(len(given[0]), 2)
    real, whole = at.dtype, jnp.arange(0).dtype
    shapes = (
        ((count, number), real),
        ((count, slots - 1), real),
        ((count,), whole),
        ((slots,), real),
        ((slots,), real),
        ((number,), whole),
        ((number,), real),
        ((slots,), whole),
    )
    options = check_ends(ends), real, whole
    with jax.named_scope("nercc.fit"):
        made = _differentiable_map(options, shapes, (*given, at))
    matrix, differences, gap, *knots = made
    return LinearMap(matrix, differences, gap, Knots(*knots))


def _differentiable_map(
    options: tuple[Any, ...], shapes: tuple[Shape, ...], arguments: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Return the leaves of a map, whose derivative shares the map's solutions where it has any."""
    points, slots, real = shapes[0][0][0], shapes[3][0][0], shapes[0][1]
    # Ends that are not natural are two points and two forces more.
    columns = points if options[0] == "natural" else points + 4
    extra = tuple((shape, real) for shape in solution_shapes(columns, slots))

    @jax.custom_jvp
    def leaves(*arguments: Array) -> tuple[Array, ...]:
        return by_platform(_map, options, arguments, shapes)

    def derivative(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> Any:
        made = by_platform(_solved_map, options, primals, (*shapes, *extra))
        made, known = made[: len(shapes)], made[2:]
        moving = [i for i, each in enumerate(tangents) if not isinstance(each, SymbolicZero)]

        def moving_map(*moved: Array) -> tuple[Array, ...]:
            now = dict(zip(moving, moved, strict=True))
            given = (now.get(place, each) for place, each in enumerate(primals))
            return by_platform(_known_map, (*options, 2 in moving), (*given, *known), shapes)

        moved, change = ([each[i] for i in moving] for each in (primals, tangents))
        return made, jax.jvp(moving_map, moved, change)[1]

    leaves.defjvp(derivative, symbolic_zeros=True)
    return leaves(*arguments)


def _map(platform: str, ends: Ends, real: Any, whole: Any, *arguments: Array) -> tuple[Array, ...]:
    *given, at = arguments
    found = fit(*given, ends=ends, rows=rows_of(platform, ends))
    return _leaves_of(found.map_to(at), real, whole)


def _solved_map(
    platform: str, ends: Ends, real: Any, whole: Any, *arguments: Array
) -> tuple[Array, ...]:
    """Return `_map`, and the arrays of its `Solutions`; zeros where there are none."""
    *given, at = arguments
    found = fit(*given, ends=ends, rows=rows_of(platform, ends))
    if found.rows is None:
        return _leaves_of(found.solved_map(at), real, whole)
    shapes = solution_shapes(len(at), len(found.knots.t))
    return _leaves_of((found.map_to(at), [jnp.zeros(shape, real) for shape in shapes]), real, whole)


def _known_map(
    platform: str, ends: Ends, real: Any, whole: Any, weights_move: bool, *arguments: Array
) -> tuple[Array, ...]:
    """Return `_map` of its arguments, and of what `_solved_map` gave but for the map itself."""
    *given, at = arguments[:5]
    if rows_of(platform, ends) is not None:
        return _map(platform, ends, real, whole, *arguments[:5])
    gap, *knots = arguments[5:11]
    values, slopes, *rows = arguments[11:]
    found = fit(*given, ends=ends, known=Knots(*knots), weights_move=weights_move)
    made = found.known_map(at, gap, Solutions(values, slopes, Rows(*rows)))
    return _leaves_of(made, real, whole)


def _leaves_of(tree: Any, real: Any, whole: Any) -> tuple[Array, ...]:
    return tuple(
        leaf.astype(real if jnp.issubdtype(leaf.dtype, jnp.floating) else whole)
        for leaf in jax.tree.leaves(tree)
    )
