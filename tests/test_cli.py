"""The command as a person meets it."""

import itertools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from commands import run_command
from conftest import require
from typer.testing import CliRunner

from nercc_jax.cli._app import app
from nercc_jax.cli._process import compile_quickly
from nercc_jax.evaluation import Estimate


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    plot = tmp_path_factory.mktemp("demo") / "demo.png"
    return run("demo", "--sets", "4", "--max-stragglers", "3", "--plot", str(plot)), plot


def test_demo_prints_a_table_and_draws_a_picture(demo):
    result, plot = demo
    assert result.exit_code == 0, result.output
    words = ("NeRCC", "BACC", "LCC", "replication", "MSE", "RelAcc", "K=8, N=20", "*")
    for word in (*words, "Labels kept against work", "NeRCC published", "Without the student"):
        assert word in result.output
    kept = re.search(r"copies, else the student +10 +1\.32 +([\d.]+)", result.output)
    assert float(kept[1]) > 99, result.output  # the student has 99.1 % of the model's labels
    placed = re.search(r"copies by the student's doubt +10 +1\.40 +([\d.]+)", result.output)
    assert float(placed[1]) >= float(kept[1]), result.output
    assert str(plot) in result.output
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_demo_rows_show_nercc_below_bacc(demo):
    rows = [line.split() for line in demo[0].output.splitlines() if "±" in line]
    rows = [row for row in rows if row[0].isdigit()]
    errors = [[float(cell) for cell in row if "±" not in cell] for row in rows[:4]]
    for stragglers, nercc, learned, bacc, bscc, lcc in errors:
        assert nercc < min(bacc, lcc), stragglers  # BSCC is lower at S = 3
        assert learned < min(nercc, bscc), stragglers


@pytest.mark.parametrize("arguments", [(), ("--evaluate", "lenet5-digits")])
def test_models_lists_what_is_shipped(arguments):
    result = run("models", *arguments)
    assert result.exit_code == 0
    for word in ("lenet5-digits", "61,706", "measured now" if arguments else "by its card"):
        assert word in result.output


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("demo", ("--model", "nothing"), "nothing"),
        ("demo", ("--max-stragglers", "20"), "must be from 0 to 19, for 20 workers"),
        ("demo", ("--num-workers", "6"), "at least as many workers"),
        ("demo", ("--plot", "/no/such/folder/x.png"), "there is no folder"),
        ("demo", ("--max-inputs", "3"), "3 data points of digits, too few for a group of 8"),
        ("demo", ("--sets", "0"), "--sets"),
        ("tune", ("--plot", "/no/such/x.png"), "--plot /no/such/x.png: there is no folder"),
        (
            "tune",
            ("--criterion", "cross_entropy", "--outputs", "probabilities"),
            "needs --outputs logits",
        ),
        ("tune", ("--max-stragglers", "-1"), "--max-stragglers -1"),
        ("tune", ("--layout", "chebishev"), "--layout chebishev: points must be one of"),
        ("tune", ("--max-inputs", "3"), "--max-inputs 3 gives 3 data points"),
        ("tune", ("--num-workers", "1", "--num-data", "1"), "--num-workers 1: without stragglers"),
        (
            "plan",
            ("--max-workers", "0"),
            "'--max-workers': it should be greater",
        ),
        ("plan", ("--budget", "-1"), "'--budget': it should be greater than or equal to 0"),
        ("plan", ("--latency", "trace:no.txt"), "--latency trace:no.txt: no.txt not found"),
        ("plan", ("--surrogate", "studnet"), "--surrogate: 'studnet' is no surrogate"),
        ("distill", ("--mixed", "3"), "'--mixed': it should be less than or equal to 1"),
        ("demo", ("--code", "no.json"), "--code no.json: no.json: No such file"),
        ("demo", ("--outputs", "logit"), "'logit' is not one of 'logits'"),
        ("demo", ("--num-data", "eight"), "'eight'"),
        ("demo", ("--num-data", "0"), "0"),
    ],
)
def test_errors_are_one_sentence(command, arguments, message):
    result = run(command, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    for word in ("Traceback", "Value error", "unable to parse"):
        assert word not in result.output


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


def test_a_file_that_is_no_code_is_reported(tmp_path):
    for content, message in (("[]", "it is no file of a code"), ("words", "is no JSON")):
        path = tmp_path / "thing.json"
        path.write_text(content)
        result = run("demo", "--code", str(path))
        assert result.exit_code == 2
        assert message in result.output
        assert "Traceback" not in result.output


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


def test_a_missing_extra_is_named():
    code = "import sys; sys.modules['typer'] = None; from nercc_jax.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install '.[demo]'" in result.stderr


def test_only_models_with_little_to_do_are_compiled_quickly(monkeypatch):
    reported = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: reported.append(name))
    x = np.ones((4, 100), np.float32)

    def product(batch):
        return batch @ jnp.ones((100, 10))

    def loop(batch):
        return jax.lax.fori_loop(0, 3, lambda _, x: x + 1, batch)

    compile_quickly(product, x, 10**9)
    compile_quickly(loop, x, 10)
    assert not reported
    compile_quickly(product, x, 10**6)
    assert reported == ["jax_disable_most_optimizations"]


@pytest.mark.parametrize(
    ("half_width", "text"),
    [(np.nan, "50.0"), (0.0003, "50.0"), (0.01, "50.0 49.0–51.0"), (0.05, "50.0 45–55")],
)
def test_a_share_has_as_many_digits_as_its_interval_gives_reason_for(half_width, text):
    from nercc_jax.cli._comparison import share_text

    assert share_text(Estimate(0.5, half_width)) == text


def test_the_servers_options_are_its_settings():
    require("pydantic_settings", "serve")
    from nercc_jax.cli._serve import command_with_options

    names = {option.name for option in command_with_options().params}
    assert {"model", "check_answers"} <= names
    assert not [name for name in names if "completion" in name], "Typer would add two of its own"


# Options that `serve` has by the same name with a meaning of its own, and why.
SERVED = {
    "model": "several may be served",
    "num_data": "groups are small, since queries wait for each other",
    "num_workers": "as num_data",
    "inputs": "they calibrate, and may have names",
    "outputs": "found by the model's own answers",
    "code": "other settings of the code stand beside it",
    "workers": "of each model",
    "surrogate": "it may learn",
    "tolerance": "of queries",
    "coverage": "of queries",
    "max_disagreement": "of queries, with a bound",
    "deadline_s": "of a request",
    "wait_for": "of a group of queries",
    "max_calls": "a mean of calls a query; of a run, rows",
    "check_answers": "of queries",
    "py_modules": "separated by commas, for a file and the environment",
    "points": "a layout; to tune, whether points move",
}
# Results, whose kind and default name are each command's own.
RESULTS = {"output", "plot"}


@pytest.mark.parametrize("command", ["demo", "distill", "models", "plan", "run", "tune", "serve"])
def test_help_fits_a_screen_or_two_and_begins_with_the_usual_options(command):
    """A line for each option where the window is wide, and the first eight above all panels."""
    if command == "serve":
        require("pydantic_settings", "serve")
    code, text = run_command(command, "--help")
    assert code == 0
    usage, *lines = text.splitlines()
    assert usage.startswith("Usage: ")
    assert len(lines) <= (110 if command == "serve" else 60)
    first = list(
        itertools.takewhile(lambda line: line[:1] == " ", lines[1 + lines.index("Options:") :])
    )
    assert len(first) <= (14 if command == "serve" else 10)
    assert command == "models" or first[0].startswith("  --model ")


def test_an_option_has_one_name_and_one_meaning_in_all_commands():
    require("pydantic_settings", "serve")
    from nercc_jax.cli._serve import command_with_options

    commands = dict(typer.main.get_command(app).commands) | {"serve": command_with_options()}
    seen = {}
    for command, made in commands.items():
        for each in made.params:
            words = each.help.partition(" [default")[0], str(each.default)
            words = words[:1] if each.name in RESULTS else words
            names = {*each.opts} - ({"--output-dir"} if command == "plan" else set())
            if (command == "serve" and each.name in SERVED) or not getattr(each, "help", None):
                continue
            known = seen.setdefault(each.name, (names, words))
            assert known == (names, words), f"--{each.name} of {command}"
    flags = [flag for names, _ in seen.values() for flag in names]
    assert len(flags) == len({*flags}), "two options have one name"
