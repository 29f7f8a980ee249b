"""The data points of a descent: the held-out part, and the groups that each step draws."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree, Shaped

from ..arrays import check_fields, native
from ..evaluation.answers import cut_groups


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The data points that each step draws, and those that are held out to judge.

    Attributes:
        groups_per_step: The number of groups of K data points; fewer if there are not so many.
        sets_per_step: The number of straggler sets of each law, each of which meets all groups; all
            sets of a law that has no more.
        held_out_share: The share of the data points, in whole groups drawn at random, on which
            codes are judged and not trained.
        held_out_sets: The number of straggler sets of each law under which codes are judged.
        grouped: Whether every K data points in the order given are a group that stays together: for
            data points whose order matters (a short path through them). A remainder is left out.

    Raises:
        ValueError: A number is out of range.
    """

    groups_per_step: int = 8
    sets_per_step: int = 12
    held_out_share: float = 0.25
    held_out_sets: int = 32
    grouped: bool = False

    def __post_init__(self):
        check_fields(self, "groups_per_step", "sets_per_step", "held_out_sets")
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"held_out_share must be between 0 and 1, not {self.held_out_share}")

    def draw(
        self, num_data: int, x: PyTree, key: PRNGKeyArray
    ) -> PyTree[Shaped[Array, "groups num_data ..."]]:
        """Return a step's groups of data points (points, ...)."""
        key_points, key_groups, _ = jax.random.split(key, 3)  # three, as for recorded results
        points = len(jax.tree.leaves(x)[0])
        groups = min(self.groups_per_step, points // num_data)
        if self.grouped:
            first = jax.random.choice(key_points, points // num_data, (groups,), replace=False)
            places = first[:, None] * num_data + jnp.arange(num_data)
        else:
            chosen = jax.random.choice(key_points, points, (groups * num_data,), replace=False)
            mixed = jax.random.choice(key_groups, groups, (groups,), replace=False)
            places = chosen.reshape(groups, num_data)[mixed]
        return jax.tree.map(lambda leaf: leaf[places], x)


def split_points(
    x: PyTree,
    num_data: int,
    sampling: Sampling,
    key: PRNGKeyArray,
) -> tuple[PyTree[Shaped[np.ndarray, "points ..."]], PyTree[Shaped[np.ndarray, "held ..."]]]:
    """Return data points to train on, and whole groups of K held out at random.

    With `grouped`, consecutive data points stay together as groups.

    Raises:
        ValueError: There are fewer than two groups, or data points are not finite floats.
    """
    x = jax.tree.map(np.asarray, native(x, "x"))
    groups = len(jax.tree.leaves(cut_groups(x, num_data))[0])  # says what is no float, or no number
    points = len(jax.tree.leaves(x)[0])
    if groups < 2:
        raise ValueError(
            f"x has {points} data points: tuning needs two groups of {num_data} data points at "
            "least, one of them held out"
        )
    size = num_data if sampling.grouped else 1
    held = min(max(round(sampling.held_out_share * groups), 1), groups - 1)
    order = np.asarray(jax.random.permutation(key, points // size))
    places = (order[:, None] * size + np.arange(size)).ravel()
    held_out, rest = places[: held * num_data], places[held * num_data :]
    return jax.tree.map(lambda leaf: leaf[rest], x), jax.tree.map(lambda leaf: leaf[held_out], x)
