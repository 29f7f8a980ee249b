"""Predicted answers: a surrogate answers stragglers' queries where it is certain enough.

Each of the model's own answers first tests the surrogate, then trains it. A batch of them is a
validation batch, which compares the surrogate's answers with the model's. From the latest
validation batches follow an error probability, and the limit below which no more labels are wrong
than allowed; or, for values, error bounds. Then a learner is updated with the batch.

Validation continues while answers are given out. If more of the answers that are certain enough are
wrong than promised, by a test that is valid at every time (`RiskMonitor`), the traffic or the model
has changed, and the calibration is discarded.
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
from ...evaluation.answers import in_parts
from ...evaluation.criteria import agree_on_labels, row_errors
from ...inference.models import Model
from ...pools.clock import TimeShare
from ...risk import ErrorProbability, Risk, RiskMonitor
from ...risk.accuracy import bar_factor, error_ratios
from ...risk.answer_check import AnswerCheck, fit_answer_check
from ...risk.error_probability import fit_error_probability
from ...risk.features import label_features
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

_WAITING = 512  # answers in the queue for learning; later ones replace the earliest
# The share of the time that learning may take, at first and after `_SETTLED` validation answers,
# and the longest pause for this, in seconds: JAX programs keep all cores of a CPU busy.
_SHARE, _LATER, _LONGEST = 0.05, 0.01, 1.0
# Answers in a batch, and answers to which a learner is first fitted; it keeps 4 * FIRST pairs.
BATCH, FIRST = 32, 256
_SETTLED = 1024  # validation answers after which little is left to learn
# The most and the fewest validation answers of a calibration, and the share by which their number
# grows until the next calibration.
_VALIDATION, LEAST, _MORE = 2048, 128, 0.25
_FEATURES = 64  # principal components, if queries have more numbers than that

# Returns the answers to queries as vectors, and their deviations, 1 for surrogates without any.
HostOutputs: TypeAlias = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def outputs_on_host(
    surrogate: AbstractSurrogate,
    sizes: Sequence[int],
    *,
    nearest: bool = False,
    most_outputs: int = 256,
) -> HostOutputs:
    """Return a function that returns a surrogate's outputs on the host.

    A learner without a prior, on plain or projected inputs, predicts with NumPy. Any other
    surrogate is compiled for each batch size in `sizes`, and batches are padded to the next size.

    Args:
        surrogate: The surrogate.
        sizes: The batch sizes, in ascending order.
        nearest: Whether a learner on the host predicts from few pairs (`nearest_predictions`).
        most_outputs: The most outputs for `nearest`, which solves for each of them at every update.
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
    """A surrogate's answers to some queries, compared with the model's own.

    `mean` and `spread` are the answers that the check expects, with deviations, and `own` the
    model's answers; all three are empty if answers are not checked.
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
    """The calibration of a surrogate; immutable, so that threads may share it.

    Attributes:
        error_probability: the probability of a wrong label; None for outputs without labels.
        factor: the factor by which deviations are multiplied to get error bounds.
        limit: the largest probability of a wrong label with which an answer is given out.
        tolerance: the largest error bound with which an answer is given out.
        share: the share of validation queries that are certain enough.
        check: the check of the model's own answers; None if they are not checked.
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
        """Return the surrogate's answers with calibrated error probabilities and bounds.

        `recovered` is the mask of answers that are certain enough. `error_probability` is the
        probability of a wrong label, NaN for outputs without labels. `deviation` is the error
        bound, in units of the outputs, which covers the error of a share `coverage` of the answers.
        """
        # The bound is infinite wherever the deviation is, even if the factor is 0.
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
    """Return the calibration on these validation batches, for the policy's accuracy."""
    parts = map(np.concatenate, zip(*batches, strict=True))
    features, deviation, error, wrong, mean, spread, own = parts
    accuracy, tolerance = policy.accuracy, policy.tolerance
    # The factor must be right for the answers that are given out, not for all.
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
    """The learning thread's own state, replaced after each drift.

    Attributes:
        drifts: The number of drifts before it.
        time: The limit on the share of the time that learning takes.
        monitor: The drift test on the answers that are certain enough.
        first: The pairs for the first fit of a learner.
        validation: The latest validation batches.
        count: The number of validation answers so far.
        due: The number of validation answers at which the next calibration is due.
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

    In a `CodedBatcher` it answers queries whose own worker straggles, as soon as that is noticed,
    if it is certain enough for the policy's `max_disagreement` or `tolerance`. It answers no query
    before two conditions are met. It must be calibrated, which takes 384 answers, or 128 for a
    surrogate that does not learn. And it must have been right about stragglers' queries, which may
    be harder than others (14 of them for a `max_disagreement` of 0.1, 28 for 0.05, 138 for 0.01).
    Learning takes at most a twentieth of the time, later a hundredth.

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
            surrogate: a cheap model with the served model's outputs (a student), or a learner
                (default: a learner fitted to the first 256 answers, which keeps the latest 1,024;
                its features are the queries' numbers, or 64 principal components of more).

        Raises:
            ValueError: if the surrogate is not callable.
        """
        if surrogate is not None and not isinstance(surrogate, AbstractSurrogate):
            surrogate = Surrogate(surrogate)
        self._surrogate = surrogate
        self._inbox: collections.deque[tuple[np.ndarray, np.ndarray]] = collections.deque(
            maxlen=_WAITING
        )
        self._setup: Setup | None = None  # until it is attached
        # The calibration, replaced as a whole by the learning thread; None after a drift.
        self._calibrated: Calibration | None = None
        self._drifts = 0

    def attach(self, setup: Setup, wake: Callable[[], Any]) -> None:
        """Attach the predictor to its batcher, whose learning thread calls `turn` after a `wake`.

        Raises:
            ValueError: if it has a batcher already, or the policy promises no accuracy.
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
        self._followed = 0  # the number of drifts after which `_risk` was restarted

    @property
    def state(self) -> Literal["learning", "answering", "drifted"]:
        """The state: "answering" if calibrated, else "drifted" after a drift, or "learning"."""
        if self._calibrated is not None:
            return "answering"
        return "drifted" if self._drifts else "learning"

    @property
    def share(self) -> float:
        """The estimated share of stragglers' queries that it answers; 0 until it is calibrated."""
        calibrated = self._calibrated
        return 0.0 if calibrated is None else min(calibrated.share, self._risk.share)

    @property
    def risk(self) -> Risk:
        """The evidence from stragglers on the risk of predictions, for the deciding thread only.

        It is restarted after each drift.
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
        """Return the surrogate's answers to some queries; None until it is calibrated."""
        calibrated = self._calibrated
        return None if calibrated is None else calibrated.assess(*self._outputs(x))

    @property
    def checks_answers(self) -> bool:
        """True once the check that `suspicious` uses is calibrated."""
        return self._calibrated is not None and self._calibrated.check is not None

    def suspicious(
        self, x: Shaped[np.ndarray, "queries ..."], own: Shaped[np.ndarray, "queries ..."]
    ) -> Bool[np.ndarray, " queries"]:
        """Return the mask of own answers of the model that look wrong; none until calibrated."""
        calibrated = self._calibrated
        if calibrated is None or calibrated.check is None:
            return np.zeros(len(x), bool)
        return calibrated.check.suspicious(*self._expected(x), own.reshape(len(own), -1))

    def add_answer(self, x: Shaped[np.ndarray, "..."], own: np.ndarray) -> None:
        """Queue the model's own answer to a query for learning, and return at once."""
        self._inbox.append((x, own.ravel()))
        if len(self._inbox) == BATCH:  # only once: a turn that must pause is repeated by itself
            self._wake()

    def discard(self) -> None:
        """Discard the calibration after a drift; no query is answered until there is a new one."""
        self._calibrated = None
        self._drifts += 1
        self._wake()

    def turn(self) -> float:
        """Learn from the queued answers, on the learning thread; return the next turn's time."""
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
        """Validate, calibrate and train the surrogate; fit a learner to the first pairs."""
        if self._learning.drifts != self._drifts:
            self._calibrated = None  # it may have been set at the same time as the drift
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
            # A kernel width for each feature is tuned by descent. With one width for all, 31 and
            # 0 % of the answers of an elliptic equation with 10 parameters were within a tenth of
            # their spread; now 99 % are. If there is one width anyway, a grid suffices: on LeNet5's
            # answers descent is no better (93.1 % of labels from 1,024 of them either way).
            tuning = LearnerTuning(rows=FIRST)
            groups = tuning.groups(learner.kernel)
            if len(groups) > 1 and not groups.any():
                tuning = LearnerTuning(widths="one", rows=FIRST, steps=0)
            self._learning.first = []
            self._use(tune_learner(learner, tuning))

    def _use(self, surrogate: AbstractSurrogate) -> None:
        """Use this surrogate from now on, with the present calibration."""
        assert self._setup is not None
        policy, self._surrogate = self._setup.policy, surrogate
        if policy.check_answers is not None:
            self._expected = outputs_on_host(surrogate, policy.batch_sizes, nearest=True)
        self._outputs = outputs_on_host(surrogate, sorted({policy.max_batch_size, BATCH}))

    def _validate(self, x: np.ndarray, own: np.ndarray) -> None:
        """Compare the surrogate's answers with the model's own, and calibrate if it is due."""
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
        # Repeated queries are predicted better than new ones, so they would make error bounds too
        # small. Predictions without a finite deviation cannot be calibrated.
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
            # Compile the programs that the deciding thread calls.
            for size in {policy.max_batch_size, BATCH}:
                made.assess(*self._outputs(repeat_rows(x[:size], size)))
            for size in policy.batch_sizes:
                if made.check is not None:
                    expected = self._expected(repeat_rows(x[:size], size))
                    made.check.suspicious(*expected, repeat_rows(own[:size], size))
        if learning.drifts == self._drifts:
            self._calibrated = made
