"""Fitting of learners: kernels that are tuned on the learner's own window."""

import dataclasses
from typing import TypeVar, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Shaped

from ..codes._checks import check_count
from ..codes._products import multiply
from ..codes._trees import check_floats, join, to_device
from ._components import ComponentLearner, split_outputs
from ._kernels import Kernel
from ._learner import Learner, init_learner
from ._pairs import Function, one_row, pairs_of
from ._tune_kernel import LearnerTuning, find_kernel, find_kernels

L = TypeVar("L", bound=Learner | ComponentLearner)

# A component with less of the variance is left to the rest: by its root, what is left out has an
# error of a hundredth of the spread even where nothing is known of it.
_LEAST_SHARE = 1e-4


@overload
def fit_learner(
    x: PyTree[Shaped[ArrayLike, "pairs ..."]],
    y: PyTree[Float[ArrayLike, "pairs ..."]],
    *,
    capacity: int = ...,
    components: None = None,
    features: Function | None = ...,
    prior: Function | None = ...,
    version: str = ...,
    tuning: LearnerTuning = ...,
) -> Learner: ...


@overload
def fit_learner(
    x: PyTree[Shaped[ArrayLike, "pairs ..."]],
    y: PyTree[Float[ArrayLike, "pairs ..."]],
    *,
    capacity: int = ...,
    components: int,
    features: Function | None = ...,
    prior: Function | None = ...,
    version: str = ...,
    tuning: LearnerTuning = ...,
) -> ComponentLearner: ...


def fit_learner(
    x: PyTree[Shaped[ArrayLike, "pairs ..."]],
    y: PyTree[Float[ArrayLike, "pairs ..."]],
    *,
    capacity: int = 1024,
    components: int | None = None,
    features: Function | None = None,
    prior: Function | None = None,
    version: str = "",
    tuning: LearnerTuning = LearnerTuning(),  # noqa: B008, it is frozen
) -> Learner | ComponentLearner:
    """Make a learner of pairs, with its kernels tuned on them.

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
        components: A number of principal components of the outputs, each with a kernel of its own;
            there may be fewer. Default: one kernel for all outputs. Which is
            better depends on the function.
        features: A function of a batch that returns what inputs are compared by. Default: their
            floats.
        prior: A function of a batch that returns the mean before any answer. Default: none.
        version: The model version of the answers.
        tuning: How the kernels are tuned. With components all have one shape.

    Raises:
        ValueError: As `init_learner` and `tune_learner`; or with components, tuning is by labels,
            their number is not positive, or there is one output or all are alike.
    """
    if components is None:
        learner = init_learner(
            x, y, capacity=capacity, features=features, prior=prior, version=version
        )
        return tune_learner(learner, tuning)
    check_count("components", components)
    _check_criterion(tuning)
    x, y = to_device((x, y))
    check_floats("y", y)
    form = join(one_row(y), 1)[1]
    z, r, _, known = pairs_of(features, prior, form, x, y)
    z, r = z[known], r[known]
    directions = _directions(np.asarray(r, np.float64), components)
    along, left = split_outputs(r, directions)
    rest = init_learner(z, left, capacity=capacity, version=version)
    own = eqx.filter_vmap(
        lambda t: init_learner(z, t[:, None], capacity=capacity, kernel=rest.kernel), in_axes=1
    )(along)
    learner = ComponentLearner(
        features=features,
        prior=prior,
        directions=directions,
        own=own,
        rest=rest,
        theta=rest.theta,
        kappa=rest.kappa,
        form=form,
    )
    return tune_learner(learner, tuning)


def tune_learner(
    learner: L,
    tuning: LearnerTuning = LearnerTuning(),  # noqa: B008, it is frozen
) -> L:
    """Return the same learner with the kernels that do best on its own window.

    Each pair is predicted by the others.

    Its `scale` becomes the one with which squared errors are, in the mean, what deviations say. The
    choice is made on the host, so this does not run inside jit. A component learner keeps its
    directions.

    Raises:
        ValueError: The widths do not fit the features, there are fewer than three pairs, or a
            component learner is tuned by labels.
    """
    if isinstance(learner, Learner):
        pairs = np.flatnonzero(np.asarray(learner.filled))
        return learner.with_kernel(*find_kernel(learner, learner.kernel, pairs, tuning))
    _check_criterion(tuning)
    rest, own = learner.rest, learner.own
    pairs = np.flatnonzero(np.asarray(rest.filled))
    if tuning.widths == "kept":
        return _tuned_from(learner, own.kernel, rest.kernel, pairs, tuning)
    # All start from the kernel that does best for all outputs together, and need half as far.
    along = multiply(own.window.residuals[..., 0].T, learner.directions.T)
    together = rest.window.residuals + along
    whole = eqx.tree_at(lambda one: one.window.residuals, rest, together)
    kernel, _ = find_kernel(whole, whole.kernel, pairs, tuning)
    number = learner.directions.shape[1]
    starts = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (number, *leaf.shape)), kernel)
    near = dataclasses.replace(tuning, steps=tuning.steps // 2)
    return _tuned_from(learner, starts, kernel, pairs, near)


def _tuned_from(
    learner: ComponentLearner,
    starts: Kernel,
    start: Kernel,
    pairs: Int[np.ndarray, " pairs"],
    tuning: LearnerTuning,
) -> ComponentLearner:
    """Return the learner with tuned kernels of the shapes of these starts."""
    own, rest = learner.own, learner.rest
    found = find_kernels(own, starts, pairs, tuning)
    own = eqx.filter_vmap(lambda one, kernel, scale: one.with_kernel(kernel, scale))(own, *found)
    alike = dataclasses.replace(tuning, shapes=(start.shape,))
    rest = rest.with_kernel(*find_kernel(rest, start, pairs, alike))
    return eqx.tree_at(lambda one: (one.own, one.rest), learner, (own, rest))


def _check_criterion(tuning: LearnerTuning) -> None:
    if tuning.criterion == "labels":
        raise ValueError("a component of the outputs has no labels: tune by 'density' or 'mse'")


def _directions(
    residuals: Float[np.ndarray, "pairs m"], number: int
) -> Float[Array, "m components"]:
    """Return the first principal components of the residuals, but for the last of all."""
    centred = residuals - residuals.mean(axis=0, keepdims=True)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    enough = sizes**2 > _LEAST_SHARE * np.sum(sizes**2)
    count = min(number, int(enough.sum()), residuals.shape[1] - 1)
    if count < 1:
        raise ValueError(
            f"outputs of {residuals.shape[1]} numbers that are alike or alone have no components: "
            "leave `components` out"
        )
    return jnp.asarray(directions[:count].T, jnp.float32)
