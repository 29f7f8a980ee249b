"""Results of calibration are kept between starts: the same is known, and nothing is run for it."""

# ruff: noqa: E402 (`require` comes before what needs it)

import jax.numpy as jnp
import numpy as np
import pytest
from batching import INTERLEAVED
from conftest import require

require("pydantic_settings", "serve")

from nercc_jax import NeRCC
from nercc_jax.cli._serving_models import calibration_file
from nercc_jax.codes.whole_files import write_arrays
from nercc_jax.serving import Coder, make_servable
from nercc_jax.serving._settings import ModelSettings
from nercc_jax.serving.adapt._error_estimator import ErrorEstimator, calibrate_or_restore

WEIGHTS = np.random.default_rng(2).normal(size=(4, 3)).astype(np.float32)
FULL = np.ones(8, bool)


class Rows:
    """Calibration data, and how often they were asked for."""

    def __init__(self):
        self.asked = 0

    def __call__(self):
        self.asked += 1
        return np.random.default_rng(3).normal(size=(256, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def calibrated():
    """A servable, and the results of its calibration."""
    servable = make_servable("tanh", lambda x: jnp.tanh(3 * x @ WEIGHTS), (4,), calibration=Rows())
    estimator = ErrorEstimator(Coder(INTERLEAVED))
    calibrate_or_restore(estimator, servable.model, servable.calibration, None, None)
    return servable, estimator


def test_a_kept_calibration_needs_no_data(calibrated, tmp_path):
    servable, estimator = calibrated
    path = tmp_path / "folder" / "kept.npz"
    calibrate_or_restore(
        ErrorEstimator(Coder(INTERLEAVED)), servable.model, servable.calibration, None, path
    )
    asked = servable.calibration.asked
    kept = ErrorEstimator(Coder(INTERLEAVED))
    calibrate_or_restore(kept, servable.model, servable.calibration, None, path)
    assert servable.calibration.asked == asked
    assert kept.conditions == estimator.conditions
    assert kept.progress() == estimator.progress()
    for few in (2, 3, 4):
        for name, value in vars(estimator.error_probability(few)).items():
            np.testing.assert_array_equal(vars(kept.error_probability(few))[name], value)
        assert not kept.needs_samples(few)
        one_missing = estimator._one_missing(few)[1]
        for found, expected in zip(
            kept.expected_error(few, one_missing),
            estimator.expected_error(few, one_missing),
            strict=True,
        ):
            np.testing.assert_array_equal(found, expected)
        # And of workers that calibration did not think of, from the same groups.
        for each in (kept, estimator):
            list(each.update_expected(few, FULL))  # all steps
        np.testing.assert_array_equal(
            kept.expected_error(few, FULL).error, estimator.expected_error(few, FULL).error
        )


def test_a_file_that_is_broken_is_made_anew(calibrated, tmp_path, caplog):
    servable, estimator = calibrated
    path = tmp_path / "kept.npz"
    write_arrays(path, estimator.state())
    flipped = bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    for content in (b"", b"PK\x03\x04 half of it", bytes(flipped)):
        path.write_bytes(content)
        asked = servable.calibration.asked
        again = ErrorEstimator(Coder(INTERLEAVED))
        calibrate_or_restore(again, servable.model, servable.calibration, None, path)
        assert servable.calibration.asked == asked + 1
        assert again.progress() == estimator.progress()
        assert path.stat().st_size > 1000
        assert "kept.npz" in caplog.text
        caplog.clear()
    assert [each.name for each in tmp_path.iterdir()] == ["kept.npz"]


def test_where_nothing_can_be_written_nothing_is_kept(calibrated, tmp_path):
    servable, estimator = calibrated
    (tmp_path / "file").touch()
    again = ErrorEstimator(Coder(INTERLEAVED))
    calibrate_or_restore(
        again, servable.model, servable.calibration, None, tmp_path / "file" / "kept.npz"
    )
    assert again.progress() == estimator.progress()


def test_its_name_has_all_that_it_depends_on(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    usual = {"model": "lenet5-digits"}
    code = NeRCC(4, 8)
    path = calibration_file(ModelSettings(**usual), code)
    assert path is not None
    assert path.parent == tmp_path / "calibrations"
    assert path == calibration_file(ModelSettings(**usual), NeRCC(4, 8))
    others = {
        calibration_file(ModelSettings(**(usual | more)), other)
        for more, other in (
            ({}, NeRCC(4, 8, lambda_dec=0.1)),
            ({}, NeRCC(4, 9)),
            ({"model": "lenet5-mnist"}, code),
            ({"outputs": "probabilities"}, code),
            ({"worker_dtype": "bfloat16"}, code),
        )
    }
    assert len(others) == 5
    assert path not in others
    monkeypatch.setattr("importlib.metadata.version", lambda name: "another")
    assert calibration_file(ModelSettings(**usual), code) != path


@pytest.mark.parametrize(
    ("folder", "model"),
    [("", "lenet5-digits"), ("gs://there", "lenet5-digits"), ("here", "my:own")],
)
def test_not_all_is_kept(folder, model, monkeypatch):
    """What your own model computes cannot be known from its name."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
    assert calibration_file(ModelSettings(model=model), NeRCC(4, 8)) is None
