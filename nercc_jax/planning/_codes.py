"""NeRCC codes measured for the planner: screened on one half of the data, judged on the other."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray, PyTree

from ..codes import NeRCC, decode_groups
from ..codes._trees import Form, join
from ..evaluation import Estimate
from ..evaluation._answers import Recorder, batched, cut_groups
from ..inference import order_points
from ..inference.models import Model
from ..risk import ErrorProbability
from ..risk._error_probability import error_probability_from_answers
from ..stragglers.simulate import Latencies, Waiting, last_prediction, own_workers
from ..surrogates.surrogate import decode_with_deviation
from ._candidates import Candidate, PlanEffort, disagreement, numbers_of_workers, waits

# Of draws that must not be the same; what is compared with each other meets the same.
_STREAMS = {"shuffle": 0, "ends": 1, "again": 2, "screen": 3, "held_out": 4}
_CHUNK = 512  # groups that are decoded at a time


class Half:
    """One half of the data: its groups in each order, and all workers' answers to each code."""

    def __init__(
        self,
        model: Model,
        x: ArrayLike,
        buffer_size: int,
        surrogate: Callable[[Array], Array] | None,
        batch_size: int,
    ):
        self._run, self._batch_size = batched(model, batch_size), batch_size
        self._buffer_size = buffer_size
        self._surrogate = None if surrogate is None else batched(surrogate, batch_size)
        groups = cut_groups(x, 1)
        self.x = groups[:, 0]
        recorder = Recorder(self._run, groups, batch_size)
        self._own, self._form = recorder.own[:, 0], recorder.form
        self._answers: dict[tuple[str | None, int], Recorder] = {}

    def answers(self, order: str | None, num_data: int) -> Recorder:
        """Return the model's answers on groups in this order."""
        if (order, num_data) not in self._answers:
            places = np.arange(len(self.x))
            if order is not None:
                places = order_points(
                    jnp.asarray(self.x),
                    num_data,
                    features=self._cheap if order == "surrogate" else None,
                    buffer_size=self._buffer_size,
                )
            whole = len(self.x) // num_data * num_data
            places = np.asarray(places)[:whole].reshape(-1, num_data)
            self._answers[order, num_data] = Recorder(
                self._run, self.x[places], self._batch_size, (self._own[places], self._form)
            )
        return self._answers[order, num_data]

    @functools.cached_property
    def _cheap(self) -> PyTree[Float[Array, "points ..."]]:
        assert self._surrogate is not None
        return self._surrogate(self.x)

    def outputs(self) -> tuple[Float[Array, "points m"], Float[Array, "points m"], Form | None]:
        """Return the surrogate's outputs and the model's, as vectors, and their form."""
        form = None if self._form.is_vector else self._form
        return join(self._cheap, 1)[0], jnp.asarray(self._own), form


class Measured(NamedTuple):
    """One half's data points, (groups, sets, K), under a code and a rule.

    `end` is when their group ended, `own` when their own answer comes; `wrong` are labels that
    differ; `error_probability` is 0 for answers of one's own, and where it is not calibrated.
    """

    end: Float[np.ndarray, "groups sets"]
    own: Float[np.ndarray, "groups sets num_data"]
    wrong: Bool[np.ndarray, "groups sets num_data"]
    error_probability: Float[np.ndarray, "groups sets num_data"]

    @property
    def disagreement(self) -> dict[str, Any]:
        """The fields of a candidate; groups are independent, sets are not."""
        share = Estimate.over(np.mean(self.wrong, axis=(1, 2)).tolist())
        return disagreement(share, self.wrong.shape[0] * self.wrong.shape[2])


@dataclasses.dataclass(frozen=True)
class Codes:
    """The codes that a plan compares, under one law of latency.

    `fastest` is the p99 of the best that takes no code: only faster ones are looked at.
    """

    latencies: Latencies
    asked: Mapping[str, Any]
    effort: PlanEffort
    calibration: Half
    held_out: Half
    fastest: float
    _made: dict[tuple[int, int, str], tuple[NeRCC, np.ndarray]] = dataclasses.field(
        default_factory=dict, init=False
    )

    def screen(
        self, sizes: Sequence[int], layouts: Sequence[str], orders: Sequence[str | None]
    ) -> list[Candidate]:
        """Return all codes and rules that might be faster, by few sets on the first half.

        Waiting until the p99 of the time in which enough answer makes that p99 no later, and most
        others are in by then. One rule is always there, so that every code is shown.
        """
        found = []
        for num_data in sizes:
            for num_workers in numbers_of_workers(num_data, self.asked):
                for points in layouts:
                    rows, numbers = [], waits(num_data, num_workers)
                    early = self.latencies.quantile(self.effort.early)
                    for number in numbers:
                        row = Candidate(
                            *(f"NeRCC {points}", num_data, num_workers, number, 0.0, points),
                            exact=False,
                            held_out=False,
                        )
                        late = row.seen(self._ends(row)).p99
                        for min_wait in sorted({early, late}):
                            row = dataclasses.replace(row, min_wait=min_wait)
                            row = row.seen(self._ends(row))
                            shown = number == numbers[-1] and min_wait == late
                            if shown or row.p99 < self.fastest:
                                rows.append(row)
                    for order in orders:
                        for row in rows:
                            row = dataclasses.replace(row, order=order)
                            measured = self._measured(row, self.calibration)
                            found.append(row.seen(**measured.disagreement))
        return found

    def measure(
        self, screened: Sequence[Candidate], key: PRNGKeyArray
    ) -> dict[Candidate, ErrorProbability | None]:
        """Measure the most promising on the held-out half, as they are and with re-execution.

        Return the error probability of those that send again what is uncertain.
        """
        wanted, most = (self.asked[n] for n in ("max_disagreement", "max_extra_work"))
        fast = [row for row in screened if row.p99 < self.fastest and wanted > 0]
        plain: dict[Candidate, ErrorProbability | None] = {}
        entries = [
            (row.p99, row.extra_work, row) for row in fast if row.disagreement.mean <= wanted
        ]
        for row in self._in_turn(entries, plain):
            measured = self._measured(row, self.held_out)
            times = self._ends(row, self.effort.draws)
            plain[row.seen(times, **measured.disagreement, held_out=True)] = None

        again: dict[Candidate, ErrorProbability | None] = {}
        entries = []
        for row in fast:  # if three times the wrong ones are sent again
            _, end, own = self._draw(row, self.effort.screen_draws)
            unknown, share = own > end[..., None], 3 * row.disagreement.mean
            random = self.latencies.random(_STREAMS["shuffle"])
            resent = unknown & (random.random(own.shape) < share / max(np.mean(unknown), 1e-9))
            seconds = self.latencies.draw(_STREAMS["again"], own.shape)
            p99 = row.seen(last_prediction(end, own, resent, seconds)).p99
            if p99 < self.fastest and row.extra_work + share <= most:
                entries.append((p99, row.extra_work + share, row))
        for row in self._in_turn(entries, again):
            again |= self._with_error_probability(row, key)
        return plain | again

    def _in_turn(
        self, entries: list[tuple[float, float, Candidate]], measured: Mapping[Candidate, Any]
    ) -> Iterator[Candidate]:
        """Yield by p99, then by extra work, until enough of the measured ones keep what is asked.

        Among p99s within 3 % the cheaper comes first.
        """
        step, wanted = math.log(1 + self.effort.alike), self.asked["max_disagreement"]
        order = sorted(entries, key=lambda e: (round(math.log(e[0]) / step), e[1], e[0]))
        for _, _, row in order[: self.effort.most]:
            kept = sum(other.most_disagreement <= wanted for other in measured)
            if kept >= self.effort.enough:
                return
            yield row

    def _with_error_probability(
        self, row: Candidate, key: PRNGKeyArray
    ) -> dict[Candidate, ErrorProbability]:
        """Measure re-execution of uncertain ones, for this disagreement and for half of it."""
        code, rule = self._rule(row)
        known, rules = self.calibration.answers(row.order, row.num_data).of(code), {"rule": rule}
        sets = self.effort.calibration_sets
        error_probability = error_probability_from_answers(known, rules, key, sets)
        seen = self._measured(row, self.held_out, error_probability)
        # A plan is asked for a share of all labels, a limit for one of those that are not exact.
        wanted = self.asked["max_disagreement"] / max(float(error_probability.shares[0]), 1e-9)
        wanted = min(wanted, 1.0)
        limits = {error_probability.limit(wanted), error_probability.limit(wanted / 2)}

        # When the last of the groups' predictions is there, a few draws for each.
        groups = self.asked["num_queries"] // row.num_data
        order = self.latencies.random(_STREAMS["shuffle"]).permutation(seen.end.size)
        order = np.tile(order[: order.size // groups * groups].reshape(-1, groups), (4, 1))
        end, own = seen.end.reshape(-1)[order], seen.own.reshape(-1, row.num_data)[order]
        seconds = self.latencies.draw(_STREAMS["again"], own.shape)
        found = {}
        # With a limit of 0 all is sent again that has no answer of its own: replication does that.
        for limit in sorted(limits - {0.0}):
            again = seen.error_probability > limit
            times = last_prediction(end, own, again.reshape(-1, row.num_data)[order], seconds)
            left = seen._replace(wrong=seen.wrong & ~again).disagreement
            resent = float(np.mean(again))
            again_row = row.seen(times, **left, limit=limit, resent=resent, held_out=True)
            found[again_row] = error_probability
        return found

    def _rule(self, row: Candidate) -> tuple[NeRCC, Waiting]:
        """Return the code of a candidate, and when its groups end."""
        size = row.num_data, row.num_workers, str(row.points)
        if size not in self._made:
            code = NeRCC(*size[:2], points=size[2], exact=True)
            self._made[size] = code, own_workers(code)
        code, own = self._made[size]
        return code, Waiting(self.latencies.law, own, row.wait_for, row.min_wait)

    def _draw(self, row: Candidate, draws: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        groups = self.asked["num_queries"] // row.num_data
        shape = self.effort.shape(groups, groups * row.num_workers, draws)
        return self._rule(row)[1].draw(self.latencies, _STREAMS["ends"], shape)

    def _ends(self, row: Candidate, draws: int | None = None) -> Float[np.ndarray, " draws"]:
        """Return when the last of all groups ends, if nothing is sent again."""
        return np.max(self._draw(row, draws or self.effort.screen_draws)[1], axis=1)

    def _measured(
        self, row: Candidate, half: Half, error_probability: ErrorProbability | None = None
    ) -> Measured:
        screening = half is self.calibration
        sets = self.effort.screen_sets if screening else self.effort.sets
        stream = _STREAMS["screen" if screening else "held_out"]
        code, rule = self._rule(row)
        coded = half.answers(row.order, row.num_data)
        answers, labels = np.asarray(coded.of(code).coded), np.argmax(coded.own, axis=-1)
        mask, end, own = rule.draw(self.latencies, stream, (len(labels), sets))
        known = own <= end[..., None]
        wrong, probability = np.zeros(known.shape, bool), np.zeros(known.shape)
        rows = np.argwhere(~known.all(axis=-1))
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            group, index = np.resize(part, (_CHUNK, 2)).T
            given = (answers[group], mask[group, index], labels[group])
            y, responded, wanted = map(jnp.asarray, given)
            decoded = _decode(code, y, responded, wanted, error_probability)
            for kept, new in zip((wrong, probability), decoded, strict=True):
                kept[tuple(part.T)] = np.asarray(new)[: len(part)]
        probability[known] = 0
        return Measured(end, own, wrong & ~known, probability)


@eqx.filter_jit
def _decode(
    code: NeRCC,
    answers: Float[Array, "groups num_workers outputs"],
    mask: Bool[Array, "groups num_workers"],
    labels: Int[Array, "groups num_data"],
    error_probability: ErrorProbability | None,
) -> tuple[Array, Array]:
    """Return which labels differ or are lost, and their error probabilities (or 0)."""
    if error_probability is None:
        decoded, trust = decode_groups(code, answers, mask), jnp.zeros(labels.shape)
    else:
        decoded, deviation = decode_with_deviation(code, None, answers, mask)
        trust = error_probability(decoded.predictions, deviation)
    return (jnp.argmax(decoded.predictions, axis=-1) != labels) | ~decoded.recovered, trust
