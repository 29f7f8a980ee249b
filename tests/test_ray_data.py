"""Rows of a Ray Data dataset: values, bars, statuses, and the other columns, row by row."""

import dataclasses
import os
import pickle
import signal
import sys
import warnings

import numpy as np
import pytest
from conftest import require

from nercc_jax import DevicePool
from nercc_jax.rows import map_rows, run_rows

# Ray Data sets its own deprecated options.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
COLUMNS = ["angle", "speed"]


def swing(x):
    return np.stack([np.sin(3 * x[:, 0]) * x[:, 1], x.sum(axis=1)], axis=1)


@pytest.fixture(scope="module")
def data():
    """Ray Data on four CPUs, which this machine need not have."""
    ray = require("ray", "ray")
    require("ray.data", "ray-data")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fork, which Ray follows by exec
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray.data
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    ray.shutdown()


def dataset(data, count=120):
    rng = np.random.default_rng(0)
    rows = rng.uniform(-1, 1, (count, 2))
    items = [
        {"name": f"row {i}", "angle": a, "speed": s, "image": np.full((2, 2), i)}
        for i, (a, s) in enumerate(rows.tolist())
    ]
    return data.from_items(items).repartition(7)


def read(found, count=120):
    """The rows by name; their other columns are those of the row."""
    rows = {row["name"]: row for row in found.take_all()}
    assert len(rows) == count
    for name, row in rows.items():
        np.testing.assert_array_equal(row["image"], int(name.split()[1]))
    return rows


def test_every_row_has_its_value_and_its_other_columns(data):
    progress = []
    found = map_rows(
        dataset(data), swing, COLUMNS, tolerance=0.0, on_progress=progress.append
    )  # fmt: skip
    for row in read(found).values():
        expected = swing(np.array([[row["angle"], row["speed"]]]))[0]
        np.testing.assert_array_equal(row["value"], expected)
        assert (row["error_bar"], row["status"], row["reason"]) == (0, "computed", "")
    assert progress[-1].computed == 120
    assert found.select_columns(["value"]).limit(5).count() == 5  # further steps, as of any dataset

    def middle(x):
        assert x.shape[1:] == (2, 2), "one column keeps its shape"
        return x.mean(axis=(1, 2))

    rows = read(map_rows(dataset(data), middle, "image", tolerance=0.0, num_workers=2))
    assert all(row["value"] == int(name.split()[1]) for name, row in rows.items())


def test_the_error_bar_is_the_calibrated_one(data, monkeypatch):
    """It was the expected error before calibration."""
    bars = np.linspace(0.0, 1.0, 120)

    def run(*args, **options):
        return dataclasses.replace(run_rows(*args, **options), score=bars)

    monkeypatch.setattr("nercc_jax.rows._ray_data.run_rows", run)
    rows = read(map_rows(dataset(data), swing, COLUMNS, tolerance=0.0, num_workers=2))
    np.testing.assert_array_equal([rows[f"row {i}"]["error_bar"] for i in range(120)], bars)


def test_a_row_that_raises_is_unknown_and_a_worker_that_dies_loses_none(data, tmp_path):
    once = str(tmp_path / "died")

    def dies(x):
        if (x[:, 0] > 0.5).any() and not os.path.exists(once):
            open(once, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        if (x[:, 0] < -0.95).any():
            raise ArithmeticError("no solution here")
        return swing(x)

    found = map_rows(dataset(data), dies, COLUMNS, tolerance=0.0, num_workers=2)
    for row in read(found).values():
        if row["angle"] < -0.95:
            assert row["status"] == "unknown"
            assert "no solution here" in row["reason"]
            assert np.isnan(row["value"]).all()
        else:
            expected = swing(np.array([[row["angle"], row["speed"]]]))[0]
            np.testing.assert_array_equal(row["value"], expected)
    assert os.path.exists(once)


@pytest.mark.parametrize(
    ("change", "columns", "match"),
    [
        (lambda each: each, "mass", "has no column 'mass'; it has name, angle, speed, image"),
        (lambda each: each.rename_columns({"name": "status"}), COLUMNS, "'status', which map_rows"),
        (lambda each: each.limit(0), COLUMNS, "has no rows"),
        (lambda each: each, "name", "'name' must hold finite numbers"),
    ],
)
def test_what_does_not_fit_is_refused_before_workers_start(data, change, columns, match):
    with pytest.raises(ValueError, match=match):
        map_rows(change(dataset(data)), swing, columns, tolerance=0.0)


def test_a_pool_that_is_sent_elsewhere_says_what_would_do():
    with (
        DevicePool(swing, 2, compiled=False) as pool,
        pytest.raises(TypeError, match=r"DevicePool cannot be sent .*rows\.map_rows"),
    ):
        pickle.dumps(pool)
