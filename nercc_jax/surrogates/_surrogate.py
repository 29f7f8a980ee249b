"""A cheap model g beside the coded one: it carries what it can, and the code only the rest.

With the answers y, coded data points c and decoder D, the prediction of data point k is

    theta g(x_k) + rho_k [D (y - theta g(c))]_k,    rho_k = 1 / (1 + kappa v_k),

v_k the posterior variance that the answers leave there. Let the residual have the variance s^2 at a
data point by itself, and the decoded one be off by tau^2 v_k: then this is the posterior mean, with
kappa = tau^2 / s^2. Where a prediction is an answer itself, v_k = 0 and it stays that answer; far
from all answers it becomes g's. theta = kappa = 0 is the code alone, theta = 1 with an infinite
kappa the surrogate alone (ParM's approximate backup, Kosaian et al. 2019, section 5.2).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray, PyTree, Shaped

from ..codes import (
    AbstractCode,
    Decoded,
    Matrices,
    decode_vectors,
    deviation,
    encode_groups,
    known_encoder,
    variances,
)
from ..evaluation import Answers, cut_groups, draw_sets, record_answers
from ..inference import Model
from ..stragglers import AbstractStragglers
from ._interface import (
    AbstractExpectation,
    AbstractSurrogate,
    Outputs,
    check_like,
    joined_outputs,
    outputs_of_groups,
)
from ._kernels import root

_THETAS = np.linspace(0, 1, 9)
# By the reciprocal of a typical posterior variance.
_KAPPAS = np.concatenate([[0.0], np.logspace(-3, 4, 22), [np.inf]])


class Surrogate(AbstractSurrogate):
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
        self.theta, self.kappa = trust(theta, kappa)

    def outputs(self, x: PyTree[Shaped[Array, "points ..."]]) -> PyTree[Float[Array, "points ..."]]:
        return self.model(x)

    def expect(
        self,
        x: PyTree[Shaped[Array, "groups num_data ..."]],
        coded: PyTree[Shaped[Array, "groups num_workers ..."]],
        own: PyTree[Float[Array, "groups num_data ..."]] | None = None,
    ) -> Outputs:
        own = outputs_of_groups(self.model, x) if own is None else own
        return joined_outputs(own, outputs_of_groups(self.model, coded))


def trust(
    theta: Float[ArrayLike, ""], kappa: Float[ArrayLike, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """A surrogate's numbers as arrays. Raises: ValueError for what is negative or no scalar."""
    numbers = jnp.asarray(theta, float), jnp.asarray(kappa, float)
    for name, value in zip(("theta", "kappa"), numbers, strict=True):
        if value.shape != ():
            raise ValueError(f"{name} must be a scalar, not of shape {value.shape}")
        if not isinstance(value, Tracer) and not value >= 0:
            raise ValueError(f"{name} must be 0 or positive, not {value}")
    return numbers


def decode_with_surrogate(
    code: AbstractCode,
    surrogate: AbstractSurrogate,
    y: Float[Array, "groups num_workers m"],
    available: Bool[Array, "groups num_workers"],
    expectation: AbstractExpectation,
    given: Matrices | None = None,
) -> tuple[Decoded, Float[Array, "groups num_data"]]:
    """The predictions of groups, and their standard deviations in units of the outputs.

    A deviation is 0 where a prediction is an answer itself. Where the surrogate tells its own
    (a learner does), the variance is the mean of the code's and its, as the prediction is; where it
    does not, an infinite kappa says nothing of how good it is, and then the deviations are those of
    the code alone.

    `expectation` is the surrogate's of these groups. A data point is recovered where its prediction
    is finite: without any answer it is the surrogate's. Answers that are broken make stragglers, as
    in `AbstractCode.decode`.
    """
    expected = expectation.after(y, available)
    residual = y - surrogate.theta * expected.coded
    decoded = decode_vectors(code, residual, available, given)
    variance, process = variances(code, residual, decoded.heard)
    # Where no answer tells a data point there is no code to go by, whatever kappa says.
    rho = jnp.where(decoded.recovered, _code_share(surrogate.kappa, variance), 0)
    predictions = _blend(surrogate.theta, rho, expected.own, decoded.predictions)
    recovered = jnp.isfinite(predictions).all(axis=-1)
    if expected.deviation is None:
        kappa = jnp.where(jnp.isinf(surrogate.kappa), 0, surrogate.kappa)
        known = variance == 0
        # v / (1 + kappa v), written so that it has a value where v is infinite.
        share = jnp.where(known, 0, 1 / (1 / jnp.where(known, 1, variance) + kappa))
        return Decoded(predictions, decoded.heard, recovered), deviation(share, process)
    own = expected.deviation
    by_code = jnp.where(rho > 0, rho, 1) * deviation(variance, process) ** 2
    square = jnp.where(rho > 0, by_code, 0) + jnp.where(rho < 1, (1 - rho) * own**2, 0)
    spread = root(square)
    # Without a pair or an answer to go by, a learner's output is no prediction.
    recovered &= jnp.isfinite(spread)
    predictions = jnp.where(recovered[..., None], predictions, jnp.nan)
    return Decoded(predictions, decoded.heard, recovered), spread


def assess(
    code: AbstractCode,
    surrogate: AbstractSurrogate | None,
    y: Float[Array, "groups num_workers m"],
    available: Bool[Array, "groups num_workers"],
    expectation: AbstractExpectation | None = None,
    given: Matrices | None = None,
) -> tuple[Decoded, Float[Array, "groups num_data"]]:
    """Predictions of groups and their standard deviations, with a surrogate or without."""
    if surrogate is not None:
        assert expectation is not None
        return decode_with_surrogate(code, surrogate, y, available, expectation, given)
    decoded = decode_vectors(code, y, available, given)
    return decoded, deviation(*variances(code, y, decoded.heard))


def _code_share(kappa: Array, variance: Float[Array, "*points"]) -> Float[Array, "*points"]:
    """rho = 1 / (1 + kappa v), where either may be infinite: nothing shrinks what is known, nor
    without a kappa."""
    known, told = variance == 0, jnp.isfinite(variance)
    far = jnp.where(kappa > 0, jnp.inf, 0)
    shrinkage = jnp.where(told, kappa * jnp.where(told & ~known, variance, 1), far)
    return 1 / (1 + jnp.where(known, 0, shrinkage))


def _blend(
    theta: Array, rho: Array, cheap: Array, residual: Array
) -> Float[Array, "groups num_data m"]:
    """theta g + rho D (y - theta g); the decoded residual is NaN where no answer tells it."""
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
    """The surrogate whose theta and kappa do best on unlabelled data points.

    Of a cheap model a `Surrogate`, of a learner the same learner with these numbers; of several the
    best: a student, a learner, and a learner whose prior is the student are measured side by side.

    Theta and kappa are searched on a grid through the nested objective: data points in groups of K,
    in the order given, under all laws' straggler sets, `num_sets` a law. The code alone and the
    surrogate alone are on the grid, so that on these data neither is better than what is found.
    What a learner has learned from must not be among them. `criterion` is "mse", the mean squared
    error, or "disagreement", the share of labels that differ from the model's own (then the mean
    squared error decides among equals).

    Raises: ValueError as `evaluate` does for the data, for a code that is no regression, without
    stragglers, and where a surrogate's outputs are not like the model's.
    """
    if criterion not in ("disagreement", "mse"):
        raise ValueError(f"criterion must be 'disagreement' or 'mse', not {criterion!r}")
    if not stragglers:
        raise ValueError("there are no stragglers to fit the surrogate to")
    several = isinstance(cheap_model, Sequence)
    candidates = [as_surrogate(each) for each in (cheap_model if several else [cheap_model])]
    own = record_answers(model, code, x, batch_size=batch_size)
    masks, _ = draw_sets(stragglers, key, code.num_workers, num_sets)
    kappas = jnp.asarray(_KAPPAS / _typical_variance(code, masks), own.coded.dtype)
    grid = [jnp.asarray(axis).ravel() for axis in np.meshgrid(_THETAS, kappas, indexing="ij")]
    found = []
    for candidate in candidates:
        expectation = expect_points(candidate, code, x, batch_size=batch_size)
        check_like(expectation.form, own.form)
        disagreement, mse = np.asarray(_scores(own, expectation, masks, *grid))
        best = np.argmin(mse) if criterion == "mse" else np.lexsort((mse, disagreement))[0]
        rank = (mse[best],) if criterion == "mse" else (disagreement[best], mse[best])
        numbers = trust(grid[0][best], grid[1][best])
        found.append((rank, eqx.tree_at(lambda s: (s.theta, s.kappa), candidate, numbers)))
    return min(found, key=lambda entry: entry[0])[1]


def as_surrogate(given: Model | AbstractSurrogate) -> AbstractSurrogate:
    """A cheap model as a surrogate. Raises: ValueError for what is not callable."""
    return given if isinstance(given, AbstractSurrogate) else Surrogate(given)


def expect_points(
    surrogate: AbstractSurrogate,
    code: AbstractCode,
    x: PyTree[Shaped[ArrayLike, "points ..."]],
    *,
    batch_size: int = 256,
) -> AbstractExpectation:
    """What a surrogate makes of data points in a row, in groups of K, and of their coded ones.

    So many groups at a time that no batch is larger than `batch_size` by much. Raises: ValueError
    as `record_answers` does for the data.
    """
    groups = cut_groups(x, code.num_data)
    number = len(jax.tree.leaves(groups)[0])
    at_once = max(batch_size // code.num_workers, 1)
    parts = []
    for place in range(0, number, at_once):
        # The last part is filled up, so that all have one shape.
        rows = np.minimum(np.arange(place, place + at_once), number - 1)
        part = jax.tree.map(lambda leaf: jnp.asarray(leaf[rows]), groups)  # noqa: B023
        told = _expect(surrogate, code, part, known_encoder(code))
        parts.append(jax.tree.map(lambda leaf: leaf[: number - place], told))  # noqa: B023
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


@eqx.filter_jit
def _expect(
    surrogate: AbstractSurrogate, code: AbstractCode, groups: PyTree, encoder: ArrayLike | None
) -> AbstractExpectation:
    return surrogate.expect(groups, encode_groups(code, groups, encoder))


def _typical_variance(code: AbstractCode, masks: Bool[Array, "sets num_workers"]) -> float:
    """The mean over sets of the largest finite posterior variance in each: 1 if there is none."""
    variance = np.asarray(jax.jit(jax.vmap(code.posterior_variance))(masks))
    largest = np.max(np.where(np.isfinite(variance), variance, 0), axis=1)
    return float(np.mean(largest)) or 1.0


@eqx.filter_jit
def _scores(
    own: Answers,
    expectation: AbstractExpectation,
    masks: Bool[Array, "sets num_workers"],
    thetas: Float[Array, " candidates"],
    kappas: Float[Array, " candidates"],
) -> Float[Array, "2 candidates"]:
    """Each candidate's disagreement and mean squared error, over sets and data points."""

    def of_set(mask):
        expected = expectation.after(own.coded, jnp.broadcast_to(mask, own.coded.shape[:2]))
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
