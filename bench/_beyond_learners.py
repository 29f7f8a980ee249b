"""A learner from past answers in beyond.py's cells, with a student and without."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _beyond_modes import Bench, Model, Order
from jaxtyping import Array, Bool

from nercc_jax import NeRCC, Scheme, fit_surrogate
from nercc_jax.codes._kept import known_encoder
from nercc_jax.schemes._scheme import PreparedInputs, assess_each
from nercc_jax.surrogates import (
    Kernel,
    Learner,
    LearnerTuning,
    init_learner,
    principal_components,
    tune_learner,
)
from nercc_jax.surrogates.surrogate import decode_with_deviation

PAST = 1000  # answers that a learner knows
ROWS = 256  # that kernels are judged by
COMPONENTS = 64  # of the pixels, that it goes by
LAYOUTS = ("repeated", "interleaved")
ALONE, BESIDE, STUDENT = "learner", "student and learner", "student"
UNCERTAIN = "copies of the most uncertain"


class Learners(NamedTuple):
    """One that goes by pixels, and one of what the student leaves over."""

    alone: Learner
    beside: Learner


def learn(bench: Bench, logits: Model) -> Learners:
    """Both learners, of answers by which the other modes are chosen. `logits` are the student's."""
    past = bench.points("choose", Order())[:PAST]
    own = bench.answers("choose", Order()).own
    answers = own.reshape(-1, own.shape[-1])[:PAST]
    pixels = principal_components(past, COMPONENTS)
    groups = [0] * own.shape[-1] + [1] * COMPONENTS

    def both(x: Array) -> Array:
        return jnp.concatenate([logits(x), pixels(x)], axis=1)

    return Learners(
        _learner(past, answers, pixels, None, [0] * COMPONENTS),
        _learner(past, answers, both, bench.work.student, groups),
    )


def learners(bench: Bench, known: Learners, with_student: bool = True) -> None:
    """Measure the learner ordered by pixels, and the student with and without one, in two orders.

    The scheme that each is part of is chosen on images that calibrate error probabilities, which no
    learner knows. None are judged.
    """
    student = bench.work.student
    _tell_best(bench, ALONE, [known.alone], Order("pixels", 1024))
    for order in (Order(), Order("surrogate", 1024)) if with_student else ():
        _tell_best(bench, STUDENT, [student], order)
        _tell_best(bench, BESIDE, [student, known.beside], order)


def _learner(
    x: np.ndarray, y: np.ndarray, features: Any, prior: Any, groups: Sequence[int]
) -> Learner:
    """Return a learner of these pairs, with a kernel tuned on them.

    Features of a group have one unit: how far a principal component spreads is its weight.
    """
    z = np.concatenate([np.asarray(features(part)) for part in np.array_split(x, 8)])
    names = np.asarray(groups)
    unit = np.sqrt([z[:, names == name].var(axis=0).mean() for name in names])
    kernel = Kernel(centre=z.mean(axis=0), unit=unit, widths=[float(np.sqrt(z.shape[1]))])
    start = init_learner(x, y, capacity=1024, features=features, prior=prior, kernel=kernel)
    return tune_learner(start, LearnerTuning(widths=groups, rows=ROWS))


def _tell_best(
    bench: Bench, mode: str, candidates: Sequence[Model | Learner], order: Order
) -> None:
    """Judge the scheme that has the fewest wrong labels where it is chosen."""
    masks = bench.cell.masks(6, bench.work.sets)
    choices: list[tuple[float, str, Scheme]] = []
    schemes = [*_mixed(bench, candidates, order), *_uncertain(bench, candidates)]
    for name, scheme in schemes:
        wrong = float(wrong_labels(bench, scheme, order, "calibrate", masks).mean())
        choices.append((wrong, name, scheme))
    _, name, scheme = min(choices, key=lambda choice: choice[0])
    summary = ", ".join(f"{name} {100 * wrong:.2f}" for wrong, name, _ in choices)
    wrong = wrong_labels(bench, scheme, order, "judged", bench.masks).mean(axis=-1)
    bench.log(
        f"{bench.cell.name} {mode}, {order.name}: {summary}; judged {100 * wrong.mean():.2f} %"
    )
    bench.add(mode, wrong, order, layout=name)


def _mixed(
    bench: Bench, candidates: Sequence[Model | Learner], order: Order
) -> list[tuple[str, Scheme]]:
    """Return layouts with the best of the candidates, mixed as does best."""
    cell, found = bench.cell, []
    for layout in LAYOUTS:
        code = NeRCC(cell.num_data, cell.num_workers, points=layout)
        surrogate = fit_surrogate(
            bench.work.model, candidates, code, bench.points("calibrate", order), cell.law,
            key=jax.random.key(4), num_sets=bench.work.sets,
        )  # fmt: skip
        found.append((layout, Scheme(code, surrogate, redundancy="code")))
    return found


def _uncertain(bench: Bench, candidates: Sequence[Model | Learner]) -> list[tuple[str, Scheme]]:
    """Return copies of the data points that a learner is least certain of."""
    code = NeRCC(bench.cell.num_data, bench.cell.num_workers, points="interleaved")
    return [
        (UNCERTAIN, Scheme(code, learner, redundancy="uncertain"))
        for learner in candidates
        if isinstance(learner, Learner)
    ]


def wrong_labels(
    bench: Bench,
    scheme: Scheme,
    order: Order,
    part: str,
    masks: Bool[np.ndarray | Array, "sets *groups num_workers"],
) -> Bool[np.ndarray, "sets groups num_data"]:
    """Return which labels are not the model's own under each set, or each group's sets."""
    x = jnp.asarray(bench.points(part, order))
    prepared, coded = eqx.filter_jit(scheme.encode)(x, known_encoder(scheme.code))
    rows = np.asarray(coded.reshape(-1, *coded.shape[2:]))
    y = jnp.asarray(bench.work.answers(rows)).reshape(*coded.shape[:2], -1)
    own = jnp.asarray(bench.answers(part, order).own).reshape(len(x), -1)
    return np.asarray(_differ(scheme, x, prepared, coded, y, own, jnp.asarray(masks)))


@eqx.filter_jit
def _differ(
    scheme: Scheme,
    x: Array,
    prepared: PreparedInputs,
    coded: Array,
    y: Array,
    own: Array,
    masks: Array,
) -> Bool[Array, "sets groups num_data"]:
    """Decode under each set, with the surrogate's knowledge of the images made once."""
    code, surrogate, points = scheme.code, scheme.surrogate, prepared.points
    sent = scheme.groups(x, prepared)
    prior = None if surrogate is None else surrogate.group_prior(sent, coded)
    own = own.reshape(*sent.shape[:2], -1)

    def of_set(mask: Array) -> Array:
        available = jnp.broadcast_to(mask, y.shape[:2])
        if points is None:
            decoded, _ = decode_with_deviation(code, surrogate, y, available, prior)
        else:
            decoded, _ = assess_each(code, points, surrogate, y, available, prior)
        same = jnp.argmax(decoded.predictions, axis=-1) == jnp.argmax(own, axis=-1)
        return ~(same & decoded.recovered)

    return jax.lax.map(of_set, masks)
