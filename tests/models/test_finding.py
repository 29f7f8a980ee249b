"""Models by name, as every command takes them, and their data."""

import sys

import jax
import numpy as np
import pytest

from nercc_models import example_inputs, find_callable, find_model, load_data, load_model

OWN = """
import numpy as np

def double(x):
    return 2 * np.asarray(x)

def scaled(path):
    scale = np.load(path)
    return lambda x: scale * np.asarray(x)

def example_inputs():
    return np.ones((3, 2))

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder to work in, with a module."""
    (tmp_path / "own_found.py").write_text(OWN)
    (tmp_path / "own_raises.py").write_text("def example_inputs():\n    raise KeyError('no')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_found", raising=False)


def test_a_shipped_model_returns_logits_or_probabilities_and_has_its_data():
    model = load_model("lenet5-digits", outputs="probabilities")
    x, labels = model.images("test", None, 20, 1)
    data = load_data("digits", "test").shuffled(1)
    np.testing.assert_array_equal(labels, data.labels[:20])
    np.testing.assert_array_equal(x, model.preprocess(data.images[:20]))
    logits = find_model("lenet5-digits")(x)
    np.testing.assert_allclose(model(x), jax.nn.softmax(logits), rtol=1e-5)
    np.testing.assert_array_equal(find_model("lenet5-digits", outputs="probabilities")(x), model(x))


def test_a_model_of_ones_own_is_found_in_the_working_directory(own):
    assert find_model("own_found:double")([2.0]).tolist() == [4.0]
    np.save("three.npy", 3.0)
    assert find_model("own_found:scaled", "three.npy")([2.0]).tolist() == [6.0]
    shares = find_model("own_found:double", outputs="probabilities")(np.eye(2, dtype=np.float32))
    np.testing.assert_allclose(shares, jax.nn.softmax(2 * np.eye(2)), rtol=1e-5)
    assert example_inputs("own_found:double").shape == (3, 2)


@pytest.mark.parametrize(
    ("find", "arguments", "message"),
    [
        (find_model, ("nothing",), "There is no model 'nothing'"),
        (find_model, ("lenet5-digits", "w.npy"), "weights are for a model of your own"),
        (find_callable, ("own_found",), "named module:function, not 'own_found'"),
        (find_callable, ("own_found:nothing",), "has no attribute 'nothing'"),
        (find_callable, ("own_found:number",), "is a int, not a callable"),
        (find_callable, ("own_found:scaled", "no.npy"), "own_found:scaled raises of no.npy File"),
        (find_callable, ("no_module:x",), "No module named 'no_module'"),
        (example_inputs, ("own_raises:x",), r"example_inputs\(\) raises KeyError: 'no'"),
    ],
)
def test_what_is_not_found_is_named(own, find, arguments, message):
    with pytest.raises(ValueError, match=message):
        find(*arguments)
