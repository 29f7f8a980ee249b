"""Copies in beyond.py, decoded and placed in several ways, next to coding, without any order."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _beyond_learners import wrong_labels
from _beyond_modes import Bench, Order
from jaxtyping import Array, Float, Int

from nercc_jax import NeRCC, Replication, Scheme
from nercc_jax.codes._trees import Form
from nercc_jax.evaluation import Estimate
from nercc_jax.surrogates import AbstractSurrogate, Surrogate
from nercc_jax.surrogates.interface import AbstractGroupPrior, SurrogatePredictions
from nercc_jax.tuning import learn_decoder

DEALS = 3  # of the images into groups


class NearestAnswers(AbstractGroupPrior):
    """The answer to the nearest of the answered coded data points."""

    distance: Float[Array, "groups num_data num_workers"]
    isolation: Float[Array, "groups num_data"]
    form: Form = eqx.field(static=True)

    def condition(self, y: Array, available: Array) -> SurrogatePredictions:
        distance = jnp.where(available[:, None], self.distance, jnp.inf)
        nearest = jnp.argmin(distance, axis=2)[..., None]
        own = jnp.take_along_axis(y, nearest, axis=1)
        coded = jnp.zeros_like(y)
        return SurrogatePredictions(own=own, coded=coded, form=self.form, deviation=self.isolation)


class Nearest(AbstractSurrogate):
    """Answers as the nearest answered data point, by pixels, whose distance is its deviation."""

    form: Form = eqx.field(static=True)
    theta: Float[Array, ""] = eqx.field(default=1.0, converter=jnp.asarray)
    kappa: Float[Array, ""] = eqx.field(default=jnp.inf, converter=jnp.asarray)

    @property
    def has_deviation(self) -> bool:
        return True

    def prior_deviation(self, x: Array) -> Array:
        distance = _distances(x, x)
        return jnp.min(jnp.where(jnp.eye(x.shape[1], dtype=bool), jnp.inf, distance), axis=2)

    def outputs(self, x: Array) -> Array:
        raise NotImplementedError("the nearest answer is that of a group")

    def group_prior(self, x: Array, coded: Array, own: Any = None) -> NearestAnswers:
        distance, isolation = _distances(x, coded), self.prior_deviation(x)
        return NearestAnswers(distance=distance, isolation=isolation, form=self.form)


def _distances(x: Array, others: Array) -> Float[Array, "groups points others"]:
    def of_group(group):
        x, others = (each.reshape(len(each), -1) for each in group)
        return jax.lax.map(lambda one: jnp.linalg.norm(others - one, axis=1), x)

    return jax.lax.map(of_group, (x, others))


def dealt(images: int) -> Int[np.ndarray, " points"]:
    """Return the images in the order in which they are dealt into groups, several times."""
    return np.concatenate([np.random.default_rng(n).permutation(images) for n in range(DEALS)])


def copies(bench: Bench) -> None:
    """Measure copies and codes at one (N, K, S), each group under straggler sets of its own.

    Images are what is drawn at random: the wrong labels of each are its mean over deals and sets.
    """
    num_workers, num_data, stragglers = (
        getattr(bench.cell, name) for name in ("num_workers", "num_data", "stragglers")
    )
    student = Surrogate(bench.work.student, kappa=jnp.inf)
    nearest = Nearest(form=bench.answers("judged", Order()).form)
    twice = Replication(num_data, num_workers)
    placed = NeRCC(num_data, num_workers, points="repeated", exact=True)
    choose = bench.points("choose", Order())
    learned = [
        learn_decoder(bench.work.model, code, choose, key=jax.random.key(7))
        for code in (twice, NeRCC(num_data, num_workers))
    ]
    uncertain: Any = {
        "redundancy": "uncertain",
        "straggler_share": stragglers / num_workers,
    }
    schemes = {
        "copies": Scheme(twice),
        "copies, learned decoder": Scheme(learned[0]),
        "NeRCC, learned decoder": Scheme(learned[1]),
        "copies, else the nearest": Scheme(twice, nearest),
        "copies of the isolated, else the nearest": Scheme(placed, nearest, **uncertain),
        "copies, else the student": Scheme(twice, student),
        "copies by the student's doubt": Scheme(placed, student, **uncertain),
    }
    groups = len(bench.groups("judged", Order()))
    masks = np.tile(np.arange(num_workers) >= stragglers, (bench.work.sets, groups, 1))
    masks = np.random.default_rng(8).permuted(masks, axis=2)
    wrong, which = {}, dealt(groups * num_data // DEALS)
    for name, scheme in schemes.items():
        each = wrong_labels(bench, scheme, Order(), "judged", masks).mean(axis=0)
        wrong[name] = np.bincount(which, each.ravel()) / DEALS
        bench.add(name, wrong[name], Order())
    before, after = list(wrong.values())[-2:]
    ratio = float(after.mean() / before.mean())
    half = Estimate.over((after - ratio * before) / before.mean()).half_width
    bench.rows[-1] |= {"ratio": ratio, "ratio_half_width": half}
    bench.log(f"{bench.cell.name}: {ratio:.2f} +- {half:.2f} of copies with the same student")
