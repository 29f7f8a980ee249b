"""Convert a code's tunable numbers to unconstrained parameters, and back."""

import dataclasses
from typing import Any, Generic, TypeAlias, TypeVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..codes import AbstractCode
from ..codes.points import mean_gap

# A `dict[str, Array]`, but declared as Any, because optax's own types accept any tree.
Parameters: TypeAlias = Any
Code = TypeVar("Code", bound=AbstractCode)

# Angles closer than this are equal: two points coincide, or a point is at an end of [-1, 1].
SAME_ANGLE = 1e-6


def parametrize(code: Code, *, points: bool = False) -> "tuple[Parameters, Rebuild[Code]]":
    """Return a code's unconstrained parameters, and the function that rebuilds the code.

    The function is a pytree, which may be an argument of a compiled one. There is a parameter for
    each of these leaves that the code has:

    - "log_lambda_enc", "log_lambda_dec", "log_end_penalty": natural logarithms. As 0 has none, a
      lambda of 0 starts at (g / 30)**4, with g the mean gap between its points, where smoothing
      has almost no effect; an `end_penalty` of 0 starts at 1. A lambda of 1 or more starts there,
      too: its fit is nearly a line, and the objective is flat. But if an `exact` code has a
      lambda_enc of 0, that is left at 0 and is not a parameter: otherwise its workers would no
      longer run on the data points themselves.
    - "gap_exponent": itself.
    - Each field of a code of your own that is declared with `eqx.field(metadata={"tune": "log"})`:
      "log_" and its name, for positive numbers; or with "plain", the numbers themselves.
    - With `points`, "alpha_shifts" (K,) and "beta_shifts" (N,), zero at the start. In order of the
      angle arccos(t), the shift s_i of a point multiplies the gap before that point by exp(s_i)
      and the gap after it by exp(-s_i); then all gaps are scaled to fill [0, pi]. So the points
      keep their order. A beta at an end of [-1, 1] stays there, and betas that coincide stay
      together. A beta that coincides with an alpha moves with it, so exact answers stay exact and
      copies stay copies. (If a beta of an `exact` code left its alpha, the objective would jump,
      which a gradient does not show. To decide whether they should coincide, compare layouts.)
      Shifts count from the smallest angle on; those beyond the number of places that can move
      have no effect, so that all layouts of a code have parameters of one shape, and one program.

    If you write your own gradient descent, optimise these parameters, not the code's leaves. Then
    no step can make a lambda negative; there its gradient is zero, and it would stay negative.

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
        value, gradients = jax.value_and_grad(objective)(parameters)
        updates, state = optimizer.update(gradients, state)
        return value, optax.apply_updates(parameters, updates), state

    for _ in range(30):
        value, parameters, state = step(parameters, state)
    code = rebuild(parameters)
    ```

    Raises:
        ValueError: The code has none of these leaves, or declares one otherwise.
    """
    leaves = {field.name: getattr(code, field.name) for field in dataclasses.fields(code)}
    free: Parameters = {}
    for name, at in (("lambda_enc", "alpha"), ("lambda_dec", "beta")):
        kept = name == "lambda_enc" and leaves.get("exact", False) and not leaves[name] > 0
        if name in leaves and at in leaves and not kept:
            value, everywhere = leaves[name], jnp.ones(leaves[at].shape, bool)
            start = (mean_gap(leaves[at], everywhere) / 30) ** 4
            free[f"log_{name}"] = jnp.log(jnp.where((value > 0) & (value < 1), value, start))
    if "end_penalty" in leaves:
        penalty = leaves["end_penalty"]
        free["log_end_penalty"] = jnp.log(jnp.where(penalty > 0, penalty, 1))
    if "gap_exponent" in leaves:
        free["gap_exponent"] = leaves["gap_exponent"]
    places = None
    if points and {"alpha", "beta"} <= leaves.keys():
        alpha, beta = leaves["alpha"], leaves["beta"]
        angles = [np.arccos(np.asarray(each, float)) for each in (alpha, beta)]
        distances = np.abs(angles[0] - angles[1][:, None])
        follows = np.min(distances, axis=1) < SAME_ANGLE
        alphas = _Chain(angles[0], np.ones(len(alpha), bool), alpha.dtype)
        betas = _Chain(angles[1], ~follows, beta.dtype)
        places = alphas, betas, jnp.asarray(follows), jnp.asarray(distances.argmin(axis=1))
        free |= {f"{name}_shifts": jnp.zeros_like(leaves[name]) for name in ("alpha", "beta")}
    for field in dataclasses.fields(code):
        if (scale := field.metadata.get("tune")) == "log":
            free[f"log_{field.name}"] = jnp.log(leaves[field.name])
        elif scale == "plain":
            free[field.name] = leaves[field.name]
        elif scale is not None:
            raise ValueError(f"{field.name}: 'tune' is 'log' or 'plain', not {scale!r}")
    if not free:
        also = " except its points, which stay fixed" if "alpha" in leaves else ""
        also = ": tune the code before its decoder is learned" if "encoder" in leaves else also
        if type(code).__module__.partition(".")[0] != __name__.partition(".")[0]:
            also = ": declare a number by eqx.field(metadata={'tune': 'log'}), or 'plain'"
        raise ValueError(f"{type(code).__name__} has nothing to tune{also}")
    return free, Rebuild(code, places)


class Rebuild(eqx.Module, Generic[Code]):
    """The function from the parameters of `parametrize` to the code.

    `places` are the functions from shifts to alpha and beta, which betas lie on an alpha, and on
    which one; None where points do not move.
    """

    code: Code
    places: "tuple[_Chain, _Chain, Bool[Array, ' n'], Int[Array, ' n']] | None"

    def __call__(self, parameters: Parameters) -> Code:
        """Return the code with these parameters."""
        values = {
            name.removeprefix("log_"): jnp.exp(value) if name.startswith("log_") else value
            for name, value in parameters.items()
            if not name.endswith("_shifts")
        }
        if self.places is not None:
            alphas, betas, follows, leader = self.places
            values["alpha"] = alpha = alphas(parameters["alpha_shifts"])
            free = betas(parameters["beta_shifts"])
            values["beta"] = jnp.where(follows, alpha[leader], free)
        return eqx.tree_at(
            lambda c: [getattr(c, name) for name in values], self.code, list(values.values())
        )


class _Chain(eqx.Module):
    """The function from shifts to the points of one kind, some of which do not move.

    The gaps between 0, the angles of the moving points, and pi fill [0, pi]. `gaps` starts with
    those that are not zero, which shifts stretch. In order of the angle, `slot` has the index in
    `gaps` of each gap, and `moves` whether a shift has a gap on both sides.
    """

    gaps: Float[Array, " n_and_1"]
    slot: Int[Array, " n_and_1"]
    moves: Bool[Array, " n"]
    order: Int[Array, " n"]

    def __init__(
        self, angles: Float[np.ndarray, " n"], moving: Bool[np.ndarray, " n"], dtype: np.dtype
    ):
        n, count = len(angles), np.sum(moving)
        self.order = jnp.asarray(np.lexsort((angles, ~moving)))
        gaps = np.diff(np.concatenate([[0], np.sort(angles[moving]), [np.pi]]))
        wide = gaps > SAME_ANGLE
        number = np.sum(wide)
        self.gaps = jnp.zeros(n + 1, dtype).at[:number].set(gaps[wide])
        # The last place always has a gap of zero where it is needed: one gap is then narrow.
        self.slot = jnp.full(n + 1, n).at[: count + 1].set(np.where(wide, wide.cumsum() - 1, n))
        self.moves = jnp.arange(n) < number - 1

    def __call__(self, shifts: Float[Array, " n"]) -> Float[Array, " n"]:
        stretch = jnp.diff(jnp.where(self.moves, shifts, 0), prepend=0, append=0)
        wide = self.gaps * jnp.exp(stretch)
        shares = (wide / jnp.sum(wide))[self.slot]
        # cos(pi x), x the cumulative share, as a sine: exactly symmetric, and exactly 1 at x = 0.
        t = jnp.sin(jnp.pi * (0.5 - jnp.cumsum(shares)[:-1]))
        return jnp.zeros_like(t).at[self.order].set(t)
