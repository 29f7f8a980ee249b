"""Past the paper: ordering, layouts, surrogates, error probabilities, learners, copies, and rivals.

Measures the disagreement (1 - RelAcc) of every mode for each model at each (N, K, S), with its 95 %
interval over straggler sets and groups of images, the same for all. Whatever is chosen (lambdas,
layouts, shrinkage, error probability) is chosen on other test images than those that judge:
unlabelled, and as new to the model and its student as queries will be. An hour for a model on one
core. Needs MNIST and CIFAR-10 (`models/data.py` says where).

Parts: `cells`, every mode; `promises`, what an error probability promises, each half of the images
judged by what was calibrated on the other one; `learners`, one from past answers, without a student
and with it; `copies`, decoded and placed in several ways.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from report import Report, environment, show
from workloads import GRID, Network, Outputs, Recorded, groups_of, in_batches, own_answers

from nercc_jax import (
    AbstractCode,
    ExactStragglers,
    NeRCC,
    Parity,
    Replication,
    Scheme,
    fit_surrogate,
    tune,
)
from nercc_jax.evaluation import Answers, Estimate, record_answers
from nercc_jax.inference import order_points
from nercc_jax.schemes import calibrate_error_probability
from nercc_jax.stragglers import straggler_sets
from nercc_jax.surrogates import (
    AbstractSurrogate,
    Kernel,
    Learner,
    LearnerTuning,
    Surrogate,
    fit_learner,
    principal_components,
)
from nercc_jax.surrogates.interface import AbstractGroupPrior, SurrogatePredictions
from nercc_jax.tuning import Descent, Sampling, learn_decoder
from nercc_models import list_parity_models, load_parity_model, student_card

MODELS: dict[str, Outputs] = {
    "lenet5-mnist": "logits",
    "repvgg-cifar10": "probabilities",
    "vit-cifar10": "probabilities",
}
PARTS = ("cells", "promises", "learners", "copies")
# The further layouts are searched too; these are shown by themselves.
SHOWN = ("chebyshev", "interleaved", "repeated")
SHARE = 0.05  # that is executed again
WANTED = (0.005, 0.05)  # shares of the labels given out that a user lets differ
PAST, COMPONENTS = 1000, 64  # answers that a learner knows, and numbers of the pixels it goes by
DEALS = 3  # of the images into groups, for copies


class Cell(NamedTuple):
    """A code's size, and how many of its workers straggle."""

    num_workers: int
    num_data: int
    stragglers: int

    @property
    def name(self) -> str:
        return f"({self.num_workers}, {self.num_data}, {self.stragglers})"

    @property
    def law(self) -> dict[str, ExactStragglers]:
        return {"law": ExactStragglers(self.stragglers)}

    def masks(self, seed: int, at_most: int) -> Bool[Array, "sets num_workers"]:
        key = jax.random.fold_in(jax.random.key(seed), 0)
        return straggler_sets(self.law["law"], key, self.num_workers, at_most)


class Order(NamedTuple):
    """An order of data points: its features and its buffer; None keeps them as they come."""

    by: str | None = None
    buffer_size: int = 0

    @property
    def name(self) -> str:
        return "no order" if self.by is None else f"{self.by}, buffer {self.buffer_size}"


class Size(NamedTuple):
    """The amount that is run.

    It counts images to choose by, and as many to calibrate on as to judge by; straggler sets; steps
    of gradient descent in the search.
    """

    choose: int = 1024
    points: int = 1024
    split: str = "test"
    sets: int = 20
    steps: int = 60


UNORDERED, BY_STUDENT = Order(), Order("surrogate", 1024)
CELLS = (
    Cell(100, 20, 40),
    Cell(60, 20, 20),
    Cell(30, 20, 5),
    Cell(24, 20, 2),
    Cell(20, 8, 3),
    Cell(10, 8, 2),
)
COPIED = {
    "lenet5-mnist": (Cell(24, 20, 2), Cell(30, 20, 5), Cell(60, 20, 20), Cell(20, 8, 12)),
    "repvgg-cifar10": tuple(
        Cell(workers, 20, lost)
        for workers, several in ((24, (2, 4)), (30, (5, 10)), (60, (20, 40)))
        for lost in several
    ),
    "vit-cifar10": (Cell(20, 8, 8), Cell(20, 8, 12)),
}
# What an error probability promises is measured by many labels that are wrong. LeNet5's student
# gives so few that the 5,000 test images do not do.
PROMISED = {
    "lenet5-mnist": Size(1000, 10_000, "train", 100),
    "repvgg-cifar10": Size(1000, 2000, sets=100),
    "vit-cifar10": Size(1000, 2000, sets=100),
}


def run(
    report: Report,
    only: tuple[str, ...] = (*MODELS,),
    parts: tuple[str, ...] = PARTS,
    cells: tuple[str, ...] = ("*",),
) -> None:
    """Measure some parts of some models.

    Options:
        only: Models.
        parts: Of the measurements.
        cells: Names of cells as in "60:20:20".
    """
    for name, part in ((name, part) for name in only for part in parts):
        outputs, several, size = MODELS[name], CELLS, Size()
        if part == "promises":
            several, size = (Cell(30, 20, 5), Cell(24, 20, 2), Cell(10, 8, 2)), PROMISED[name]
        elif part == "copies":
            several, size = COPIED[name], Size(1000, 2000)
        if report.quick:
            size, several = Size(160, 160, sets=4, steps=4), several[-1:]
        network, student = (Network.load(name, outputs, student=each) for each in (False, True))
        x, _ = network.images(size.split, report.data_dir, size.choose + 2 * size.points)
        choose, calibrate, judged = np.split(x, [size.choose, size.choose + size.points])
        work = Work(network, Recorded(network), student, choose, calibrate, judged, size)
        if part == "copies":  # nothing is calibrated
            both = np.concatenate([work.calibrate, work.judged])
            work = dataclasses.replace(work, judged=both[dealt(len(both))])
        known: dict[str, Learner] = {}  # all cells have the same learners
        for cell in several:
            if cells != ("*",) and ":".join(map(str, cell)) not in cells:
                continue
            start, bench = time.perf_counter(), Bench(work, cell, report.log)
            if part == "cells":
                every_mode(bench, name)
            elif part == "promises":
                promises(bench)
            elif part == "copies":
                copies(bench)
            else:
                known = known or learn(bench, Network.load(name, "logits", student=True))
                learners(bench, known)
            results = report.read()  # another process may have measured another model by now
            summary = results.setdefault(name, {})
            summary |= {"outputs": outputs, "student": student_card(name)}
            here = environment()
            summary.setdefault("environment", here)  # of older cells, which have none
            summary.setdefault(part, {})[cell.name] = {
                "rows": bench.rows, "size": size._asdict(), "environment": here,
                "seconds": round(time.perf_counter() - start, 1),
            }  # fmt: skip
            report.write(results)
            report.log(f"{name} {cell.name}: {part}")
            columns = ("mode", "order", "disagreement", "half_width", "layout")
            show({key: row.get(key) for key in columns} for row in bench.rows)
            jax.clear_caches()  # XLA maps memory for every program


@dataclasses.dataclass(frozen=True)
class Work:
    """A model, its answers, its student, and images to choose, calibrate and judge by."""

    model: Network
    answers: Recorded
    student: Network
    choose: np.ndarray
    calibrate: np.ndarray
    judged: np.ndarray
    size: Size


class Bench:
    """One cell's measurements; `rows` grows as modes are measured."""

    def __init__(self, work: Work, cell: Cell, log: Callable[[str], Any]):
        self.work, self.cell, self.log = work, cell, log
        self.rows: list[dict[str, Any]] = []
        self.masks = cell.masks(1, work.size.sets)
        self.groups = functools.cache(self._groups)

    def _groups(self, part: str, order: Order) -> np.ndarray:
        """Return a part of the images, whole groups of K, in this order."""
        groups = groups_of(getattr(self.work, part), self.cell.num_data)
        if order.by is None:
            return groups
        x = groups.reshape(-1, *groups.shape[2:])
        features = None if order.by == "pixels" else in_batches(self.work.student, x)
        size = max(order.buffer_size, self.cell.num_data)
        there = order_points(x, self.cell.num_data, features=features, buffer_size=size)
        return groups_of(x[np.asarray(there)], self.cell.num_data)

    def points(self, part: str, order: Order) -> np.ndarray:
        groups = self.groups(part, order)
        return groups.reshape(-1, *groups.shape[2:])

    def own(self, part: str, order: Order) -> Float[np.ndarray, "groups num_data m"]:
        """Return the model's own answers."""
        return self.work.answers(self.groups(part, order), 2)

    def answers(self, part: str, order: Order, code: AbstractCode) -> Answers:
        """Return all workers' answers."""
        y = self.work.answers.coded(code, self.groups(part, order))
        return Answers(code, jnp.asarray(y), jnp.asarray(self.own(part, order)))

    def assessed(
        self, scheme: Scheme, part: str, order: Order, masks: Any
    ) -> tuple[Bool[np.ndarray, "sets groups num_data"], Any]:
        """Return which labels are not the model's own under each set, and all that is known."""
        own = self.own(part, order)
        found = self.work.answers.assess(scheme, self.points(part, order), masks)
        labels = np.asarray(jnp.argmax(found.predictions, axis=-1))
        same = (labels == own.argmax(-1).ravel()) & np.asarray(found.recovered)
        return ~same.reshape(len(masks), *own.shape[:2]), found

    def add(
        self, mode: str, wrong: Float[np.ndarray, "sets groups"], order: Order, **more: Any
    ) -> None:
        """Add a row of the share of labels that are not the model's own."""
        mean = Estimate.over(wrong)
        about = {"mode": mode, "order": order.name}
        self.rows.append(about | {"disagreement": mean.mean, "half_width": mean.half_width} | more)

    def plain(self, mode: str, code: AbstractCode, order: Order, known: Any = None) -> None:
        """Measure a code by itself; lost labels are wrong."""
        known = known or self.answers("judged", order, code)
        kept = [np.asarray(_kept(known, mask)) for mask in self.masks]
        self.add(mode, 1 - np.array(kept) / code.num_data, order)

    def layouts(self, order: Order) -> dict[str, NeRCC]:
        """Return each layout's code, and ("search") the best, tuned for data in this order."""
        size = self.cell.num_data, self.cell.num_workers
        codes = {name: NeRCC(*size, points=name) for name in SHOWN}
        found = tune(
            self.work.model, [*codes.values()], self.points("choose", order), self.cell.law,
            key=jax.random.key(3), criterion="cross_entropy",
            sampling=Sampling(held_out_share=0.5, held_out_sets=40, grouped=True),
            descent=Descent(self.work.size.steps),
        )  # fmt: skip
        self.log(f"{self.cell.name} {order.name}: the best starts as {SHOWN[found.start]}")
        return {"search": found.code} | codes

    def best_with_surrogate(
        self, codes: Mapping[str, NeRCC], order: Order
    ) -> tuple[Scheme, dict[str, Any]]:
        """Return the code that does best with the student where it was chosen, and its numbers."""
        choices = []
        # What the search picks is often one of the shown ones.
        for name, code in {id(code): (name, code) for name, code in codes.items()}.values():
            surrogate = fit_surrogate(
                self.work.model, self.work.student, code, self.points("choose", order),
                self.cell.law, key=jax.random.key(4), num_sets=40,
            )  # fmt: skip
            scheme = Scheme(code, surrogate, redundancy="code")
            wrong, _ = self.assessed(scheme, "choose", order, self.masks)
            numbers = {"theta": float(surrogate.theta), "kappa": float(surrogate.kappa)}
            choices.append((wrong.mean(), scheme, {"layout": name} | numbers))
        return min(choices, key=lambda choice: choice[0])[1:]

    def judged(self, scheme: Scheme, order: Order) -> tuple[np.ndarray, ...]:
        """Return what is wrong, error probabilities, and what is given out at `WANTED` shares."""
        calibrated = calibrate_error_probability(
            self.work.model, scheme, self.points("calibrate", order), self.cell.law,
            key=jax.random.key(5), num_sets=100,
        )  # fmt: skip
        scheme = dataclasses.replace(scheme, error_probability=calibrated)
        wrong, found = self.assessed(scheme, "judged", order, self.masks)
        score = np.asarray(found.error_probability).reshape(wrong.shape)
        limits = np.array([calibrated.limit(share) for share in WANTED])
        return wrong, score, score[..., None] <= limits

    def tell(self, mode: str, judged: Sequence[np.ndarray], order: Order, **more: Any) -> None:
        """Record a mode as it is, with 5 % by the model, and with as many as are needed."""
        wrong, score, kept_of = judged
        self.add(mode, wrong.mean(-1), order, **more, bins=_bins(score, wrong))
        rest, flat = wrong.copy(), score.reshape(len(score), -1)
        again = np.argsort(-flat, axis=1)[:, : int(SHARE * flat.shape[1])]
        np.put_along_axis(rest.reshape(flat.shape), again, False, axis=1)
        self.add(f"{mode}, {SHARE:.0%} again", rest.mean(-1), order, **more, again=SHARE)
        for share, kept in zip(WANTED, np.moveaxis(kept_of, -1, 0), strict=True):
            given = kept & (score > 0)
            some, whole = (wrong & given).sum(-1), given.sum(-1)
            of_given = None
            if whole.any():  # with half of its 95 % interval
                ratio = float(some.sum() / whole.sum())
                of_given = ratio, Estimate.over((some - ratio * whole) / whole.mean()).half_width
            self.add(
                f"{mode}, at most {share:.1%}", (wrong & kept).mean(-1), order, **more,
                again=float(1 - kept.mean()), promised=share, given=float(given.mean()),
                wrong_of_given=of_given,
            )  # fmt: skip


_kept = eqx.filter_jit(lambda known, mask: known.sums_of(known.decode(mask))["rel_acc"])


def _bins(
    score: Float[np.ndarray, "sets groups num_data"],
    wrong: Bool[np.ndarray, "sets groups num_data"],
) -> list[dict[str, float]]:
    """Promised and observed disagreement in five bins of as many promised wrong ones each."""
    order, flat, bins = np.argsort(score, axis=None), score.ravel(), []
    total = np.cumsum(flat[order]) / max(float(score.sum()), 1e-30)
    for number in range(5):
        chosen = order[(total > number / 5) & (total <= (number + 1) / 5)]
        chosen = chosen[flat[chosen] > 0]
        if len(chosen):
            means = {"promised": flat[chosen].mean(), "observed": wrong.ravel()[chosen].mean()}
            bins.append({"number": len(chosen)} | {key: float(m) for key, m in means.items()})
    return bins


def every_mode(bench: Bench, name: str) -> None:
    """Measure all modes at one (N, K, S)."""
    work, cell = bench.work, bench.cell
    shape = (cell.num_data, cell.num_workers)
    twice = Replication(*shape)
    bench.plain("replication", twice, UNORDERED)
    own, cheap = (
        bench.own("judged", UNORDERED),
        own_answers(work.student, bench.groups("judged", UNORDERED)),
    )
    off = cheap.argmax(-1) != own.argmax(-1)
    lost = np.stack([~np.asarray(twice.recovered(mask)) for mask in bench.masks])
    bench.add("replication, else surrogate", (lost[:, None] & off).mean(-1), UNORDERED)
    bench.add("surrogate alone", np.tile(off.mean(-1), (len(bench.masks), 1)), UNORDERED)
    k, rest = divmod(cell.num_data, cell.num_workers - cell.num_data)
    if not rest and (name, k, MODELS[name]) in list_parity_models():
        models = [work.model, load_parity_model(name, k, MODELS[name])]
        code = Parity(*shape)
        known = record_answers(models, code, bench.points("judged", UNORDERED))
        bench.plain("ParM", code, UNORDERED, known)
    # The paper's points with the best lambda_dec of a grid, by MSE: the decoder alone differs.
    masks, errors = cell.masks(2, work.size.sets), []
    given = bench.answers("choose", UNORDERED, NeRCC(*shape, lambda_dec=0.0))
    for value in GRID:
        code = NeRCC(*shape, lambda_dec=float(value))
        tried = eqx.tree_at(lambda each: each.code, given, code)
        errors.append(np.mean(_losses(tried, masks)))
    published = NeRCC(*shape, lambda_dec=float(GRID[int(np.nanargmin(errors))]))
    orders = [Order("pixels", size) for size in (cell.num_data, 256, 1024)]
    for order in (UNORDERED, *orders, BY_STUDENT):
        bench.plain("published", published, order)
    found = {order: bench.layouts(order) for order in (UNORDERED, orders[-1], BY_STUDENT)}
    for order in (UNORDERED, *orders, BY_STUDENT):
        for layout, code in found.get(order, found[orders[-1]]).items():
            if (layout, order) == ("search", orders[-1]):
                bench.tell(layout, bench.judged(Scheme(code), order), order)
            else:
                bench.plain(layout, code, order)
    for order in (UNORDERED, BY_STUDENT):
        scheme, numbers = bench.best_with_surrogate(found[order], order)
        bench.tell("with surrogate", bench.judged(scheme, order), order, **numbers)


@eqx.filter_jit
def _losses(answers: Answers, masks: Array) -> Array:
    return jax.lax.map(lambda mask: answers.losses(mask[None], "mse")[0], masks)


def promises(bench: Bench) -> None:
    """Measure the error probability of repeated points, with the surrogate and without."""
    work, (num_workers, num_data, _) = bench.work, bench.cell
    swapped = dataclasses.replace(work, calibrate=work.judged, judged=work.calibrate)
    halves = (bench, Bench(swapped, bench.cell, bench.log))
    code = NeRCC(num_data, num_workers, points="repeated", exact=True)
    for order in (UNORDERED, BY_STUDENT):
        scheme, numbers = bench.best_with_surrogate({"repeated": code}, order)
        for mode, each, more in (
            ("repeated", Scheme(code), {}),
            ("with surrogate", scheme, numbers),
        ):
            both = [half.judged(each, order) for half in halves]
            judged = [np.concatenate(part, axis=1) for part in zip(*both, strict=True)]
            bench.tell(mode, judged, order, **more)


# --- learners from past answers


def learn(bench: Bench, logits: Network) -> dict[str, Learner]:
    """Return a learner that goes by pixels, and one of what the student leaves over.

    They learn answers by which the other modes are chosen. Features of a group have one unit: how
    far a principal component spreads is its weight.
    """
    past = bench.points("choose", UNORDERED)[:PAST]
    answers = bench.work.answers(past)
    pixels, outputs = principal_components(past, COMPONENTS), answers.shape[1]

    def both(x: Any) -> Array:
        return jnp.concatenate([logits(x), pixels(x)], axis=1)

    found = {}
    for name, features, prior, groups in (
        ("alone", pixels, None, [0] * COMPONENTS),
        ("beside", both, bench.work.student, [0] * outputs + [1] * COMPONENTS),
    ):
        z = np.concatenate([np.asarray(features(part)) for part in np.array_split(past, 8)])
        names = np.asarray(groups)
        unit = np.sqrt([z[:, names == each].var(axis=0).mean() for each in names])
        kernel = Kernel(centre=z.mean(axis=0), unit=unit, widths=[float(np.sqrt(z.shape[1]))])
        found[name] = fit_learner(
            past, answers, capacity=1024, features=features, prior=prior, kernel=kernel,
            tuning=LearnerTuning(widths=groups, rows=256),
        )  # fmt: skip
    return found


def learners(bench: Bench, known: Mapping[str, Learner]) -> None:
    """Measure the learner ordered by pixels, and the student with and without one, in two orders.

    The scheme that each is part of is chosen on images that calibrate error probabilities, which no
    learner knows. None are judged.
    """
    student = bench.work.student
    modes: list[tuple[str, list[Any], Order]] = [
        ("learner", [known["alone"]], Order("pixels", 1024))
    ]
    for order in (UNORDERED, BY_STUDENT):
        modes.append(("student", [student], order))
        modes.append(("student and learner", [student, known["beside"]], order))
    num_workers, num_data, _ = bench.cell
    for mode, candidates, order in modes:
        schemes: dict[str, Scheme] = {}
        for layout in ("repeated", "interleaved"):  # with the candidates mixed as does best
            code = NeRCC(num_data, num_workers, points=layout)
            surrogate = fit_surrogate(
                bench.work.model, candidates, code, bench.points("calibrate", order),
                bench.cell.law, key=jax.random.key(4), num_sets=bench.work.size.sets,
            )  # fmt: skip
            schemes[layout] = Scheme(code, surrogate, redundancy="code")
        for each in candidates:
            if isinstance(each, Learner):
                code = NeRCC(num_data, num_workers, points="interleaved")
                uncertain = Scheme(code, each, redundancy="uncertain")
                schemes["copies of the most uncertain"] = uncertain
        masks = bench.cell.masks(6, bench.work.size.sets)
        chosen = {
            name: bench.assessed(scheme, "calibrate", order, masks)[0].mean()
            for name, scheme in schemes.items()
        }
        name = min(chosen, key=lambda each: chosen[each])
        wrong, _ = bench.assessed(schemes[name], "judged", order, bench.masks)
        bench.log(f"{bench.cell.name} {mode}, {order.name}: {name}, {100 * wrong.mean():.2f} %")
        bench.add(mode, wrong.mean(axis=-1), order, layout=name)


# --- copies


class NearestAnswers(AbstractGroupPrior):
    """The answer to the nearest of the answered coded data points."""

    distance: Float[Array, "groups num_data num_workers"]
    isolation: Float[Array, "groups num_data"]
    form: Any = eqx.field(static=True)

    def condition(self, y: Array, available: Array) -> SurrogatePredictions:
        distance = jnp.where(available[:, None], self.distance, jnp.inf)
        nearest = jnp.argmin(distance, axis=2)[..., None]
        own = jnp.take_along_axis(y, nearest, axis=1)
        coded = jnp.zeros_like(y)
        return SurrogatePredictions(own=own, coded=coded, form=self.form, deviation=self.isolation)


class Nearest(AbstractSurrogate):
    """Answers as the nearest answered data point, by pixels, whose distance is its deviation."""

    form: Any = eqx.field(static=True)
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


def dealt(images: int) -> np.ndarray:
    """Return the images in the order in which they are dealt into groups, several times."""
    return np.concatenate([np.random.default_rng(n).permutation(images) for n in range(DEALS)])


def copies(bench: Bench) -> None:
    """Measure copies and codes at one (N, K, S), each group under straggler sets of its own.

    Images are what is drawn at random: the wrong labels of each are its mean over deals and sets.
    """
    num_workers, num_data, stragglers = bench.cell
    student, model = Surrogate(bench.work.student, kappa=jnp.inf), bench.work.model
    twice, nercc = Replication(num_data, num_workers), NeRCC(num_data, num_workers)
    nearest = Nearest(form=bench.answers("judged", UNORDERED, twice).form)
    placed = NeRCC(num_data, num_workers, points="repeated", exact=True)
    choose = bench.points("choose", UNORDERED)
    learned = [learn_decoder(model, each, choose, key=jax.random.key(7)) for each in (twice, nercc)]
    share = stragglers / num_workers
    uncertain: Any = {"redundancy": "uncertain", "straggler_share": share}
    schemes = {
        "copies": Scheme(twice),
        "copies, learned decoder": Scheme(learned[0]),
        "NeRCC, learned decoder": Scheme(learned[1]),
        "copies, else the nearest": Scheme(twice, nearest),
        "copies of the isolated, else the nearest": Scheme(placed, nearest, **uncertain),
        "copies, else the student": Scheme(twice, student),
        "copies by the student's doubt": Scheme(placed, student, **uncertain),
    }
    groups = len(bench.groups("judged", UNORDERED))
    masks = np.tile(np.arange(num_workers) >= stragglers, (bench.work.size.sets, groups, 1))
    masks = np.random.default_rng(8).permuted(masks, axis=2)
    wrong, which = {}, dealt(groups * num_data // DEALS)
    for name, scheme in schemes.items():
        each, _ = bench.assessed(scheme, "judged", UNORDERED, masks)
        wrong[name] = np.bincount(which, each.mean(axis=0).ravel()) / DEALS
        bench.add(name, wrong[name], UNORDERED)
    before, after = list(wrong.values())[-2:]
    ratio = float(after.mean() / before.mean())
    half = Estimate.over((after - ratio * before) / before.mean()).half_width
    bench.rows[-1] |= {"ratio": ratio, "ratio_half_width": half}
