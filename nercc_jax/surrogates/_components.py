"""A learner whose outputs have more than one kernel: one for each of their principal components.

With orthonormal directions v_1, ..., v_q of the outputs, the residuals r of the answers are cut
into r v_i, each with a Gaussian process of its own, and what is left, with one for all. Means add
up, and so do variances, as what is cut apart is orthogonal. One kernel for all outputs is as smooth
as the smoothest and the roughest let it be; large structures are often the smooth ones.

Source: Higdon et al. 2008, "Computer model calibration using high-dimensional output".
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree, Shaped

from ..codes import Form, check_count, check_floats, join, multiply
from ._conditioning import Conditioned, whiten_group
from ._fit_learner import LearnerTuning, find_kernel, find_kernels
from ._interface import (
    AbstractExpectation,
    AbstractLearner,
    Expected,
    outputs_of_groups,
)
from ._kernels import Kernel, root
from ._learner import Learner, start_learner
from ._pairs import Function, features_of, pairs_of, prior_of_groups
from ._window import one_row

# A component with less of the variance is left to the rest: by its root, what is cut off has an
# error of a hundredth of the spread even where nothing is told of it.
_LEAST_SHARE = 1e-4


class ComponentLearner(AbstractLearner):
    """What past answers tell about new data points, with a kernel for each principal component.

    `own` are the learners of the components, arrays with a first axis of them; `rest` is that of
    what is left. Everything else is as in `Learner`; `fit_components` makes one. Its time is that
    of so many learners.
    """

    features: Function | None
    prior: Function | None
    directions: Float[Array, "m components"]
    own: Learner
    rest: Learner
    theta: Float[Array, ""]
    kappa: Float[Array, ""]
    form: Form = eqx.field(static=True)

    @property
    def capacity(self) -> int:
        """How many pairs the window holds at most."""
        return self.rest.capacity

    @property
    def size(self) -> Int[Array, ""]:
        """How many pairs it holds."""
        return self.rest.size

    @property
    def version(self) -> str:
        """Of the model whose answers these are."""
        return self.rest.version

    def update(
        self,
        x: PyTree[Shaped[Array, "pairs ..."]],
        y: PyTree[Float[Array, "pairs ..."]],
        observed: Bool[Array, " pairs"] | None = None,
        *,
        version: str | None = None,
    ) -> "ComponentLearner":
        """See `AbstractLearner`; the directions stay what they are."""
        x, y = jax.tree.map(jnp.asarray, (x, y))
        z, r, _, known = pairs_of(self.features, self.prior, self.form, x, y, observed)
        along, left = self._cut(r)
        rest = self.rest.update(z, left, known, version=version)
        own = eqx.filter_vmap(
            lambda one, t: one.update(z, t[:, None], known), in_axes=(eqx.if_array(0), 1)
        )(self.own, along)
        return eqx.tree_at(lambda learner: (learner.own, learner.rest), self, (own, rest))

    def predict(
        self, x: PyTree[Shaped[ArrayLike, "points ..."]]
    ) -> tuple[PyTree[Float[Array, "points ..."]], Float[Array, " points"]]:
        """As `Learner.predict`."""
        x = jax.tree.map(jnp.asarray, x)
        z = features_of(self.features, x)
        along, apart = eqx.filter_vmap(lambda one: one.predict(z))(self.own)
        mean, deviation = self.rest.predict(z)
        mean = mean + multiply(along[..., 0].T, self.directions.T)
        if self.prior is not None:
            mean = mean + join(self.prior(x), 1)[0]
        return self.form.split(mean), _together(deviation, apart, self.form.size)

    def expect(
        self,
        x: PyTree[Shaped[Array, "groups num_data ..."]],
        coded: PyTree[Shaped[Array, "groups num_workers ..."]],
        own: PyTree[Float[Array, "groups num_data ..."]] | None = None,
    ) -> "ExpectedComponents":
        x, coded = jax.tree.map(jnp.asarray, (x, coded))
        z = [
            outputs_of_groups(lambda p: features_of(self.features, p), each) for each in (x, coded)
        ]
        prior = None
        if self.prior is not None:
            together = jax.tree.map(lambda *both: jnp.concatenate(both, axis=1), x, coded)
            prior = prior_of_groups(self.prior, together, self.form)
        apart = eqx.filter_vmap(lambda one: one.expect(*z), out_axes=eqx.if_array(1))(self.own)
        directions = jnp.broadcast_to(self.directions, (len(z[0]), *self.directions.shape))
        return ExpectedComponents(
            own=apart,
            rest=self.rest.expect(*z),
            prior=prior,
            directions=directions,
            form=self.form,
        )

    def _cut(self, r: Float[Array, "rows m"]) -> tuple[Array, Array]:
        return _cut(r, self.directions)


class ExpectedComponents(AbstractExpectation):
    """A component learner's groups after the window: a Gaussian process for each component."""

    own: Conditioned  # with a second axis of components
    rest: Conditioned
    prior: Float[Array, "groups points m"] | None
    directions: Float[Array, "groups m components"]
    form: Form = eqx.field(static=True)

    def given(
        self,
        y: Float[Array, "groups num_workers m"],
        heard: Bool[Array, "groups num_workers"],
    ) -> Expected:
        workers = y.shape[1]
        if self.prior is not None:
            y = y - self.prior[:, -workers:]
        along, left = _cut(y, self.directions)
        # All factors in one call of LAPACK: two such calls of many matrices each, side by side,
        # wait for each other's threads for ever (jaxlib 0.10.2 on two cores).
        covariance, noise = (
            jnp.concatenate([one, other[:, None]], axis=1)
            for one, other in (
                (self.own.covariance, self.rest.covariance),
                (self.own.noise, self.rest.noise),
            )
        )
        known, white = jax.vmap(jax.vmap(whiten_group, in_axes=(0, 0, None)))(
            covariance, noise, heard
        )
        apart = eqx.filter_vmap(
            lambda one, known, white, t: one.told(known, white, t[..., None], heard),
            in_axes=(eqx.if_array(1), 1, 1, 2),
        )(self.own, known[:, :-1], white[:, :-1], along)
        rest = self.rest.told(known[:, -1], white[:, -1], left, heard)

        def whole(rest: Array, apart: Array) -> Array:
            along = jnp.moveaxis(apart[..., 0], 0, -1)
            return rest + multiply(along, jnp.swapaxes(self.directions, 1, 2))

        own, coded = whole(rest.own, apart.own), whole(rest.coded, apart.coded)
        if self.prior is not None:
            own, coded = own + self.prior[:, :-workers], coded + self.prior[:, -workers:]
        deviation = _together(rest.deviation, apart.deviation, y.shape[-1])
        return Expected(own, coded, deviation)


def fit_components(
    x: PyTree[Shaped[ArrayLike, "pairs ..."]],
    y: PyTree[Float[ArrayLike, "pairs ..."]],
    *,
    number: int = 12,
    capacity: int = 1024,
    features: Function | None = None,
    prior: Function | None = None,
    version: str = "",
    tuning: LearnerTuning = LearnerTuning(),  # noqa: B008, it is frozen
) -> ComponentLearner:
    """A learner of these pairs, its first `number` principal components with a kernel each.

    Fewer, where the pairs or the outputs are fewer, or components have hardly a share of the
    outputs' variance. Kernels are tuned as `fit_learner` does, all of one shape. Whether that does
    better than one kernel for all outputs depends on the function: see.

    >>> import jax.numpy as jnp
    >>> from nercc_jax.surrogates import LearnerTuning, fit_components
    >>> x = jnp.linspace(-1, 1, 40)[:, None]
    >>> y = jnp.concatenate([jnp.sin(x), jnp.sin(9 * x), x], axis=1)
    >>> learner = fit_components(x, y, capacity=64, tuning=LearnerTuning(steps=0))  # the grid's
    >>> mean, deviation = learner.predict(jnp.array([[0.33]]))
    >>> mean.shape, deviation.shape
    ((1, 3), (1,))

    Raises: ValueError as `fit_learner` does, for tuning by labels, for a number that is not
    positive, and for outputs of which there is only one, or that are all alike.
    """
    check_count("number", number)
    _check_criterion(tuning)
    x, y = jax.tree.map(jnp.asarray, (x, y))
    check_floats("y", y)
    form = join(one_row(y), 1)[1]
    z, r, _, known = pairs_of(features, prior, form, x, y)
    z, r = z[known], r[known]
    directions = _directions(np.asarray(r, np.float64), number)
    along, left = _cut(r, directions)
    rest = start_learner(z, left, capacity=capacity, version=version)
    own = eqx.filter_vmap(
        lambda t: start_learner(z, t[:, None], capacity=capacity, kernel=rest.kernel), in_axes=1
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
    return tune_components(learner, tuning)


def tune_components(
    learner: ComponentLearner,
    tuning: LearnerTuning = LearnerTuning(),  # noqa: B008, it is frozen
) -> ComponentLearner:
    """The same learner with the kernels that do best on its own window: see `tune_learner`.

    The directions of the components stay what they are. Raises: ValueError as `tune_learner` does,
    and for tuning by labels.
    """
    _check_criterion(tuning)
    rest, own = learner.rest, learner.own
    pairs = np.flatnonzero(np.asarray(rest.filled))
    if tuning.widths == "kept":
        return _tuned_from(learner, own.kernel, rest.kernel, pairs, tuning)
    # All start from the kernel that does best for all outputs together, and need half as far.
    along = multiply(own.residuals[..., 0].T, learner.directions.T)
    whole = eqx.tree_at(lambda one: one.residuals, rest, rest.residuals + along)
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
    """The learner with kernels of these shapes: from `starts` of the components, from `start` of
    the rest."""
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
    """The first principal components of the residuals, but for the last of all."""
    centred = residuals - residuals.mean(axis=0, keepdims=True)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    enough = sizes**2 > _LEAST_SHARE * np.sum(sizes**2)
    count = min(number, int(enough.sum()), residuals.shape[1] - 1)
    if count < 1:
        raise ValueError(
            f"outputs of {residuals.shape[1]} numbers that are alike or alone have no components: "
            "use `fit_learner`"
        )
    return jnp.asarray(directions[:count].T, jnp.float32)


def _cut(
    rows: Float[Array, "*lead m"], directions: Float[Array, "*groups m components"]
) -> tuple[Float[Array, "*lead components"], Float[Array, "*lead m"]]:
    """Rows along the directions, and what is left of them."""
    along = multiply(rows, directions)
    return along, rows - multiply(along, jnp.swapaxes(directions, -1, -2))


def _together(
    rest: Float[Array, "*points"] | None, apart: Float[Array, "components *points"] | None, m: int
) -> Float[Array, "*points"]:
    """The deviation of outputs, root mean square over all, by those of what they are cut into."""
    assert rest is not None
    assert apart is not None
    return root(rest**2 + jnp.sum(apart**2, axis=0) / m)
