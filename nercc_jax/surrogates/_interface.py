"""What decoding asks of a surrogate, whatever it is: a fixed model, or a learner."""

import abc
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree, Shaped

from ..codes import Form, join
from ..evaluation import Answers
from ..inference import Model

L = TypeVar("L", bound="AbstractLearner")


class Expected(eqx.Module):
    """A surrogate's outputs on data points and on coded ones, and how far it says it may be off.

    `deviation` is of data points, in units of the outputs; None for one that does not tell.
    """

    own: Float[Array, "groups num_data m"]
    coded: Float[Array, "groups num_workers m"]
    deviation: Float[Array, "groups num_data"] | None = None


class AbstractExpectation(eqx.Module):
    """What a surrogate makes of groups before their answers come; made once for all straggler sets.

    All its arrays have a first axis of groups. `form` is its outputs', which must be the model's.
    """

    form: eqx.AbstractVar[Form]

    @abc.abstractmethod
    def given(
        self,
        y: Float[Array, "groups num_workers m"],
        heard: Bool[Array, "groups num_workers"],
    ) -> Expected:
        """What it makes of them after these answers; of those that are not heard only the shape
        counts, but all must be finite."""

    def after(
        self,
        y: Float[Array, "groups num_workers m"],
        available: Bool[Array, "groups num_workers"],
    ) -> Expected:
        """As `given`, with answers that may be broken: then their workers are stragglers."""
        heard = available & jnp.all(jnp.isfinite(y), axis=-1)
        return self.given(jnp.where(heard[..., None], y, 0), heard)


class AbstractSurrogate(eqx.Module):
    """What is known of the model's outputs beside a group's answers, and how far to trust it.

    `theta` is the share of it that is taken off the answers, `kappa` the shrinkage of what is then
    decoded, by posterior variance: see `decode_with_surrogate`. Both are leaves, 0 or positive.
    """

    theta: eqx.AbstractVar[Float[Array, ""]]
    kappa: eqx.AbstractVar[Float[Array, ""]]

    @property
    def tells_deviation(self) -> bool:
        """Whether it says, before any answer, how far it may be off."""
        return False

    def deviation_before(
        self, x: PyTree[Shaped[Array, "groups num_data ..."]]
    ) -> Float[Array, "groups num_data"]:
        """How far it may be off on data points, before any of their groups' answers.

        Raises: ValueError for one that does not tell (`tells_deviation`)."""
        raise ValueError(f"{type(self).__name__} does not say how far it may be off")

    @abc.abstractmethod
    def outputs(self, x: PyTree[Shaped[Array, "points ..."]]) -> PyTree[Float[Array, "points ..."]]:
        """What it makes of a batch of data points, by itself: in the model's outputs' form."""

    @abc.abstractmethod
    def expect(
        self,
        x: PyTree[Shaped[Array, "groups num_data ..."]],
        coded: PyTree[Shaped[Array, "groups num_workers ..."]],
        own: PyTree[Float[Array, "groups num_data ..."]] | None = None,
    ) -> AbstractExpectation:
        """What it makes of groups of data points and of their coded ones.

        `own`: its `outputs` on the data points, where they are there already."""


class AbstractLearner(AbstractSurrogate):
    """A surrogate that learned from past answers, and so tells how far it may be off."""

    @abc.abstractmethod
    def update(
        self: L,
        x: PyTree[Shaped[Array, "pairs ..."]],
        y: PyTree[Float[Array, "pairs ..."]],
        observed: Bool[Array, " pairs"] | None = None,
        *,
        version: str | None = None,
    ) -> L:
        """The learner that knows these pairs, too, in place of its oldest.

        `observed` masks them: what is not observed, or is not finite, is left out, whatever its
        value. Coded data points with their answers are pairs like any other. Shapes say what is
        compiled, not how many are observed.

        Raises: ValueError where `version` is another than the learner's, and where x and y are not
        like what the learner holds.
        """

    @abc.abstractmethod
    def predict(
        self, x: PyTree[Shaped[ArrayLike, "points ..."]]
    ) -> tuple[PyTree[Float[Array, "points ..."]], Float[Array, " points"]]:
        """The mean, in the model's outputs' form, and the standard deviation of each data point."""

    @property
    def tells_deviation(self) -> bool:
        return True

    def deviation_before(
        self, x: PyTree[Shaped[Array, "groups num_data ..."]]
    ) -> Float[Array, "groups num_data"]:
        return outputs_of_groups(lambda points: self.predict(points)[1], x)

    def outputs(self, x: PyTree[Shaped[Array, "points ..."]]) -> PyTree[Float[Array, "points ..."]]:
        return self.predict(x)[0]


class Outputs(AbstractExpectation):
    """Outputs of a fixed model: no answer changes them."""

    own: Float[Array, "groups num_data m"]
    coded: Float[Array, "groups num_workers m"]
    form: Form = eqx.field(static=True)

    def given(
        self,
        y: Float[Array, "groups num_workers m"],
        heard: Bool[Array, "groups num_workers"],
    ) -> Expected:
        return Expected(self.own, self.coded)


def check_like(cheap: Form, own: Form) -> None:
    """Raises: ValueError where a surrogate's outputs are not like the model's."""
    if (cheap.structure, cheap.shapes) != (own.structure, own.shapes):
        theirs, ours = (jax.tree.unflatten(form.structure, form.shapes) for form in (cheap, own))
        raise ValueError(f"the surrogate gives outputs {theirs}, the model {ours}")


def outputs_of_groups(
    model: Model, groups: PyTree[Shaped[Array, "groups size ..."]]
) -> PyTree[Float[Array, "groups size ..."]]:
    """A model of batches on groups of data points."""
    shape = jax.tree.leaves(groups)[0].shape[:2]
    flat = model(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), groups))
    return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), flat)


def outputs_of(answers: Answers) -> Outputs:
    """A fixed model's recorded answers as what it expects."""
    return Outputs(own=answers.own, coded=answers.coded, form=answers.form)


def joined_outputs(own: PyTree, coded: PyTree) -> Outputs:
    """A fixed model's outputs on groups and on their coded data points."""
    vectors, form = join(own, 2)
    return Outputs(own=vectors, coded=join(coded, 2)[0], form=form)
