"""Every system that functions.py measures of one function, on the same inputs and stragglers."""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _functions_cases import EMBEDDINGS, Case, CheapModel
from _functions_rivals import NUM_DATA, lost_copies
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from nercc_jax import AbstractCode, Berrut, NeRCC, Scheme, fit_surrogate
from nercc_jax.codes import encode_groups
from nercc_jax.codes._decoding import decode_vectors
from nercc_jax.codes._kept import CachedMatrices, known_encoder
from nercc_jax.inference import order_points
from nercc_jax.risk import ErrorBars
from nercc_jax.schemes import AssessedPredictions, cross_validate_error_bars
from nercc_jax.stragglers import AbstractStragglers, ContiguousStragglers, ExactStragglers
from nercc_jax.surrogates import AbstractSurrogate, Learner, LearnerTuning, fit_learner

Masks = Bool[Array, "sets groups num_workers"]
Told = tuple[Float[Array, "sets points m"], Float[Array, "sets points"]]

COVERAGE = 0.9
LAMBDAS = (0.0, 1e-9, 1e-6, 1e-4, 1e-2)  # of the decoder, for what is tuned
LAYOUTS = ("interleaved", "chebyshev", "mixed:0.5")
# A width for each of a few inputs, one for all pixels; a straight line beside it.
WIDE = 16
# Inputs and outputs of simulators are filled up with zeros to one size, so that all share compiled
# programs. Zeros change no distance, and no error by the outputs' spread.
OUTPUTS = 40
PUBLISHED = "NeRCC, published"
RIVALS = (
    "BACC",
    PUBLISHED,
    "NeRCC, tuned",
    "NeRCC, following points",
    "copies, else the mean",
    "copies, else the nearest",
    "copies, else a GP over the group",
)
ALONE = "learner, no redundancy"
RANDOM, UNCERTAIN = "learner, copies of random points", "learner, copies of the most uncertain"
CODED = tuple(f"learner, {layout}" for layout in LAYOUTS)
MIXED = "learner and code, as fit_surrogate mixes them"
LEARNERS = (ALONE, RANDOM, UNCERTAIN, *CODED, MIXED)
# The same where a cheap model is there: what fills lost copies, and what a learner knows.
WITH = ", with a cheap model"
CHEAP = "copies, else the cheap model"
HELPED_RIVALS = (CHEAP, *(name + WITH for name in RIVALS[5:]))
HELPED = tuple(name + WITH for name in (ALONE, RANDOM, UNCERTAIN, CODED[0]))


@dataclasses.dataclass(frozen=True)
class Cell:
    name: str
    num_workers: int
    law: AbstractStragglers


CELLS = (
    Cell("(24, 20, 2)", 24, ExactStragglers(2)),
    Cell("(24, 20, 4)", 24, ExactStragglers(4)),
    Cell("(30, 20, 5)", 30, ExactStragglers(5)),
    Cell("(30, 20, rack of 6)", 30, ContiguousStragglers(6)),
)


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

    def masks(self, cell: Cell, sets: int) -> Masks:
        """Return masks in which each group has its own stragglers."""
        groups = len(self.x) // NUM_DATA
        keys = jax.random.split(jax.random.key(self.seed), (sets, groups))
        return _available(cell.law, keys, cell.num_workers)


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


class Bench:
    """One function's measurements. What is chosen is chosen on draws of their own."""

    def __init__(self, case: Case, size: Size, log: Callable[[str], Any]):
        self.case, self.size, self.log = case, size, log
        width = case.inputs(False, 0, 1).shape[1]
        self.function = filled_up(case.function, width)
        self._choosing = [self._draw(False, seed) for seed in range(size.chosen)]
        self._judging = [self._draw(True, seed) for seed in range(size.judged)]
        self.cheap = None if case.cheap is None else cheap_filled_up(case.cheap, width)
        self._fitted: dict[tuple[bytes, bool], Learner] = {}
        # Rivals that fill lost copies have the kernel of the first draw, with a cheap model or not.
        helped = (False,) if self.cheap is None else (False, True)
        self._kernels = {each: self.learner(self._choosing[0], each).kernel for each in helped}
        self._codes: dict[str, NeRCC] = {}
        self._mixture: AbstractSurrogate | None = None
        self._said: dict[bytes, Array] = {}

    def draws(self, judging: bool | None) -> list[Draw]:
        both = {True: self._judging, False: self._choosing}
        return [*self._choosing, *self._judging] if judging is None else both[judging]

    def fit(self, x: ArrayLike, y: ArrayLike, helped: bool = False) -> Learner:
        """Fit a learner to past answers, with the help of a cheap model or without.

        There is a width for each of a few inputs, or those that a cheap model asks for; the same
        for all schemes and cells.
        """
        key = hashlib.sha256(np.asarray(x).tobytes()).digest(), helped
        if key not in self._fitted:
            self._fitted[key] = self._fit(x, y, helped)
        return self._fitted[key]

    def _fit(self, x: ArrayLike, y: ArrayLike, helped: bool) -> Learner:
        few = self.inputs(False, 0, 1).shape[1] <= WIDE
        features, prior, widths = self.case.features, None, "each" if few else "one"
        if helped:
            assert self.cheap is not None
            features, prior, widths = self.cheap.features, self.cheap.prior, self.cheap.widths
        return fit_learner(
            x,
            y,
            capacity=self.size.history,
            features=features,
            prior=prior,
            tuning=LearnerTuning(widths=widths),
        )

    def learner(self, draw: Draw, helped: bool = False) -> Learner:
        """Return the learner of a draw's past answers."""
        return self.fit(draw.past, draw.past_outputs, helped)

    def measure(
        self, cell: Cell, *, judging: bool, rivals: bool = True, bars: Collection[str] = ()
    ) -> Iterator[dict[str, list[Numbers]]]:
        """Yield a row for each draw, of all systems in one cell or of the learners alone.

        Those in `bars` are judged by their error bars, too.
        """
        found: dict[str, list[Numbers]] = {}
        for draw in self.draws(judging):
            masks = draw.masks(cell, self.size.sets)
            systems = [self._rivals(cell, draw, masks)] if rivals else []
            systems += [] if self.cheap is None else [self._helped_rivals(cell, draw, masks)]
            for name, numbers in itertools.chain(*systems, self._learning(cell, draw, masks, bars)):
                found.setdefault(name, []).append(numbers)
            yield found

    def prepare(self, cell: Cell, *, rivals: bool = True) -> None:
        """Find what is chosen for a cell: NeRCC's lambda and layout, and how to mix.

        The mixture is the same for all cells, found in the first.
        """
        self._said.clear()
        if rivals:
            self._choose_codes(cell)
        if self._mixture is None:
            draw, first = self._choosing[0], CELLS[0]
            self._mixture = fit_surrogate(
                self.function,
                self.learner(draw),
                _nercc(first.num_workers, LAYOUTS[0]),
                draw.x[draw.order],
                {"law": first.law},
                key=jax.random.key(0),
                num_sets=8,
                criterion="mse",
            )

    def chosen(self) -> dict[str, Any]:
        """Return what was chosen in the cell that was prepared last, in numbers."""
        assert self._mixture is not None
        summary = {
            name: {"lambda_dec": float(code.lambda_dec)} for name, code in self._codes.items()
        }
        mixed = {"theta": float(self._mixture.theta), "kappa": float(self._mixture.kappa)}
        return summary | {MIXED: mixed}

    def decode(self, scheme: Scheme, draw: Draw, masks: Masks, *, ordered: bool = False) -> Told:
        """Decode the points by a scheme under each straggler set; workers answer once."""
        order = draw.order if ordered else np.arange(len(draw.x))
        known, x = CachedMatrices(known_encoder(scheme.code)), jnp.asarray(draw.x[order])
        prepared, coded = eqx.filter_jit(scheme.encode)(x, known.encoder)
        summary = _conclude(scheme, x, prepared, self._answers(coded), masks, known)
        home = np.argsort(order)
        return summary.decoded.predictions[:, home], summary.deviation[:, home]

    def decode_plain(self, code: AbstractCode, draw: Draw, masks: Masks) -> Array:
        """Return the predictions of a code by itself, as the points come."""
        groups = jnp.asarray(draw.x).reshape(-1, NUM_DATA, draw.x.shape[-1])
        return _decode(code, self._answers(encode_groups(code, groups, known_encoder(code))), masks)

    def decode_ordered(self, code: AbstractCode, draw: Draw, masks: Masks) -> Array:
        """Return the predictions of a code by itself, with the points in their order."""
        there = dataclasses.replace(draw, x=draw.x[draw.order])
        return self.decode_plain(code, there, masks)[:, np.argsort(draw.order)]

    def _draw(self, judging: bool, seed: int) -> Draw:
        size, more = self.size, 1000 if self.case.name in EMBEDDINGS else 0
        groups = int(min(size.groups, (self.case.least - size.history) // NUM_DATA))
        ends = np.cumsum([size.history, groups * NUM_DATA, more])
        past, x, others, _ = np.split(self.inputs(judging, seed, int(ends[-1])), ends)
        order = np.asarray(order_points(x, NUM_DATA))
        found = self.outputs(others) if more else None
        seed = 2 * seed + judging
        return Draw(past, self.outputs(past), x, self.outputs(x), order, found, seed)

    def inputs(self, judging: bool, seed: int, count: int) -> np.ndarray:
        """Return inputs of the case, filled up."""
        x = self.case.inputs(judging, seed, count)
        return np.pad(x, ((0, 0), (0, max(WIDE - x.shape[1], 0))))

    def outputs(self, x: np.ndarray | Array) -> Float[Array, "points m"]:
        """Return the function's outputs, computed in batches of one size."""
        rows, batch = len(x), 256
        x = jnp.concatenate([jnp.asarray(x), jnp.zeros((-rows % batch, *x.shape[1:]))])
        parts = [self.function(x[start : start + batch]) for start in range(0, len(x), batch)]
        return jnp.concatenate(parts)[:rows]

    def _answers(self, coded: Array) -> Array:
        """Return the workers' answers; the same to the same, until another cell is prepared."""
        groups, workers = coded.shape[:2]
        key = hashlib.sha256(np.asarray(coded).tobytes()).digest()
        if key not in self._said:
            answers = self.outputs(coded.reshape(groups * workers, *coded.shape[2:]))
            self._said[key] = answers.reshape(groups, workers, -1)
        return self._said[key]

    def _choose_codes(self, cell: Cell) -> None:
        for name, layouts, summary in (
            (PUBLISHED, ("chebyshev",), self.decode_plain),
            ("NeRCC, tuned", (*LAYOUTS, "repeated"), self.decode_ordered),
        ):
            codes = [
                _nercc(cell.num_workers, layout, value) for layout in layouts for value in LAMBDAS
            ]
            errors = [self._chosen(cell, code, summary) for code in codes]
            self._codes[name] = codes[int(np.argmin(errors))]

    def _chosen(self, cell: Cell, code: NeRCC, summary: Callable[..., Array]) -> float:
        """Return a code's error where things are chosen."""
        errors = [
            _rmse(summary(code, draw, draw.masks(cell, self.size.sets)), draw)
            for draw in self._choosing
        ]
        return float(np.nan_to_num(np.mean(errors), nan=np.inf))

    def _rivals(self, cell: Cell, draw: Draw, masks: Masks) -> Iterator[tuple[str, Numbers]]:
        tuned = self._codes["NeRCC, tuned"]
        following = Scheme(_nercc(cell.num_workers, "interleaved"), follow="inputs")
        for name, predictions in (
            ("BACC", self.decode_plain(_bacc(cell.num_workers), draw, masks)),
            (PUBLISHED, self.decode_plain(self._codes[PUBLISHED], draw, masks)),
            ("NeRCC, tuned", self.decode_ordered(tuned, draw, masks)),
            ("NeRCC, following points", self.decode(following, draw, masks, ordered=True)[0]),
        ):
            yield name, self._numbers(predictions, draw)
        answered = _answered(cell, masks)
        filled = lost_copies(
            jnp.asarray(draw.x), draw.own, answered, self._kernels[False], self.case.features
        )
        for name, predictions in zip(RIVALS[4:], filled, strict=True):
            yield name, self._numbers(predictions, draw)

    def _helped_rivals(self, cell: Cell, draw: Draw, masks: Masks) -> Iterator[tuple[str, Numbers]]:
        """Decode copies with the cheap model where they are lost, or by its features."""
        assert self.cheap is not None
        answered, features = _answered(cell, masks), self.cheap.features(jnp.asarray(draw.x))
        word = jnp.zeros_like(draw.own)
        if self.cheap.prior is not None:
            word = self.cheap.prior(jnp.asarray(draw.x))
            seen = answered.reshape(len(answered), -1, 1)
            yield CHEAP, self._numbers(jnp.where(seen, draw.own, word), draw)
        summary = lost_copies(features, draw.own - word, answered, self._kernels[True], None)
        for name, predictions in zip(HELPED_RIVALS[1:], summary[1:], strict=True):
            yield name, self._numbers(predictions + word, draw)

    def _learning(
        self, cell: Cell, draw: Draw, masks: Masks, bars: Collection[str]
    ) -> Iterator[tuple[str, Numbers]]:
        copies, learner = _nercc(cell.num_workers, "repeated"), self.learner(draw)
        assert self._mixture is not None
        numbers = self._mixture.theta, self._mixture.kappa
        mixed = eqx.tree_at(lambda one: (one.theta, one.kappa), learner, numbers)
        alone = _nercc(NUM_DATA, "interleaved")
        plain: dict[str, Any] = {"redundancy": "code"}
        schemes = {
            ALONE: Scheme(alone, learner, **plain),
            RANDOM: Scheme(copies, learner, **plain),
            UNCERTAIN: Scheme(
                _nercc(cell.num_workers, "interleaved"), learner, redundancy="uncertain"
            ),
            **{
                name: Scheme(_nercc(cell.num_workers, layout), learner, **plain)
                for name, layout in zip(CODED, LAYOUTS, strict=True)
            },
            MIXED: Scheme(_nercc(cell.num_workers, LAYOUTS[0]), mixed, **plain),
        }
        if self.cheap is not None:
            helped = self.learner(draw, True)
            schemes |= {
                name: eqx.tree_at(
                    lambda one: one.surrogate, schemes[name.removesuffix(WITH)], helped
                )
                for name in HELPED
            }
        for name, scheme in schemes.items():
            responded = masks[..., : scheme.code.num_workers]
            ordered = name.removesuffix(WITH) in (*CODED, MIXED)
            predictions, deviation = self.decode(scheme, draw, responded, ordered=ordered)
            bar = None
            if name in bars:
                helps = name.endswith(WITH)
                measured = self._bars(cell, scheme, draw, helps, ordered=ordered)
                bar = measured(deviation, COVERAGE)
            yield name, self._numbers(predictions, draw, bar)

    def _bars(
        self, cell: Cell, scheme: Scheme, draw: Draw, helped: bool, *, ordered: bool
    ) -> ErrorBars:
        """Return a scheme's error bars by the past answers alone.

        Each group of them is decoded by a learner of the others.
        """
        past = np.asarray(draw.past)
        order = np.asarray(order_points(past, NUM_DATA)) if ordered else np.arange(len(past))
        return cross_validate_error_bars(
            self.function, scheme, past[order], draw.past_outputs[order], {"law": cell.law},
            lambda x, y: self.fit(x, y, helped), key=jax.random.key(draw.seed),
        )  # fmt: skip

    def _numbers(
        self,
        predictions: Float[Array, "sets points m"],
        draw: Draw,
        bar: Float[Array, "sets points"] | None = None,
    ) -> Numbers:
        found = Numbers(_rmse(predictions, draw))
        if bar is not None:
            error = jnp.sqrt(jnp.mean((predictions - draw.own) ** 2, axis=-1))
            within = np.asarray(error <= bar)
            uncertain = np.asarray(bar) > 0
            share = float(np.mean(within[uncertain])) if uncertain.any() else None
            found = dataclasses.replace(found, covered=share, uncertain=int(uncertain.sum()))
        if draw.others is not None:
            share = recall(predictions, draw.own, draw.others)
            found = dataclasses.replace(found, recall=float(share))
        return found


def filled_up(
    function: Callable[[Array], Array], width: int, outputs: int = OUTPUTS
) -> Callable[[Array], Array]:
    """Compile a function as it is measured, with inputs and outputs filled up."""

    @eqx.filter_jit
    def filled(x: Float[Array, "batch wide"]) -> Float[Array, "batch m"]:
        y = function(x[:, :width])
        return jnp.pad(y, ((0, 0), (0, max(outputs - y.shape[1], 0))))

    return filled


def cheap_filled_up(cheap: CheapModel, width: int) -> CheapModel:
    """Compile a cheap model as it is measured; its features are as many as they are."""
    prior = None if cheap.prior is None else filled_up(cheap.prior, width)
    return dataclasses.replace(cheap, features=filled_up(cheap.features, width, 0), prior=prior)


def picked(chosen: Mapping[str, list[Numbers]]) -> str:
    """Return the scheme with the least error where things are chosen; none of the rivals."""
    schemes = [name for name in (*LEARNERS, *HELPED) if name in chosen]
    return min(schemes, key=lambda name: np.mean([numbers.rmse for numbers in chosen[name]]))


def _answered(cell: Cell, masks: Masks) -> Bool[Array, "sets groups num_data"]:
    """Return the data points with an answered copy, if all have as many copies."""
    held = np.argmax(np.asarray(known_encoder(_nercc(cell.num_workers, "repeated"))), axis=1)
    holds = held[:, None] == np.arange(NUM_DATA)
    return jnp.asarray(np.any(holds & np.asarray(masks)[..., None], axis=-2))


@eqx.filter_jit
def _available(law: AbstractStragglers, keys: Array, num_workers: int) -> Masks:
    return jax.vmap(jax.vmap(lambda key: law.available(key, num_workers)))(keys)


@functools.cache  # with a code, its matrices are kept
def _nercc(num_workers: int, layout: str, lambda_dec: float = 0.0) -> NeRCC:
    return NeRCC(NUM_DATA, num_workers, points=layout, lambda_dec=lambda_dec)


@functools.cache
def _bacc(num_workers: int) -> Berrut:
    return Berrut(NUM_DATA, num_workers)


def _rmse(predictions: Float[Array, "*sets points m"], draw: Draw) -> float:
    """Return the RMSE over the spread of the outputs, over all sets, points and outputs."""
    own = np.asarray(draw.own, np.float64)
    error = np.mean((np.asarray(predictions, np.float64) - own) ** 2)
    return float(np.sqrt(error / np.mean((own - own.mean(axis=0)) ** 2)))


@jax.jit
def recall(predictions: Array, own: Array, others: Array) -> Array:
    """Return recall@10: the share of each embedding's 10 nearest others that it finds decoded."""
    wanted = _nearest(own, others)

    def one(decoded: Array) -> Array:
        found = _nearest(decoded, others)
        return jnp.mean(jnp.any(found[:, :, None] == wanted[:, None], axis=1))

    return jnp.mean(jax.lax.map(one, predictions))


def _nearest(points: Array, others: Array) -> Int[Array, "points 10"]:
    product = jnp.matmul(points, others.T, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.top_k(2 * product - jnp.sum(others**2, axis=1), 10)[1]


@eqx.filter_jit
def _conclude(
    scheme: Scheme, x: Array, prepared: Any, y: Array, masks: Array, known: CachedMatrices
) -> AssessedPredictions:
    return jax.lax.map(lambda mask: scheme.decode(x, prepared, y, mask, known), masks)


@eqx.filter_jit
def _decode(code: AbstractCode, y: Array, masks: Array) -> Array:
    def of_set(mask: Array) -> Array:
        predictions = decode_vectors(code, y, mask).predictions
        return predictions.reshape(-1, y.shape[-1])

    return jax.lax.map(of_set, masks)
