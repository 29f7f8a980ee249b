"""The error of decoded answers, estimated before decoding; and the stragglers simulated for it."""

import collections
import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import ArrayLike, Bool, Float

from ...codes.whole_files import read_arrays, write_arrays
from ...evaluation._answers import batched, cut_groups
from ...inference import cast_model
from ...inference.models import Conditions, Model, current_conditions, run_workers
from ...risk import logistic_regression
from ...risk._straggler_risk import AccuracyTarget, bar_factor
from ..core._adaptation import ExpectedError
from ..core._coder import Coder
from ..core._error_probability import (
    FEATURES,
    DecodingErrorBars,
    DecodingErrorProbability,
    error_probability,
    uncalibrated,
)

_LOG = logging.getLogger(__name__)

DRAWS = 32  # sets of stragglers
_LOOKS = 3  # decodings for each set: before the last two answers, the last one, and with all
# Roberts' sequence, whose points fill the square evenly: 1/p and 1/p^2 of the root of p^3 = p + 1.
_SPREAD = np.array([0.7548776662466927, 0.5698402909980532])
_PLACES = 4  # of a group's queries that are looked at for each set
_SAMPLES = 20_000  # that the regression takes, at most
_TINY = 1e-12  # added to errors before their logarithms are taken


class StragglerSimulation:
    """Simulated stragglers on groups all of whose answers are known, to calibrate decoding.

    A query's own worker straggles, and others with it; the rest answers, and the groups are decoded
    as the last answers come in. Whether the labels are then the model's own calibrates a
    `DecodingErrorProbability`; with a tolerance, the errors calibrate `DecodingErrorBars`. Sets of
    stragglers differ, so one calibration holds in the mean over sets like these. Groups have a
    given number of queries; the last `DRAWS` simulations count, which are `seen`.
    """

    def __init__(self, coder: Coder, queries: int, target: AccuracyTarget):
        self._coder, self._queries, self._target = coder, queries, target
        self._random, self._number = np.random.default_rng(queries), 0
        self.seen: collections.deque[tuple[np.ndarray, ...]] = collections.deque(maxlen=DRAWS)

    def draw(
        self,
        answers: Float[np.ndarray, "groups num_workers m"],
        originals: Float[np.ndarray, "groups num_data m"],
        known: int,
        width: int,
    ) -> Iterator[None]:
        """Simulate one set of stragglers in all groups, in steps that decode `width` at once.

        Originals are by alpha. Only the first `known` groups count; the rest keeps shapes fixed.
        """
        looks = self._draw_looks()
        layout = self._coder.layout(self._queries)
        missing = [place for place, own in enumerate(layout.own) if not looks[-1, own].any()]
        missing = self._random.permutation(missing)[:_PLACES]
        places = self._coder.order[missing]
        seen = []
        for mask in looks:
            parts = []
            for begin in range(0, len(answers), width):
                some = slice(begin, begin + width)
                own = originals[some]
                if self._target.tolerance is None:
                    found, same = self._coder.compare(answers[some], own, mask, width)
                    missed = ~same
                else:
                    found = self._coder.decode_all(answers[some].swapaxes(0, 1), mask, width)
                    missed = np.sqrt(np.mean((found.predictions - own) ** 2, axis=2))
                parts.append((found.features, found.informative, missed))
                yield
            seen.append([np.concatenate(part) for part in zip(*parts, strict=True)])
        # (looks, groups, places, ...) becomes (groups and places, looks, ...).
        self.seen.append(
            tuple(
                np.concatenate(np.moveaxis(np.stack(part)[:, :known, places], 0, 2))
                for part in zip(*seen, strict=True)
            )
        )

    def calibrate(self, known: int) -> DecodingErrorProbability | DecodingErrorBars:
        parts = [np.concatenate(part) for part in zip(*self.seen, strict=True)]
        number = known * self._queries
        if self._target.tolerance is None:
            return calibrate(*parts, number=number)
        return calibrate_bars(*parts, number=number, target=self._target)

    @property
    def uncalibrated(self) -> DecodingErrorProbability | DecodingErrorBars:
        if self._target.tolerance is None:
            return uncalibrated()
        return DecodingErrorBars(np.full(FEATURES, np.nan, np.float32), 0.0, 0)

    def _draw_looks(self) -> Bool[np.ndarray, "looks num_workers"]:
        """Return the masks of workers that have answered at each look.

        One query's own workers straggle, and any number of the others up to the redundancy. Queries
        and numbers are spread evenly, so that few sets represent all.
        """
        self._number += 1
        first, second = np.modf(self._number * _SPREAD)[0]
        layout = self._coder.layout(self._queries)
        sent = np.concatenate([*self._coder.first[: self._queries], layout.extras]).astype(int)
        own = layout.own[int(first * self._queries)]
        others = self._random.permutation(np.setdiff1d(sent, own))
        spare = max(len(others) - self._queries, 0)
        answered = max(len(others) - int(second * (spare + 1)), 1)
        looks = np.zeros((_LOOKS, self._coder.num_workers), bool)
        for look, mask in enumerate(looks):
            mask[others[: max(answered - (_LOOKS - 1 - look), 1)]] = True
        return looks


def calibrate(
    features: Float[np.ndarray, "samples looks features"],
    informative: Bool[np.ndarray, "samples looks"],
    wrong: Bool[np.ndarray, "samples looks"],
    number: int,
) -> DecodingErrorProbability:
    """Calibrate the error probability of queries whose own worker straggles.

    A query is answered at the first look at which it is certain enough. Here it counts as wrong
    from the least probability on that it had at any look with a wrong label: that bounds the share
    of wrong labels from above, and grows with the limit. There are `number` different queries among
    the samples.
    """
    thin = slice(None, None, -(-informative.size // _SAMPLES))
    flat = features[informative][thin].astype(np.float64)
    # A query is much the same under all sets: it counts as one in all, not as one in each.
    count = min(number / max(len(flat), 1), 1.0)
    weights = logistic_regression(flat, wrong[informative][thin], count=count).astype(np.float32)
    probability = error_probability(features, informative, weights)
    least = np.min(np.where(wrong, probability, np.inf), axis=1)
    wrong_from = np.sort(least[np.isfinite(least)])
    answered_from = np.sort(np.min(probability, axis=1))
    return DecodingErrorProbability(weights, wrong_from, answered_from, number)


def calibrate_bars(
    features: Float[np.ndarray, "samples looks features"],
    informative: Bool[np.ndarray, "samples looks"],
    error: Float[np.ndarray, "samples looks"],
    number: int,
    target: AccuracyTarget,
) -> DecodingErrorBars:
    """Calibrate the error bars of queries whose own worker straggles.

    A query is answered at the first look at which its bar is within the tolerance. There are
    `number` different queries among the samples.
    """
    used = [0, 2, 3, 4]  # but for the margin, which is a label's
    thin = slice(None, None, -(-informative.size // _SAMPLES))
    wanted = np.log(error[informative][thin] + _TINY)
    weights = np.zeros(FEATURES)
    flat = features[informative][thin][:, used].astype(np.float64)
    weights[used] = np.linalg.lstsq(flat, wanted, rcond=None)[0]
    expected = DecodingErrorBars(weights, 0.0, number)(features, informative)
    factor = bar_factor(expected, error, target, number)
    weights[0] += np.log(factor)  # nothing is within the tolerance of infinity
    assert target.tolerance is not None
    share = np.mean((factor * expected <= target.tolerance).any(axis=1))
    return DecodingErrorBars(weights.astype(np.float32), float(share), number)


# The number of groups of each size that an estimate rests on; of smaller groups that calibration
# makes; and the least with which there is an estimate.
_GROUPS, _SHORT, _LEAST = 256, 128, 32
# Simulations with each group that comes, as long as there are any to make, and their groups.
_AT_ONCE, _FEW = 2, 32
_MASKS = 4096  # sets of workers whose expected error is kept


class ErrorEstimator:
    """Estimates the error of each decoded query of a group, before and after decoding.

    Before decoding, given the number of queries and the workers that answered (`expected_error`),
    it is the mean over calibration groups that are decoded from the same workers. After decoding,
    the query's own margin and deviation say more (`error_probability`). The groups come from data
    given beforehand and from traffic: a group all of whose coded data points were answered, the
    queries themselves among them, shows what decoding from fewer would have given. The oldest group
    is replaced.

    One thread at a time may update it (`calibrate`, `add_group`, `update_expected`), which takes
    its time: the last two in steps of a few milliseconds, one for each item of the iterator that
    they return. All threads may read its latest results (`needs_samples`, `error_probability`,
    `expected_error`), which takes none.
    """

    def __init__(self, coder: Coder, target: AccuracyTarget | None = None):
        """Start without groups; a target with a tolerance is for values, others for labels."""
        self._coder, self.target = coder, target or AccuracyTarget()
        self.conditions = Conditions()  # of the calibration
        self.own: Float[np.ndarray, "rows m"] | None = None  # answers of its model
        self._width = _GROUPS  # that a step looks at, at most
        self._samples = {
            few: _GroupSamples(
                coder,
                StragglerSimulation(coder, few, self.target)
                if coder.has_error_probability and few > 1
                else None,
            )
            for few in range(1, coder.num_data + 1)
        }

    def calibrate(
        self,
        model: Model | Sequence[Model],
        x: Float[ArrayLike, "points ..."],
        *,
        worker_dtype: DTypeLike | None = None,
    ) -> None:
        """Run the model on unlabelled data points, coded and uncoded, in groups of every size.

        Both in the pool's dtype, because a query's own answer is a worker's, too. The batcher warns
        of a pool whose `conditions` differ.

        Raises:
            ValueError: where x fills no group, is not floating point, or not finite.
        """
        models = cast_model((model,) if callable(model) else tuple(model), worker_dtype)
        self.conditions = current_conditions(worker_dtype)
        run = eqx.filter_jit(run_workers)
        for few in range(2, self._coder.num_data + 1):
            number = _GROUPS if few == self._coder.num_data else _SHORT
            groups = cut_groups(x, few)[:number]
            coded = self._coder.encode(groups, np.arange(self._coder.num_workers)).swapaxes(0, 1)
            answers = np.asarray(run(models, self._coder.code, jnp.asarray(coded)))
            points = groups.reshape(-1, *groups.shape[2:])
            originals = np.asarray(batched(models[0], min(64, len(points)))(points))
            self.own = originals.reshape(len(originals), -1)
            samples, originals = self._samples[few], originals.reshape(len(groups), few, -1)
            for group, own in zip(answers, originals, strict=True):
                samples.add(group.reshape(len(group), -1), self._coder.to_alphas(own))
            samples.simulate(DRAWS)
            if samples.known < _LEAST:
                continue
            # The usual sets of answers: all that are sent, and all but a query's own.
            layout = self._coder.layout(few)
            everyone = np.zeros(self._coder.num_workers, bool)
            everyone[np.concatenate([*self._coder.first[:few], layout.extras]).astype(int)] = True
            for missing in ([], *layout.own):
                mask = everyone.copy()
                mask[np.asarray(missing, int)] = False
                if mask.any():
                    _run_all(samples.update_expected(mask, _GROUPS))

    def compile(self, outputs: Sequence[int], width: int) -> None:
        """Compile for a model's outputs of this shape, so that no query waits for it.

        Updates run the same programs with `width` groups a step, as many as a group has rows at
        most, so that a step takes no longer than a decoding.
        """
        self._width = width
        if not self._coder.can_decode:
            return
        zeros = np.zeros((1, self._coder.num_workers, int(np.prod(outputs))), np.float32)
        everyone = np.ones(self._coder.num_workers, bool)
        self._coder.compare(zeros, zeros[:, : self._coder.num_data], everyone, width)
        self._coder.agree(zeros[0, 0], zeros[0, 0])

    def state(self) -> dict[str, np.ndarray]:
        samples = self._samples.items()
        return {f"{few} {name}": x for few, each in samples for name, x in each.state().items()}

    def restore(self, state: Mapping[str, np.ndarray], conditions: Conditions) -> None:
        """Take the `state` of an estimator of the same code, calibrated under these conditions."""
        self.conditions = conditions
        for few, samples in self._samples.items():
            prefix = f"{few} "
            own = {
                name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)
            }
            if own:
                samples.restore(own)

    def needs_samples(self, queries: int) -> bool:
        """Return whether there is no estimate yet for groups of this size."""
        if queries == 1 or not self._coder.can_decode:
            return False
        return not self._samples[queries].enough

    def add_group(
        self,
        answers: Float[np.ndarray, "num_workers ..."],
        originals: Float[np.ndarray, "queries ..."],
    ) -> Iterator[None]:
        """Take a group: all workers' answers, and the model's own to the queries."""
        answers = answers.reshape(len(answers), -1)
        originals = originals.reshape(len(originals), -1)
        samples = self._samples[len(originals)]
        samples.add(answers, self._coder.to_alphas(originals))
        return samples.simulate_in_steps(self._width)

    def error_probability(self, queries: int) -> DecodingErrorProbability | DecodingErrorBars:
        """Return the error probability, or bars, for groups of this size; uncalibrated at first.

        Only for codes with a posterior deviation (`Coder.has_error_probability`).
        """
        return self._samples[queries].error_probability

    def update_expected(
        self, queries: int, mask: Bool[np.ndarray, " num_workers"]
    ) -> Iterator[None]:
        """Compute the expected error of groups of this size, decoded from these workers."""
        if self._samples[queries].known >= _LEAST and mask.any():
            yield from self._samples[queries].update_expected(mask, self._width)

    def expected_error(self, queries: int, mask: Bool[np.ndarray, " num_workers"]) -> ExpectedError:
        """Return the latest result of `update_expected`, NaN where there is none."""
        nothing = np.full(queries, np.nan)
        if self._samples[queries].known < _LEAST or not mask.any():
            return ExpectedError(nothing, nothing, True)
        found = self._samples[queries].expected.get(mask.tobytes())
        if found is None:
            return ExpectedError(nothing, nothing, False)
        disagreement, error = (part[self._coder.order[:queries]] for part in found[:2])
        return ExpectedError(disagreement, error, found[2] == self._samples[queries].epoch)

    def progress(self) -> tuple[int, int]:
        """Return the number of full groups seen, and the number that an estimate needs."""
        return min(self._samples[self._coder.num_data].known, _GROUPS), _LEAST

    def discard(self) -> None:
        """Discard all groups after a drift: nothing is estimated until there are new ones."""
        for samples in self._samples.values():
            samples.discard()

    def agrees(self, decoded: np.ndarray, own: np.ndarray) -> bool:
        return bool(self._coder.agree(decoded.ravel(), own.ravel()))


class _GroupSamples:
    """The last `_GROUPS` groups of one size, and the estimates they give.

    The epoch is how often the expected errors became out of date. These are by mask, the oldest
    first: disagreement and error by alpha, and their epoch. Each entry is replaced as a whole, so
    that other threads may read meanwhile.
    """

    def __init__(self, coder: Coder, simulation: StragglerSimulation | None):
        self._coder, self._simulation = coder, simulation
        self._nothing = uncalibrated() if simulation is None else simulation.uncalibrated
        self._answers: np.ndarray | None = None
        self._originals: np.ndarray | None = None
        self.epoch = 0
        self.discard()

    def discard(self) -> None:
        self.known = self._turn = 0
        self._fresh = 0  # groups since the last epoch
        self._draws_left = 0  # simulations until the next calibration
        self._due = _LEAST  # groups at the next calibration
        self.error_probability = self._nothing
        self.expected: dict[bytes, tuple[np.ndarray, np.ndarray, int]] = {}
        if self._simulation is not None:
            self._simulation.seen.clear()

    def add(self, answers: np.ndarray, originals: np.ndarray) -> None:
        if self._answers is None or self._originals is None:
            self._answers = np.zeros((_GROUPS, *answers.shape), np.float32)
            self._originals = np.zeros((_GROUPS, *originals.shape), np.float32)
        slot = self.known % _GROUPS
        self._answers[slot], self._originals[slot] = answers, originals
        self.known += 1
        self._fresh += 1

    def state(self) -> dict[str, np.ndarray]:
        if self._answers is None or self._originals is None:
            return {}
        known = min(self.known, _GROUPS)
        return {
            "answers": self._answers[:known],
            "originals": self._originals[:known],
            "masks": np.array([np.frombuffer(mask, bool) for mask in self.expected]),
            "disagreement": np.array([each[0] for each in self.expected.values()]),
            "error": np.array([each[1] for each in self.expected.values()]),
            **{name: np.asarray(part) for name, part in vars(self.error_probability).items()},
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        for answers, originals in zip(state["answers"], state["originals"], strict=True):
            self.add(answers, originals)
        tables = (state[name] for name in ("masks", "disagreement", "error"))
        for mask, disagreement, error in zip(*tables, strict=True):
            self.expected[mask.tobytes()] = disagreement, error, self.epoch
        self.error_probability = DecodingErrorProbability(
            state["weights"],
            state["wrong_from"],
            state["answered_from"],
            int(state["num_queries"]),
        )
        self._due = self.known + _GROUPS

    @property
    def enough(self) -> bool:
        return self.known >= _LEAST and (
            self._simulation is None or self.error_probability.num_queries > 0
        )

    def _next_groups(self, number: int = _GROUPS) -> tuple[np.ndarray, np.ndarray]:
        """Return the next groups in turn, cycling if there are fewer, so that shapes stay fixed."""
        assert self._answers is not None
        assert self._originals is not None
        chosen = (self._turn + np.arange(number)) % min(self.known, _GROUPS)
        self._turn = (self._turn + number) % _GROUPS
        return self._answers[chosen], self._originals[chosen]

    def simulate(self, draws: int) -> None:
        """Calibrate the error probability at once, if there are enough groups."""
        if self._simulation is None or self.known < _LEAST:
            return
        known = min(self.known, _GROUPS)
        for _ in range(draws):
            _run_all(self._simulation.draw(*self._next_groups(), known, _GROUPS))
        self.error_probability = self._simulation.calibrate(known)
        self._due = self.known + _GROUPS

    def simulate_in_steps(self, width: int) -> Iterator[None]:
        """Run some simulations with each group, and calibrate when they are complete.

        At first this happens whenever the number of groups has doubled.
        """
        if self._simulation is None:
            return
        if not self._draws_left and self.known > self._due - DRAWS // _AT_ONCE:
            self._draws_left = DRAWS
        if not self._draws_left:
            return
        self._draws_left -= _AT_ONCE
        known = min(self.known, _GROUPS)
        for _ in range(_AT_ONCE):
            yield from self._simulation.draw(*self._next_groups(_FEW), min(known, _FEW), width)
        if not self._draws_left:
            self.error_probability = self._simulation.calibrate(known)
            self._due = self.known + known

    def update_expected(self, mask: np.ndarray, width: int) -> Iterator[None]:
        assert self._answers is not None
        assert self._originals is not None
        if not self.epoch or self._fresh >= _GROUPS:
            self.epoch += 1
            self._fresh = 0
        number = min(self.known, _GROUPS)
        square, wrong = np.zeros((2, self._coder.num_data))
        recovered = np.ones(self._coder.num_data, bool)
        for begin in range(0, number, width):
            some = slice(begin, min(begin + width, number))
            own = self._originals[some]
            found, same = self._coder.compare(self._answers[some], own, mask, width)
            recovered = found.recovered  # the same for all groups: it follows from the mask
            square += np.sum((found.predictions - own) ** 2, axis=(0, 2), dtype=float)
            wrong += np.sum(~(recovered & same), axis=0)
            yield
        error = np.where(recovered, np.sqrt(square / number), np.nan)
        # Jeffreys' estimate: none wrong among n does not mean that none ever will be.
        disagreement = (wrong + 0.5) / (number + 1)
        while len(self.expected) >= _MASKS:
            del self.expected[next(iter(self.expected))]
        self.expected[mask.tobytes()] = disagreement, error, self.epoch


def calibrate_or_restore(
    estimator: ErrorEstimator,
    model: Model,
    x: np.ndarray | Callable[[], np.ndarray],
    worker_dtype: DTypeLike | None,
    cache: Path | None,
) -> None:
    """Calibrate an estimator, or restore it from a cache file: calibration takes seconds.

    The file is named after all that calibration depends on. It is written if it is not there, or
    is damaged, which is logged. Raises as `ErrorEstimator.calibrate`.
    """
    if cache is not None:
        try:
            state = read_arrays(cache, "it is made again")
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError) as error:
            _LOG.warning("%s", error)
        else:
            estimator.restore(state, current_conditions(worker_dtype))
            return
    estimator.calibrate(model, x() if callable(x) else x, worker_dtype=worker_dtype)
    if cache is not None:
        with contextlib.suppress(OSError):
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_arrays(cache, estimator.state())


def _run_all(steps: Iterable[None]) -> None:
    for _ in steps:
        pass
