"""A model of one's own in every command, by what `nercc new-model` writes."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from commands import invoke
from conftest import require

from nercc_jax import load_code
from nercc_jax.codes import LearnedDecoder
from nercc_models import find_model, find_points, load_data, load_model

MODEL = "their_model:model"
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


def test_outputs_are_as_asked(folder):
    x = jnp.eye(3)
    logits, shares = (
        find_model("own_parts:model", outputs=outputs)(x) for outputs in ("logits", "probabilities")
    )
    np.testing.assert_allclose(
        shares, np.exp(logits) / np.exp(logits).sum(1, keepdims=True), rtol=1e-5
    )
    np.save("w.npy", 3.0)
    np.testing.assert_array_equal(find_model("own_parts:load", folder / "w.npy")(x), 3 * x)


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


@pytest.mark.slow
def test_the_template_says_what_it_recognises_and_writes_weights(folder):
    done = subprocess.run([sys.executable, "their_model.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[0]) > 95
    assert (folder / "their_model.safetensors").exists()


@pytest.fixture(scope="module")
def tuned(folder):
    small = "--num-data 4 --num-workers 8 --max-stragglers 2 --max-inputs 120 --sets 3 --steps 8"
    return run("tune", "--model", MODEL, "--learn-decoder", *small.split())


@pytest.mark.slow
def test_tune_compares_draws_and_writes_a_code(tuned, folder):
    for word in ("untuned", "tuned", "learned", "BACC", "MSE", "RelAcc", "lambda_dec", "8 steps"):
        assert word in tuned
    assert (folder / "nercc-tune.png").read_bytes().startswith(b"\x89PNG")
    card = json.loads((folder / "nercc-tuned.json").read_text())["about"]
    assert (card["model"], card["data"]) == (MODEL, "example_inputs() of their_model")
    code = load_code(folder / "nercc-tuned.json")
    assert isinstance(code, LearnedDecoder)
    assert (code.num_data, code.num_workers) == (4, 8)


@pytest.mark.slow
def test_demo_takes_a_tuned_code_and_weights(tuned, folder):
    small = "--weights their_model.safetensors --max-stragglers 1 --sets 2 --max-inputs 80"
    options = ("--code", "nercc-tuned.json", "--plot", "demo.png", *small.split())
    reported = run("demo", "--model", "their_model:load", *options)
    assert "tuned" in reported
    assert "K=4, N=8" in reported
    assert "RelAcc" in reported


@pytest.mark.slow
def test_plan_writes_a_plan(folder):
    arguments = "--latency stragglers:0.05:0.08:10 --queries 4 --max-workers 5 --budget 0.25"
    arguments += " --max-inputs 96 --max-disagreement 0.2 --layouts interleaved --output a/b"
    reported = run("plan", "--model", MODEL, *arguments.split())
    for word in ("uncoded", "hedged", "NeRCC interleaved", "recommended:", "*"):
        assert word in reported
    written = json.loads((folder / "a/b/plan.json").read_text())
    assert written["latency"] == "stragglers:0.05:0.08:10"
    assert written["recommended"] in written["candidates"]


@pytest.mark.slow
def test_run_decodes_batches_or_computes_rows(folder):
    small = "--num-data 2 --num-workers 4 --max-inputs 40 --groups 4"
    run("run", "--model", MODEL, *small.split(), "--output", "batches.npz")
    with np.load("batches.npz") as found:
        assert found["predictions"].shape == (40, 10)
        assert found["recovered"].all()
    run("run", "--model", MODEL, "--max-inputs", "40", "--tolerance", "0", "--output", "rows.npz")
    with np.load("rows.npz") as found:
        assert found["exact"].all()


@pytest.mark.slow
def test_distill_and_serve_take_it(folder):
    small = "--answers 200 --epochs 1 --output s.safetensors"
    assert f"agrees with {MODEL} on" in run("distill", "--model", MODEL, *small.split())
    require("pydantic_settings", "serve")
    reported = run("serve", "--check", "--model", MODEL, "--surrogate", "s.safetensors")
    assert "their_model.model can be served" in reported
