"""Coded inference on a pool: encode, dispatch, wait for enough, decode."""

import dataclasses
import operator
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from .._codes import AbstractCode, Decoded, decode_groups
from .._inference import in_groups, is_grouped
from ._batch import Answers, Enough
from ._pool import AbstractPool


@dataclasses.dataclass(frozen=True)
class Timing:
    """Where a batch's seconds went: one after the other, they make up the whole call.

    `wait` is from the last coded data point's dispatch until the answers were enough: the workers'
    time, transport included.
    """

    encode: float
    dispatch: float
    wait: float
    decode: float

    @property
    def total(self) -> float:
        return self.encode + self.dispatch + self.wait + self.decode


@dataclasses.dataclass(frozen=True)
class PoolResult:
    """Predictions with their status, the answers they rest on, and the time it took."""

    decoded: Decoded
    answers: Answers
    timing: Timing


def pool_inference(
    pool: AbstractPool,
    code: AbstractCode,
    *,
    with_status: bool = False,
    grouped: bool | None = None,
) -> Callable[..., Any]:
    """One function `(x, enough=None, deadline=60.0) -> predictions` for a pool behind a code.

    x: (K, ...) for one group, or (groups, K, ...), finite, of a float dtype; every worker gets its
    coded data points of all groups as one batch. `enough` says when to decode: a number of answers
    (all N unless given), or a function of the mask, such as `Forecast.below`; `deadline` is in
    seconds, and what is in by then is decoded. Predictions are (K, ...) or (groups, K, ...), NaN
    where a data point cannot be recovered; `with_status=True` returns a `PoolResult`. `grouped`
    says whether x comes as groups; unless given, the axis of length K tells, if only one has it.

    The encoder and the decoder are compiled here, once, for every straggler set.

    Raises: ValueError for an x that does not fit or is not finite, before anything is sent;
    TimeoutError where no prediction can be recovered from what is in at the deadline; RuntimeError
    where no worker answers and none will.
    """
    encoder = np.asarray(code.encoder_matrix())
    kinds = code.worker_models.tolist()
    everyone = jnp.ones(code.num_workers, bool)
    decode = shared_decoder(code)

    def infer(x: ArrayLike, enough: Enough | None = None, deadline: float = 60.0):
        begin = time.perf_counter()
        x, many = _groups(code, np.asarray(x), everyone, grouped)
        coded = encode_on_host(encoder, x)
        encoded = time.perf_counter()
        needed = None if enough is None or callable(enough) else operator.index(enough)
        with pool.dispatch(coded, kinds=kinds, needed=needed) as batch:
            sent = time.perf_counter()
            answers = batch.wait(enough, deadline)
        waited = time.perf_counter()
        if answers.values is None:
            raise _nobody(pool, answers, deadline)
        decoded = jax.tree.map(np.asarray, decode(answers.values, answers.available))
        if not many:
            decoded = jax.tree.map(lambda leaf: leaf[0], decoded)
        if not np.any(decoded.recovered):
            raise TimeoutError(
                f"no prediction can be recovered from the {answers.available.sum()} of "
                f"{code.num_workers} answers that were in after {deadline} s"
            )
        end = time.perf_counter()
        timing = Timing(encoded - begin, sent - encoded, waited - sent, end - waited)
        return PoolResult(decoded, answers, timing) if with_status else decoded.predictions

    return infer


def _groups(
    code: AbstractCode, x: np.ndarray, everyone: Array, grouped: bool | None
) -> tuple[np.ndarray, bool]:
    """x as (groups, K, ...), and whether it came so."""
    if grouped is None:
        grouped = is_grouped(code, x, everyone)
    elif x.shape[int(grouped) : int(grouped) + 1] != (code.num_data,):
        wanted = "(groups, K, ...)" if grouped else "(K, ...)"
        raise ValueError(f"x has shape {x.shape}, but must be {wanted}, K = {code.num_data}")
    x = in_groups(code, x, grouped)
    x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)
    if not np.isfinite(x).all():
        finite = np.isfinite(x.reshape(*x.shape[:2], -1)).all(axis=-1)
        where = np.argwhere(~finite) if grouped else np.flatnonzero(~finite)
        raise ValueError(f"data points {where.tolist()} are not finite: take them out")
    return x, grouped


def shared_decoder(code: AbstractCode) -> Callable[[np.ndarray, np.ndarray], Decoded]:
    """Decodes (N, groups, ...) answers that share a mask; the code is a constant of the program."""

    @jax.jit
    def decode(values, available):
        masks = jnp.broadcast_to(available, (values.shape[1], code.num_workers))
        return decode_groups(code, jnp.swapaxes(values, 0, 1), masks)

    return decode


def encode_on_host(
    encoder: Float[np.ndarray, "num_workers num_data"], x: Float[np.ndarray, "groups num_data ..."]
) -> Float[np.ndarray, "num_workers groups ..."]:
    """Coded data points, worker by worker: on the host, where x is and whence it is sent."""
    groups, num_data, *shape = x.shape
    flat = np.moveaxis(x.reshape(groups, num_data, -1), 1, 0).reshape(num_data, -1)
    coded = encoder.astype(x.dtype) @ flat
    return coded.reshape(len(encoder), groups, *shape)


def _nobody(pool: AbstractPool, answers: Answers, deadline: float) -> Exception:
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
