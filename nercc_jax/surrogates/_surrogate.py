"""A cheap model g beside the coded one: it carries what it can, and the code only the rest.

With the answers y, coded data points c and decoder D, the prediction of data point k is

    theta g(x_k) + rho_k [D (y - theta g(c))]_k,    rho_k = 1 / (1 + kappa v_k),

v_k the posterior variance that the answers leave there. Let the residual have the variance s^2 at a
data point by itself, and the decoded one be off by tau^2 v_k: then this is the posterior mean, with
kappa = tau^2 / s^2. Where a prediction is an answer itself, v_k = 0 and it stays that answer; far
from all answers it becomes g's. theta = kappa = 0 is the code alone, theta = 1 with an infinite
kappa the surrogate alone (ParM's approximate backup, Kosaian et al. 2019, section 5.2).
"""

from collections.abc import Mapping
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray, PyTree, Shaped

from ..codes import (
    AbstractCode,
    Decoded,
    Form,
    Matrices,
    decode_vectors,
    deviation,
    variances,
)
from ..evaluation import Answers, draw_sets, record_answers
from ..inference import Model
from ..stragglers import AbstractStragglers

_THETAS = np.linspace(0, 1, 9)
# By the reciprocal of a typical posterior variance.
_KAPPAS = np.concatenate([[0.0], np.logspace(-3, 4, 22), [np.inf]])


class Surrogate(eqx.Module):
    """A cheap model, and how far to trust a code against it; `fit_surrogate` finds the numbers.

    `model` is any callable on a batch of data points with the served model's outputs, on their
    scale. `theta` is the share of it that is taken off the answers, `kappa` the shrinkage of what
    is decoded, by posterior variance; both are leaves, 0 or positive.
    """

    model: Model
    theta: Float[Array, ""]
    kappa: Float[Array, ""]

    def __init__(
        self,
        model: Model,
        *,
        theta: Float[ArrayLike, ""] = 1.0,
        kappa: Float[ArrayLike, ""] = 0.0,
    ):
        """Raises: ValueError for a model that is not callable, and numbers that are negative."""
        if not callable(model):
            raise ValueError(f"a surrogate is a callable on a batch, not {type(model).__name__}")
        self.model = model
        self.theta, self.kappa = jnp.asarray(theta, float), jnp.asarray(kappa, float)
        for name, value in (("theta", self.theta), ("kappa", self.kappa)):
            if value.shape != ():
                raise ValueError(f"{name} must be a scalar, not of shape {value.shape}")
            if not isinstance(value, Tracer) and not value >= 0:
                raise ValueError(f"{name} must be 0 or positive, not {value}")


def decode_with_surrogate(
    code: AbstractCode,
    surrogate: Surrogate,
    y: Float[Array, "groups num_workers m"],
    available: Bool[Array, "groups num_workers"],
    cheap: Float[Array, "groups num_data m"],
    cheap_coded: Float[Array, "groups num_workers m"],
    given: Matrices | None = None,
) -> tuple[Decoded, Float[Array, "groups num_data"]]:
    """The predictions of groups, and their standard deviations in units of the outputs.

    A deviation is 0 where a prediction is an answer itself. An infinite kappa says nothing of how
    good the surrogate is: then the deviations are those of the code alone.

    `cheap` and `cheap_coded` are the surrogate's outputs on data and coded data points. A data
    point is recovered where its prediction is finite: without any answer it is the surrogate's.
    Answers that are broken make stragglers, as in `AbstractCode.decode`.
    """
    residual = y - surrogate.theta * cheap_coded
    decoded = decode_vectors(code, residual, available, given)
    variance, process = variances(code, residual, decoded.heard)
    predictions = _blend(surrogate.theta, surrogate.kappa, cheap, decoded.predictions, variance)
    kappa = jnp.where(jnp.isinf(surrogate.kappa), 0, surrogate.kappa)
    known = variance == 0
    # v / (1 + kappa v), written so that it has a value where v is infinite.
    share = jnp.where(known, 0, 1 / (1 / jnp.where(known, 1, variance) + kappa))
    recovered = jnp.isfinite(predictions).all(axis=-1)
    return Decoded(predictions, decoded.heard, recovered), deviation(share, process)


def _blend(
    theta: Array, kappa: Array, cheap: Array, residual: Array, variance: Array
) -> Float[Array, "groups num_data m"]:
    """theta g + rho D (y - theta g); the decoded residual is NaN where no answer tells it."""
    # kappa v, where either may be infinite: nothing shrinks what is known, nor without a kappa.
    known, told = variance == 0, jnp.isfinite(variance)
    far = jnp.where(kappa > 0, jnp.inf, 0)
    shrinkage = jnp.where(told, kappa * jnp.where(told & ~known, variance, 1), far)
    rho = 1 / (1 + jnp.where(known, 0, shrinkage))[..., None]
    return theta * cheap + rho * jnp.where(jnp.isfinite(residual), residual, 0)


def fit_surrogate(
    model: Model,
    cheap_model: Model,
    code: AbstractCode,
    x: PyTree[Shaped[ArrayLike, "points ..."]],
    stragglers: Mapping[str, AbstractStragglers],
    *,
    key: PRNGKeyArray,
    num_sets: int = 20,
    criterion: Literal["disagreement", "mse"] = "disagreement",
    batch_size: int = 256,
) -> Surrogate:
    """The `Surrogate` of a cheap model whose theta and kappa do best on unlabelled data points.

    Both are searched on a grid through the nested objective: data points in groups of K, in the
    order given, under all laws' straggler sets, `num_sets` a law. The code alone and the surrogate
    alone are on the grid, so that on these data neither is better than what is found. `criterion`
    is "mse", the mean squared error, or "disagreement", the share of labels that differ from the
    model's own (then the mean squared error decides among equals).

    Raises: ValueError as `evaluate` does for the data, for a code that is no regression, without
    stragglers, and where the surrogate's outputs are not like the model's.
    """
    if criterion not in ("disagreement", "mse"):
        raise ValueError(f"criterion must be 'disagreement' or 'mse', not {criterion!r}")
    if not stragglers:
        raise ValueError("there are no stragglers to fit the surrogate to")
    cheap, own = (
        record_answers(each, code, x, batch_size=batch_size) for each in (cheap_model, model)
    )
    check_like(cheap.form, own.form)
    masks, _ = draw_sets(stragglers, key, code.num_workers, num_sets)
    kappas = jnp.asarray(_KAPPAS / _typical_variance(code, masks), own.coded.dtype)
    grid = [jnp.asarray(axis).ravel() for axis in np.meshgrid(_THETAS, kappas, indexing="ij")]
    disagreement, mse = np.asarray(_scores(own, cheap, masks, *grid))
    best = np.argmin(mse) if criterion == "mse" else np.lexsort((mse, disagreement))[0]
    return Surrogate(cheap_model, theta=grid[0][best], kappa=grid[1][best])


def check_like(cheap: Form, own: Form) -> None:
    """Raises: ValueError where a surrogate's outputs are not like the model's."""
    if (cheap.structure, cheap.shapes) != (own.structure, own.shapes):
        theirs, ours = (jax.tree.unflatten(form.structure, form.shapes) for form in (cheap, own))
        raise ValueError(f"the surrogate gives outputs {theirs}, the model {ours}")


def _typical_variance(code: AbstractCode, masks: Bool[Array, "sets num_workers"]) -> float:
    """The mean over sets of the largest finite posterior variance in each: 1 if there is none."""
    variance = np.asarray(jax.jit(jax.vmap(code.posterior_variance))(masks))
    largest = np.max(np.where(np.isfinite(variance), variance, 0), axis=1)
    return float(np.mean(largest)) or 1.0


@eqx.filter_jit
def _scores(
    own: Answers,
    cheap: Answers,
    masks: Bool[Array, "sets num_workers"],
    thetas: Float[Array, " candidates"],
    kappas: Float[Array, " candidates"],
) -> Float[Array, "2 candidates"]:
    """Each candidate's disagreement and mean squared error, over sets and data points."""
    both = jnp.concatenate([own.coded, cheap.coded], axis=-1)
    together = eqx.tree_at(lambda known: known.coded, own, both)

    def of_set(mask):
        decoded, decoded_cheap = jnp.split(together.decode(mask).predictions, 2, axis=-1)
        variance = own.code.posterior_variance(mask)

        def of_candidate(candidate):
            theta, kappa = candidate
            residual = decoded - theta * decoded_cheap
            predictions = _blend(theta, kappa, cheap.own, residual, variance)
            wrong = jnp.mean(~own.same_labels(predictions))
            return jnp.stack([wrong, jnp.mean((predictions - own.own) ** 2)])

        return jax.lax.map(of_candidate, (thetas, kappas))

    return jnp.mean(jax.lax.map(of_set, masks), axis=0).T
