"""Functions that are smooth in their inputs: what a learner from past answers is worth to a code.

For eight real functions, four cells of workers and stragglers: codes, copies with what fills their
gaps, a learner with and without redundancy, and what is picked on other data. Judged by RMSE
relative to the outputs' spread, by how many errors are within 90 % bars, and by recall@10 for
embeddings; over ten draws of past answers, inputs and stragglers, with 95 % intervals. CIFAR-10
needs its parquet file (`models/data.py` says where).
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.interpolate
from jaxtyping import Array, ArrayLike, Bool, Float
from report import Report, environment, show
from simulators import EMBEDDINGS, NAMES, SIMULATORS, Case, CheapModel, load
from workloads import Recorded, groups_of, in_batches

from nercc_jax import AbstractCode, Berrut, NeRCC, Scheme, fit_surrogate
from nercc_jax.codes import decode_groups
from nercc_jax.inference import order_points
from nercc_jax.schemes import calibrate_error_bars
from nercc_jax.stragglers import AbstractStragglers, ContiguousStragglers, ExactStragglers
from nercc_jax.surrogates import (
    AbstractSurrogate,
    Kernel,
    Learner,
    LearnerTuning,
    fit_learner,
)

Masks = Bool[Any, "sets groups num_workers"]

NUM_DATA = 20
COVERAGE = 0.9
LAMBDAS = (0.0, 1e-9, 1e-6, 1e-4, 1e-2)  # of the decoder, for what is tuned
LAYOUTS = ("interleaved", "chebyshev", "mixed:0.5")
# A width for each of a few inputs, one for all pixels; a straight line beside it.
WIDE = 16
# Inputs and outputs of simulators are filled up with zeros to one size, so that all share compiled
# programs. Zeros change no distance, and no error by the outputs' spread.
OUTPUTS = 40
BARS = 10_000  # the first seed of rows that error bars are made of
SWEEPS = 100  # the first seed of sweeps: of none that points were tried out on
PUBLISHED, TUNED = "NeRCC, published", "NeRCC, tuned"
FILLED = ("copies, else the mean", "copies, else the nearest", "copies, else a GP over the group")
ALONE = "learner, no redundancy"
RANDOM, UNCERTAIN = "learner, copies of random points", "learner, copies of the most uncertain"
CODED = tuple(f"learner, {layout}" for layout in LAYOUTS)
MIXED = "learner and code, as fit_surrogate mixes them"
# The same where a cheap model is there: what fills lost copies, and what a learner knows.
WITH = ", with a cheap model"
HELPED = (ALONE, RANDOM, UNCERTAIN, CODED[0])
LAWS: dict[str, tuple[int, AbstractStragglers]] = {
    "(24, 20, 2)": (24, ExactStragglers(2)),
    "(24, 20, 4)": (24, ExactStragglers(4)),
    "(30, 20, 5)": (30, ExactStragglers(5)),
    "(30, 20, rack of 6)": (30, ContiguousStragglers(6)),
}
FIRST = 24  # workers of the first cell


@dataclasses.dataclass(frozen=True)
class Size:
    """The amount that is run.

    It counts past answers, groups that are judged, straggler sets that each of them meets, and
    draws of all of these for choosing and for judging; sweeps of one parameter, as many for each.
    """

    history: int = 120
    groups: int = 8
    sets: int = 6
    chosen: int = 3
    judged: int = 10
    sweeps: int = 40


@dataclasses.dataclass(frozen=True)
class Draw:
    """Past pairs and points to be judged, with the function's own outputs.

    `order` makes a short path of the points: what is coded, where an order helps, is coded in it.
    """

    past: np.ndarray
    past_outputs: Float[Array, "past m"]
    x: np.ndarray
    own: Float[Array, "points m"]
    order: np.ndarray
    others: Float[Array, "others m"] | None
    seed: int

    def masks(self, cell: str, sets: int) -> Masks:
        """Return masks in which each group has its own stragglers."""
        groups, (workers, law) = len(self.x) // NUM_DATA, LAWS[cell]
        keys = jax.random.split(jax.random.key(self.seed), (sets, groups))
        return _available(law, keys, workers)


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Scores of a system on one draw.

    They are the RMSE over the outputs' spread, of the uncertain ones the share within their bars
    and their number, and recall@10.
    """

    rmse: float
    covered: float | None = None
    uncertain: int = 0
    recall: float | None = None


def run(
    report: Report,
    only: tuple[str, ...] = NAMES,
    cells: tuple[str, ...] = (*LAWS,),
    draws: int = Size.judged,
    sweeps: bool = False,
) -> None:
    """Measure some functions in some cells, and sweeps of simulators; written draw by draw.

    Options:
        only: Functions.
        cells: Of workers and stragglers.
        draws: To judge by.
        sweeps: Sweeps alone.
    """
    size = Size(groups=2, sets=2, chosen=1, judged=2, sweeps=2) if report.quick else Size()
    whole = cells == (*LAWS,)
    if report.quick:  # each function and each cell has programs of its own to compile
        only, cells = only[:1], cells[:1]
    size = dataclasses.replace(size, judged=0 if sweeps else min(draws, size.judged))
    for name in only:
        bench = Bench(load(name, report.data_dir), size, report.log)

        def keep(news: Mapping[str, Any], bench: Bench = bench) -> None:
            results = report.read()
            summary: dict[str, Any] = results.setdefault(bench.case.name, {})
            summary |= {"about": bench.case.about, "environment": environment(), **news}
            report.write(results)

        start = time.perf_counter()
        for cell in () if sweeps else cells:
            bench.prepare(cell)
            *_, chosen = bench.measure(cell, judging=False)
            # The scheme with the least error where things are chosen; none of the rivals.
            schemes = [each for each in chosen if each.startswith("learner")]
            picked = min(schemes, key=lambda each: np.mean([n.rmse for n in chosen[each]]))
            judged: dict[str, list[Numbers]] = {}
            for judged in bench.measure(cell, judging=True, bars={ALONE, picked}):
                known = report.read().get(bench.case.name, {}).get("cells", {})
                summary: dict[str, Any] = {"picked": picked, "chosen": bench.chosen()}
                summary["systems"] = {each: columns(rows) for each, rows in judged.items()}
                spent = round(time.perf_counter() - start, 1)
                summary |= {"seconds": spent, "environment": environment()}
                keep({"size": dataclasses.asdict(size), "cells": known | {cell: summary}})
            start = time.perf_counter()
            report.log(f"{name} {cell}: {picked}")
            show({"system": each, "RMSE": np.mean([row.rmse for row in rows])}
                 for each, rows in judged.items())  # fmt: skip
        if name in SIMULATORS and whole:
            keep({"sweep": sweep(bench) | {"draws": size.sweeps}})
        jax.clear_caches()  # XLA maps memory for every program, and a process has a limit


def columns(rows: list[Numbers]) -> dict[str, list[Any]]:
    """Return a list for each number, with an entry for each draw; absent ones are left out."""
    found = {name: [getattr(row, name) for row in rows] for name in vars(rows[0])}
    return {name: values for name, values in found.items() if any(values)}


class Bench:
    """One function's measurements. What is chosen is chosen on draws of their own."""

    def __init__(self, case: Case, size: Size, log: Callable[[str], Any]):
        self.case, self.size, self.log = case, size, log
        width = case.inputs(False, 0, 1).shape[1]
        self.function, self.cheap = filled_up(case.function, width), None
        if case.cheap is not None:  # its features are as many as they are
            prior = None if case.cheap.prior is None else filled_up(case.cheap.prior, width)
            features = filled_up(case.cheap.features, width, 0)
            self.cheap: CheapModel | None = dataclasses.replace(
                case.cheap, features=features, prior=prior
            )
        self._draws = {
            judging: [self._draw(judging, seed) for seed in range(number)]
            for judging, number in ((False, size.chosen), (True, size.judged))
        }
        self._fitted: dict[tuple[int, bool], Learner] = {}
        # Rivals that fill lost copies have the kernel of the first draw, with a cheap model or not.
        helped = (False,) if self.cheap is None else (False, True)
        first = self._draws[False][0]
        self._kernels = {each: self.learner(first, each).kernel for each in helped}
        self._codes: dict[str, NeRCC] = {}
        self._mixture: AbstractSurrogate | None = None
        self._recorded = Recorded(self.function)

    def draws(self, judging: bool) -> list[Draw]:
        return self._draws[judging]

    def learner(self, draw: Draw, helped: bool = False) -> Learner:
        """Return the learner of a draw's past answers, with a cheap model's help or without.

        There is a width for each of a few inputs, or those that a cheap model asks for; the same
        for all schemes and cells.
        """
        key = draw.seed, helped
        if key not in self._fitted:
            few = self.inputs(False, 0, 1).shape[1] <= WIDE
            known: Any = self.cheap if helped else CheapModel(self.case.features, None)  # pyright: ignore[reportArgumentType]
            widths = known.widths or ("each" if few else "one")
            self._fitted[key] = fit_learner(
                draw.past, draw.past_outputs, capacity=self.size.history,
                features=known.features, prior=known.prior, tuning=LearnerTuning(widths=widths),
            )  # fmt: skip
        return self._fitted[key]

    def measure(
        self, cell: str, *, judging: bool, bars: Collection[str] = ()
    ) -> Iterator[dict[str, list[Numbers]]]:
        """Yield, after each draw, the rows of all systems in one cell.

        Those in `bars` are judged by their error bars, too. Rivals are judged alone.
        """
        found: dict[str, list[Numbers]] = {}
        for draw in self.draws(judging):
            masks = draw.masks(cell, self.size.sets)
            systems = [*self._rivals(cell, draw, masks)] if judging else []
            for name, numbers in (*systems, *self._learning(cell, draw, masks, bars)):
                found.setdefault(name, []).append(numbers)
            yield found

    def prepare(self, cell: str) -> None:
        """Find what is chosen for a cell: NeRCC's lambda and layout, and how to mix.

        The mixture is the same for all cells, found in the first.
        """
        self._recorded = Recorded(self.function)  # what another cell asked takes memory
        workers, _ = LAWS[cell]
        for name, layouts, decode in (
            (PUBLISHED, ("chebyshev",), self.decode_plain),
            (TUNED, (*LAYOUTS, "repeated"), self.decode_ordered),
        ):
            codes = [_nercc(workers, layout, value) for layout in layouts for value in LAMBDAS]
            errors = [
                np.mean([
                    relative_error(decode(code, draw, draw.masks(cell, self.size.sets)), draw)
                    for draw in self.draws(False)
                ])
                for code in codes
            ]  # fmt: skip
            self._codes[name] = codes[int(np.argmin(np.nan_to_num(errors, nan=np.inf)))]
        if self._mixture is None:
            draw, (first, law) = self.draws(False)[0], next(iter(LAWS.values()))
            self._mixture = fit_surrogate(
                self.function, self.learner(draw), _nercc(first, LAYOUTS[0]), draw.x[draw.order],
                {"law": law}, key=jax.random.key(0), num_sets=8, criterion="mse",
            )  # fmt: skip

    def chosen(self) -> dict[str, Any]:
        """Return what was chosen in the cell that was prepared last, in numbers."""
        assert self._mixture is not None
        mixed = {"theta": float(self._mixture.theta), "kappa": float(self._mixture.kappa)}
        codes = {name: {"lambda_dec": float(code.lambda_dec)} for name, code in self._codes.items()}
        return codes | {MIXED: mixed}

    def decode(
        self, scheme: Scheme, draw: Draw, masks: Masks, *, ordered: bool = False
    ) -> tuple[Float[Array, "sets points m"], Float[Array, "sets points"]]:
        """Return predictions and deviations by a scheme under each set; workers answer once."""
        order = draw.order if ordered else np.arange(len(draw.x))
        found, home = self._recorded.assess(scheme, draw.x[order], masks), np.argsort(order)
        return found.predictions[:, home], found.deviation[:, home]

    def decode_plain(self, code: AbstractCode, draw: Draw, masks: Masks) -> Array:
        """Return the predictions of a code by itself, as the points come."""
        y = self._recorded.coded(code, groups_of(draw.x, NUM_DATA))
        found = _decode(code, jnp.asarray(y), masks)
        return found.reshape(len(masks), -1, found.shape[-1])

    def decode_ordered(self, code: AbstractCode, draw: Draw, masks: Masks) -> Array:
        """Return the predictions of a code by itself, with the points in their order."""
        there = dataclasses.replace(draw, x=draw.x[draw.order])
        return self.decode_plain(code, there, masks)[:, np.argsort(draw.order)]

    def _draw(self, judging: bool, seed: int) -> Draw:
        size, more = self.size, 1000 if self.case.name in EMBEDDINGS else 0
        groups = int(min(size.groups, (self.case.least - size.history) // NUM_DATA))
        ends = np.cumsum([size.history, groups * NUM_DATA, more])
        past, x, others, _ = np.split(self.inputs(judging, seed, int(ends[-1])), ends)
        order, found = np.asarray(order_points(x, NUM_DATA)), self.outputs(others) if more else None
        own, seed = self.outputs(x), 2 * seed + judging
        return Draw(past, self.outputs(past), x, own, order, found, seed)

    def inputs(self, judging: bool, seed: int, count: int) -> np.ndarray:
        """Return inputs of the case, filled up."""
        x = self.case.inputs(judging, seed, count)
        return np.pad(x, ((0, 0), (0, max(WIDE - x.shape[1], 0))))

    def outputs(self, x: Any) -> Float[Array, "points m"]:
        """Return the function's outputs, computed in batches of one size."""
        return jnp.asarray(in_batches(self.function, x))

    def _rivals(self, cell: str, draw: Draw, masks: Masks) -> Iterator[tuple[str, Numbers]]:
        workers, _ = LAWS[cell]
        x, own = jnp.asarray(draw.x), draw.own
        found = {
            "BACC": self.decode_plain(_bacc(workers), draw, masks),
            PUBLISHED: self.decode_plain(self._codes[PUBLISHED], draw, masks),
            TUNED: self.decode_ordered(self._codes[TUNED], draw, masks),
        }
        # The data points with an answered copy, if all have as many copies.
        held = np.argmax(np.asarray(_nercc(workers, "repeated").encoder_matrix()), axis=1)
        holds = held[:, None] == np.arange(NUM_DATA)
        answered = jnp.asarray(np.any(holds & np.asarray(masks)[..., None], axis=-2))
        filled = lost_copies(x, own, answered, self._kernels[False], self.case.features)
        found |= dict(zip(FILLED, filled, strict=True))
        if self.cheap is not None:  # what it says where copies are lost, or its features
            word = jnp.zeros_like(own) if self.cheap.prior is None else self.cheap.prior(x)
            if self.cheap.prior is not None:
                seen = answered.reshape(len(answered), -1, 1)
                found["copies, else the cheap model"] = jnp.where(seen, own, word)
            features = self.cheap.features(x)
            filled = lost_copies(features, own - word, answered, self._kernels[True], None)
            for name, each in zip(FILLED[1:], filled[1:], strict=True):
                found[name + WITH] = each + word
        for name, predictions in found.items():
            yield name, numbers_of(predictions, draw)

    def _learning(
        self, cell: str, draw: Draw, masks: Masks, bars: Collection[str]
    ) -> Iterator[tuple[str, Numbers]]:
        (workers, law), learner = LAWS[cell], self.learner(draw)
        assert self._mixture is not None
        mixture = self._mixture.theta, self._mixture.kappa
        mixed = eqx.tree_at(lambda one: (one.theta, one.kappa), learner, mixture)
        plain: dict[str, Any] = {"redundancy": "code"}
        copied = _nercc(workers, "interleaved")
        schemes = {
            ALONE: Scheme(_nercc(NUM_DATA, "interleaved"), learner, **plain),
            RANDOM: Scheme(_nercc(workers, "repeated"), learner, **plain),
            UNCERTAIN: Scheme(copied, learner, redundancy="uncertain"),
            **{
                name: Scheme(_nercc(workers, layout), learner, **plain)
                for name, layout in zip(CODED, LAYOUTS, strict=True)
            },
            MIXED: Scheme(_nercc(workers, LAYOUTS[0]), mixed, **plain),
        }
        if self.cheap is not None:
            helped = self.learner(draw, True)
            schemes |= {
                name + WITH: eqx.tree_at(lambda one: one.surrogate, schemes[name], helped)
                for name in HELPED
            }
        for name, scheme in schemes.items():
            ordered = name.removesuffix(WITH) in (*CODED, MIXED)
            responded = masks[..., : scheme.code.num_workers]
            predictions, deviation = self.decode(scheme, draw, responded, ordered=ordered)
            bar = None
            if name in bars:  # by as many rows again as the learner knows
                more = self.inputs(False, BARS + draw.seed, len(draw.past))
                order = order_points(more, NUM_DATA) if ordered else np.arange(len(more))
                bar = calibrate_error_bars(
                    self.function, scheme, more[order], {"law": law},
                    key=jax.random.key(draw.seed),
                )(deviation, COVERAGE)  # fmt: skip
            yield name, numbers_of(predictions, draw, bar)


def lost_copies(
    x: ArrayLike,
    own: Float[ArrayLike, "points m"],
    answered: Bool[ArrayLike, "sets groups num_data"],
    kernel: Kernel,
    features: Callable[[Array], Array] | None,
) -> tuple[Array, ...]:
    """Lost copies filled in by their groups' answers: the mean, the nearest, a Gaussian process."""
    x, own, answered = (np.asarray(each) for each in (x, own, answered))
    x, own = (each.reshape(-1, NUM_DATA, each.shape[-1]) for each in (x, own))
    start = fit_learner(
        x[0, :0], own[0, :0], capacity=NUM_DATA, features=features, kernel=kernel, tuning=None
    )
    filled = np.empty((3, *answered.shape, own.shape[-1]), own.dtype)
    for place in np.ndindex(answered.shape[:2]):
        points, outputs, seen = x[place[1]], own[place[1]], answered[place]
        square = np.sum((points[:, None] - points) ** 2, axis=-1)
        nearest = outputs[np.argmin(np.where(seen, square, np.inf), axis=1)]
        process = start.update(points[seen], outputs[seen]).predict(points)[0]
        mean = outputs.mean(axis=0, where=seen[:, None])
        for way, summary in enumerate((mean, nearest, process)):
            filled[way, *place] = np.where(seen[:, None], outputs, summary)
    return tuple(map(jnp.asarray, filled.reshape(3, len(answered), -1, own.shape[-1])))


def filled_up(
    function: Callable[[Array], Array], width: int, outputs: int = OUTPUTS
) -> Callable[[Array], Array]:
    """Compile a function as it is measured, with inputs and outputs filled up."""

    @eqx.filter_jit
    def filled(x: Float[Array, "batch wide"]) -> Float[Array, "batch m"]:
        y = function(x[:, :width])
        return jnp.pad(y, ((0, 0), (0, max(outputs - y.shape[1], 0))))

    return filled


@eqx.filter_jit
def _available(law: AbstractStragglers, keys: Array, num_workers: int) -> Masks:
    return jax.vmap(jax.vmap(lambda key: law.available(key, num_workers)))(keys)


@functools.cache  # with a code, its matrices are kept
def _nercc(num_workers: int, layout: str, lambda_dec: float = 0.0) -> NeRCC:
    return NeRCC(NUM_DATA, num_workers, points=layout, lambda_dec=lambda_dec)


@functools.cache
def _bacc(num_workers: int) -> Berrut:
    return Berrut(NUM_DATA, num_workers)


@eqx.filter_jit
def _decode(code: AbstractCode, y: Array, masks: Array) -> Array:
    return jax.lax.map(lambda mask: decode_groups(code, y, mask).predictions, masks)


def relative_error(predictions: Float[Any, "*sets points m"], draw: Draw) -> float:
    """Return the RMSE over the spread of the outputs, over all sets, points and outputs."""
    own = np.asarray(draw.own, np.float64)
    error = np.mean((np.asarray(predictions, np.float64) - own) ** 2)
    return float(np.sqrt(error / np.mean((own - own.mean(axis=0)) ** 2)))


def numbers_of(
    predictions: Float[Array, "sets points m"],
    draw: Draw,
    bar: Float[Array, "sets points"] | None = None,
) -> Numbers:
    """Return a system's scores, with bars if it has some."""
    found = Numbers(relative_error(predictions, draw))
    if bar is not None:
        error = jnp.sqrt(jnp.mean((predictions - draw.own) ** 2, axis=-1))
        within, uncertain = np.asarray(error <= bar), np.asarray(bar) > 0
        share = float(np.mean(within[uncertain])) if uncertain.any() else None
        found = dataclasses.replace(found, covered=share, uncertain=int(uncertain.sum()))
    if draw.others is not None:
        share = float(recall(predictions, draw.own, draw.others))
        found = dataclasses.replace(found, recall=share)
    return found


@jax.jit
def recall(predictions: Array, own: Array, others: Array) -> Array:
    """Return recall@10: the share of each embedding's 10 nearest others that it finds decoded."""

    def nearest(points: Array) -> Array:
        product = jnp.matmul(points, others.T, precision=jax.lax.Precision.HIGHEST)
        return jax.lax.top_k(2 * product - jnp.sum(others**2, axis=1), 10)[1]

    wanted = nearest(own)
    shares = jax.lax.map(
        lambda each: jnp.mean(jnp.any(nearest(each)[:, :, None] == wanted[:, None], axis=1)),
        predictions,
    )
    return jnp.mean(shares)


# --- sweeps of one parameter


def sweep(bench: Bench) -> dict[str, Any]:
    """Return the RMSE of sweeps of the first parameter in 20 steps, draw by draw.

    Four of 24 calls are redundant, and two are lost: a code with fixed points, and SciPy's cubic
    spline along the parameter through the rows that came. At the ends of a sweep what is lost has
    neighbours on one side only, so the redundant calls are copies there, or rows between the last
    two. The picked way is chosen on as many other sweeps.
    """
    fixed = Scheme(NeRCC(NUM_DATA, FIRST, points="interleaved", lambda_dec=0.0))
    ends = {
        "the last two copied": ((0, 0), (1, 1)),
        "the last copied twice": ((0, 0), (0, 0)),
        "the last copied, and one halfway": ((0, 0), (0, 1)),
    }  # each of two further calls at an end is halfway between these rows from it
    found: dict[bool, dict[str, list[float]]] = {False: {}, True: {}}
    for judging, of in found.items():
        for seed in range(SWEEPS, SWEEPS + bench.size.sweeps):
            x = bench.inputs(judging, seed, bench.size.groups * NUM_DATA)
            value = np.sort(x[:, 0].reshape(-1, NUM_DATA), axis=1)
            others = np.tile(x.mean(axis=0), (value.size, 1)).astype(np.float32)

            def outputs(value: np.ndarray, others: np.ndarray = others) -> np.ndarray:
                return np.asarray(
                    bench.outputs(np.column_stack([value.ravel(), others[: value.size, 1:]]))
                )

            own = outputs(value)
            x = np.column_stack([value.ravel(), others[:, 1:]]).astype(np.float32)
            draw = Draw(
                x[:0],
                jnp.asarray(own[:0]),
                x,
                jnp.asarray(own),
                np.arange(len(x)),
                None,
                2 * seed + judging,
            )
            masks = draw.masks(next(iter(LAWS)), bench.size.sets)
            grouped = own.reshape(*value.shape, -1)
            spread = np.mean((grouped - grouped.mean(axis=1, keepdims=True)) ** 2)
            error = np.mean((np.asarray(bench.decode(fixed, draw, masks)[0]) - own) ** 2)
            of.setdefault("fixed points", []).append(float(np.sqrt(error / spread)))
            for name, pairs in ends.items():
                pairs = [*pairs, *((-1 - a, -1 - b) for a, b in pairs)]
                more = np.stack([(value[:, a] + value[:, b]) / 2 for a, b in pairs], axis=1)
                sent, y = np.hstack([value, more]), outputs(more).reshape(*more.shape, -1)
                y, squares = np.concatenate([grouped, y], axis=1), []
                for mask, group in itertools.product(np.asarray(masks), range(len(value))):
                    came, first = np.unique(sent[group, mask[group]], return_index=True)
                    spline = scipy.interpolate.CubicSpline(came, y[group, mask[group]][first])
                    squares.append(np.mean((spline(value[group]) - grouped[group]) ** 2))
                error = float(np.sqrt(np.mean(squares) / spread))
                of.setdefault(f"SciPy's spline, {name}", []).append(error)
    picked = min(found[False], key=lambda name: np.mean(found[False][name]))
    return {"picked": picked, "rmse": found[True]}
