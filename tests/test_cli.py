"""The command as a person meets it."""

import itertools
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from commands import invoke
from conftest import require

from nercc_jax.cli._options import COMMANDS
from nercc_jax.evaluation import Estimate
from nercc_models import find_points, load_data, load_model


def run(*arguments):
    return invoke(*arguments)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    plot = tmp_path_factory.mktemp("demo") / "demo.png"
    return run("demo", "--sets", "4", "--max-stragglers", "3", "--plot", str(plot)), plot


def test_demo_prints_a_table_and_draws_a_picture(demo):
    result, plot = demo
    assert result.exit_code == 0, result.output
    words = ("NeRCC tuned", "BACC", "replication", "MSE", "RelAcc", "K=8, N=20", "*")
    table = (
        "Labels kept against work",
        "NeRCC published",
        "replication on 20 workers",
        "by copies",
    )
    for word in (*words, *table):
        assert word in result.output
    for system, calls in (("replication on 16 workers", "16 +2.00"), ("BACC", "20 +2.50")):
        assert re.search(rf"{system} +{calls}", result.output), result.output
    kept = re.search(r"replication, else surrogate +10 +1\.32 +([\d.]+)", result.output)
    assert float(kept[1]) > 99, result.output  # the student has 99.1 % of the model's labels
    placed = re.search(r"copies by the student's doubt +10 +1\.40 +([\d.]+)", result.output)
    assert float(placed[1]) >= float(kept[1]), result.output
    assert str(plot) in result.output
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_demo_rows_show_nercc_below_bacc(demo):
    rows = [line.split() for line in demo[0].output.splitlines() if "±" in line]
    rows = [row for row in rows if row[0].isdigit()]
    errors = [[float(cell) for cell in row if "±" not in cell] for row in rows[:4]]
    for stragglers, published, tuned, learned, bacc in errors:
        assert learned < tuned < published < bacc, stragglers


@pytest.mark.parametrize("arguments", [(), ("--evaluate", "lenet5-digits")])
def test_models_lists_what_is_shipped(arguments):
    result = run("models", *arguments)
    assert result.exit_code == 0
    for word in ("lenet5-digits", "61,706", "measured now" if arguments else "by its card"):
        assert word in result.output


MODULES = {
    "a": "def model(x):\n    return x\n",
    "broken": "def model(x:",
    "raises": "raise KeyError('weights')",
}
# By command, what is wrong with its options; these modules, x.npy and few.npy are there.
ROWS = "--model a:model --inputs x.npy --tolerance 1"
WRONG = {
    "demo": {
        "--model nothing": "nothing",
        "--max-stragglers 20": "must be from 0 to 19, for 20 workers",
        "--num-workers 6": "at least as many workers",
        "--plot /no/such/folder/x.png": "/no/such/folder is no folder",
        "--max-inputs 3": "3 data points of digits, too few for a group of 8",
        "--sets 0": "--sets",
        "--code no.json": "--code no.json: no.json: No such file",
        "--outputs logit": "--outputs: 'logit' is not one of logits, ",
        "--num-data eight": "--num-data: a whole number is needed, not 'eight'",
        "--num-data 0": "--num-data: it must be at least 1, not 0",
        "--model broken:model": "--model broken:model: SyntaxError: ",
        "--model raises:model": "--model raises:model: KeyError: 'weights'",
        "--max-input 3": "unrecognized arguments: --max-input 3",
    },
    "demos": {"": "there is no command 'demos', but demo, distill"},
    "distill": {
        "--mixed 3": "--mixed: it must be at most 1, not 3",
        "--learning-rate inf": "--learning-rate: it must be above 0, not inf",
        "--share 0": "--share: it must be above 0, not 0",
        "--share 0.0001": "too cheap to be worth a student",
        "--output s.npz": "must end in .safetensors",
        "--output none/s.safetensors": "none is no folder",
        "--epochs 0": "--epochs: it must be at least 1, not 0",
        "--answers 0": "--answers: it must be at least 1, not 0",
        "--model a:model": "needs data points: use --inputs",
        "--model a:model --inputs few.npy": "has 4 inputs: needs five or more",
        "--inputs x.npy": "does not run on a batch of shape (1, 3)",
    },
    "plan": {
        "--max-workers 0": "--max-workers: it must be at least 1, not 0",
        "--max-workers 2": "need 8 workers at least",
        "--budget -1": "--budget: it must be at least 0, not -1",
        "--latency trace:no.txt": "--latency trace:no.txt: no.txt not found",
        "--latency normal": "--latency normal: a law of latency is lognormal:",
        "--latency pareto:0.05:0.05": "latencies must be finite",
        "--layouts interleaved,square": "not 'square'",
        "--surrogate studnet": "--surrogate: 'studnet' is no surrogate",
        "--max-disagreement 2": "--max-disagreement must be in [0, 1], not 2.0",
    },
    "tune": {
        "--plot /no/such/x.png": "--plot /no/such/x.png: /no/such is no folder",
        "--criterion cross_entropy --outputs probabilities": "needs --outputs logits",
        "--max-stragglers -1": "--max-stragglers -1",
        "--layout chebishev": "--layout chebishev: points must be one of",
        "--max-inputs 3": "--max-inputs 3 gives 3 data points",
        "--num-workers 1 --num-data 1": "--num-workers 1: without stragglers",
    },
    "run": {
        "--output /no/such/folder/x.npz": "/no/such/folder is no folder",
        "--output x.txt": "a result file ends in .npz, .csv or .parquet",
        "--wait-for 21": "--wait-for must be from 1 to N = 20, not 21",
        "--wait-for 17 --max-disagreement 0.1": "--wait-for does not go with --max-disagreement",
        "--deadline-s 0": "--deadline-s: it must be above 0, not 0",
        "--deadline-s nan": "--deadline-s: it must be above 0, not nan",
        "--groups 0": "--groups: it must be at least",
        "--batches -1": "--batches: it must be at least",
        "--faults straggler_rate=1.5": "--faults: straggler_rate is a share, from 0 to 1, not 1.5",
        "--faults straggler_rate=true": "straggler_rate is a share, from 0 to 1, not True",
        "--faults death_rate=nan": "--faults: death_rate is a share, from 0 to 1, not nan",
        "--faults service_delay_s=-1": "service_delay_s is seconds, from 0 to a day, not -1",
        "--faults straggler_delay_s=86401": "straggler_delay_s is seconds, from 0 to a day, not 8",
        "--faults straggle_rate=1": "--faults: there is no fault 'straggle_rate', only service_del",
        "--faults fault_seed=0.5": "--faults: fault_seed is a whole number, not 0.5",
        "--faults straggler_score='size'": "straggler_score size: one of your own is named module:",
        "--faults straggler_score=1": "straggler_score is module:function, not 1",
        "--split nothing": "--split nothing: The data set 'digits' has no split",
        "--code /no/such/code.json": "/no/such/code.json",
        "--pool threads": "threads",
        "--faults [1]": "--faults: a table, {name = 1}, is needed, not '[1]'",
        "--faults wrong_workers=[1]": "a table of whole numbers, {swap = [1]}, not [1]",
        f"{ROWS} --faults wrong_workers={{swap=['a']}}": "a table of whole numbers, {swap = [1]}",
        f"{ROWS} --faults wrong_workers={{death=[1]}}": "a table of whole numbers, {swap = [1]}",
        "--actor-options TPU": "--actor-options: a table, {name = 1}, is needed, not 'TPU'",
        "--statistic mean --stop-at -0.1": "--stop-at: it must be at least 0, not -0.1",
        "--seed -1": "--seed: it must be at least 0, not -1",
        "--grace-s 3": "--grace-s does not go with a coded run",
        "--check-answers 0.1": "--check-answers does not go with a coded run",
        "--model a:b --inputs no.npy": "--inputs no.npy: there is no such file, and no such data",
        "--model a:model": "needs data points: use --inputs",
        "--inputs x.npy --weights x.npy": "weights are for a model of your own",
        "--model a:b --weights no.npy": "there are no weights at no.npy",
        "--model a:model --weights hf:a/b": "weights of the hub are named hf:owner/name/file",
        "--model a:b --inputs x.npy --tolerance nan": "--tolerance must be 0 or positive",
        "--model a:b --inputs x.npy --max-disagreement 2": "--max-disagreement must be in [0, 1]",
        "--model a:b --inputs x.npy --columns a": "--columns does not go with inputs other than",
        "--model a:no --inputs x.npy --tolerance 1": "no attribute 'no'",
        f"{ROWS} --max-disagreement 0.1": "not both",
        f"{ROWS} --coverage 1": "--coverage must be between 0 and 1",
        f"{ROWS} --num-data 2": "go with --tolerance",
        f"{ROWS} --wait-for 2": "go with --tolerance",
        f"{ROWS} --batches 2": "go with --tolerance",
        f"{ROWS} --job-deadline-s 0": "--job-deadline-s must be",
        f"{ROWS} --grace-s -1": "--grace-s must be a number",
        f"{ROWS} --max-calls 0": "--max-calls must be positive",
        f"{ROWS} --max-fenced 1": "--max-fenced must be in",
        f"{ROWS} --stop-at 0.1": "--stop-at needs a --statistic",
    },
}


@pytest.mark.parametrize(
    ("command", "arguments"), [(name, each) for name, found in WRONG.items() for each in found]
)
def test_errors_are_one_sentence_and_leave_nothing(
    command, arguments, tmp_path, untyped, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text in MODULES.items():
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(text)
    np.save("x.npy", np.ones((9, 3)))
    np.save("few.npy", np.ones((4, 3)))
    result = run(command, *arguments.split())
    assert result.exit_code == 2, result.output
    assert WRONG[command][arguments] in result.output
    assert not re.search("Traceback|Value error|unable to parse", result.output)
    left = {path.name for path in tmp_path.iterdir() if not path.is_dir() or any(path.iterdir())}
    assert left <= {"x.npy", "few.npy", "__pycache__", *(f"{name}.py" for name in MODULES)}


@pytest.mark.parametrize("command", [("demo", "--plot"), ("tune", "--output")])
def test_what_cannot_be_written_is_reported_first(command, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    result = run(*command, str(tmp_path / "result"))
    assert result.exit_code == 2
    assert f"{tmp_path} may not be written to" in result.output.replace("\n", "")


def test_python_runs_it_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "nercc_jax", "--version"], capture_output=True, text=True
    )
    assert done.stdout.startswith("nercc "), done.stderr


def test_a_missing_ray_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run("run", "--pool", "ray")
    assert result.exit_code == 2
    assert "pip install '.[ray]'" in result.output


@pytest.mark.parametrize(
    ("command", "package"),
    [("models", "rich"), ("models", "rich.console"), ("demo", "matplotlib")],
)
def test_a_missing_extra_is_named_before_any_work(command, package):
    code = f"import sys; sys.modules[{package!r}] = None; "
    code += f"from nercc_jax.cli import main; sys.argv[1:] = [{command!r}]; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert "pip install '.[demo]'" in result.stderr
    assert not result.stdout


@pytest.mark.parametrize(
    ("half_width", "text"),
    [(np.nan, "50.0"), (0.0003, "50.0"), (0.01, "50.0 49.0–51.0"), (0.05, "50.0 45–55")],
)
def test_a_share_has_as_many_digits_as_its_interval_gives_reason_for(half_width, text):
    assert Estimate(0.5, half_width).percent() == text


# The options above all panels of `--help`.
FIRST = {
    "demo": "model inputs outputs num-data num-workers code plot numbers",
    "distill": "model inputs share answers epochs output",
    "models": "names evaluate data-dir numbers",
    "new-model": "file",
    "plan": "model inputs latency queries max-workers budget max-disagreement output",
    "run": "model inputs tolerance max-disagreement num-data num-workers output resume",
    "serve": "model config check print-config scheme num-data num-workers pool workers http-port",
    "tune": "model inputs outputs num-data num-workers layout steps output",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_or_two_and_begins_with_the_usual_options(command):
    """A line for each option where the window is wide, and the first eight above all panels."""
    if command == "serve":
        require("pydantic_settings", "serve")
    found = invoke(command, "--help", env={"COLUMNS": "120"})
    assert found.exit_code == 0
    usage, *lines = found.output.splitlines()
    assert usage == f"Usage: nercc {command} [OPTIONS]"
    assert len(lines) < (90 if command == "serve" else 60)
    panel = lines[1 + lines.index("Options:") :]
    first = itertools.takewhile(lambda line: line[:1] == " ", panel)
    names = [found[1] for line in first if (found := re.match(r"  (?:--)?([\w-]+)", line))]
    assert names == [*FIRST[command].split(), "help"]
    if command == "tune":  # numbers show their default
        text = "\n".join(lines)
        assert re.search(r"--steps .*\[default: \d+\]", text)


# -- A model of one's own in every command, by what `nercc new-model` writes -----------------------


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


def succeeds(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a user works: a model as `nercc new-model` writes it, and a module by hand."""
    before, path = os.getcwd(), tmp_path_factory.mktemp("own")
    os.chdir(path)
    (path / "own_parts.py").write_text(PARTS)
    assert "nercc demo --model their_model:model" in succeeds("new-model", "their_model.py")
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
    report = succeeds("run", "--model", "pixels:model", "--inputs", "digits", *small)
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
    report = succeeds("demo", "--model", "own_parts:holes", *code, "--outputs", "values")
    assert "no NeRCC learned: the model's answers to coded data points must be" in report
    assert "MSE of decoded values" in report


@pytest.mark.slow
def test_tuning_takes_as_many_steps_as_it_is_told(folder):
    options = "--num-data 2 --num-workers 4 --steps 1 --sets 1 --max-stragglers 1 --seed 1"
    words = ("--model", "own_parts:model", "--plot", "one.png", "--output", "one.json")
    assert "1 steps in" in succeeds("tune", *words, *options.split())


@pytest.mark.slow
def test_commands_run_what_jax_cannot_trace_but_tune_says_why_not(folder):
    code = ("--num-data", "2", "--num-workers", "4")
    report = succeeds("demo", "--model", "own_parts:by_hand", *code, "--plot", "by-hand.png")
    assert "RelAcc" in report
    assert (folder / "by-hand.png").exists()
    succeeds("run", "--model", "own_parts:by_hand", *code, "--output", "by-hand.npz")
    tune = ("tune", "--model", "own_parts:by_hand", *code, "--steps", "1")
    result = invoke(*tune)
    assert result.exit_code == 2
    assert "error: JAX cannot trace the model" in result.output
    assert "Traceback" not in result.output
