"""A code's tunable numbers as free ones, and back: what gradient descent walks on."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..codes import AbstractCode, mean_gap

# `dict[str, Array]`, said loosely: optax types its trees as anything.
Parameters: TypeAlias = Any
Code = TypeVar("Code", bound=AbstractCode)

# Angles this close are the same: the points coincide, or one lies at an end of [-1, 1].
_SAME = 1e-6


def parametrize(
    code: Code, *, points: bool = False
) -> tuple[Parameters, Callable[[Parameters], Code]]:
    """Return a code's free parameters, unbounded numbers, and the function that rebuilds the code.

    The parameters are those whose leaves the code has:

    - "log_lambda_enc", "log_lambda_dec", "log_end_penalty": natural logarithms. A lambda of 0
      starts from the fourth power of a thirtieth of the mean gap between its points, where
      smoothing hardly acts, and an `end_penalty` of 0 from 1. But an `exact` code with a lambda_enc
      of 0 keeps it: else its workers would no longer run on the data points themselves.
    - "gap_exponent": itself.
    - With `points`, "alpha_shifts" and "beta_shifts", zero at the start: a shift s_i of a point's
      angle arccos(t) multiplies the gap before it by exp(s_i) and the one behind it by exp(-s_i),
      and then all gaps are scaled to fill [0, pi]. So a point moves by itself, and all keep their
      order. Betas at an end of [-1, 1] or at each other stay there, and a beta that coincides with
      an alpha follows it: it never leaves, so answers stay exact and copies stay copies. (For an
      `exact` code leaving is a jump of the objective, which no gradient sees: compare layouts.)

    A descent of your own goes over these, not over the code's leaves: no step makes a lambda
    negative, where it would have no slope and stay for ever.

    ```python
    import jax
    import jax.numpy as jnp
    import optax
    from nercc_jax import NeRCC, nested_objective, parametrize

    model = lambda x: jnp.tanh(3 * x)
    x = jax.random.normal(jax.random.key(0), (8, 4, 2))  # groups of K = 4 data points
    available = jnp.array([[True] * 10, [True] * 7 + [False] * 3])  # straggler sets

    parameters, rebuild = parametrize(NeRCC(4, 10))
    optimizer = optax.adam(0.3)
    state = optimizer.init(parameters)

    @jax.jit
    def step(parameters, state):
        objective = lambda parameters: nested_objective(model, rebuild(parameters), x, available)
        value, slopes = jax.value_and_grad(objective)(parameters)
        updates, state = optimizer.update(slopes, state)
        return value, optax.apply_updates(parameters, updates), state

    for _ in range(30):
        value, parameters, state = step(parameters, state)
    code = rebuild(parameters)
    ```

    Raises:
        ValueError: The code has none of these leaves.
    """
    leaves = {field.name: getattr(code, field.name) for field in dataclasses.fields(code)}
    free: Parameters = {}
    for name, at in (("lambda_enc", "alpha"), ("lambda_dec", "beta")):
        kept = name == "lambda_enc" and leaves.get("exact", False) and not leaves[name] > 0
        if name in leaves and not kept:
            free[f"log_{name}"] = _logarithm(leaves[name], leaves[at])
    if "end_penalty" in leaves:
        penalty = leaves["end_penalty"]
        free["log_end_penalty"] = jnp.log(jnp.where(penalty > 0, penalty, 1))
    if "gap_exponent" in leaves:
        free["gap_exponent"] = leaves["gap_exponent"]
    place = None
    if points and {"alpha", "beta"} <= leaves.keys():
        shifts, place = _moving_points(leaves["alpha"], leaves["beta"])
        free |= shifts
    if not free:
        also = " but points, which are left as they are" if "alpha" in leaves else ""
        raise ValueError(f"{type(code).__name__} has nothing to tune{also}")

    def rebuild(parameters: Parameters) -> Code:
        values = {
            name.removeprefix("log_"): jnp.exp(value) if name.startswith("log_") else value
            for name, value in parameters.items()
            if not name.endswith("_shifts")
        }
        if place is not None:
            values["alpha"], values["beta"] = place(parameters)
        return eqx.tree_at(
            lambda c: [getattr(c, name) for name in values], code, list(values.values())
        )

    return free, rebuild


def _logarithm(value: Float[Array, ""], points: Float[Array, " n"]) -> Float[Array, ""]:
    least = (mean_gap(points, jnp.ones(points.shape, bool)) / 30) ** 4
    return jnp.log(jnp.where(value > 0, value, least))


def _moving_points(
    alpha: Float[Array, " k"], beta: Float[Array, " n"]
) -> tuple[Parameters, Callable[[Parameters], tuple[Array, Array]]]:
    same = np.abs(np.arccos(np.asarray(alpha, float)) - np.arccos(np.asarray(beta, float))[:, None])
    follows = np.min(same, axis=1) < _SAME
    leader = np.argmin(same, axis=1)
    free_alpha, place_alpha = _moving(np.asarray(alpha, float))
    free_beta, place_beta = _moving(np.asarray(beta, float)[~follows])
    dtype = alpha.dtype

    def place(parameters: Parameters) -> tuple[Array, Array]:
        new = place_alpha(parameters["alpha_shifts"])
        others = place_beta(parameters["beta_shifts"])
        return new, new[leader].at[~follows].set(others)

    return {
        "alpha_shifts": jnp.zeros(free_alpha, dtype),
        "beta_shifts": jnp.zeros(free_beta, dtype),
    }, place


def _moving(points: np.ndarray) -> tuple[int, Callable[[Array], Array]]:
    """Return the number of shifts of these points, and a function from shifts to points."""
    angles = np.arccos(points)
    order = np.argsort(angles)
    gaps = np.diff(np.concatenate([[0], angles[order], [np.pi]]))
    wide = gaps > _SAME

    def place(shifts: Array) -> Array:
        stretch = jnp.diff(shifts, prepend=0, append=0)
        wide_gaps = jnp.asarray(gaps[wide], shifts.dtype) * jnp.exp(stretch)
        shares = jnp.zeros(gaps.size, shifts.dtype).at[wide].set(wide_gaps / jnp.sum(wide_gaps))
        # cos(pi x) as a sine: symmetric to the last bit, and exactly 1 at 0.
        t = jnp.sin(jnp.pi * (0.5 - jnp.cumsum(shares)[:-1]))
        return jnp.zeros_like(t).at[order].set(t)

    return int(wide.sum()) - 1, place
