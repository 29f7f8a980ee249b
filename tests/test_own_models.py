"""A model of one's own in every command, by what `nercc new-model` writes."""

import os
import sys

import numpy as np
import pytest
from commands import invoke

from nercc_models import find_points, load_data, load_model

PARTS = """
import numpy as np

def model(batch):
    return batch @ np.eye(3, 2, dtype="float32")

def by_hand(batch):
    return np.asarray(batch)

def picky(batch):
    if (np.asarray(batch) > 5).any():
        raise ArithmeticError("no solution here")
    return np.asarray(batch)

def holes(batch):  # it has nothing of some mixtures
    rows = np.asarray(batch, "float32")
    return np.where(abs(rows[:, :1] - rows[:, :1].round()) > 0.3, np.nan, rows)

def load(path):
    return lambda batch: batch * np.load(path)

def example_inputs():
    return np.arange(30.0).reshape(10, 3)
"""


def run(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a user works: a model as `nercc new-model` writes it, and a module by hand."""
    before, path = os.getcwd(), tmp_path_factory.mktemp("own")
    os.chdir(path)
    (path / "own_parts.py").write_text(PARTS)
    assert "nercc demo --model their_model:model" in run("new-model", "their_model.py")
    yield path
    os.chdir(before)
    sys.path[:] = [each for each in sys.path if each != str(path)]


def test_what_is_there_is_not_written_over(folder):
    for name, message in (("their_model.py", "is left as it is"), ("my-model.py", "of a module")):
        result = invoke("new-model", name)
        assert result.exit_code == 2
        assert message in result.output


def test_inputs_are_parted_alike_for_all_commands(folder):
    data = find_points("own_parts:model")
    train, test = data.shuffled("train", 100, 1), data.shuffled("test", 100, 2)
    assert (train.shape, test.shape) == ((8, 3), (2, 3))
    np.testing.assert_array_equal(np.sort([*train[:, 0], *test[:, 0]]), 3 * np.arange(10))
    np.testing.assert_array_equal(np.sort(data.shuffled("test", 9, 3), 0), np.sort(test, 0))
    np.testing.assert_array_equal(data.split("all").x, np.arange(30).reshape(10, 3))
    np.save("x.npy", np.ones((7, 3)))
    assert find_points("own_parts:model", inputs="x.npy").shuffled("train", 9, 0).shape == (6, 3)
    with pytest.raises(ValueError, match="only the splits train and test, not 'all'"):
        data.shuffled("all", 9, 0)


def test_inputs_may_be_a_data_set_by_name(folder):
    (folder / "pixels.py").write_text("def model(x):\n    return x.reshape(len(x), -1)[:, 18:28]\n")
    small = ("--num-data", "2", "--num-workers", "4", "--max-inputs", "9", "--output", "d.npz")
    report = run("run", "--model", "pixels:model", "--inputs", "digits", *small)
    assert "9 data points of 'test'" in report
    with np.load("d.npz") as found:
        assert found["label"].tolist() == load_data("digits", "test", limit=9).labels.tolist()
    rows = find_points("pixels:model", inputs="digits").shuffled("train", 5, 0)
    assert rows.shape == (5, 8, 8, 1)
    assert rows.dtype == np.float32
    result = invoke("run", "--model", "pixels:model", "--inputs", "digit")
    assert "--inputs digit: there is no such file, and no such data set" in result.output
    own = load_model("lenet5-digits")
    shipped, named = (find_points("lenet5-digits", own, each) for each in (None, "digits"))
    np.testing.assert_array_equal(shipped.shuffled("test", 5, 0), named.shuffled("test", 5, 0))


@pytest.mark.parametrize("outputs", ["logits", "probabilities", "values"])
def test_one_number_a_row_has_no_label(folder, outputs):
    (folder / "one.py").write_text("def model(x):\n    return x[:, :1]\n")
    np.save("x.npy", np.ones((9, 3), np.float32))
    code = ("--num-data", "2", "--num-workers", "4", "--output", f"one-{outputs}.npz")
    result = invoke("run", "--model", "one:model", "--inputs", "x.npy", "--outputs", outputs, *code)
    assert result.exit_code == (0 if outputs == "values" else 2)
    assert ("say --outputs values" in result.output) == (outputs != "values")


def test_what_a_function_raises_on_the_host_is_one_line(folder):
    options = ["--num-data", "2", "--num-workers", "4", "--sets", "2", "--outputs", "values"]
    result = invoke("demo", "--model", "own_parts:picky", *options)
    assert result.exit_code == 1
    assert result.output == "error: the model failed: ArithmeticError: no solution here\n"


def test_the_demo_goes_on_where_some_mixtures_have_no_answer(folder):
    code = ("--num-data", "2", "--num-workers", "4", "--sets", "2", "--max-stragglers", "1")
    report = run("demo", "--model", "own_parts:holes", *code, "--outputs", "values")
    assert "no NeRCC learned: the model's answers to coded data points must be" in report
    assert "MSE of decoded values" in report


@pytest.mark.slow
def test_commands_run_what_jax_cannot_trace_but_tune_says_why_not(folder):
    code = ("--num-data", "2", "--num-workers", "4")
    report = run("demo", "--model", "own_parts:by_hand", *code, "--plot", "by-hand.png")
    assert "RelAcc" in report
    assert (folder / "by-hand.png").exists()
    run("run", "--model", "own_parts:by_hand", *code, "--output", "by-hand.npz")
    tune = ("tune", "--model", "own_parts:by_hand", *code, "--steps", "1")
    result = invoke(*tune)
    assert result.exit_code == 2
    assert "error: JAX cannot trace the model" in result.output
    assert "Traceback" not in result.output


# -- The template in every command: one test after the other, on what the last one wrote. ----------
