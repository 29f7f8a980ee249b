"""How predictions respond to observations, with a derivative by the adjoint of the linear solve.

A prediction is c's of the unknowns s of `_root_information`, M s = r in least squares. With the
adjoint a = (M'M)^-1 c, its response to a difference of neighbouring observations is the shear row
of M a times the shear, and differences make the response to each observation.

For the derivative, let w = M a = Q R'^-1 c be the adjoint by rows, and e = r - M s the residuals of
a unit observation. Then d(c's) = dc's + (dM a)'e + w'(dr - dM s), and since a change of the penalty
or of a weight only scales rows of M, that is, summed over rows and over gaps of size h,

    dc's + sum_rows q w e + sum_gaps shear dh/2 [w_shear (v_i + v_{i+1}) - (a_i + a_{i+1}) e_shear],

where q is dmu/mu - 3 dh/h for shear rows, dmu/mu - dh/h for bend rows, the relative change of their
weights for the others, v are the slopes of s and a_i those of a. w and e come by rotations, without
cancellation. Only second derivatives differentiate the rotations themselves.

Forces f on the unknowns act as observations do, with s = (M'M)^-1 f, e = -M s, and a'df beside.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ._knots import by_observation
from ._root_information import Pivots, Rows, factorize_beside, root, shears_of
from .arrays import product, where


class Problem(NamedTuple):
    """A least-squares problem of `factorize`, and the predictions that are asked for.

    `values` and `slopes` are the coefficients c of each prediction, a column each, `pushes` and
    `torques` the forces on each knot's value and slope, and `shown` is that of `Knots`.
    """

    gaps: Float[Array, " gaps"]
    weights: Float[Array, " n"]
    slope_weights: Float[Array, " n"]
    mu: Float[Array, ""]
    values: Float[Array, "n k"]
    slopes: Float[Array, "n k"]
    pushes: Float[Array, "n forces"]
    torques: Float[Array, "n forces"]
    shown: Int[Array, " n"]

    def columns(self) -> tuple[Float[Array, "n columns"], Float[Array, "n columns"]]:
        """Return the columns of predictions and forces, for values and slopes."""
        return _beside(self.values, self.pushes), _beside(self.slopes, self.torques)

    def split(self, columns: Array) -> tuple[Array, Any, Any]:
        """Return the columns of predictions, of forces and, if there are any, of observations.

        Where there are none they are NumPy's, which compile to nothing.
        """
        predictions, forces = self.values.shape[1], self.pushes.shape[1]
        nothing = np.zeros((len(columns), 0), columns.dtype)
        if columns.shape[1] == predictions:
            return columns, nothing, nothing
        both = predictions + forces
        acting = columns[:, predictions:both] if forces else nothing
        return columns[:, :predictions], acting, columns[:, both:]


class Responses(NamedTuple):
    """The change of each prediction by one more unit of data.

    `matrix` is that of each knot's observation, `differences` that of the difference between the
    observations on both sides of each gap, `forced` that of each force.
    """

    matrix: Float[Array, "k n"]
    differences: Float[Array, "k gaps"]
    forced: Float[Array, "k forces"]


class Solutions(NamedTuple):
    """The solutions that the derivative needs.

    There is a column for each prediction, one for each force, then one for the observation at each
    knot. `values` and `slopes` are the solutions at the knots, `rows` those of M.
    """

    values: Float[Array, "n columns"]
    slopes: Float[Array, "n columns"]
    rows: Rows


def solution_shapes(columns: int, knots: int) -> list[tuple[int, int]]:
    """Return the shapes of the arrays of `Solutions`, for so many predictions and forces."""
    by_knot, by_gap = (knots, columns + knots), (knots - 1, columns + knots)
    return [by_knot, by_knot, by_gap, by_gap, by_knot, by_knot]


def responses(problem: Problem) -> Responses:
    """Return the responses, without a derivative."""
    factor, adjoint, _ = factorize_beside(*problem[:4], *problem.columns())
    rows = factor.spread(adjoint)
    return _responses(problem, rows.shear, adjoint)


@jax.custom_jvp
def solve(problem: Problem) -> tuple[Responses, Solutions]:
    """Return the responses, and what `known_responses` takes for their derivative."""
    return _solved(problem)


@solve.defjvp
def _(primals: tuple[Problem], tangents: tuple[Problem]) -> Any:
    made, solutions = solve(primals[0])
    _, (_, change) = jax.jvp(_solved, primals, tangents)
    return (made, solutions), (_change(primals[0], tangents[0], solutions), change)


@jax.custom_jvp
def known_responses(problem: Problem, solutions: Solutions) -> Responses:
    """Return the responses, from the problem's solutions; differentiable in the problem."""
    values, slopes = (problem.split(each)[0] for each in solutions[:2])
    forced = _together((values, slopes), (problem.pushes, problem.torques))
    return _from_shear(problem, solutions.rows.shear, forced)


@known_responses.defjvp
def _(primals: tuple[Problem, Solutions], tangents: tuple[Problem, Solutions]) -> Any:
    # The change of the solutions is that of the problem, which counts already.
    return known_responses(*primals), _change(primals[0], tangents[0], primals[1])


def _solved(problem: Problem) -> tuple[Responses, Solutions]:
    units = jnp.diag(root(problem.weights))
    factor, adjoint, found = factorize_beside(*problem[:4], *problem.columns(), units)
    assert found is not None
    observed, residuals = found

    # One pass through the knots for the columns of both.
    right = (jnp.concatenate(each, axis=-1) for each in zip(adjoint, observed, strict=True))
    values, slopes, rows = factor.back_and_spread(Pivots(*right), residuals)
    solutions = Solutions(values, slopes, rows)
    return _responses(problem, rows.shear, adjoint), solutions


def _change(problem: Problem, change: Problem, solutions: Solutions) -> Responses:
    """Return the change of the responses by that of the problem."""
    penalty, stretch = change.mu / problem.mu, change.gaps / problem.gaps
    relative = Rows(
        penalty - 3 * stretch,
        penalty - stretch,
        _relative(change.weights, problem.weights),
        _relative(change.slope_weights, problem.slope_weights),
    )
    bent = (shears_of(problem.gaps, problem.mu) * change.gaps / 2)[:, None]

    def sides(columns: Array, sign: int = 1) -> tuple[Array, Array]:
        """Return the columns of predictions, and those of all that acts; `sign` is of forces."""
        ours, forces, observations = problem.split(columns)
        return ours, _beside(observations, sign * forces)

    values, slopes = map(sides, solutions[:2])
    of_adjoint, of_solution = sides(solutions.slopes[1:] + solutions.slopes[:-1])
    (shear, *others), right = zip(*(sides(rows, -1) for rows in solutions.rows), strict=True)
    scaled = [q[:, None] * each for q, each in zip(relative[1:], others, strict=True)]
    pairs = [
        (relative.shear[:, None] * shear - bent * of_adjoint, right[0]),
        *zip(scaled, right[1:], strict=True),
        (bent * shear, of_solution),
        (change.values, values[1]),
        (change.slopes, slopes[1]),
    ]
    left, right = (jnp.concatenate(each) for each in zip(*pairs, strict=True))
    made = product(left.T, right)
    matrix, forced = made[:, : len(problem.weights)], made[:, len(problem.weights) :]
    if forced.shape[1]:
        forced += _together((values[0], slopes[0]), (change.pushes, change.torques))
    return Responses(matrix, jnp.zeros((len(matrix), len(problem.gaps)), matrix.dtype), forced)


def _responses(problem: Problem, shear: Float[Array, "gaps columns"], adjoint: Pivots) -> Responses:
    """Return the responses, by the shear rows and R'^-1 of predictions and forces."""
    ours, forces, _ = zip(*map(problem.split, adjoint.rows()), strict=True)
    return _from_shear(problem, shear, _together(ours, forces))


def _from_shear(
    problem: Problem, shear: Float[Array, "gaps columns"], forced: Float[Array, "k forces"]
) -> Responses:
    shear = problem.split(shear)[0]
    differences = -(shears_of(problem.gaps, problem.mu)[:, None] * shear).T
    # By differences the response to a constant is exact: it has none of the rotations' rounding.
    matrix = by_observation(problem.values.T, differences, problem.shown)
    return Responses(matrix, differences, forced)


def _together(
    columns: Sequence[Array], forces: Sequence[Array | np.ndarray]
) -> Float[Array, "k forces"]:
    """Return the products of columns with forces, in parts that are to be added."""
    if not forces[0].shape[1]:
        return jnp.zeros((columns[0].shape[1], 0), columns[0].dtype)
    return product(jnp.concatenate(columns).T, jnp.concatenate(forces))


def _beside(columns: Array, more: Array | np.ndarray) -> Array:
    return jnp.concatenate([columns, more], axis=1) if more.shape[1] else columns


def _relative(change: Array, weights: Array) -> Array:
    """Return the relative change; what has no weight is a row of zeros, and may have any."""
    return change / where(weights > 0, weights, 1)
