"""Coded inference on a pool: encode, dispatch, wait, decode, run uncertain ones again."""

import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, PyTree, Shaped

from ..codes import AbstractCode, Decoded
from ..codes._checks import check_count
from ..codes._trees import check_finite, points_of
from ..inference._coded import as_groups
from ..inference.models import check_conditions
from ..risk import Accuracy, ErrorProbability
from ..schemes import Scheme
from ..schemes._scheme import select_uncertain
from ._batch import BatchAnswers, Enough, check_deadline
from ._pool import AbstractPool
from ._steps import ScoredPredictions, code_steps, scheme_steps, score_of
from ._worker import no_mesh, off_meshes


@dataclasses.dataclass(frozen=True)
class Timing:
    """The seconds of each step of a call: see `PoolResult`."""

    encode: float
    dispatch: float
    wait: float
    decode: float
    reexecute: float = 0.0

    @property
    def total(self) -> float:
        return self.encode + self.dispatch + self.wait + self.decode + self.reexecute


@dataclasses.dataclass(frozen=True)
class PoolResult:
    """Predictions with their status, the answers they rest on, and the time they took.

    Attributes:
        decoded: Predictions, and which of them were recovered.
        answers: The answers to coded data points.
        timing: Seconds of each step: `encode`; `dispatch`, handing coded data points to the pool;
            `wait`, until the answers were enough: the workers' time, transport included; `decode`;
            `reexecute`; and of the whole call, `total`.
        error_probability: The probability that a label is not the model's own; None without an
        error probability.
        reexecuted: Which predictions are the model's own because they were run again; their error
            and deviation are 0. None without an error probability or a tolerance.
        deviation: How far predictions may be off, in units of the outputs; None without a scheme.
    """

    decoded: Decoded
    answers: BatchAnswers
    timing: Timing
    error_probability: Float[np.ndarray, "*groups num_data"] | None = None
    reexecuted: Bool[np.ndarray, "*groups num_data"] | None = None
    deviation: Float[np.ndarray, "*groups num_data"] | None = None


@no_mesh()
def pool_inference(
    pool: AbstractPool,
    code: AbstractCode | Scheme,
    *,
    with_status: bool = False,
    grouped: bool | None = None,
    error_probability: ErrorProbability | None = None,
    max_disagreement: float | None = None,
    max_reexecution: float = 1.0,
    tolerance: float | None = None,
    coverage: float = 0.9,
) -> Callable[..., Any]:
    """Return a function `(x, enough=None, deadline=60.0) -> predictions` of a pool behind a code.

    Its arguments: `x` is (K, ...) for one group, or (groups, K, ...), finite, of a float dtype, or
    a pytree of such as for `coded_inference`; every worker gets its coded data points of all groups
    as one batch. `enough` says when to decode: a number of answers (default: all N), or a function
    of the mask, such as `Answers.below`. `deadline` is in seconds; the answers that are in by then
    are decoded. Predictions are (K, ...) or (groups, K, ...), NaN where a data point cannot be
    recovered.

    With an error probability, data points whose label is too uncertain are sent to the pool again,
    themselves, and their predictions are then the model's own: the least certain first. Those calls
    are hedged as all of the pool's. A data point without such an answer at the deadline stays as
    decoded; `PoolResult.error_probability` says how uncertain it is.

    A `Scheme` in the code's place is carried out as a whole: its order (over all data points of a
    call), its surrogate or learner, the place of its redundant workers, its error probability and
    its error bars. With a tolerance, data points whose error bar is larger are sent again as above.

    The encoder and the decoder are compiled once, for every straggler set. An error probability or
    a forecast that was calibrated under other `conditions` than the pool's causes a
    `CalibrationWarning`.

    Args:
        pool: The workers.
        code: A code or a scheme.
        with_status: Return a `PoolResult` instead of predictions alone.
        grouped: Whether x comes as groups (default: by the axis of length K, if only one has it).
        error_probability: From `calibrate_error_probability`; a scheme has its own.
        max_disagreement: The largest share of the labels given out approximately that may differ
            from the model's own (`ErrorProbability.limit`).
        max_reexecution: The share of a call's data points that may be run again.
        tolerance: The largest error bar of a scheme's predictions, in units of the outputs.
        coverage: The share of errors that error bars cover.

    Raises:
        ValueError: For an error probability without `max_disagreement` or the reverse, or with a
        scheme; for a
            tolerance without a scheme or with a `max_disagreement`; for shares outside [0, 1]; for
            an error probability that needs a surrogate, and a code that is no regression. From the
            function, before anything is sent: for an x that does not fit or is not finite, and a
            deadline that is not positive.
        TimeoutError: From the function, if no prediction can be recovered at the deadline.
        RuntimeError: From the function, if no worker answers and none will.

    Example:
        >>> from nercc_jax import NeRCC
        >>> from nercc_jax.pools import DevicePool
        >>> with DevicePool(jnp.tanh, 6) as pool:
        ...     infer = pool_inference(pool, NeRCC(4, 6), with_status=True)
        ...     result = infer(jnp.ones((4, 3)), 5, deadline=60.0)  # decodes 5 of 6 answers
        >>> int(result.answers.available.sum()) >= 5
        True
    """
    bars = None
    if isinstance(code, Scheme):
        scheme = off_meshes(code)
        plain, bars = scheme.code, scheme.bars
        check_conditions((scheme.error_probability, bars), pool.conditions)
        rule = error_probability, max_disagreement, max_reexecution, tolerance
        limit = _limit(scheme, *rule)
        encode, decode = scheme_steps(scheme)
    elif tolerance is not None:
        raise ValueError("a tolerance wants error bars: give a `Scheme` in the code's place")
    else:
        check_conditions(error_probability, pool.conditions)
        plain, error_probability = off_meshes((code, error_probability))
        limit = _limit(plain, error_probability, max_disagreement, max_reexecution)
        if error_probability is None:
            encode, decode = code_steps(plain)
        else:
            encode, decode = scheme_steps(Scheme(plain, error_probability=error_probability))
    kinds = plain.worker_models.tolist()
    target = Accuracy(max_disagreement=max_disagreement, tolerance=tolerance, coverage=coverage)

    @no_mesh()
    def infer(x: PyTree, enough: Enough | None = None, deadline: float = 60.0):
        begin = pool.clock.now()
        deadline = check_deadline(deadline)
        x, _, many = as_groups(plain, jax.tree.map(np.asarray, x), grouped=grouped)
        check_finite(x if many else jax.tree.map(lambda leaf: leaf[0], x), 2 if many else 1)
        outgoing = encode(x)
        encoded = pool.clock.now()
        check_conditions(enough, pool.conditions)
        needed = None if enough is None or callable(enough) else operator.index(enough)
        with pool.dispatch(outgoing.coded, kinds=kinds, needed=needed) as batch:
            sent = pool.clock.now()
            answers = batch.wait(enough, deadline)
        waited = pool.clock.now()
        if answers.values is None:
            raise _nobody(pool, answers, deadline)
        found = decode(outgoing, answers.values, answers.available)
        again = None
        if not np.any(found.decoded.recovered):
            raise TimeoutError(
                f"no prediction can be recovered from the {answers.available.sum()} of "
                f"{plain.num_workers} answers that were in after {deadline} s"
            )
        end = pool.clock.now()
        score = score_of(target, bars, found)
        if score is not None:
            most = int(max_reexecution * score.size)
            chosen = select_uncertain(score.ravel(), limit=limit, at_most=most)
            found, again = _reexecute(pool, x, found, chosen, deadline - (end - sent))
        if not many:
            found, again = jax.tree.map(lambda leaf: leaf[0], (found, again))
        decoded, error_probabilities, deviation = found
        last = pool.clock.now() - end
        timing = Timing(encoded - begin, sent - encoded, waited - sent, end - waited, last)
        result = PoolResult(decoded, answers, timing, error_probabilities, again, deviation)
        return result if with_status else decoded.predictions

    return infer


def _limit(
    code: AbstractCode | Scheme,
    error_probability: ErrorProbability | None,
    max_disagreement: float | None,
    max_reexecution: float,
    tolerance: float | None = None,
) -> float:
    """Return the error probability or bar above which a prediction is not given out at once."""
    if not 0 <= max_reexecution <= 1:
        raise ValueError(f"max_reexecution must be a share in [0, 1], not {max_reexecution}")
    if isinstance(code, Scheme):
        if error_probability is not None:
            raise ValueError(
                "a scheme has its own error probability: Scheme(code, error_probability=...)"
            )
        if tolerance is not None:
            if max_disagreement is not None or not tolerance >= 0:
                raise ValueError(
                    f"a tolerance must be 0 or positive, and without max_disagreement: {tolerance}"
                )
            return tolerance
        if max_disagreement is None:
            return 1.0
        if code.error_probability is None:
            raise ValueError(
                "max_disagreement needs an error probability: Scheme(code, error_probability=...)"
            )
        return code.error_probability.limit(max_disagreement)
    if error_probability is None and max_disagreement is None:
        return 1.0
    if error_probability is None or max_disagreement is None:
        raise ValueError(
            "error_probability and max_disagreement go together: how likely a label is wrong, "
            "and how many may be"
        )
    # Each says so where it does not fit: a code without a deviation, and a surrogate's error
    # probability.
    code.posterior_variance(np.ones(code.num_workers, bool))
    error_probability(
        jnp.zeros(2 if error_probability.form is None else error_probability.form.size),
        jnp.ones(()),
    )
    return error_probability.limit(max_disagreement)


def _reexecute(
    pool: AbstractPool,
    x: PyTree[Shaped[np.ndarray, "groups num_data ..."]],
    found: ScoredPredictions,
    chosen: Int[np.ndarray, " chosen"],
    seconds: float,
) -> tuple[ScoredPredictions, Bool[np.ndarray, "groups num_data"]]:
    """Have the pool run some data points themselves.

    Return predictions with the model's own in place, and which of them those are.
    """
    decoded = found.decoded
    again = np.zeros(decoded.recovered.shape, bool)
    if len(chosen) == 0 or seconds <= 0:
        return found, again
    # As many in a call as coded ones were, for which workers have compiled their program.
    size = len(again)
    rows = np.resize(chosen, -(-len(chosen) // size) * size).reshape(-1, size)
    points = jax.tree.map(lambda leaf: leaf[rows], points_of(x))
    with pool.dispatch(points) as batch:
        answers = batch.wait(deadline=seconds)
    if answers.values is None:
        return found, again
    places = np.unravel_index(rows[answers.available], again.shape)

    def filled(values: Any, new: Any) -> Any:
        values = np.array(values)
        values[places] = new
        return values

    own = jax.tree.map(lambda leaf: leaf[answers.available], answers.values)
    status = eqx.tree_at(
        lambda d: (d.predictions, d.recovered),
        decoded,
        (jax.tree.map(filled, decoded.predictions, own), filled(decoded.recovered, True)),
    )
    sure = (None if each is None else filled(each, 0) for each in found[1:])
    return ScoredPredictions(status, *sure), filled(again, True)


def _nobody(pool: AbstractPool, answers: BatchAnswers, deadline: float) -> Exception:
    """Return the error for a batch without a single answer."""
    report = pool.report()
    seen = f"{report.busy} workers are busy, {report.starting} are started again"
    if answers.failures:
        last = answers.failures[-1]
        seen += (
            f"; {len(answers.failures)} failures, the last at worker {last.worker}: {last.reason}"
        )
    if answers.waited < deadline:
        return RuntimeError(f"no worker answered, and none will: {seen}")
    return TimeoutError(f"no worker answered within {deadline} s: {seen}")


# Many batches, one after the other.


@dataclasses.dataclass(frozen=True)
class BatchOutcome:
    """The outcome of one batch of many: see `run_batches`."""

    number: int
    attempts: int
    result: PoolResult | None
    short: bool
    trouble: str | None


def run_batches(
    pool: AbstractPool,
    code: AbstractCode,
    batches: Iterable[PyTree],
    *,
    enough: Enough | None = None,
    deadline: float = 60.0,
    attempts: int = 3,
) -> Iterator[BatchOutcome]:
    """Yield the outcome of coded inference on each of many batches, in order.

    A batch that is not recovered whole is dispatched again, each time with its own deadline. Data
    points that are lost in spite of that are NaN in its outcome, and the next batch follows. A pool
    whose workers die goes on with their replacements.

    Args:
        pool: The workers.
        code: The code.
        batches: Batches (groups, K, ...).
        enough: When to decode, as in `pool_inference`.
        deadline: Seconds for each attempt.
        attempts: How often a batch is dispatched at most.

    Yields:
        The batch's `number`, from 0; how often it was dispatched (`attempts`); the `result` of the
        attempt that recovered the most, a `PoolResult`, None where none recovered anything; whether
        that was decoded from fewer answers than `enough` (`short`), at the deadline or because no
        more could come; and what went wrong in the last attempt that did not recover everything
        (`trouble`), None where every attempt did.

    Raises:
        ValueError: At once, for fewer than one attempt, or a deadline that is not positive; in its
            turn, for a batch or a number that does not fit.

    Example:
        >>> from nercc_jax import NeRCC
        >>> from nercc_jax.pools import DevicePool
        >>> batches = np.ones((3, 1, 4, 2), np.float32)  # three batches of one group of K = 4
        >>> with DevicePool(jnp.tanh, 6) as pool:
        ...     for outcome in run_batches(pool, NeRCC(4, 6), batches, enough=5):
        ...         print(outcome.number, outcome.result.decoded.predictions.shape)
        0 (1, 4, 2)
        1 (1, 4, 2)
        2 (1, 4, 2)
    """
    attempts, deadline = check_count("attempts", attempts), check_deadline(deadline)
    infer = pool_inference(pool, code, with_status=True, grouped=True)

    def run() -> Iterator[BatchOutcome]:
        for number, x in enumerate(batches):
            result, most, trouble, tries = None, 0, None, 0
            while tries < attempts:
                tries += 1
                try:
                    found = infer(x, enough, deadline)
                except (TimeoutError, RuntimeError) as error:  # nothing to decode, or recovered
                    trouble = str(error)
                    continue
                recovered = np.asarray(found.decoded.recovered)
                if recovered.sum() > most:
                    result, most = found, recovered.sum()
                if recovered.all():
                    break
                responded = int(found.answers.available.sum())
                trouble = (
                    f"{recovered.size - recovered.sum()} of {recovered.size} data points cannot be "
                    f"recovered from the {responded} answers that were in"
                )
            short = False
            if result is not None:
                available = result.answers.available
                needed = code.num_workers if enough is None else enough
                short = not (needed(available) if callable(needed) else available.sum() >= needed)
            yield BatchOutcome(number, tries, result, short, trouble)

    return run()
