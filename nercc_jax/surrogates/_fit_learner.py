"""Fitting of learners: a kernel that is tuned on the learner's own window."""

import numpy as np
from jaxtyping import ArrayLike, Float, PyTree, Shaped

from ._learner import Learner, init_learner
from ._pairs import Function
from ._tune_kernel import LearnerTuning, find_kernel


def fit_learner(
    x: PyTree[Shaped[ArrayLike, "pairs ..."]],
    y: PyTree[Float[ArrayLike, "pairs ..."]],
    *,
    capacity: int = 1024,
    features: Function | None = None,
    prior: Function | None = None,
    version: str = "",
    tuning: LearnerTuning = LearnerTuning(),  # noqa: B008, it is frozen
) -> Learner:
    """Make a learner of pairs, with its kernel tuned on them.

    This is `init_learner`, then `tune_learner`.

    >>> import jax.numpy as jnp
    >>> from nercc_jax.surrogates import fit_learner
    >>> x = jnp.linspace(-1, 1, 40)[:, None]
    >>> learner = fit_learner(x, jnp.sin(3 * x), capacity=64)
    >>> mean, deviation = learner.predict(jnp.array([[0.33]]))
    >>> bool(abs(mean - jnp.sin(0.99)) < 0.01)
    True

    Args:
        x: Inputs.
        y: Answers.
        capacity: The most pairs that the learner holds; then the oldest are replaced.
        features: A function of a batch that returns what inputs are compared by. Default: their
            floats.
        prior: A function of a batch that returns the mean before any answer. Default: none.
        version: The model version of the answers.
        tuning: How the kernel is tuned.

    Raises:
        ValueError: As `init_learner` and `tune_learner`.
    """
    learner = init_learner(x, y, capacity=capacity, features=features, prior=prior, version=version)
    return tune_learner(learner, tuning)


def tune_learner(
    learner: Learner,
    tuning: LearnerTuning = LearnerTuning(),  # noqa: B008, it is frozen
) -> Learner:
    """Return the same learner with the kernel that does best on its own window.

    Each pair is predicted by the others.

    Its `scale` becomes the one with which squared errors are, in the mean, what deviations say. The
    choice is made on the host, so this does not run inside jit.

    Raises:
        ValueError: The widths do not fit the features, or there are fewer than three pairs.
    """
    pairs = np.flatnonzero(np.asarray(learner.filled))
    return learner.with_kernel(*find_kernel(learner, learner.kernel, pairs, tuning))
