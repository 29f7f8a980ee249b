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
def calibrate():
    """Makes an estimator by a kept file, and says how often data were needed for it."""
    servable = make_servable("tanh", lambda x: jnp.tanh(3 * x @ WEIGHTS), (4,), calibration=Rows())

    def calibrate(path=None):
        asked = servable.calibration.asked
        made = ErrorEstimator(Coder(INTERLEAVED))
        calibrate_or_restore(made, servable.model, servable.calibration, None, path)
        return made, servable.calibration.asked - asked

    return calibrate


def test_a_kept_calibration_needs_no_data(calibrate, tmp_path):
    path = tmp_path / "folder" / "kept.npz"
    (estimator, first), (kept, second) = calibrate(path), calibrate(path)
    assert (first, second) == (1, 0)
    assert kept.conditions == estimator.conditions
    assert kept.progress() == estimator.progress()
    for few in (2, 3, 4):
        for name, value in vars(estimator.error_probability(few)).items():
            np.testing.assert_array_equal(vars(kept.error_probability(few))[name], value)
        assert not kept.needs_samples(few)
        # Of workers that calibration did not think of, too, from the same groups.
        for mask in (*estimator._one_missing(few), FULL):
            for each in (kept, estimator):
                list(each.update_expected(few, mask))  # all steps
            found, expected = (each.expected_error(few, mask) for each in (kept, estimator))
            np.testing.assert_array_equal(found.error, expected.error)
            np.testing.assert_array_equal(found.disagreement, expected.disagreement)


def test_a_file_that_is_broken_is_made_anew_and_one_that_cannot_be_is_no_error(
    calibrate, tmp_path, caplog
):
    path = tmp_path / "kept.npz"
    estimator, _ = calibrate(path)
    flipped = bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    for content in (b"", b"PK\x03\x04 half of it", bytes(flipped)):
        path.write_bytes(content)
        again, asked = calibrate(path)
        assert (asked, again.progress()) == (1, estimator.progress())
        assert path.stat().st_size > 1000
        assert "kept.npz" in caplog.text
        caplog.clear()
    (tmp_path / "file").touch()
    assert calibrate(tmp_path / "file" / "kept.npz")[0].progress() == estimator.progress()


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
