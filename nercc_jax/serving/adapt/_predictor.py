"""Predicted answers: a surrogate's, where it is certain enough about a straggler's query.

Every own answer of the model first tests the surrogate, then trains it. A batch of them is a
validation batch: what the surrogate says of those queries, against what the model said. The latest
validation batches give an error probability and the limit below which no more labels are wrong than
allowed, or, for functions, error bounds. Then a learner learns from the batch.

Validation goes on while answers are given out. If more of those that are certain enough are wrong
than promised, by a test that is valid at every time (`RiskMonitor`), the traffic or the model has
changed, and everything that was calibrated is discarded.
"""

import collections
import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Shaped

from ...codes import Decoded
from ...codes.trees import Form, join
from ...evaluation._answers import in_parts
from ...evaluation.criteria import agree_on_labels, row_errors
from ...inference.models import Model
from ...pools.clock import TimeShare
from ...risk import ErrorProbability, Risk, RiskMonitor
from ...risk._accuracy import bar_factor, error_ratios
from ...risk._answer_check import AnswerCheck, fit_answer_check
from ...risk._error_probability import fit_error_probability
from ...risk._features import label_features
from ...surrogates import (
    AbstractSurrogate,
    Learner,
    LearnerTuning,
    Projection,
    Surrogate,
    fit_learner,
    principal_components,
    tune_learner,
)
from ...surrogates.nearest import nearest_predictions
from .._policy import BatchingPolicy
from ..core._request import repeat_rows
from ..core._setup import Setup

_LOG = logging.getLogger(__name__)

_WAITING = 512  # answers that wait to be learned from; later ones replace the earliest
# The share of the time that learning may take, since programs of JAX keep all cores of a CPU busy,
# at first and where it has settled, and the longest pause that follows from it, in seconds.
_SHARE, _LATER, _LONGEST = 0.05, 0.01, 1.0
# Answers that a learner takes at once, and that it starts from; it keeps four times as many.
BATCH, FIRST = 32, 256
_SETTLED = 1024  # validation answers after which little is left to learn
# Validation answers that calibration looks at, at most and at least, and the share by which their
# number grows until the next calibration.
_VALIDATION, LEAST, _MORE = 2048, 128, 0.25
_FEATURES = 64  # principal components, where queries have more numbers

# Returns the answers to queries as vectors, and their deviations, 1 where there are none.
HostOutputs: TypeAlias = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def outputs_on_host(
    surrogate: AbstractSurrogate,
    sizes: Sequence[int],
    *,
    nearest: bool = False,
    most_outputs: int = 256,
) -> HostOutputs:
    """Return a function that returns a surrogate's outputs on the host.

    A learner that predicts by NumPy does so. Of others a program is compiled for each of some
    numbers of queries, which are filled up to the next.

    Args:
        surrogate: The surrogate.
        sizes: These numbers, in ascending order.
        nearest: Whether a learner on the host predicts from few pairs (`nearest_predictions`).
        most_outputs: The most outputs for that: it solves for each of them at every update.
    """
    own = surrogate if isinstance(surrogate, Learner) else None
    if own is not None and own.prior is None and isinstance(own.features, Projection | None):
        few = nearest and own.form.size <= most_outputs
        predict = nearest_predictions(own) if few else own.predict

        def on_host(x: Shaped[np.ndarray, "queries ..."]) -> tuple[Any, Any]:
            mean, deviation = predict(x)
            return join(mean, 1)[0], deviation

        return on_host
    arrays, rest = eqx.partition(surrogate, eqx.is_array)
    on_device = eqx.combine(jax.tree.map(jnp.asarray, arrays), rest)

    def compiled(x: Shaped[np.ndarray, "queries ..."]) -> tuple[np.ndarray, np.ndarray]:
        at_once = next((size for size in sizes if size >= len(x)), sizes[-1])
        return in_parts(lambda rows: jax.device_get(_outputs(on_device, rows)), x, at_once)

    return compiled


@eqx.filter_jit
def _outputs(surrogate: AbstractSurrogate, x: Shaped[Any, "queries ..."]) -> tuple[Any, Any]:
    if isinstance(surrogate, Learner):
        mean, deviation = surrogate.predict(x)
    else:
        mean, deviation = surrogate.outputs(x), jnp.ones(len(x))
    return join(mean, 1)[0], deviation


class ValidationBatch(NamedTuple):
    """A surrogate's answers to some queries, compared with the model's own, which may be large.

    `mean` and `spread` are the answers that the check expects, and `own` the model's; empty where
    they are not checked.
    """

    features: Float[np.ndarray, "queries features"]
    deviation: Float[np.ndarray, " queries"]
    error: Float[np.ndarray, " queries"]
    wrong: Bool[np.ndarray, " queries"]
    mean: Float[np.ndarray, "checked m"]
    spread: Float[np.ndarray, " checked"]
    own: Float[np.ndarray, "checked m"]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The calibration of a surrogate; immutable, so that one thread may make it for others.

    Attributes:
        error_probability: the probability of a wrong label; None where labels do not matter.
        factor: what deviations are multiplied by to get error bounds.
        limit: the largest probability of a wrong label with which an answer is given out.
        tolerance: the largest error bound with which an answer is given out.
        share: the share of queries that are certain enough, by validation.
        check: the check of the model's own answers; None where they are not checked.
    """

    error_probability: ErrorProbability | None
    factor: float
    limit: float
    tolerance: float
    share: float
    check: AnswerCheck | None = None

    def assess(
        self, values: Float[np.ndarray, "queries m"], deviation: Float[np.ndarray, " queries"]
    ) -> Decoded:
        """Return the surrogate's answers with what calibration says of them.

        `recovered` are those that may be given out. The error probability is that of another label,
        NaN where labels do not matter; the deviation is the error bound, in units of the outputs,
        which covers the error of a share `coverage` of the answers.
        """
        # Infinite where a deviation is, whatever the factor.
        finite = np.isfinite(deviation)
        bound = np.where(finite, self.factor * np.where(finite, deviation, 0), np.inf)
        probability = np.full(len(values), np.nan)
        sure = (bound <= self.tolerance) & np.isfinite(values).all(axis=1)
        if self.error_probability is not None:
            probability = self.error_probability(values, deviation, values)
            sure &= probability <= self.limit
        return Decoded(values, np.zeros(0, bool), sure, bound, probability)


def calibrate(
    batches: Sequence[ValidationBatch], policy: BatchingPolicy, form: Form | None
) -> Calibration:
    """Return the calibration that these validation batches give, for the policy's promise."""
    parts = map(np.concatenate, zip(*batches, strict=True))
    features, deviation, error, wrong, mean, spread, own = parts
    accuracy, tolerance = policy.accuracy, policy.tolerance
    # It has to be right for those that are given out, not for all.
    factor = bar_factor(deviation[:, None], error[:, None], accuracy, len(error))
    error_probability, limit, share, check = None, 1.0, 1.0, None
    if accuracy.max_disagreement is not None:
        error_probability = fit_error_probability(
            features[:, None], wrong[:, None], failure=0.25, form=form
        )
        error_probability = jax.tree.map(np.asarray, error_probability)
        limit = error_probability.limit(accuracy.max_disagreement)
        share = 1 - error_probability.share(limit)
    if tolerance is not None:
        share *= float(np.mean(factor * deviation <= tolerance))
    if policy.check_answers is not None:
        labels = accuracy.max_disagreement is not None and (form is None or form.is_vector)
        check = fit_answer_check(mean, spread, own, policy.check_answers, labels=labels)
    most = math.inf if tolerance is None else tolerance
    return Calibration(error_probability, factor, limit, most, share, check)


@dataclasses.dataclass
class _Learning:
    """The learning thread's own state; a new one begins after each drift.

    Attributes:
        drifts: The number of drifts before it.
        time: When it may go on.
        monitor: The test of what would be given out.
        first: Pairs that a learner is made of.
        validation: The latest validation batches.
        count: The number of validation answers.
        due: Their number at the next calibration.
    """

    drifts: int
    time: TimeShare
    monitor: RiskMonitor
    first: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)
    validation: collections.deque[ValidationBatch] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=_VALIDATION // BATCH)
    )
    count: int = 0
    due: float = LEAST


class Predictor:
    """A surrogate that answers stragglers' queries, and learns from the model's own answers.

    Given to a `CodedBatcher`, it answers queries whose own worker straggles, as soon as that is
    noticed, wherever it is certain enough for the policy's `max_disagreement` or `tolerance`. It
    answers nothing until it is calibrated, which takes 384 answers, or 128 for a surrogate that
    does not learn, and has shown that it is right about stragglers' queries, which may be harder
    than others (14 of them for a `max_disagreement` of 0.1, 28 for 0.05, 138 for 0.01). It learns
    beside the batcher, in a twentieth of the time at most, later in a hundredth.

    Example:
        >>> import numpy as np
        >>> from nercc_jax import Uncoded
        >>> from nercc_jax.testing import SimulatedPool
        >>> from nercc_jax.serving import BatchingPolicy, CodedBatcher, Coder, Predictor
        >>> pool = SimulatedPool(np.tanh, 4, seconds=lambda size: 0.05)
        >>> policy = BatchingPolicy(max_disagreement=0.1)
        >>> predictor = Predictor()
        >>> batcher = CodedBatcher(
        ...     pool, Coder(Uncoded(1)), (3,), (3,), policy=policy, predictor=predictor
        ... )
        >>> predictor.state
        'learning'
        >>> batcher.close()
    """

    def __init__(self, surrogate: Model | AbstractSurrogate | None = None):
        """Create a predictor for one batcher.

        Args:
            surrogate: a cheap model with the served model's outputs (a student), or a learner; by
                default a learner that is made from the first 256 answers and keeps the latest
                1,024, whose features are the queries' numbers, or 64 principal components where
                there are more.

        Raises:
            ValueError: for a surrogate that is not callable.
        """
        if surrogate is not None and not isinstance(surrogate, AbstractSurrogate):
            surrogate = Surrogate(surrogate)
        self._surrogate = surrogate
        self._inbox: collections.deque[tuple[np.ndarray, np.ndarray]] = collections.deque(
            maxlen=_WAITING
        )
        self._setup: Setup | None = None  # until it is attached
        # The calibration, replaced as a whole by the learning thread; after a drift there is none.
        self._calibrated: Calibration | None = None
        self._drifts = 0

    def attach(self, setup: Setup, wake: Callable[[], Any]) -> None:
        """Attach the predictor to its batcher, whose learning thread calls `turn` after a `wake`.

        Raises:
            ValueError: where it has a batcher already, or nothing says what may be given out.
        """
        policy = setup.policy
        if self._setup is not None:
            raise ValueError("this predictor is another batcher's: make one for each")
        if not policy.accuracy.promises:
            raise ValueError(
                "to answer from what is known needs a policy with max_disagreement, or with a "
                "tolerance for outputs that are values"
            )
        self._setup, self._wake = setup, wake
        if self._surrogate is not None:
            self._use(self._surrogate)
        time = TimeShare(setup.clock, _SHARE, longest=_LONGEST)
        self._learning = _Learning(0, time, RiskMonitor(policy.accuracy.promised))
        self._risk = Risk(policy.accuracy, needs_evidence=True)
        self._followed = 0  # the drifts of calibration that the risk knows

    @property
    def state(self) -> Literal["learning", "answering", "drifted"]:
        """The state: it answers, it still learns, or drift has reset it."""
        if self._calibrated is not None:
            return "answering"
        return "drifted" if self._drifts else "learning"

    @property
    def share(self) -> float:
        """The share of stragglers' queries that it would answer."""
        calibrated = self._calibrated
        return 0.0 if calibrated is None else min(calibrated.share, self._risk.share)

    @property
    def risk(self) -> Risk:
        """The evidence of stragglers on predictions, for the deciding thread.

        Where calibration began again, the evidence does, too.
        """
        if self._drifts != self._followed:
            self._followed = self._drifts
            self._risk.restart()
        return self._risk

    def status(self) -> dict[str, Any]:
        """Return the predictor's part of a server's status."""
        return {
            "state": self.state,
            "validated": self._learning.count,
            "share": self.share,
            "drifts": self._drifts,
            "stragglers": self._risk.status(),
        }

    def predict(self, x: Shaped[np.ndarray, "queries ..."]) -> Decoded | None:
        """Return its answers to some queries; None while it is not calibrated."""
        calibrated = self._calibrated
        return None if calibrated is None else calibrated.assess(*self._outputs(x))

    @property
    def checks_answers(self) -> bool:
        """True once `suspicious` knows enough to find wrong answers."""
        return self._calibrated is not None and self._calibrated.check is not None

    def suspicious(
        self, x: Shaped[np.ndarray, "queries ..."], own: Shaped[np.ndarray, "queries ..."]
    ) -> Bool[np.ndarray, " queries"]:
        """Return which of the model's own answers look wrong; none while it is not calibrated."""
        calibrated = self._calibrated
        if calibrated is None or calibrated.check is None:
            return np.zeros(len(x), bool)
        return calibrated.check.suspicious(*self._expected(x), own.reshape(len(own), -1))

    def add_answer(self, x: Shaped[np.ndarray, "..."], own: np.ndarray) -> None:
        """Take the model's own answer to a query, and return at once."""
        self._inbox.append((x, own.ravel()))
        if len(self._inbox) == BATCH:  # once: a turn that has to wait comes back by itself
            self._wake()

    def discard(self) -> None:
        """Give nothing out until the surrogate is calibrated again: too many were wrong."""
        self._calibrated = None
        self._drifts += 1
        self._wake()

    def turn(self) -> float:
        """Learn from what has come, and return when to be called again; on a thread of its own."""
        assert self._setup is not None
        time = self._learning.time
        while len(self._inbox) >= BATCH:
            begin = self._setup.clock.now()
            if begin < time.next:
                return time.next
            pairs = [self._inbox.popleft() for _ in range(BATCH)]
            try:
                self.learn(*map(np.stack, zip(*pairs, strict=True)))
            finally:
                settled = self._calibrated is not None and self._learning.count >= _SETTLED
                time.spend(begin, _LATER if settled else _SHARE)
        return math.inf

    def learn(self, x: Shaped[np.ndarray, "pairs ..."], own: Float[np.ndarray, "pairs m"]) -> None:
        """Validate, calibrate and train the surrogate; of the first pairs, make a learner."""
        if self._learning.drifts != self._drifts:
            self._calibrated = None  # if it was made meanwhile
            monitor = RiskMonitor(self._learning.monitor.promised)
            self._learning = _Learning(self._drifts, self._learning.time, monitor)
        if self._surrogate is not None:
            self._validate(x, own)
            if isinstance(self._surrogate, Learner):
                self._use(self._surrogate.update(x, own))
        else:
            self._learning.first += zip(x, own, strict=True)
            if len(self._learning.first) < FIRST:
                return
            x, own = map(np.stack, zip(*self._learning.first, strict=True))
            features = principal_components(x, _FEATURES) if x[0].size > _FEATURES else None
            learner = fit_learner(
                x, own, features=features, capacity=4 * FIRST, kernel="squared_exponential",
                tuning=None,
            )  # fmt: skip
            # A width for each feature is found by descent. With one for all, 31 and 0 % of the
            # answers of an elliptic equation, with 10 parameters, were within a tenth of their
            # spread, and now 99 %. Where all have one anyway, it is from a grid: on LeNet5's
            # answers descent finds nothing better (93.1 % of labels from 1,024 of them either way).
            tuning = LearnerTuning(rows=FIRST)
            groups = tuning.groups(learner.kernel)
            if len(groups) > 1 and not groups.any():
                tuning = LearnerTuning(widths="one", rows=FIRST, steps=0)
            self._learning.first = []
            self._use(tune_learner(learner, tuning))

    def _use(self, surrogate: AbstractSurrogate) -> None:
        """Go by this surrogate from now on, with the calibration that there is."""
        assert self._setup is not None
        policy, self._surrogate = self._setup.policy, surrogate
        if policy.check_answers is not None:
            self._expected = outputs_on_host(surrogate, policy.batch_sizes, nearest=True)
        self._outputs = outputs_on_host(surrogate, sorted({policy.max_batch_size, BATCH}))

    def _validate(self, x: np.ndarray, own: np.ndarray) -> None:
        """Compare the surrogate's answers with the model's own, and calibrate now and then."""
        assert self._setup is not None
        policy, form, learning = self._setup.policy, self._setup.coder.form, self._learning
        values, deviation = self._outputs(x)
        features = np.asarray(label_features(values, deviation, values, form))
        wrong = ~np.asarray(agree_on_labels(values, own, form))
        error, checks = np.asarray(row_errors(values, own)), policy.check_answers is not None
        checked = (*self._expected(x), own) if checks else (own[:0], own[:0, 0], own[:0])
        if (known := self._calibrated) is not None:
            found = known.assess(values, deviation)
            excess = error_ratios(error, np.asarray(found.deviation))
            missed = policy.accuracy.missed(wrong, excess)
            if learning.monitor.add(missed[found.recovered].tolist()):
                self.discard()
                self._setup.observe("drift", 1)
                _LOG.warning(
                    "predictions went wrong more often than promised: they are not given out"
                )
                return
        # Queries that come again are predicted better than new ones, whose bars they would shorten.
        # Where nothing is known of errors yet, there is nothing to calibrate.
        new = np.isfinite(deviation)
        if isinstance(self._surrogate, Learner):
            new &= ~self._surrogate.knows(x)
        fields = (features, deviation, error, wrong, *checked)
        learning.validation.append(ValidationBatch(*(each[new[: len(each)]] for each in fields)))
        learning.count += int(new.sum())
        if learning.count < learning.due:
            return
        learning.due = learning.count + _MORE * min(learning.count, _VALIDATION)
        made = calibrate(learning.validation, policy, form)
        if self._calibrated is None:
            # Compile what the deciding thread calls.
            for size in {policy.max_batch_size, BATCH}:
                made.assess(*self._outputs(repeat_rows(x[:size], size)))
            for size in policy.batch_sizes:
                if made.check is not None:
                    expected = self._expected(repeat_rows(x[:size], size))
                    made.check.suspicious(*expected, repeat_rows(own[:size], size))
        if learning.drifts == self._drifts:
            self._calibrated = made
