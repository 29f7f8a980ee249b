"""What error to expect of decoding from given workers, to know when enough of them answered."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree, Shaped

from ..codes import AbstractCode, as_mask
from ..inference import AbstractCalibrated, Conditions, Model
from ._answers import Answers, record_answers

# Straggler sets whose verdict is remembered.
_REMEMBERED = 4096


class Forecast(AbstractCalibrated):
    """What decoding does to calibration data when these workers answer; `make_forecast` makes one.

    `answers` are recorded on calibration data points. Every method decodes those of the workers of
    a mask. One compilation serves all masks.

    It tells the mean over data like the calibration's: neither the error of the batch at hand, nor
    what depends on it. A disagreement p seen on n data points is known to sqrt(p (1 - p) / n) at
    best, 0.0035 for 1 % of 800; to less where those of a group go wrong together. Whoever waits for
    the first set that looks good finds one that looks better than it is, the more so the fewer the
    data points. And it takes workers to straggle whatever the data.

    Measured (LeNet5 on digits, logits, K = 8, N = 20, `NeRCC`, 50 masks of 0 to 12 stragglers):
    forecasts from 800 training images against what 448 other images showed had correlation 0.999
    in error and 0.996 in disagreement; their means were 1.01 and 0.95 times what was observed. A
    model does better on data it was trained on: calibrate on other. A new mask took `enough` about
    0.6 ms with 25 groups, 1 to 2 with 100 (two CPU cores), a known one 0.01 to 0.04.
    """

    answers: Answers

    def calibrated_under(self) -> Conditions:
        """At which precision, and where, the answers were made: a pool says if its own differ."""
        return self.answers.conditions

    def error(self, available: Bool[ArrayLike, " num_workers"]) -> Float[Array, ""]:
        """sqrt(mean |u_k - f_k|^2), the `rmse` of `Evaluation`, in units of the model's outputs.

        Data points that are not recovered are left out; NaN where none is.

        Raises: ValueError for a mask of another shape or dtype.
        """
        return _expect(self, available)[0]

    def disagreement(self, available: Bool[ArrayLike, " num_workers"]) -> Float[Array, ""]:
        """The share of data points whose label, argmax u_k, is not argmax f_k: 1 - `rel_acc`.

        Data points that are not recovered count as wrong.

        Raises: ValueError for a mask of another shape or dtype.
        """
        return _expect(self, available)[1]

    def by_place(
        self, available: Bool[ArrayLike, " num_workers"]
    ) -> tuple[Float[Array, " num_data"], Float[Array, " num_data"]]:
        """`error` and `disagreement` of each of the K places of a group by itself.

        They differ much where points are interleaved: a place whose own worker answered is exact.

        Raises: ValueError for a mask of another shape or dtype.
        """
        return _expect_by_place(self, available)

    def below(
        self, *, max_disagreement: float | int | None = None, max_error: float | int | None = None
    ) -> Callable[[np.ndarray], bool]:
        """A function `enough(mask) -> bool` for a pool: whether to stop waiting for more workers.

        True where the `disagreement` is `max_disagreement` or less; or where the `error` is
        `max_error` or less and no data point is lost, since a lost one has no error to be small.
        More answers need not be better, so True may be followed by False. Where not even all
        workers' answers reach the limit, `enough` may never be True: ask for
        `error(np.ones(N, bool))` first.

        It may be called from any thread, and remembers the last few thousand masks. A new one is
        decoded on the device that holds the forecast, behind what that is busy with: if it is one
        of the workers', `jax.device_put(forecast, device)` moves the forecast to another. It is
        compiled here, so that no later call waits for that.

        Raises: ValueError unless exactly one limit is given, 0 <= `max_disagreement` < 1 or
        `max_error` > 0; `enough` does for a mask of another shape or dtype.
        """
        if (max_disagreement is None) == (max_error is None):
            given = "neither" if max_error is None else "both"
            raise ValueError(f"give max_disagreement or max_error, not {given}")
        if max_disagreement is not None and not 0 <= max_disagreement < 1:
            raise ValueError(f"max_disagreement must be in [0, 1), not {max_disagreement}")
        if max_error is not None and not max_error > 0:
            raise ValueError(f"max_error must be positive, not {max_error}")
        num_workers = self.answers.code.num_workers
        groups, num_data, _ = self.answers.own.shape
        points = groups * num_data
        most = (max_disagreement or 0) * points + 1e-6

        @functools.lru_cache(maxsize=_REMEMBERED)
        def decide(mask: bytes) -> bool:
            error, disagreement, lost = map(float, _expect(self, np.frombuffer(mask, bool)))
            if max_error is not None:
                return lost == 0 and error <= max_error
            # In whole data points: 10 of 200 are 5 %, whatever float32 makes of it.
            return round(disagreement * points) <= most

        def enough(mask: np.ndarray) -> bool:
            mask = np.asarray(mask)
            if mask.dtype != bool or mask.shape != (num_workers,):
                as_mask(mask, (num_workers,))  # says what is wrong with it
            # Nobody answered: nothing is recovered, under any code.
            return bool(mask.any()) and decide(mask.tobytes())

        enough(np.ones(num_workers, bool))
        return _ForecastRule(enough, self.answers.conditions)


class _ForecastRule(AbstractCalibrated):
    """What `Forecast.below` returns."""

    enough: Callable[[np.ndarray], bool] = eqx.field(static=True)
    conditions: Conditions = eqx.field(static=True)

    def calibrated_under(self) -> Conditions:
        return self.conditions

    def __call__(self, mask: np.ndarray) -> bool:
        return self.enough(mask)


def make_forecast(
    model: Model | Sequence[Model],
    code: AbstractCode,
    x: PyTree[Shaped[ArrayLike, "points ..."]],
    *,
    batch_size: int = 256,
    worker_dtype: DTypeLike | None = None,
) -> Forecast:
    """Records a model's answers on calibration data, for a forecast under any straggler set.

    x: unlabelled data points as they will come, cut into groups of K in the order given (if queries
    are put in order before they are coded, so must these be). Arguments, and errors, as in
    `record_answers`. An answer that is not finite makes its worker a straggler in that group, as in
    decoding.
    """
    options: Any = {"batch_size": batch_size, "worker_dtype": worker_dtype}
    return Forecast(record_answers(model, code, x, **options))


@eqx.filter_jit
def _expect(forecast: Forecast, available: Bool[ArrayLike, " num_workers"]) -> tuple[Array, ...]:
    """The error, the disagreement, and the share of data points that are lost."""
    available = as_mask(available, (forecast.answers.code.num_workers,))
    score = forecast.answers.scores(available)
    return score["rmse"], 1 - score["rel_acc"], score["lost"]


@eqx.filter_jit
def _expect_by_place(
    forecast: Forecast, available: Bool[ArrayLike, " num_workers"]
) -> tuple[Array, Array]:
    answers = forecast.answers
    decoded = answers.decode(as_mask(available, (answers.code.num_workers,)))
    recovered = decoded.recovered
    square = jnp.sum((decoded.predictions - answers.own) ** 2, axis=-1, where=recovered[..., None])
    error = jnp.sqrt(jnp.sum(square, axis=0) / jnp.sum(recovered, axis=0))
    same = answers.same_labels(decoded.predictions)
    return error, 1 - jnp.mean(recovered & same, axis=0)
