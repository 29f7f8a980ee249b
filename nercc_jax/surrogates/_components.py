"""A learner with one kernel for each principal component of the outputs.

With orthonormal directions v_1, ..., v_q of the outputs, the residuals r of the answers are split
into r v_i, each with a Gaussian process of its own, and the rest, with one for all. Means add up,
and so do variances, as the parts are orthogonal. One kernel for all outputs is a compromise of the
smoothest and the roughest; large structures are often the smooth ones.

Source: Higdon et al. 2008, "Computer model calibration using high-dimensional output".
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree, Shaped

from ..codes._products import multiply
from ..codes._trees import Form, join
from ..evaluation._criteria import root_mean_square
from ._interface import (
    AbstractGroupPrior,
    AbstractLearner,
    SurrogatePredictions,
    outputs_of_groups,
)
from ._learner import GaussianGroupPrior, Learner, whiten_group
from ._pairs import Function, features_of, pairs_of, prior_of_groups


class ComponentLearner(AbstractLearner):
    """A learner with one kernel for each principal component.

    `fit_learner(components=...)` makes one. Its time is that of as many learners. `directions` are
    orthonormal, `own` are the learners of the components (arrays with a first axis of components),
    and `rest` is the learner of what is left of the outputs. Everything else is as in `Learner`.
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
        """Return the most pairs that the window holds."""
        return self.rest.capacity

    @property
    def size(self) -> Int[Array, ""]:
        """Return the number of pairs in the window."""
        return self.rest.size

    @property
    def version(self) -> str:
        """Return the model version of the answers."""
        return self.rest.version

    def update(
        self,
        x: PyTree[Shaped[Array, "pairs ..."]],
        y: PyTree[Float[Array, "pairs ..."]],
        observed: Bool[Array, " pairs"] | None = None,
        *,
        version: str | None = None,
    ) -> "ComponentLearner":
        """Return the learner that knows these pairs, too; see `AbstractLearner.update`."""
        x, y = jax.tree.map(jnp.asarray, (x, y))
        z, r, _, known = pairs_of(self.features, self.prior, self.form, x, y, observed)
        along, left = split_outputs(r, self.directions)
        rest = self.rest.update(z, left, known, version=version)
        own = eqx.filter_vmap(
            lambda one, t: one.update(z, t[:, None], known), in_axes=(eqx.if_array(0), 1)
        )(self.own, along)
        return eqx.tree_at(lambda learner: (learner.own, learner.rest), self, (own, rest))

    def predict(
        self, x: PyTree[Shaped[ArrayLike, "points ..."]]
    ) -> tuple[PyTree[Float[Array, "points ..."]], Float[Array, " points"]]:
        """Return means and deviations; see `Learner.predict`."""
        x = jax.tree.map(jnp.asarray, x)
        z = features_of(self.features, x)
        along, apart = eqx.filter_vmap(lambda one: one.predict(z))(self.own)
        mean, deviation = self.rest.predict(z)
        mean = mean + multiply(along[..., 0].T, self.directions.T)
        if self.prior is not None:
            mean = mean + join(self.prior(x), 1)[0]
        return self.form.split(mean), _together(deviation, apart, self.form.size)

    def group_prior(
        self,
        x: PyTree[Shaped[Array, "groups num_data ..."]],
        coded: PyTree[Shaped[Array, "groups num_workers ..."]],
        own: PyTree[Float[Array, "groups num_data ..."]] | None = None,
    ) -> "ComponentGroupPrior":
        x, coded = jax.tree.map(jnp.asarray, (x, coded))
        z = [
            outputs_of_groups(lambda p: features_of(self.features, p), each) for each in (x, coded)
        ]
        prior = None
        if self.prior is not None:
            together = jax.tree.map(lambda *both: jnp.concatenate(both, axis=1), x, coded)
            prior = prior_of_groups(self.prior, together, self.form)
        apart = eqx.filter_vmap(lambda one: one.group_prior(*z), out_axes=eqx.if_array(1))(self.own)
        directions = jnp.broadcast_to(self.directions, (len(z[0]), *self.directions.shape))
        return ComponentGroupPrior(
            own=apart,
            rest=self.rest.group_prior(*z),
            prior=prior,
            directions=directions,
            form=self.form,
        )


class ComponentGroupPrior(AbstractGroupPrior):
    """A component learner's knowledge of groups: a Gaussian process for each component.

    Attributes:
        own: The processes of the components, with a second axis of components.
        rest: The process of what is left of the outputs.
        prior: The prior's outputs, if there is a prior.
        directions: The components' directions, repeated for each group.
        form: The structure of the outputs.
    """

    own: GaussianGroupPrior
    rest: GaussianGroupPrior
    prior: Float[Array, "groups points m"] | None
    directions: Float[Array, "groups m components"]
    form: Form = eqx.field(static=True)

    def condition(
        self,
        y: Float[Array, "groups num_workers m"],
        responded: Bool[Array, "groups num_workers"],
    ) -> SurrogatePredictions:
        workers = y.shape[1]
        if self.prior is not None:
            y = y - self.prior[:, -workers:]
        along, left = split_outputs(y, self.directions)
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
            covariance, noise, responded
        )
        apart = eqx.filter_vmap(
            lambda one, known, white, t: one.condition_whitened(
                known, white, t[..., None], responded
            ),
            in_axes=(eqx.if_array(1), 1, 1, 2),
        )(self.own, known[:, :-1], white[:, :-1], along)
        rest = self.rest.condition_whitened(known[:, -1], white[:, -1], left, responded)

        def whole(rest: Array, apart: Array) -> Array:
            along = jnp.moveaxis(apart[..., 0], 0, -1)
            return rest + multiply(along, jnp.swapaxes(self.directions, 1, 2))

        own, coded = whole(rest.own, apart.own), whole(rest.coded, apart.coded)
        if self.prior is not None:
            own, coded = own + self.prior[:, :-workers], coded + self.prior[:, -workers:]
        deviation = _together(rest.deviation, apart.deviation, y.shape[-1])
        return SurrogatePredictions(own, coded, deviation)


def split_outputs(
    rows: Float[Array, "*lead m"], directions: Float[Array, "*groups m components"]
) -> tuple[Float[Array, "*lead components"], Float[Array, "*lead m"]]:
    """Return rows along the directions, and what is left of them."""
    along = multiply(rows, directions)
    return along, rows - multiply(along, jnp.swapaxes(directions, -1, -2))


def _together(
    rest: Float[Array, "*points"] | None, apart: Float[Array, "components *points"] | None, m: int
) -> Float[Array, "*points"]:
    """Return the root mean square deviation of outputs by the deviations of their parts."""
    assert rest is not None
    assert apart is not None
    parts = jnp.concatenate([rest[None], apart / np.sqrt(m)])
    return root_mean_square(parts, axis=0) * np.sqrt(len(parts)).astype(parts.dtype)
