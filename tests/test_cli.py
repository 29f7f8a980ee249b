"""The command as a person meets it."""

import itertools
import re
import subprocess
import sys

import numpy as np
import pytest
from commands import invoke
from conftest import require

from nercc_jax.cli._options import COMMANDS
from nercc_jax.evaluation import Estimate


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


# By command, what is wrong with its options; a and x.npy are there.
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
        "--max-input 3": "unrecognized arguments: --max-input 3",
    },
    "demos": {"": "there is no command 'demos', but demo, distill"},
    "distill": {
        "--mixed 3": "--mixed: it must be at most 1, not 3",
        "--learning-rate inf": "--learning-rate: it must be above 0, not inf",
        "--share 0": "--share: it must be above 0, not 0",
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
    monkeypatch.delitem(sys.modules, "a", raising=False)
    (tmp_path / "a.py").write_text("def model(x):\n    return x\n")
    np.save("x.npy", np.ones((9, 3)))
    result = run(command, *arguments.split())
    assert result.exit_code == 2, result.output
    assert WRONG[command][arguments] in result.output
    assert not re.search("Traceback|Value error|unable to parse", result.output)
    left = {path.name for path in tmp_path.iterdir() if not path.is_dir() or any(path.iterdir())}
    assert left <= {"a.py", "x.npy", "__pycache__"}


@pytest.mark.parametrize("command", [("demo", "--plot"), ("tune", "--output")])
def test_what_cannot_be_written_is_reported_first(command, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    result = run(*command, str(tmp_path / "result"))
    assert result.exit_code == 2
    assert f"{tmp_path} may not be written to" in result.output.replace("\n", "")


def test_a_module_that_cannot_be_imported_is_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nercc_broken.py").write_text("def model(x:")
    (tmp_path / "nercc_raises.py").write_text("raise KeyError('weights')")
    for name, message in (("broken", "SyntaxError: "), ("raises", "KeyError: 'weights'")):
        result = run("demo", "--model", f"nercc_{name}:model")
        assert result.exit_code == 2
        assert f"--model nercc_{name}:model: {message}" in result.output


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
