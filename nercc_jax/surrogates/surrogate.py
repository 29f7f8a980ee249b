"""A cheap model g in addition to the code, which then decodes only what g cannot predict.

With the answers y, coded data points c and decoder D, the prediction of data point k is

    theta g(x_k) + rho_k [D (y - theta g(c))]_k,    rho_k = 1 / (1 + kappa v_k),

where v_k is the posterior variance at data point k, given the answers. If the residual y - g has
the prior variance s^2 at a data point, and the decoded residual the error variance tau^2 v_k, this
is the posterior mean for kappa = tau^2 / s^2. If a prediction is an answer itself, v_k = 0 and the
answer is unchanged; far from all answers it becomes g's output. theta = kappa = 0 is the code
alone, and theta = 1 with an infinite kappa the surrogate alone (ParM's approximate backup, Kosaian
et al. 2019, section 5.2).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray, PyTree, Shaped

from ..codes import AbstractCode, Decoded, encode_groups
from ..codes.code import deviation, deviations, variances
from ..codes.decoding import decode_vectors
from ..codes.kept import Matrices, encoder_of
from ..codes.trees import join, scalar_leaf
from ..evaluation import Answers, record_answers
from ..evaluation.answers import cut_groups, in_parts
from ..evaluation.objective import draw_sets
from ..inference.models import Model
from ..stragglers import AbstractStragglers
from .interface import (
    AbstractGroupPrior,
    AbstractSurrogate,
    SurrogatePredictions,
    check_like,
    outputs_of_groups,
)


class Surrogate(AbstractSurrogate):
    """A fixed cheap model, and its weights relative to a code; `fit_surrogate` finds these.

    Attributes:
        model: A function of a batch of data points, with the served model's outputs on their scale.
        theta: See `AbstractSurrogate`; default 1.
        kappa: See `AbstractSurrogate`; default 0.
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
        """Create a surrogate.

        Raises:
            ValueError: The model is not callable, or a number is negative.
        """
        if not callable(model):
            raise ValueError(f"a surrogate is a callable on a batch, not {type(model).__name__}")
        self.model = model
        self.theta = scalar_leaf("theta", theta, float, least=0.0, most=np.inf)
        self.kappa = scalar_leaf("kappa", kappa, float, least=0.0, most=np.inf)

    def outputs(self, x: PyTree[Shaped[Array, "points ..."]]) -> PyTree[Float[Array, "points ..."]]:
        return self.model(x)

    def group_prior(
        self,
        x: PyTree[Shaped[Array, "groups num_data ..."]],
        coded: PyTree[Shaped[Array, "groups num_workers ..."]],
        own: PyTree[Float[Array, "groups num_data ..."]] | None = None,
    ) -> SurrogatePredictions:
        own = outputs_of_groups(self.model, x) if own is None else own
        vectors, form = join(own, 2)
        coded = join(outputs_of_groups(self.model, coded), 2)[0]
        return SurrogatePredictions(own=vectors, coded=coded, form=form)


def decode_with_deviation(
    code: AbstractCode,
    surrogate: AbstractSurrogate | None,
    y: Float[Array, "groups num_workers m"],
    available: Bool[Array, "groups num_workers"],
    prior: AbstractGroupPrior | None = None,
    given: Matrices | None = None,
) -> Decoded:
    """Decode groups, with deviations, and with or without a surrogate.

    With a surrogate, a data point is recovered if its prediction is finite; without any answer, the
    prediction is the surrogate's. Workers whose answers are not finite count as stragglers, as in
    `AbstractCode.decode`.

    Args:
        code: A code.
        surrogate: A surrogate; None for the code alone.
        y: Answers as vectors.
        available: The mask of the workers that answered.
        prior: The surrogate's prior for these groups; None without a surrogate.
        given: The code's matrices, if they are known.

    Returns:
        Predictions as vectors. If the surrogate has deviations of its own (a learner), the variance
            is the mean of the code's and the surrogate's, weighted like the prediction. Otherwise
            it is the code's, shrunk like the prediction unless kappa is infinite.
    """
    if surrogate is None:
        decoded = decode_vectors(code, y, available, given)
        own = deviations(code, y, decoded.responded)
        return Decoded(decoded.predictions, decoded.responded, decoded.recovered, own)
    assert prior is not None
    expected = prior.condition(y, available)
    residual = y - surrogate.theta * expected.coded
    decoded = decode_vectors(code, residual, available, given)
    variance, process = variances(code, residual, decoded.responded)
    # Data points that the code cannot recover have only the surrogate's prediction.
    rho = jnp.where(decoded.recovered, _code_share(surrogate.kappa, variance), 0)
    predictions = _blend(surrogate.theta, rho, expected.own, decoded.predictions)
    recovered = jnp.isfinite(predictions).all(axis=-1)
    if expected.deviation is None:
        kappa = jnp.where(jnp.isinf(surrogate.kappa), 0, surrogate.kappa)
        known = variance == 0
        # v / (1 + kappa v), in a form that is finite for an infinite v.
        share = jnp.where(known, 0, 1 / (1 / jnp.where(known, 1, variance) + kappa))
        return Decoded(predictions, decoded.responded, recovered, deviation(share, process))
    own = expected.deviation
    by_code = jnp.sqrt(jnp.where(rho > 0, rho, 1)) * deviation(variance, process)
    by_own = jnp.sqrt(jnp.where(rho < 1, 1 - rho, 1)) * own
    # Not a sum of squares, which would overflow or underflow float32 for outputs of 1e19 or 1e-23.
    spread = jnp.hypot(jnp.where(rho > 0, by_code, 0), jnp.where(rho < 1, by_own, 0))
    # Without any pair or answer, a learner's output is not a prediction.
    recovered &= jnp.isfinite(spread)
    predictions = jnp.where(recovered[..., None], predictions, jnp.nan)
    return Decoded(predictions, decoded.responded, recovered, spread)


def _code_share(kappa: Array, variance: Float[Array, "*points"]) -> Float[Array, "*points"]:
    """Return rho = 1 / (1 + kappa v), where kappa or v may be infinite; 1 if either is 0."""
    known, summary = variance == 0, jnp.isfinite(variance)
    far = jnp.where(kappa > 0, jnp.inf, 0)
    shrinkage = jnp.where(summary, kappa * jnp.where(summary & ~known, variance, 1), far)
    return 1 / (1 + jnp.where(known, 0, shrinkage))


def _blend(
    theta: Array, rho: Array, cheap: Array, residual: Array
) -> Float[Array, "groups num_data m"]:
    """Return theta g + rho D (y - theta g); decoded residuals that are not finite count as 0."""
    return theta * cheap + rho[..., None] * jnp.where(jnp.isfinite(residual), residual, 0)


def fit_surrogate(
    model: Model,
    cheap_model: Model | AbstractSurrogate | Sequence[Model | AbstractSurrogate],
    code: AbstractCode,
    x: PyTree[Shaped[ArrayLike, "points ..."]],
    stragglers: Mapping[str, AbstractStragglers],
    *,
    key: PRNGKeyArray,
    num_sets: int = 20,
    criterion: Literal["disagreement", "mse"] = "disagreement",
    batch_size: int = 256,
) -> Any:
    """Return the surrogate with the theta and kappa that are best on unlabelled data points.

    Theta and kappa are searched on a grid; all groups are decoded under the straggler sets of all
    laws. The code alone and the surrogate alone are on the grid, so neither is better on these data
    than the result.

    Args:
        model: The served model, a function of a batch.
        cheap_model: A cheap model, or a surrogate such as a learner; or several, of which the best
            is returned. A learner must not have learned from `x`.
        code: A regression code.
        x: Data points, in the order in which they are cut into groups of K.
        stragglers: Named laws from which straggler sets are drawn.
        key: The random key of the draws.
        num_sets: The number of straggler sets for each law.
        criterion: "mse", the mean squared error; or "disagreement", the share of labels that differ
            from the model's own, with ties broken by the mean squared error.
        batch_size: The most data points in a call of a model.

    Returns:
        A `Surrogate` for a cheap model; for a learner the same learner with these numbers.

    Raises:
        ValueError: `evaluate` would not accept the data, the code is not a regression, there are no
            stragglers, or a surrogate's outputs differ in form from the model's.
    """
    if criterion not in ("disagreement", "mse"):
        raise ValueError(f"criterion must be 'disagreement' or 'mse', not {criterion!r}")
    masks, _ = draw_sets(stragglers, key, code.num_workers, num_sets)
    several = isinstance(cheap_model, Sequence)
    candidates = [
        each if isinstance(each, AbstractSurrogate) else Surrogate(each)
        for each in (cheap_model if several else [cheap_model])
    ]
    own = record_answers(model, code, x, batch_size=batch_size)
    # Kappa is in units of 1 over a typical variance, the mean of the sets' largest finite ones.
    variance = np.asarray(jax.jit(jax.vmap(code.posterior_variance))(masks))
    typical = float(np.mean(np.max(np.where(np.isfinite(variance), variance, 0), axis=1))) or 1.0
    kappas = np.concatenate([[0.0], np.logspace(-3, 4, 22), [np.inf]]) / typical
    grid = np.meshgrid(np.linspace(0, 1, 9), kappas, indexing="ij")
    grid = [jnp.asarray(axis.ravel(), own.coded.dtype) for axis in grid]
    groups, encoder, found = cut_groups(x, code.num_data), encoder_of(code), []
    for candidate in candidates:
        expect = lambda part: _expect(candidate, code, jax.tree.map(jnp.asarray, part), encoder)  # noqa: B023, E731
        prior = in_parts(expect, groups, max(batch_size // code.num_workers, 1))
        check_like(prior.form, own.form)
        disagreement, mse = np.asarray(_scores(own, prior, masks, *grid))
        best = np.argmin(mse) if criterion == "mse" else np.lexsort((mse, disagreement))[0]
        rank = (mse[best],) if criterion == "mse" else (disagreement[best], mse[best])
        numbers = [axis[best] for axis in grid]
        found.append((rank, eqx.tree_at(lambda s: [s.theta, s.kappa], candidate, numbers)))
    return min(found, key=lambda entry: entry[0])[1]


@eqx.filter_jit
def _expect(
    surrogate: AbstractSurrogate, code: AbstractCode, groups: PyTree, encoder: ArrayLike | None
) -> AbstractGroupPrior:
    return surrogate.group_prior(groups, encode_groups(code, groups, encoder))


@eqx.filter_jit
def _scores(
    own: Answers,
    prior: AbstractGroupPrior,
    masks: Bool[Array, "sets num_workers"],
    thetas: Float[Array, " candidates"],
    kappas: Float[Array, " candidates"],
) -> Float[Array, "2 candidates"]:
    """Return each candidate's disagreement and mean squared error, over sets and data points."""

    def of_set(mask):
        expected = prior.condition(own.coded, jnp.broadcast_to(mask, own.coded.shape[:2]))
        both = jnp.concatenate([own.coded, expected.coded], axis=-1)
        together = eqx.tree_at(lambda known: known.coded, own, both)
        decoded, decoded_cheap = jnp.split(together.decode(mask).predictions, 2, axis=-1)
        variance = own.code.posterior_variance(mask)

        def of_candidate(candidate):
            theta, kappa = candidate
            residual = decoded - theta * decoded_cheap
            rho = jnp.broadcast_to(_code_share(kappa, variance), residual.shape[:-1])
            predictions = _blend(theta, rho, expected.own, residual)
            wrong = jnp.mean(~own.same_labels(predictions))
            return jnp.stack([wrong, jnp.mean((predictions - own.own) ** 2)])

        return jax.lax.map(of_candidate, (thetas, kappas))

    return jnp.mean(jax.lax.map(of_set, masks), axis=0).T
