"""Many batches on a pool, one after the other: none is lost quietly, whoever dies meanwhile."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import PyTree

from ..codes import AbstractCode, check_count
from ._batch import Enough, check_deadline
from ._inference import PoolResult, pool_inference
from ._pool import AbstractPool


@dataclasses.dataclass(frozen=True)
class BatchOutcome:
    """What became of one batch.

    `number` counts the batches from 0, and `attempts` how often this one was dispatched. `result`
    is that of the attempt that recovered the most, None where none recovered anything; which data
    points it recovers, `result.decoded.recovered` says. `short`: it was decoded at the deadline, or
    because no more could come, from answers that were not `enough`. `trouble` says what was wrong
    with the last attempt that did not recover everything, None where every attempt did.
    """

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
    """Coded inference on batches (groups, K, ...), in order: an outcome for each, as it is done.

    A batch that is not recovered whole is dispatched again, `attempts` times in all, each with its
    own deadline in seconds; what is lost then is told in its outcome, and the next batch follows.
    `enough` as in `pool_inference`. A pool whose workers die goes on with their replacements.

    Raises: ValueError for fewer than one attempt, or a deadline that is not positive, at once; for
    a batch or a number that does not fit, when its turn comes.
    """
    attempts, deadline = check_count("attempts", attempts), check_deadline(deadline)
    infer = pool_inference(pool, code, with_status=True, grouped=True)

    def is_enough(available: np.ndarray) -> bool:
        if callable(enough):
            return bool(enough(available))
        return bool(available.sum() >= (code.num_workers if enough is None else enough))

    def run() -> Iterator[BatchOutcome]:
        for number, x in enumerate(batches):
            result, tries, trouble = _persist(lambda x=x: infer(x, enough, deadline), attempts)
            short = result is not None and not is_enough(result.answers.available)
            yield BatchOutcome(number, tries, result, short, trouble)

    return run()


def _persist(
    infer: Callable[[], PoolResult], attempts: int
) -> tuple[PoolResult | None, int, str | None]:
    """The best result of up to `attempts` calls, how many there were, and the last trouble."""
    best, most, trouble = None, 0, None
    for attempt in range(1, attempts + 1):
        try:
            result = infer()
        except (TimeoutError, RuntimeError) as error:  # nothing to decode, or nothing recovered
            trouble = str(error)
            continue
        recovered = np.asarray(result.decoded.recovered)
        if recovered.sum() > most:
            best, most = result, recovered.sum()
        if recovered.all():
            return best, attempt, trouble
        heard = int(result.answers.available.sum())
        trouble = (
            f"{recovered.size - recovered.sum()} of {recovered.size} data points cannot be "
            f"recovered from the {heard} answers that were in"
        )
    return best, attempts, trouble
