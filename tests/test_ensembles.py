"""Statistics of a run's rows: exact where all are computed, and intervals that hold otherwise."""

import dataclasses

import numpy as np
import pytest

from nercc_jax.pools import Fault, Faults
from nercc_jax.rows import RowResult, run_rows
from nercc_jax.testing import SimulatedPool

ROWS, WORKERS = 400, 20


def function(x):
    return np.stack([np.sin(3 * x[:, 0]) + x[:, 1], np.cos(2 * x[:, 1])], axis=1)


def rough(x):
    return function(x) + 0.2 * np.sin(40 * x)


def first(y):
    return y[:, 0]


def rows(seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (ROWS, 2))


def run(x, *, slow=None, model=function, deaths=0.0, **options) -> tuple[RowResult, float]:
    """Run a function in simulated time: 1 s a row, more where `slow` says so."""
    faults = [Fault("delay", latency=lambda batch: float(slow(np.asarray(batch)).max()))]
    faults = faults * (slow is not None) + [Fault("death", deaths)] * (deaths > 0)
    with SimulatedPool(
        model, WORKERS, seconds=float, faults=Faults(faults), hang_timeout=1e4
    ) as pool:
        options = {"tolerance": 0.05, "rows_per_call": 1, "deadline": 1e3} | options
        return run_rows(model, x, pool, **options), pool.clock.now()


def late_where_large(x):
    """The rows with the largest first outputs take long."""
    return np.where(function(x)[:, 0] > 1.2, 25.0, 0.0)


def test_all_rows_computed_give_exact_statistics():
    x, y = rows(), function(rows())[:, 0]
    result, _ = run(x, tolerance=0.0)
    weights = np.linspace(0, 1, ROWS)
    assert result.mean(first).interval == pytest.approx((y.mean(), y.mean()))
    weighed = result.mean(first, weights=weights)
    assert weighed.value == pytest.approx(np.average(y, weights=weights))
    assert weighed.width == 0
    share = result.probability(lambda v: v > 0.5, first)
    assert (share.value, share.width) == (pytest.approx(np.mean(y > 0.5)), 0)
    middle = result.quantile(0.9, first)
    assert middle.value == np.quantile(y, 0.9, method="inverted_cdf")
    assert middle.width == 0


@pytest.mark.parametrize("slow", [None, late_where_large], ids=["prompt", "large ones late"])
def test_intervals_hold_and_are_shorter_than_a_samples(slow):
    held, widths = [], []
    for seed in range(12):
        x = rows(seed)
        y = function(x)[:, 0]
        result, _ = run(x, slow=slow, deaths=0.01, job_deadline=14.0, seed=seed)
        computed = int(np.sum(result.status == "computed"))
        assert 100 < computed < ROWS
        sample = np.sqrt((1 - computed / ROWS) / computed)
        for estimate, true, spread in (
            (result.mean(first), y.mean(), y.std()),
            (result.probability(lambda v: v > 1.2, first), np.mean(y > 1.2), np.std(y > 1.2)),
            (result.quantile(0.9, first), np.quantile(y, 0.9, method="inverted_cdf"), np.inf),
        ):
            low, high = estimate.interval
            assert low <= estimate.value <= high
            held.append(low <= true <= high)
            widths.append(estimate.width / (2 * 1.645 * sample * spread))
    assert np.mean(held) >= 0.75  # 0.9 within three standard deviations of 36
    assert np.median([each for each in widths if each]) < 1 / 3


def test_a_quantiles_interval_has_the_values_whose_share_may_be_it():
    """Shares of values up to a number are those of the condition that says so."""
    result, _ = run(rows(), tolerance=0.3, job_deadline=8.0)
    estimate = result.quantile(0.8, first)
    below, above = estimate.interval
    assert below <= estimate.value <= above
    assert below < above
    for value, inside in ((below - 1e-3, False), (estimate.value, True), (above + 3e-3, False)):
        low, high = result.probability(lambda v, most=value: v <= most, first).interval
        assert (low < 0.8 <= high) == inside


def test_late_rows_that_never_came_widen_the_interval_and_are_said():
    """No row of the slow kind comes by the deadline: nothing is known of their errors."""

    def never(x):
        return np.where(function(x)[:, 0] > 1.2, 1e3, 0.0)

    x = rows()
    result, _ = run(x, slow=never, job_deadline=30.0)
    estimate = result.mean(first)
    assert "only 0 late rows have come" in estimate.note
    assert estimate.from_late > 0.5
    low, high = estimate.interval
    assert low <= function(x)[:, 0].mean() <= high


def test_rows_that_never_came_are_surely_on_one_side_of_a_far_quantile():
    x = rows()
    y = function(x)[:, 0]

    def never(x):
        return np.where(function(x)[:, 0] < np.quantile(y, 0.1), 1e3, 0.0)

    result, _ = run(x, slow=never, job_deadline=30.0)
    for q in (0.5, 0.9):
        low, high = result.quantile(q, first).interval
        assert low <= np.quantile(y, q) <= high
        assert high - low < 0.05


def test_a_run_without_a_learner_estimates_by_the_rows_that_came():
    x = rows()
    y = function(x)[:, 0]
    result, _ = run(x, tolerance=0.0, job_deadline=10.5)
    computed = result.status == "computed"
    estimate = result.mean(first)
    low, high = estimate.interval
    assert low <= y.mean() <= high
    root = 1.645 * y.std() * np.sqrt((1 - computed.mean()) / 100)  # drawn at random: 100
    assert estimate.width == pytest.approx(2 * root, rel=0.5)


def test_a_run_goes_on_until_the_interval_is_short_enough():
    x, seen = rows(), []
    usual, _ = run(x, tolerance=0.2)
    wanted = usual.mean(first).width / 2
    options = {"statistic": lambda result: result.mean(first), "tolerance": 0.2}
    result, seconds = run(
        x,
        stop_when=lambda estimate: estimate.width <= wanted,
        on_progress=lambda progress: seen.append(progress.estimate),
        **options,
    )
    assert result.stopped is None
    assert result.mean(first).width <= wanted
    assert (usual.status == "computed").sum() < (result.status == "computed").sum() < ROWS
    low, high = seen[-1].interval
    assert low <= function(x)[:, 0].mean() <= high
    # And less is computed for one that is long enough as it is.
    early, sooner = run(x, stop_when=lambda estimate: estimate.width < 20 * wanted, **options)
    assert sooner < seconds
    assert (early.status == "computed").sum() < (result.status == "computed").sum()
    unknown = [why for why in early.reasons.values() if "statistic was known" in why]
    assert len(unknown) == np.sum(early.status == "unknown")


def test_a_resumed_run_estimates_by_what_the_folder_has(tmp_path):
    x, options = rows(), {"statistic": lambda result: result.mean(first), "tolerance": 0.2}
    options |= {"folder": tmp_path / "run", "seed": 1}
    earlier, _ = run(x, stop_when=lambda estimate: estimate.width < 0.05, **options)
    computed = np.sum(earlier.status == "computed")
    assert computed < ROWS / 2
    wanted = earlier.mean(first).width / 4
    # Without a goal nothing more is computed; with one, the run goes on.
    again, _ = run(x, **options | {"statistic": None}, resume=True)
    further, _ = run(x, stop_when=lambda each: each.width < wanted, **options, resume=True)
    assert further.mean(first).width < wanted
    assert np.sum(further.status == "computed") > computed
    for result in (earlier, again, further):
        low, high = result.mean(first).interval
        assert low <= function(x)[:, 0].mean() <= high
        assert high - low < 0.06


def test_rows_are_chosen_for_the_statistic():
    """Those near the threshold are computed, though all are known well enough for the tolerance."""

    def estimate(result):
        return result.probability(lambda v: v > 1, first)

    x, widths = rows(), []
    for aim in ({}, {"statistic": estimate, "stop_when": lambda estimate: False}):
        result, _ = run(x, model=rough, tolerance=0.8, job_deadline=14.0, **aim)
        found, computed = estimate(result), result.status == "computed"
        widths.append(found.width)
        low, high = found.interval
        assert low <= np.mean(rough(x)[:, 0] > 1) <= high
        assert not found.uncertainty[computed].any()
    assert widths[1] < 0.5 * widths[0]


@pytest.mark.parametrize("unit", [1e-90, 1e80])
def test_the_unit_of_the_outputs_does_not_matter(unit):
    """Squares of variances would be 0, or infinite; it was a ZeroDivisionError or an overflow."""
    x = rows()
    result, _ = run(x, slow=late_where_large, job_deadline=14.0)
    usual = result.mean(first)
    scaled = result.mean(lambda y: unit * first(y).astype(float))
    assert usual.width > 0
    # Deviations are those of the outputs, whatever is asked of them.
    rescaled = dataclasses.replace(
        result.evidence,
        **{n: unit * getattr(result.evidence, n).astype(float)
           for n in ("values", "predictions", "deviation")},
    )  # fmt: skip
    moved = dataclasses.replace(result, evidence=rescaled).mean(first)
    for found in (scaled, moved):
        assert found.value == pytest.approx(unit * usual.value, rel=1e-5)
        assert found.width == pytest.approx(unit * usual.width, rel=1e-3)


def test_arguments_that_do_not_fit_are_refused():
    result, _ = run(rows())
    for ask, message in (
        (lambda: result.mean(), "rows have 2 outputs: give an `f`"),
        (lambda: result.mean(lambda y: y), "`f` maps 400 rows to a number each"),
        (lambda: result.mean(lambda y: 1.0), r"not to \(\)"),
        (lambda: result.mean(lambda y: np.where(y[:, 0] > 0, 1.0, np.nan)), "not finite"),
        (lambda: result.quantile(1.5, first), r"a share between 0 and 1, not 1\.5"),
        (lambda: result.mean(first, coverage=1.0), "coverage"),
        (lambda: result.mean(first, weights=np.ones(3)), "for each of 400 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            ask()
