"""How likely the label of a decoded query is not the model's own.

`calibrate_error_probability` weighs a prediction's margin against its deviation, whose square is
the product of how rough the path is (`AbstractCode.process_variance`) and of how much of that the
answers leave open (`posterior_variance`). From the few answers of a small group the first is hardly
known, and the second tells most, so here the regression weighs the three by themselves. Measured, K
= 4 and N = 8 interleaved, at most 5 % of the stragglers' labels wrong: LeNet5 on MNIST sends 42 %
of them again instead of 50 %, the tuned code on digits 19 % instead of 23 %, for 2 queries 5
instead of 25.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ..codes import Form
from ..risk import logistic_regression, margin

FEATURES = 5
_SAMPLES = 20_000  # that the regression takes, at most
_TINY = 1e-30
# Natural logarithms of the square roots; beyond, they tell nothing more.
_LARGEST = 20.0


@dataclasses.dataclass(frozen=True)
class QueryDoubt:
    """What `calibrate` found: weights, and what limits of doubt cost.

    Of queries whose own worker straggled, `wrong` are, in increasing order, the doubts from which
    on one would have been given a wrong label, and `last` the doubts in the end, with all answers
    that came. `number` is how many different queries these are.
    """

    weights: Float[np.ndarray, " features"]
    wrong: Float[np.ndarray, " wrong"]
    last: Float[np.ndarray, " samples"]
    number: int

    def limit(self, max_disagreement: float) -> float:
        """The largest doubt to answer at, so that this share of labels is wrong in the mean.

        Of all queries whose own worker straggles, those that are sent again included. Negative
        where nothing may be answered, 1 where everything. As `ErrorProbability.limit` does,
        it counts one more wrong one than there were and two standard errors more, of as many as
        there are queries: a single calibration errs, and should not err to the user's loss.
        """
        number = max(self.number, 1)
        share = (max_disagreement * (number + 1) - 1) / number
        if share < 0 or self.number == 0:
            return -1.0
        # The root of what keeps p + 2 sqrt(p / number) <= share.
        root = np.sqrt(1 / number + share) - np.sqrt(1 / number)
        allowed = int(np.floor(root**2 * self.last.size))
        if allowed >= self.wrong.size:
            return 1.0
        return float(np.nextafter(self.wrong[allowed], np.float32(-1)))

    def share(self, limit: float) -> float:
        """The share of those queries that has more doubt than this in the end."""
        return float(np.mean(self.last > limit)) if self.last.size else 1.0


def unknown() -> QueryDoubt:
    """Before anything is known: all doubts are NaN, and nothing may be answered."""
    nothing = np.zeros(0, np.float32)
    return QueryDoubt(np.full(FEATURES, np.nan, np.float32), nothing, nothing, 0)


def features_of(
    predictions: Float[Array, "rows num_data m"],
    roughness: Float[Array, " rows"],
    variance: Float[Array, " num_data"],
    form: Form | None = None,
) -> tuple[Float[Array, "rows num_data features"], Bool[Array, "rows num_data"]]:
    """What the regression looks at, and where that tells anything.

    One answer tells nothing, and two no roughness, which is a feature of its own. Of predictions
    with several labels (`form`) the least sure one tells.
    """
    told = jnp.isfinite(predictions).all(axis=-1) & jnp.isfinite(variance)
    rough = jnp.isfinite(roughness) & (roughness > 0)
    features = [
        jnp.ones(()),
        jnp.log(margin(jnp.where(told[..., None], predictions, 0), form) + _TINY),
        jnp.log(jnp.where(rough, roughness, 1))[:, None] / 2,
        jnp.log(jnp.where(told, variance, 1) + _TINY) / 2,
        ~rough[:, None],
    ]
    features = jnp.stack([jnp.broadcast_to(each, told.shape) for each in features], axis=-1)
    return jnp.clip(features, -_LARGEST, _LARGEST).astype(predictions.dtype), told


def error_probability_from_answers(
    features: Float[np.ndarray, "rows num_data features"],
    told: Bool[np.ndarray, "rows num_data"],
    weights: Float[np.ndarray, " features"],
) -> Float[np.ndarray, "rows num_data"]:
    """The probability that the label is not the model's own: 1 where nothing is told."""
    # SciPy's `expit`, without its import: a server's first look at its decoder would wait for it.
    with np.errstate(invalid="ignore"):  # weights are NaN before anything is known
        likely = np.exp(-np.logaddexp(np.float32(0), -(features @ weights)))
    return np.where(told, likely, np.float32(1))


def calibrate(
    features: Float[np.ndarray, "samples looks features"],
    told: Bool[np.ndarray, "samples looks"],
    wrong: Bool[np.ndarray, "samples looks"],
    number: int,
) -> QueryDoubt:
    """The doubt of queries whose own worker straggles, looked at as the last answers come in.

    A query is answered at the first look at which it is not too doubtful. Here it counts as wrong
    from the least doubt on that it had at any look at which its label was: that bounds the share of
    wrong ones from above, and grows with the limit.
    """
    thin = slice(None, None, -(-told.size // _SAMPLES))
    flat = features[told][thin].astype(np.float64)
    # A query is much the same under all sets: it counts as one in all, not as one in each.
    count = min(number / max(len(flat), 1), 1.0)
    weights = logistic_regression(flat, wrong[told][thin], count=count).astype(np.float32)
    doubt = error_probability_from_answers(features, told, weights)
    least = np.min(np.where(wrong, doubt, np.inf), axis=1)
    return QueryDoubt(weights, np.sort(least[np.isfinite(least)]), doubt[:, -1], number)
