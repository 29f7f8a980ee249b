"""The mean, a probability or a quantile over all rows of an ensemble, of which some were computed.

Computed rows count with their own values. The others are predicted, and the predictions are
corrected by rows whose errors are known: rows drawn at random correct rows that were not needed,
and rows that came late correct rows that are late or missing. This is prediction-powered inference
(Angelopoulos et al. 2023), stratified by lateness.

Let `g` be a function of a row's value, such as whether it exceeds a threshold. Errors are known in
units of the row's deviation, `z_j = (y_j - p_j) / d_j`, and an open row `i` may have any of the
values `p_i + d_i z_j`. The mean and variance of `g` over these are its prediction `m_i` and its
uncertainty `v_i`. The sum over open rows of one kind, with weights `w_i`, is

    sum_i w_i m_i + b sum_i w_i sqrt(v_i),  b = sum_j (g(y_j) - m_j) / sum_j sqrt(v_j),

with a ratio estimator of the predictions' common error (Cochran 1977, chapter 6). Its variance is
`sum_i w_i^2 v_i + (sum_i w_i sqrt(v_i))^2 sum_j v_j / (sum_j sqrt(v_j))^2`, times the variance of
the ratio's residuals, less a degree of freedom, over `sum_j v_j / n` if that exceeds 1.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int

from .accuracy import conformal_quantile

# Maps values (rows, ...) to one number or one boolean a row.
RowStatistic: TypeAlias = Callable[[Any], Any]
Weights: TypeAlias = Float[np.ndarray, " rows"] | None


@dataclasses.dataclass(frozen=True)
class EnsembleEstimate:
    """An estimate over all rows of an ensemble.

    Attributes:
        value: The estimate.
        interval: The lower and upper end of its confidence interval.
        coverage: The probability with which the interval contains the true value.
        from_late: The share of the interval's variance that is due to late and missing rows.
        note: A warning, if too few errors of rows like the open ones are known; else empty.
        uncertainty: Each row's part of the estimate's standard deviation, 0 for computed rows; None
            if all rows were computed, or the predictions' errors are unknown.
    """

    value: float
    interval: tuple[float, float]
    coverage: float
    from_late: float = 0.0
    note: str = ""
    uncertainty: Float[np.ndarray, " rows"] | None = dataclasses.field(
        default=None, repr=False, compare=False
    )

    @property
    def width(self) -> float:
        """The interval's length."""
        return self.interval[1] - self.interval[0]


@dataclasses.dataclass(frozen=True)
class RowEvidence:
    """An ensemble's rows: values, predictions, and the rows whose errors calibrate the others.

    Attributes:
        values: Own values where `computed`, predicted values elsewhere.
        predictions: Predicted values; those of `judged` rows were made without their own values.
        deviation: Expected errors of the predictions, in units of the outputs.
        computed: The mask of rows that count with their own values.
        late: The mask of rows that were answered late, or are overdue or failed in time.
        random: The mask of rows that were drawn at random to be computed.
        judged: The mask of computed rows whose predictions' errors calibrate the others.
    """

    values: Float[np.ndarray, "rows ..."]
    predictions: Float[np.ndarray, "rows ..."]
    deviation: Float[np.ndarray, " rows"]
    computed: Bool[np.ndarray, " rows"]
    late: Bool[np.ndarray, " rows"]
    random: Bool[np.ndarray, " rows"]
    judged: Bool[np.ndarray, " rows"]

    def map(self, f: RowStatistic | None) -> "RowEvidence":
        """Return the rows with values and predictions mapped by `f`, (rows,).

        Raises:
            ValueError: If `f` does not return a finite number for each row, or rows have several
                outputs and there is no `f`.
        """
        number, mapped = len(self.computed), []
        for each in (self.values, self.predictions):
            if f is None and each.size != number:
                raise ValueError(f"rows have {each.size // number} outputs: give an `f` of them")
            found = np.asarray(each.reshape(number) if f is None else f(each), float)
            if found.shape != (number,):
                raise ValueError(f"`f` maps {number} rows to a number each, not to {found.shape}")
            mapped.append(found)
        if odd := np.count_nonzero(~np.isfinite(mapped).all(axis=0)):
            raise ValueError(f"{odd} rows' values or predictions are not finite: map them by `f`")
        return dataclasses.replace(self, values=mapped[0], predictions=mapped[1])


def average(
    rows: RowEvidence,
    g: RowStatistic | float,
    weights: Weights,
    coverage: float,
    *,
    step: bool = False,
) -> EnsembleEstimate:
    """Return the weighted mean of `g` over all rows, with an interval.

    Args:
        rows: The result of `RowEvidence.map`.
        g: Maps values to numbers of the same shape. A number stands for the indicator of values up
            to it, for which errors are sorted once instead of drawn.
        weights: The rows' weights, 0 or positive (default: equal weights).
        coverage: The probability with which the interval contains the true mean.
        step: Whether all values of `g` are 0 or 1.

    Raises:
        ValueError: If weights or coverage do not fit.
    """
    number, computed = len(rows.computed), rows.computed
    w = np.ones(number) if weights is None else np.asarray(weights, float)
    if w.shape != (number,) or not (np.isfinite(w) & (w >= 0)).all() or not w.any():
        raise ValueError(f"weights are numbers from 0 on, not all 0, for each of {number} rows")
    if not 0 < coverage < 1:
        raise ValueError(f"coverage is a share between 0 and 1, not {coverage}")
    w = w / w.sum()
    own = np.zeros(number)
    known = rows.values[computed]
    own[computed] = g(known) if callable(g) else known <= g
    value = float(w @ own)
    if computed.all():
        return EnsembleEstimate(value, (value, value), coverage)

    # Rows whose errors are known, in units of deviations, and the open rows that they represent.
    late, prompt = (np.flatnonzero(~computed & each) for each in (rows.late, ~rows.late))
    judged = rows.judged & rows.random
    judged &= rows.deviation <= rows.deviation[prompt if len(prompt) else late].max()
    of_kind = [np.flatnonzero(each) for each in (judged, rows.judged & rows.late)]
    z, draws = (rows.values - rows.predictions) / np.maximum(rows.deviation, 1e-300), 128
    errors = [z[np.random.default_rng(0).permutation(each)[:draws]] for each in of_kind]
    if len(errors[0]) < 2:
        note = "fewer than two rows that were drawn at random have come"
        return EnsembleEstimate(math.nan, (-math.inf, math.inf), coverage, note=note)
    few = math.isinf(conformal_quantile(np.abs(errors[1]), coverage))
    if few:
        errors[1] = np.concatenate(errors)[-draws:]

    variances, degrees, low, high = np.zeros(2), np.ones(2), 0.0, 0.0
    uncertainty = np.zeros(number)
    for kind, some in enumerate((prompt, late)):
        v = w[some]
        mean, variance, least, most = _moments(rows, g, some, errors[kind])
        value += float(v @ mean)
        uncertainty[some] = v * np.sqrt(variance)
        if kind == 1 and few:
            row = float(v.max(initial=0.0)) / 2 if step else 0.0  # no share is known better
            low, high = max(float(v @ (mean - least)), row), max(float(v @ (most - mean)), row)
            continue

        # The predictions' common error, and its part of the sum's variance.
        judges, drawn = of_kind[kind], len(errors[kind])
        expected, spread, *_ = _moments(rows, g, judges, errors[kind])
        if drawn == len(judges):  # a row's own error is one of those drawn
            expected = (drawn * expected - own[judges]) / (drawn - 1)
        scale, total = float(np.sqrt(spread).sum()), float(spread.sum())
        variances[kind] = float(v**2 @ variance)
        if scale > 0:
            bias, size = float((own[judges] - expected).sum()) / scale, float(v @ np.sqrt(variance))
            left = float(np.sum((own[judges] - expected - bias * np.sqrt(spread)) ** 2))
            value += bias * size
            count = _effective_number(spread)
            variances[kind] += total * (size / scale) ** 2
            variances[kind] *= max(left / total * count / max(count - 1, 1), 1.0)

        # If few judged or open rows have most of the variance, the effective number of rows counts.
        counts = () if step else map(_effective_number, (spread, v**2 * variance))
        degrees[kind] = max(min([float(drawn), *counts]) - 1, 1.0)

    half, total = 0.0, float(variances.sum())
    if total > 0:  # Student's t with Welch and Satterthwaite's degrees of freedom
        from scipy.special import stdtrit  # late: a fifth of a worker's import time

        freedom = 1 / float(np.sum((variances / total) ** 2 / degrees))
        half = float(stdtrit(max(freedom, 1.0), (1 + coverage) / 2)) * total**0.5
    from_late, note = float(variances[1]) / total if total else 0.0, ""
    if low + high > 0:
        from_late = (low + high) / (low + high + 2 * half)
        note = (
            f"only {len(of_kind[1])} late rows have come: those that are missing count with the "
            "worst error that any row has had, in units of deviations"
        )
    ends = (value - half - low, value + half + high)
    if step:
        value, ends = min(max(value, 0.0), 1.0), (max(ends[0], 0.0), min(ends[1], 1.0))
    return EnsembleEstimate(value, ends, coverage, from_late, note, uncertainty)


def _effective_number(parts: Float[np.ndarray, " rows"]) -> float:
    """Return the effective number of parts of a sum (Kish 1965); 0 if the sum is 0."""
    shares = parts / max(float(parts.max(initial=0.0)), 1e-300)  # squares of 1e-180 would be 0
    return float(shares.sum()) ** 2 / max(float(np.sum(shares**2)), 1e-300)


def quantile(rows: RowEvidence, q: float, weights: Weights, coverage: float) -> EnsembleEstimate:
    """Return the least value that a share `q` of the rows does not exceed, with an interval.

    The interval consists of the values at which the share of rows may be `q`, by the share's own
    interval. Arguments and errors are those of `average`; rows have one value each.
    """
    if not 0 < q < 1:
        raise ValueError(f"a quantile is at a share between 0 and 1, not {q}")
    # Eight places from each value to the next, since the quantile's row may not be computed yet.
    values, shares = np.unique(rows.values), {}
    places = np.interp(np.arange(8 * len(values) - 7) / 8, np.arange(len(values)), values)
    # Without weights, shares are multiples of a row. If an open row is the quantile, it counts half
    # at both ends: it does not count below its value, and does from there on.
    row = 1 / len(rows.values) if weights is None else 0.0
    q = math.ceil(q / row - 1e-6) * row - row / 2 if row else q

    def first(end: Callable[[EnsembleEstimate], float], share: float) -> int:
        """Return the first place at which `end` of the share's estimate is at least `share`."""
        low, high = 0, len(places)
        while low < high:
            middle = (low + high) // 2
            if middle not in shares:
                at_most = float(places[middle])
                shares[middle] = average(rows, at_most, weights, coverage, step=True)
            above = end(shares[middle]) >= share - 1e-9
            low, high = (low, middle) if above else (middle + 1, high)
        return low

    value = min(first(lambda each: each.value, q), len(places) - 1)
    low = min(first(lambda each: each.interval[1], q), value)
    high = first(lambda each: each.interval[0], q + 2e-9)
    found, known = shares[value], rows.computed.all()
    ends = (
        float(places[low]) if low > 0 or known else -math.inf,
        float(places[max(high, value)]) if high < len(places) else math.inf,
    )
    return dataclasses.replace(found, value=float(places[value]), interval=ends)


def _moments(
    rows: RowEvidence,
    g: RowStatistic | float,
    some: Int[np.ndarray, " some"],
    errors: Float[np.ndarray, " draws"],
) -> Float[np.ndarray, "4 some"]:
    """Return the mean, variance, minimum and maximum of `g` for some rows, over these errors."""
    if not callable(g):  # the share of errors up to a limit, from their order
        limits = (g - rows.predictions[some]) / np.maximum(rows.deviation[some], 1e-300)
        share = np.searchsorted(np.sort(errors), limits, side="right") / len(errors)
        spread = share * (1 - share) * len(errors) / max(len(errors) - 1, 1)
        return np.stack([share, spread, share >= 1, share > 0])
    if len(some) * len(errors) > 1 << 22:  # too many numbers to hold at once
        return np.hstack([_moments(rows, g, part, errors) for part in np.array_split(some, 2)])
    drawn = rows.predictions[some, None] + rows.deviation[some, None] * errors
    found = np.asarray(g(drawn.ravel()), float).reshape(drawn.shape)
    spread = found.var(axis=1, ddof=min(1, len(errors) - 1))
    return np.stack([found.mean(axis=1), spread, found.min(axis=1), found.max(axis=1)])
