"""Approximate answers to a group's queries: by a surrogate, or decoded from the group's answers.

What becomes of them is for `core/_decide.py` to say.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from ..pools.batch import answers_to_wait_for
from ..pools.clock import AbstractClock
from ._policy import BatchingPolicy, read_outputs
from .adapt._adaptation import Adaptation
from .core._coder import Coder
from .core._decide import Place
from .core._group import Group
from .core._request import CODED, Answer, BatchSpec


class Estimator:
    """A maker of approximate answers, on the scheduler's thread.

    Attributes:
        queries: the shape and dtype of queries.
        enough: the answers of a full group that suffice for decoding where no error is estimated.
    """

    def __init__(
        self,
        coder: Coder,
        policy: BatchingPolicy,
        adaptation: Adaptation,
        clock: AbstractClock,
        specs: tuple[BatchSpec, BatchSpec],
    ):
        """Compile the decoder; the specs are those of queries and of answers.

        Raises:
            ValueError: where the policy needs a surrogate and there is none, where queries or
                answers cannot be predicted, where `wait_for` does not fit the code, or nothing
                gives error bars for a tolerance.
        """
        self._coder, self._policy, self._adaptation = coder, policy, adaptation
        self._clock, (self.queries, self._answers) = clock, specs
        if adaptation.predictor is not None and {spec.dtype for spec in specs} != {CODED}:
            dtypes = [str(spec.dtype) for spec in specs]
            raise ValueError(f"only float32 can be predicted, not {dtypes}")
        if adaptation.predictor is None and policy.redundancy == "uncertain":
            raise ValueError(
                "redundancy 'uncertain' needs a predictor (`--surrogate`): nothing else tells what "
                "is uncertain"
            )
        bars = adaptation.predictor is not None or coder.has_deviation
        if policy.tolerance is not None and not bars:
            raise ValueError(
                f"a tolerance needs error bars, and {type(coder.code).__name__} has none: give a "
                "predictor (`--surrogate`), or NeRCC with K of 2 or more"
            )
        num_data, num_workers = coder.num_data, coder.num_workers
        enough = policy.wait_for
        if enough is None and coder.systematic:
            enough = num_workers - (num_workers - num_data) // 2
        elif enough is None:
            enough = answers_to_wait_for(num_data, num_workers)
        if not 1 <= enough <= num_workers:
            raise ValueError(f"wait_for must be from 1 to N = {num_workers}, not {enough}")
        self.enough = enough
        if coder.can_decode:
            zeros, everyone = self._answers.zeros(num_workers), np.ones(num_workers, bool)
            self._decoded(zeros[:, None], everyone, num_data)

    def predict(self, group: Group, places: Sequence[Place]) -> None:
        """Add a surrogate's answers to a group's queries, of which each is looked up once.

        What a surrogate learns while a query waits is hardly more. Before it is ready, and while
        it has drifted, there are none.
        """
        predictor = self._adaptation.predictor
        new = [place for place in places if "predicted" not in group.estimates.get(place, {})]
        if predictor is None or not self._adaptation.can_predict or not new:
            return
        begin = self._clock.now()
        x = [query.x for query in map(group.query, new) if query.x is not None]
        assert len(x) == len(new), "queries that somebody waits for have their data"
        found = predictor.predict(np.stack(x))
        if found is None:
            return
        end, epoch = self._clock.now(), self._adaptation.risk("predicted").epoch
        self._adaptation.observe("predict_seconds", end - begin)
        basis = int((~np.isnan(group.sent_at)).sum()), int(group.mask.sum())
        for row, place in enumerate(new):
            value = found.values[row].reshape(self._answers.shape)
            errors = float(found.disagreement[row]), float(found.error_bound[row])
            answer = Answer(value, "predicted", *basis, *errors)
            group.add_estimate(place, answer, bool(found.sure[row]), epoch)
        if group.trace is not None:
            sure = int(found.sure.sum())
            group.trace.add("predict", begin, end, sure=sure, uncertain=len(new) - sure)

    def decode(self, group: Group, places: Sequence[Place]) -> None:
        """Add decoded answers to a group's queries, where they are sound."""
        begin, usable = self._clock.now(), group.mask & ~group.moved
        predictions, sound, features, score = self._decoded(
            group.values(), usable, len(group.cells)
        )
        decoded, epoch = self._clock.now(), self._adaptation.risk("decoded").epoch
        self._adaptation.observe("decode_seconds", decoded - begin)
        self._adaptation.observe("workers_responded", int(group.mask.sum()))
        accuracy, basis = self._policy.accuracy, int((~np.isnan(group.sent_at)).sum())
        limit, sure = self._adaptation.evidence(len(group.cells)).limit, 0
        for cell, row in places:
            if not sound[row, cell]:
                continue
            known = float(score[row, cell])
            within = known <= limit if accuracy.promises else math.isnan(known)
            errors = (known, math.nan) if accuracy.tolerance is None else (math.nan, known)
            answer = Answer(
                predictions[row, cell, ...],
                "decoded",
                basis,
                int(group.mask.sum()),
                *errors,
                features=features[row, cell].copy(),
            )
            group.add_estimate((cell, row), answer, within, epoch)
            sure += within
        if group.trace is not None:
            group.trace.add("decode", begin, decoded, answers=int(group.mask.sum()))
            counts = {"sure": sure, "uncertain": len(places) - sure}
            group.trace.add("error probability", decoded, self._clock.now(), **counts)

    def _decoded(
        self, values: np.ndarray, mask: np.ndarray, queries: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Decode values for a number of queries.

        Returns:
            By row and place: the predictions; whether they are sound, since a code may have lost a
            query, or a sum of large answers may have overflowed; the features of their score; and
            the score, the probability of a wrong label or the error bar of values.
        """
        promises = self._policy.accuracy.promises
        score = self._adaptation.scores.of(queries) if promises else None
        width = self._policy.max_batch_size
        found = self._coder.decode(values, mask, width, score, features=promises)
        assert found.score is not None
        finite = np.isfinite(found.predictions).reshape(*found.score.shape, -1).all(axis=-1)
        parts = found.predictions, found.recovered & finite, found.features, found.score
        predictions, sound, features, score = (each[:, :queries] for each in parts)
        return predictions, sound, features, score


def fitting_policy(
    policy: BatchingPolicy, coder: Coder, queries: BatchSpec, answers: BatchSpec
) -> BatchingPolicy:
    """Return a policy with its outputs as they are read, if it fits the code.

    Raises:
        ValueError: where it does not, or where queries or answers cannot be coded.
    """
    if coder.num_data > 1 and {queries.dtype, answers.dtype} != {CODED}:
        raise ValueError(
            f"queries are {queries.dtype} and answers {answers.dtype}: only float32 can be "
            "coded, so give a Coder(Uncoded(1))"
        )
    shapes = [answers.shape] if coder.form is None else coder.form.shapes
    read, _ = read_outputs(policy.outputs, policy.tolerance, shapes)
    if answers.dtype != CODED:  # nothing approximate
        read = policy.outputs or "values"
    exact_only = read == "values" and policy.tolerance is None
    if exact_only and coder.can_decode and not coder.systematic:
        raise ValueError(
            "outputs are values without a tolerance, so that all answers are exact, and a code "
            "that mixes all queries would send each of them twice: give a tolerance, "
            "interleaved points, or no code"
        )
    return dataclasses.replace(policy, outputs=read)
