"""The solution of a smoothing spline's problem, with one derivative rule.

K x = b of `_problem` is symmetric, so dx = K^-1 (db - dK x), by the same factor, is all that
derivatives need. The factor is never differentiated. `jax.lax.custom_linear_solve` is told that the
solve is its own transpose, and derivatives of any order work.

`ROWS` selects the algorithm by platform: a CPU eliminates one knot after the other (`_filter`),
accelerators many at once (`_dissection`).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..arrays import product
from . import _filter
from ._dissection import dissect
from ._problem import Columns, Problem, system_times
from .platforms import alike_in_shard_map, by_platform

# By platform, the number of rows that may couple two knots that are eliminated in parallel before a
# QR reduces them to four; None eliminates one knot after the other. More rows are fewer kernels. An
# H100's time is that of launches: it decodes 64 groups of (20, 8) with 110, and with 4 rows with
# some 120. On a TPU the work counts, too: by XLA's estimate a v5e takes, with 4, 8, 12 and 16 rows,
# 2.11, 1.98, 1.89 and 1.83 million cycles for one group of (100, 20), and 1.84, 1.89, 2.33 and 3.21
# for 64 groups of (20, 8).
ROWS: dict[str, int | None] = {"cpu": None, "tpu": 12, "other": 16}


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def solve(problem: Problem, b: Columns, wanted: tuple[str, ...] = ("value", "slope")) -> Columns:
    """Return the wanted parts of x in K x = b, differentiable to any order in everything."""
    return Columns(**_on_platform(wanted, problem, b))


@solve.defjvp
def _(wanted: tuple[str, ...], primals: Any, tangents: Any) -> Any:
    def parts(problem: Problem, b: Columns) -> Columns:
        found = _solve_all(problem, b)[0]
        return Columns(**{each: getattr(found, each) for each in wanted})

    return jax.jvp(parts, primals, tangents)


@jax.custom_jvp
def _solve_all(problem: Problem, b: Columns) -> tuple[Columns, _filter.Rotated]:
    """Return x and, for its derivative, the factor."""
    found = tuple(_on_platform(Columns._fields + _filter.Rotated._fields, problem, b).values())
    return Columns(*found[:4]), _filter.Rotated(*found[4:])


@_solve_all.defjvp
def _(primals: tuple[Problem, Columns], tangents: tuple[Problem, Columns]) -> Any:
    (problem, b), (moved, change) = primals, tangents
    x, factor = _solve_all(problem, b)
    _, by_problem = jax.jvp(lambda problem: system_times(problem, x), (problem,), (moved,))
    # One array: JAX 0.10 transposes the solve only where all of its right-hand side moves.
    right = jnp.concatenate(
        [-of if db is None else db - of for db, of in zip(change, by_problem, strict=True)]
    )
    problem, known, right = alike_in_shard_map((problem, factor, right))
    places = tuple(np.cumsum([len(part) for part in x])[:-1])

    def times(x: Array) -> Array:
        return jnp.concatenate(system_times(problem, Columns(*jnp.split(x, places))))

    def solved(_: Any, right: Array) -> Array:
        b = Columns(*jnp.split(right, places))
        return jnp.concatenate([*_on_platform(Columns._fields, problem, b, known).values()])

    found = jax.lax.custom_linear_solve(times, right, solved, symmetric=True)
    x_change = Columns(*jnp.split(found, places))
    return (x, factor), (x_change, jax.tree.map(jnp.zeros_like, factor))


def _on_platform(
    wanted: tuple[str, ...], problem: Problem, b: Columns, known: _filter.Rotated | None = None
) -> dict[str, Array]:
    """Return parts of x and of the factor by name, by the platform's algorithm."""
    columns = next(part.shape[1] for part in b if part is not None)
    gaps, knots = len(problem.gaps), len(problem.weights)
    shapes = dict.fromkeys(("shear", "bend"), (gaps, columns))
    shapes |= dict.fromkeys(("value", "slope"), (knots, columns))
    shapes |= {"rotations": (gaps, 14), "rows": (gaps, 8), "last": (3,)}
    made = [(shapes[each], problem.mu.dtype) for each in wanted]
    found = by_platform(_solved, (wanted,), (problem, b, known), made)
    return dict(zip(wanted, found, strict=True))


def _solved(
    platform: str, wanted: tuple[str, ...], problem: Problem, b: Columns, known: Any
) -> tuple[Array, ...]:
    """Return parts of x and of a filter's factor; nested dissection has none without columns."""
    if (rows := ROWS[platform]) is None:
        factor, x = _filter.solve_in_turn(problem, b, wanted, known)
    else:
        x = dissect(problem, rows, b).solve(b)
        if b.shear is None:
            # As K is symmetric, the shears that forces cause follow from the solutions for unit
            # data. This keeps digits where slopes are as heavy as gaps are stiff.
            unit = Columns(shear=jnp.eye(len(problem.gaps), dtype=problem.gaps.dtype))
            made = dissect(problem, rows, unit).solve(unit)
            shear = product(made.value.T, b.value) + product(made.slope.T, b.slope)
            x = x._replace(shear=shear)
        none = jnp.zeros_like(problem.gaps)[:, None]
        last = jnp.zeros(3, none.dtype)
        factor = _filter.Rotated(jnp.tile(none, 14), jnp.tile(none, 8), last)
    found = x._asdict() | factor._asdict()
    return tuple(found[each] for each in wanted)


@jax.custom_jvp
def variance(
    problem: Problem, gap: Int[Array, " k"], left: Float[Array, "2 k"], right: Float[Array, "2 k"]
) -> Float[Array, " k"]:
    """Return mu times the variance of left . s_i + right . s_{i+1} for these gaps i.

    s are values and slopes of the knots, and observations have the variance 1 / weight. The
    derivative, and an accelerator, take a column of `solve` for each of the k.
    """
    found = by_platform(_variance, (), (problem, gap, left, right), [(gap.shape, left.dtype)])
    return problem.mu * found[0]


@variance.defjvp
def _(primals: Any, tangents: Any) -> Any:
    def by_rule(problem: Problem, *asked: Array) -> Array:
        forces = _forces(len(problem.weights), *asked)
        x = solve(problem, forces)
        return problem.mu * jnp.sum(forces.value * x.value + forces.slope * x.slope, axis=0)

    return variance(*primals), jax.jvp(by_rule, primals, tangents)[1]


def _variance(platform: str, problem: Problem, *asked: Array) -> tuple[Array]:
    if (rows := ROWS[platform]) is None:
        return (_filter.variance_in_turn(problem, *asked),)
    forces = _forces(len(problem.weights), *asked)
    x = dissect(problem, rows, forces).solve(forces)
    return (jnp.sum(forces.value * x.value + forces.slope * x.slope, axis=0),)


def _forces(knots: int, gap: Array, left: Array, right: Array) -> Columns:
    """Return the coefficients of values and slopes as forces, a column for each combination.

    The variance of a combination is by how much its forces move it.
    """
    slot = jnp.arange(knots)[:, None]
    here, after = ((slot == each[None]).astype(left.dtype) for each in (gap, gap + 1))
    pairs = zip(left[:, None], right[:, None], strict=True)
    value, slope = (here * a + after * b for a, b in pairs)
    return Columns(value=value, slope=slope)
