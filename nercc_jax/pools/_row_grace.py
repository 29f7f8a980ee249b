"""Answers that come after a run has ended: they judge the error bars that it gave out."""

import time
from collections.abc import Collection, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ..evaluation._functions import row_errors
from ._row_settings import RowResult
from ._rows import RowCall


def late_answers(
    calls: Collection[RowCall], seconds: float
) -> dict[int, Float[np.ndarray, " outputs"]]:
    """Wait some seconds for the calls that workers have; return the values that came, by row.

    Calls that no worker has are dropped.
    """
    end = time.monotonic() + seconds
    for call in calls:
        if not (call.running or call.over):
            call.batch.forget()
    found: dict[int, Float[np.ndarray, " outputs"]] = {}
    for call in calls:
        if call.batch.open:
            call.batch.wait(deadline=max(end - time.monotonic(), 1e-3))
        if (values := call.values()) is not None:
            found |= zip(call.rows.tolist(), values.reshape(len(values), -1), strict=True)
    return found


def bars_that_held(
    result: RowResult, answers: Mapping[int, Float[np.ndarray, " outputs"]], labels: bool
) -> tuple[int, int]:
    """Return how many of the error bars of rows that came late held, and how many there are.

    The answers are the function's own values, by row. Where outputs are scores of labels,
    predictions are judged by their label.
    """
    barred = result.status == "predicted" if labels else np.isfinite(result.score)
    barred &= result.status != "computed"
    rows = [row for row, y in answers.items() if barred[row] and np.isfinite(y).all()]
    if not rows or result.values is None:
        return 0, 0
    y = np.stack([answers[row] for row in rows])
    mean = result.values[rows].reshape(len(rows), -1)
    if labels:
        held = np.argmax(mean, axis=1) == np.argmax(y, axis=1)
    else:
        error = row_errors(jnp.asarray(mean, jnp.float32), jnp.asarray(y, jnp.float32))
        held = np.asarray(error) <= result.score[rows]
    return int(held.sum()), len(rows)
