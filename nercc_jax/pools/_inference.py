"""Coded inference on a pool: encode, dispatch, wait for enough, decode, run doubtful ones again."""

import dataclasses
import operator
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from ..codes import (
    AbstractCode,
    Decoded,
    check_finite,
    decode_groups,
    encoder_rows,
    join,
    known_decoders,
    points_of,
)
from ..inference import check_conditions, group_points
from ..risk import ErrorProbability
from ..schemes import Scheme, select_uncertain
from ..surrogates import decode_with_deviation
from ._batch import BatchAnswers, Enough, check_deadline
from ._encoding import encode_on_host
from ._pool import AbstractPool
from ._schemes import Goal, Judged, Sent, scheme_steps
from ._worker import no_mesh, off_meshes


@dataclasses.dataclass(frozen=True)
class Timing:
    """The seconds of each step of a batch; together they make up the whole call.

    `wait` is from the last coded data point's dispatch until the answers were enough: the workers'
    time, transport included. `reexecute` is what running doubtful data points again took.
    """

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
    """Predictions with their status, the answers they rest on, and the time it took.

    With an `ErrorProbability`, `doubt` is the probability that a label is not the model's own; of a
    scheme, `deviation` is how far predictions may be off, in units of the outputs. `reexecuted`
    says which predictions are the model's own because they were run again (their doubt and
    deviation are 0). What there is none of is None. `answers` are those to coded data points.
    """

    decoded: Decoded
    answers: BatchAnswers
    timing: Timing
    doubt: Float[np.ndarray, "*groups num_data"] | None = None
    reexecuted: Bool[np.ndarray, "*groups num_data"] | None = None
    deviation: Float[np.ndarray, "*groups num_data"] | None = None


@no_mesh()
def pool_inference(
    pool: AbstractPool,
    code: AbstractCode | Scheme,
    *,
    with_status: bool = False,
    grouped: bool | None = None,
    doubt: ErrorProbability | None = None,
    max_disagreement: float | None = None,
    max_reexecution: float = 1.0,
    tolerance: float | None = None,
    coverage: float = 0.9,
) -> Callable[..., Any]:
    """One function `(x, enough=None, deadline=60.0) -> predictions` for a pool behind a code.

    x: (K, ...) for one group, or (groups, K, ...), finite, of a float dtype, or a pytree of such as
    for `coded_inference`; every worker gets its coded data points of all groups as one batch.
    `enough` says when to decode: a number of answers (all N unless given), or a function of the
    mask, such as `Forecast.below`; `deadline` is in seconds, and what is in by then is decoded.
    Predictions are (K, ...) or (groups, K, ...), NaN where a data point cannot be recovered;
    `with_status=True` returns a `PoolResult`. `grouped` says whether x comes as groups; unless
    given, the axis of length K tells, if only one has it.

    With a `doubt` (`calibrate_error_probability`), data points whose label is too doubtful for
    `max_disagreement` in the mean are sent to the pool again, themselves, and their predictions are
    the model's own: the most doubtful first, and no more than the share `max_reexecution` of all
    data points of a call. That is hedged as all the pool does. What has no such answer when the
    deadline comes stays as decoded; `PoolResult.doubt` tells how doubtful it is.

    A `Scheme` in the code's place is carried out: its order (over all data points of a call), its
    surrogate or learner, where its redundant workers are, its doubt and its error bars. With a
    `tolerance`, in units of the outputs, data points whose error bar (with this `coverage`) is
    larger are sent again as above.

    What was calibrated under other `conditions` than the pool's (a doubt, a forecast's rule) says
    so by a `CalibrationWarning`.

    The encoder and the decoder are compiled here, once, for every straggler set.

    Raises: ValueError for a doubt without `max_disagreement` or the reverse, or beside a scheme, a
    tolerance without a scheme or beside a `max_disagreement`, shares outside [0, 1], a doubt that
    wants a surrogate, and a code that is no regression; for an x that does not fit or
    is not finite, and a deadline that is not positive, before anything is sent; TimeoutError where
    no prediction can be recovered from what is in at the deadline; RuntimeError where no worker
    answers and none will.
    """
    bars = None
    if isinstance(code, Scheme):
        scheme = off_meshes(code)
        plain, bars = scheme.code, scheme.bars
        check_conditions((scheme.error_probability, bars), pool.conditions)
        limit = _scheme_limit(scheme, doubt, max_disagreement, max_reexecution, tolerance)
        send, judge = scheme_steps(scheme)
    elif tolerance is not None:
        raise ValueError("a tolerance wants error bars: give a `Scheme` in the code's place")
    else:
        check_conditions(doubt, pool.conditions)
        plain, doubt = off_meshes((code, doubt))
        limit = _limit(plain, doubt, max_disagreement, max_reexecution)
        send, judge = _code_steps(plain, doubt)
    kinds, goal = plain.worker_models.tolist(), Goal(tolerance, max_disagreement, coverage)

    @no_mesh()
    def infer(x: PyTree, enough: Enough | None = None, deadline: float = 60.0):
        begin = time.perf_counter()
        deadline = check_deadline(deadline)
        x, many = _groups(plain, x, grouped)
        outgoing = send(x)
        encoded = time.perf_counter()
        check_conditions(enough, pool.conditions)
        needed = None if enough is None or callable(enough) else operator.index(enough)
        with pool.dispatch(outgoing.coded, kinds=kinds, needed=needed) as batch:
            sent = time.perf_counter()
            answers = batch.wait(enough, deadline)
        waited = time.perf_counter()
        if answers.values is None:
            raise _nobody(pool, answers, deadline)
        judged = judge(outgoing, answers.values, answers.available)
        decoded, again = judged.decoded, None
        if not np.any(decoded.recovered):
            raise TimeoutError(
                f"no prediction can be recovered from the {answers.available.sum()} of "
                f"{plain.num_workers} answers that were in after {deadline} s"
            )
        end = time.perf_counter()
        score = goal.score(bars, judged)
        if score is not None:
            most = int(max_reexecution * score.size)
            chosen = select_uncertain(score.ravel(), limit=limit, at_most=most)
            judged, again = _reexecute(pool, x, judged, chosen, deadline - (end - sent))
        if not many:
            judged, again = jax.tree.map(lambda leaf: leaf[0], (judged, again))
        decoded, doubts, deviation = judged
        last = time.perf_counter() - end
        timing = Timing(encoded - begin, sent - encoded, waited - sent, end - waited, last)
        result = PoolResult(decoded, answers, timing, doubts, again, deviation)
        return result if with_status else decoded.predictions

    return infer


def _limit(
    code: AbstractCode,
    doubt: ErrorProbability | None,
    max_disagreement: float | None,
    max_reexecution: float,
) -> float:
    """Return the doubt above which a prediction is not given out at once."""
    if not 0 <= max_reexecution <= 1:
        raise ValueError(f"max_reexecution must be a share in [0, 1], not {max_reexecution}")
    if doubt is None and max_disagreement is None:
        return 1.0
    if doubt is None or max_disagreement is None:
        raise ValueError(
            "doubt and max_disagreement go together: the one tells how likely a label is wrong, "
            "the other how many may be"
        )
    # Each says so where it does not fit: a code without a deviation, and a surrogate's doubt.
    code.posterior_variance(np.ones(code.num_workers, bool))
    doubt(jnp.zeros(2 if doubt.form is None else doubt.form.size), jnp.ones(()))
    return doubt.limit(max_disagreement)


def _scheme_limit(
    scheme: Scheme,
    doubt: ErrorProbability | None,
    max_disagreement: float | None,
    max_reexecution: float,
    tolerance: float | None,
) -> float:
    """Return `_limit` of a scheme's doubt, or of its error bars."""
    if doubt is not None:
        raise ValueError("a scheme has its own doubt: Scheme(code, error_probability=...)")
    everything = _limit(scheme.code, None, None, max_reexecution)
    if tolerance is not None:
        if max_disagreement is not None or not tolerance >= 0:
            raise ValueError(
                f"a tolerance must be 0 or positive, and without max_disagreement: {tolerance}"
            )
        return tolerance
    if max_disagreement is None:
        return everything
    if scheme.error_probability is None:
        raise ValueError("max_disagreement wants a doubt: Scheme(code, error_probability=...)")
    return scheme.error_probability.limit(max_disagreement)


def _reexecute(
    pool: AbstractPool,
    x: PyTree[Shaped[np.ndarray, "groups num_data ..."]],
    judged: Judged,
    chosen: Int[np.ndarray, " chosen"],
    seconds: float,
) -> tuple[Judged, Bool[np.ndarray, "groups num_data"]]:
    """Has the pool run these data points themselves: what is known then, and which were in time."""
    decoded = judged.decoded
    again = np.zeros(decoded.recovered.shape, bool)
    if len(chosen) == 0 or seconds <= 0:
        return judged, again
    # As many in a call as coded ones were, for which workers have compiled their program.
    size = len(again)
    rows = np.resize(chosen, -(-len(chosen) // size) * size).reshape(-1, size)
    points = jax.tree.map(lambda leaf: leaf[rows], points_of(x))
    with pool.dispatch(points) as batch:
        answers = batch.wait(deadline=seconds)
    if answers.values is None:
        return judged, again
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
    sure = (None if each is None else filled(each, 0) for each in judged[1:])
    return Judged(status, *sure), filled(again, True)


def _groups(code: AbstractCode, x: PyTree, grouped: bool | None) -> tuple[PyTree, bool]:
    """x as (groups, K, ...) on the host, and whether it came so."""
    groups, many = group_points(code, jax.tree.map(np.asarray, x), grouped)
    check_finite(groups if many else jax.tree.map(lambda leaf: leaf[0], groups), 2 if many else 1)
    return groups, many


def _code_steps(
    code: AbstractCode, doubt: ErrorProbability | None
) -> tuple[Callable[[PyTree], Sent], Callable[[Sent, PyTree, np.ndarray], Judged]]:
    """As `scheme_steps`, for a code by itself, and a doubt."""
    encoder = encoder_rows(code)
    decode = shared_decoder(code)
    assessor = None if doubt is None else shared_assessor(code, doubt)

    def send(x: PyTree) -> Sent:
        return Sent(jax.tree.map(lambda leaf: encode_on_host(encoder, leaf), x))

    def judge(_: Sent, values: PyTree, available: np.ndarray) -> Judged:
        if assessor is None:
            return Judged(jax.tree.map(np.asarray, decode(values, available)))
        return Judged(*jax.tree.map(np.asarray, assessor(values, available)))

    return send, judge


def shared_decoder(code: AbstractCode) -> Callable[[PyTree, np.ndarray], Decoded]:
    """Return a function that decodes (N, groups, ...) answers that share a mask."""

    def decode(values: PyTree, available: np.ndarray) -> Decoded:
        y = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), values)
        groups = len(jax.tree.leaves(y)[0])
        masks = np.broadcast_to(np.asarray(available), (groups, code.num_workers))
        return decode_groups(code, y, masks)

    return decode


def shared_assessor(
    code: AbstractCode, doubt: ErrorProbability
) -> Callable[..., tuple[Decoded, Float[Array, "groups num_data"]]]:
    """As `shared_decoder`, with each prediction's doubt."""

    @jax.jit
    def judge(values, available, given):
        y, form = join(jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), values), 2)
        masks = jnp.broadcast_to(available, (len(y), code.num_workers))
        decoded, deviation = decode_with_deviation(code, None, y, masks, given=given)
        doubts = doubt(decoded.predictions, deviation)
        predictions = form.split(decoded.predictions)
        return Decoded(predictions, decoded.heard, decoded.recovered), doubts

    return lambda values, available: judge(values, available, known_decoders(code, available))


def _nobody(pool: AbstractPool, answers: BatchAnswers, deadline: float) -> Exception:
    """The error for a batch without a single answer."""
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
