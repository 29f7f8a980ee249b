"""The interface of surrogates: fixed models and learners.

Decoding gets a prior of each group from a surrogate (`group_prior`), and conditions it on the
workers' answers.
"""

import abc
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float, PyTree, Shaped

from ..codes.trees import Form, groups_of, points_of
from ..inference.models import Model


class AbstractGroupPrior(eqx.Module):
    """A surrogate's predictions for groups before the workers answer.

    It is computed once for all straggler sets. All its arrays have a first axis of groups. `form`
    is the structure of its outputs, which must be that of the model's outputs.
    """

    form: eqx.AbstractVar[Form]

    @abc.abstractmethod
    def condition(
        self,
        y: Float[Array, "groups num_workers m"],
        available: Bool[Array, "groups num_workers"],
    ) -> "SurrogatePredictions":
        """Return the surrogate's predictions, conditioned on these answers.

        Args:
            y: Answers as vectors. Those that are not finite are not used.
            available: Which workers answered.
        """


class SurrogatePredictions(AbstractGroupPrior):
    """A surrogate's outputs on data points and coded data points, independent of the answers.

    Attributes:
        own: Outputs on the data points.
        coded: Outputs on the coded data points.
        form: The structure of the outputs.
        deviation: Standard deviations on the data points, in units of the outputs; None if the
            surrogate has none.
    """

    own: Float[Array, "groups num_data m"]
    coded: Float[Array, "groups num_workers m"]
    form: Form = eqx.field(static=True)
    deviation: Float[Array, "groups num_data"] | None = None

    def condition(
        self,
        y: Float[Array, "groups num_workers m"],
        available: Bool[Array, "groups num_workers"],
    ) -> "SurrogatePredictions":
        return self


class AbstractSurrogate(eqx.Module):
    """A cheap approximation of the served model, and its weights relative to a code.

    Attributes:
        theta: The share of its outputs that is subtracted from the answers before they are decoded,
            0 or positive.
        kappa: The shrinkage of decoded residuals with their posterior variance, 0 or positive: see
            `surrogate.py`.
    """

    theta: eqx.AbstractVar[Float[Array, ""]]
    kappa: eqx.AbstractVar[Float[Array, ""]]

    @property
    def has_deviation(self) -> bool:
        """Return whether its predictions have a deviation before any answer."""
        return False

    def prior_deviation(
        self, x: PyTree[Shaped[Array, "groups num_data ..."]]
    ) -> Float[Array, "groups num_data"]:
        """Return the deviations on data points before any of their groups' answers.

        Raises:
            ValueError: It has none (`has_deviation`).
        """
        raise ValueError(f"{type(self).__name__} does not say how far it may be off")

    @abc.abstractmethod
    def outputs(self, x: PyTree[Shaped[Array, "points ..."]]) -> PyTree[Float[Array, "points ..."]]:
        """Return its outputs on a batch of data points, in the structure of the model's outputs."""

    @abc.abstractmethod
    def group_prior(
        self,
        x: PyTree[Shaped[Array, "groups num_data ..."]],
        coded: PyTree[Shaped[Array, "groups num_workers ..."]],
        own: PyTree[Float[Array, "groups num_data ..."]] | None = None,
    ) -> AbstractGroupPrior:
        """Return its prior for groups of data points and their coded data points.

        Args:
            x: Data points.
            coded: Coded data points.
            own: Its `outputs` on the data points, if they are already known.
        """


def check_like(cheap: Form, own: Form) -> None:
    """Raise ValueError if a surrogate's outputs differ from the model's in structure or shapes."""
    if (cheap.structure, cheap.shapes) != (own.structure, own.shapes):
        theirs, ours = (jax.tree.unflatten(form.structure, form.shapes) for form in (cheap, own))
        raise ValueError(f"the surrogate gives outputs {theirs}, the model {ours}")


def outputs_of_groups(
    model: Model, groups: PyTree[Shaped[Any, "groups size ..."]]
) -> PyTree[Float[Any, "groups size ..."]]:
    """Return the outputs of a model of batches on groups of data points."""
    return groups_of(model(points_of(groups)), jax.tree.leaves(groups)[0].shape[1])
