"""`nercc run --inputs`: a function of one's own on each row, within a tolerance or computed."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import invoke
from conftest import require

from nercc_models import load_inputs

# As users write them: NumPy, which JAX cannot trace.
OWN = '''
import os
import time
import numpy as np


def swing(x, cost=0.0):
    """A damped pendulum by Runge and Kutta: 3 parameters, 20 outputs."""
    time.sleep(cost * len(x))
    damping, drive, angle = 0.2 + 0.2 * x[:, 0], 0.5 + 0.3 * x[:, 1], 0.5 + 0.5 * x[:, 2]
    state, outputs, step = np.stack([angle, 0 * angle]), [], 0.15

    def slope(t, s):
        return np.stack([s[1], -damping * s[1] - np.sin(s[0]) + drive * np.cos(0.8 * t)])

    for count in range(60):
        t = count * step
        a = slope(t, state)
        b = slope(t + step / 2, state + step / 2 * a)
        c = slope(t + step / 2, state + step / 2 * b)
        d = slope(t + step, state + step * c)
        state = state + step / 6 * (a + 2 * b + 2 * c + d)
        if count % 3 == 2:
            outputs.append(state[0])
    return np.stack(outputs, axis=1)


def slow(x):
    """Until somebody has seen enough of it; then still no faster than a learner is loaded."""
    return swing(x, cost=0.05 if os.path.exists("FOLDER/seen") else 0.25)


def flat(x):
    return swing(x)[:, 0]


def boxes(x):
    return swing(x)[:, :12].reshape(-1, 3, 4)


def some_nan(x):
    y = swing(x)
    y[x[:, 0] > 0.9] = np.nan
    return y


def picky(x):
    if (x[:, 0] > 0.9).any():
        raise ArithmeticError("there is no solution here")
    return swing(x)


def broken(x):
    return {"y": x}


def traced(x):
    return x[:, :1] * np.array([1.0, -1.0])


def table(x):
    return x[:, :, None] * np.array([1.0, -1.0])
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the user works: a module, and inputs of it."""
    (tmp_path / "nercc_own_rows.py").write_text(OWN.replace("FOLDER", str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nercc_own_rows", raising=False)
    np.save("x.npy", np.random.default_rng(0).uniform(-1, 1, (50, 3)))
    return tmp_path


def run(function, *arguments, inputs="x.npy"):
    command = ["run", "--model", f"nercc_own_rows:{function}", "--inputs", inputs, *arguments]
    return invoke(*command)


def load(path):
    with np.load(path) as file:
        return dict(file)


def own(function):
    import nercc_own_rows  # pyright: ignore[reportMissingImports]

    return getattr(nercc_own_rows, function)(np.load("x.npy"))


SMALL = ("--tolerance", "0.01", "--num-workers", "4", "--deadline-s", "20")


@pytest.mark.parametrize("function", ["swing", "flat", "boxes"])
def test_rows_are_what_the_function_gives_to_the_bit(folder, function):
    result = run(function, *SMALL, "--output", "y.npz")
    assert result.exit_code == 0, result.output
    assert "computed 50, predicted 0, waiting 0" in result.output
    rows = load("y.npz")
    assert rows["predictions"].dtype == np.float64
    np.testing.assert_array_equal(rows["predictions"], own(function))
    assert rows["exact"].all()
    assert not rows["deviation"].any()
    assert not rows["bar"].any()
    assert not (folder / "y.npz.parts").exists()
    summary = json.loads((folder / "y.summary.json").read_text())
    assert (summary["rows_done"], summary["computed"], summary["predicted"]) == (50, 50, 0)
    assert summary["learned_from"] is None


def test_what_the_function_gives_is_kept_though_it_be_nan(folder):
    result = run("some_nan", *SMALL, "--output", "y.npz")
    assert result.exit_code == 0, result.output
    assert "not finite" in result.output
    np.testing.assert_array_equal(load("y.npz")["predictions"], own("some_nan"))


def test_rows_on_which_the_function_raises_are_reported_and_no_others_are_lost(folder):
    result = run("picky", *SMALL, "--groups", "4", "--output", "y.npz")
    odd = np.load("x.npy")[:, 0] > 0.9
    assert result.exit_code == 3
    assert f"{odd.sum()} rows are unknown" in result.output
    assert f"row {np.argmax(odd)}: ArithmeticError: there is no solution here" in result.output
    rows = load("y.npz")
    np.testing.assert_array_equal(rows["exact"], ~odd)
    assert np.isnan(rows["predictions"][odd]).all()
    assert np.isinf(rows["deviation"][odd]).all()
    again = run("swing", *SMALL, "--output", "y.npz", "--resume")
    assert again.exit_code == 2
    assert "model was 'nercc_own_rows:picky' and is 'nercc_own_rows:swing'" in again.output
    again = run("picky", *SMALL, "--output", "y.npz", "--resume")
    assert again.exit_code == 3  # once more, and only those
    assert f"{50 - odd.sum()} rows are done already" in again.output


def test_a_function_that_gives_no_array_ends_the_run_in_words(folder):
    result = run("broken", *SMALL)
    assert result.exit_code == 1
    assert "the function gave a dict: an array (rows, ...) is needed" in result.output
    assert "Traceback" not in result.output
    assert not list(folder.glob("*.parts"))


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_have_a_column_for_each_output(folder, suffix):
    require("pyarrow", "data")
    result = run("boxes", *SMALL, "--max-inputs", "20", "--output", f"y.{suffix}")
    assert result.exit_code == 0, result.output
    wanted = own("boxes")[:20].reshape(20, -1)
    names = [f"output_{place}" for place in range(12)]
    names += ["deviation", "bar", "exact", "status", "reason"]
    if suffix == "parquet":
        from pyarrow import parquet

        table = parquet.read_table("y.parquet")
        assert table.column_names == names
        found = [table[name].to_numpy() for name in names[:12]]
        assert table["exact"].to_pylist() == [True] * 20
    else:
        with open("y.csv") as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0]) == names
        found = [[float(row[name]) for row in rows] for name in names[:12]]
    np.testing.assert_array_equal(np.stack(found, axis=1), wanted)


def test_inputs_come_as_arrays_or_tables(tmp_path):
    require("pyarrow", "data")
    import pyarrow
    from pyarrow import parquet

    x = np.random.default_rng(1).normal(size=(7, 2))
    np.savez(tmp_path / "x.npz", x)
    np.savetxt(tmp_path / "x.csv", x, delimiter=",", fmt="%.17g", header="a,b", comments="")
    np.savetxt(tmp_path / "plain.csv", x, delimiter=",", fmt="%.17g")
    parquet.write_table(pyarrow.table({"a": x[:, 0], "b": x[:, 1]}), tmp_path / "x.parquet")
    for name in ("x.npz", "x.csv", "plain.csv", "x.parquet"):
        np.testing.assert_array_equal(load_inputs(tmp_path / name)[0], x)
    np.save(tmp_path / "x.npy", x.astype(np.float32))
    assert load_inputs(tmp_path / "x.npy")[0].dtype == np.float32


NAMED = {"b": [2.0, 4.0, 6.0], "name": ["x,1", "#2", "z"], "a": [1.0, 3.0, 5.0], "n": [7, 8, 9]}


def named_table(suffix, **changes):
    """Writes `table.csv` or `table.parquet` with columns of numbers and texts."""
    import pyarrow
    from pyarrow import parquet

    path, columns = Path(f"table.{suffix}"), NAMED | changes
    if suffix == "parquet":
        parquet.write_table(pyarrow.table(columns), path)
        return path
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_name_their_inputs_and_ids(folder, suffix):
    require("pyarrow", "data")
    path = named_table(suffix)
    x, ids = load_inputs(path, ["a", "b"], "name")
    np.testing.assert_array_equal(x, [[1, 2], [3, 4], [5, 6]])
    assert ids.tolist() == NAMED["name"]
    x, ids = load_inputs(path, ["n"])
    np.testing.assert_array_equal(x, [[7], [8], [9]])
    assert ids is None
    x, ids = load_inputs(named_table(suffix, name=[1, 2, 3]), None, "n")
    np.testing.assert_array_equal(x, [[2, 1, 1], [4, 2, 3], [6, 3, 5]])
    assert ids.astype(str).tolist() == ["7", "8", "9"]
    spreadsheet = Path("spreadsheet.csv")
    spreadsheet.write_text("a, b\n1,2\n\n3,4\n", encoding="utf-8-sig")
    np.testing.assert_array_equal(load_inputs(spreadsheet, ["b", "a"])[0], [[2, 1], [4, 3]])
    spreadsheet.write_text("1,2\n3,4\n", encoding="utf-8-sig")
    np.testing.assert_array_equal(load_inputs(spreadsheet)[0], [[1, 2], [3, 4]])
    for columns, id_column, message in (
        (["a", "c"], None, "it has no column 'c', but b, name, a, n"),
        (["a"], "c", "it has no column 'c'"),
        (None, None, "column .name. has .* in row 0, and inputs are numbers|holds object"),
    ):
        with pytest.raises(ValueError, match=message):
            load_inputs(named_table(suffix), columns, id_column)


@pytest.mark.parametrize("output", ["y.npz", "y.csv", "y.parquet", "y"])
def test_results_carry_the_ids_and_a_run_with_others_is_not_resumed(folder, output):
    require("pyarrow", "data")
    path, table = str(named_table("csv")), ["--columns", "a,b,n", "--id-column"]
    result = run("swing", *SMALL, *table, "name", "--output", output, inputs=path)
    assert result.exit_code == 0, result.output
    if output == "y":
        found = load(Path(output) / "part-000000.npz")["id"].tolist()
        table[-1:] = ["--id-column", "n", "--output", output, "--resume"]
        again = run("swing", *SMALL, *table, inputs=path)
        assert again.exit_code == 2
        assert "ids was" in again.output
    elif output == "y.npz":
        found = load(output)["id"].tolist()
    elif output == "y.csv":
        with open(output) as file:
            found = [row["id"] for row in csv.DictReader(file)]
    else:
        from pyarrow import parquet

        found = parquet.read_table(output)["id"].to_pylist()
    assert found == NAMED["name"]


def test_a_coded_run_carries_ids_too(folder):
    table = ["--columns", "a,b", "--id-column", "name"]
    code = ["--num-data", "2", "--num-workers", "4", "--groups", "1000000000"]
    for count in (2, 3):
        more = [*code, "--output", f"y{count}.csv", "--max-inputs", str(count)]
        result = run("traced", *table, *more, inputs=str(named_table("csv")))
        assert result.exit_code == 0, result.output
        with open(f"y{count}.csv") as file:
            assert [row["id"] for row in csv.DictReader(file)] == NAMED["name"][:count]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.npy", np.zeros((0, 3)), r"needs shape \(rows, \*shape of a data point\), not \(0, 3\)"),
        (
            "x.npy",
            np.array([[1.0], [np.nan], [np.inf]]),
            "2 rows are not finite, the first is row 1",
        ),
        ("x.npy", np.array([["a"]]), "numbers are needed"),
        ("x.npz", {"a": np.ones((2, 2)), "b": np.ones((2, 2))}, "holds 2 arrays"),
        ("x.csv", "a,b\n1,2\n3\n", "cannot be read"),
        ("x.csv", "", "it has no rows"),
        ("x.csv", "a,b\n", "it has no rows"),
        ("x.parquet", "nothing", "cannot be read"),
        ("x.txt", "1", "ends in .npy, .npz, .csv, .parquet"),
    ],
)
def test_inputs_that_do_not_fit_are_reported_by_their_option(folder, name, content, message):
    path = folder / name
    if isinstance(content, str):
        path.write_text(content)
    elif isinstance(content, dict):
        np.savez(path, **content)
    else:
        np.save(path, content)
    with pytest.raises(ValueError, match=message):
        load_inputs(path)
    result = run("swing", "--tolerance", "1", inputs=str(path))
    assert result.exit_code == 2
    assert result.output.startswith(f"error: --inputs {path}: ")


# With a learner.


def command(*arguments):
    code = "from nercc_jax.cli import main; main()"
    return [sys.executable, "-c", code, "run", "--inputs", "x.npy", *arguments]


def parts_of(folder):
    """All rows that the parts hold, by name."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        parts = [load(folder / part["file"]) for part in manifest["parts"]]
    except FileNotFoundError:
        return {"index": ()}
    names = parts[0] if parts else ()
    return {name: np.concatenate([each[name] for each in parts]) for name in names}


@pytest.mark.slow
def test_a_run_with_stragglers_and_deaths_that_is_killed_and_goes_on(folder):
    """Every row is within the tolerance by its own error bar, or computed; none is lost."""
    require("ray", "ray")
    tolerance, rows = 0.1, 1500  # which a learner of 200 rows keeps easily
    x = np.random.default_rng(0).uniform(-1, 1, (rows, 3))
    np.save("x.npy", x)
    asked = (
        "--pool ray --address local --num-workers 5 --actor-options num_cpus=0.1 --output results"
    )
    faults = "--faults straggler_rate=0.05,straggler_delay_s=1,death_rate=0.005"
    arguments = command(
        *("--model", "nercc_own_rows:slow", "--tolerance", str(tolerance)),
        *(*asked.split(), *faults.split()),
    )
    cache = jax.config.jax_compilation_cache_dir or ""
    options = {"cwd": folder, "env": os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}}
    with open("log", "w") as log:
        first = subprocess.Popen(arguments, stdout=log, stderr=log, **options)
        try:
            end = time.monotonic() + 300
            while len(parts_of(folder / "results").get("index", ())) < 200:
                assert first.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < end
                time.sleep(0.1)
        finally:
            first.send_signal(signal.SIGKILL)
            first.wait()
    before = parts_of(folder / "results")
    assert len(before["index"]) < rows
    (folder / "seen").touch()
    again = subprocess.run([*arguments, "--resume"], capture_output=True, text=True, **options)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{len(before['index'])} rows are done already" in again.stdout
    after = parts_of(folder / "results")
    # What was done is as it was, and all the rest is there, once.
    for name, values in before.items():
        np.testing.assert_array_equal(after[name][: len(values)], values)
    order = np.argsort(after["index"])
    after = {name: values[order] for name, values in after.items()}
    np.testing.assert_array_equal(after["index"], np.arange(rows))
    sys.path.insert(0, str(folder))
    import nercc_own_rows  # pyright: ignore[reportMissingImports]

    y, exact = nercc_own_rows.swing(x), after["exact"]
    np.testing.assert_array_equal(after["predictions"][exact], y[exact])
    assert (after["score"] <= tolerance).all()
    assert (~exact).sum() > 5
    error = np.sqrt(np.mean((after["predictions"] - y) ** 2, axis=1))
    assert np.mean(error[~exact] <= after["score"][~exact]) > 0.7  # nine tenths are promised


@pytest.mark.parametrize(
    "asked", ["mean@own_rows:first", "quantile:0.5@own_rows:first", "above:0.2@own_rows:largest"]
)
def test_a_statistic_of_all_rows_is_printed_and_written(tmp_path, monkeypatch, asked):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_rows.py").write_text(
        "import numpy as np\n"
        "def function(x):\n    return np.stack([x[:, 0] ** 2, np.sin(x[:, 1])], axis=1)\n"
        "def first(y):\n    return y[:, 0]\n"
        "def largest(y):\n    return y.max(axis=1)\n"
    )
    x = np.random.default_rng(0).uniform(0, 1, (300, 2))
    np.save("x.npy", x)
    y = np.stack([x[:, 0] ** 2, np.sin(x[:, 1])], axis=1)
    command = ["run", "--model", "own_rows:function", "--inputs", "x.npy", "--num-workers", "2"]
    command += ["--tolerance", "0", "--output", "rows.npz"]
    found = invoke(*command, "--statistic", asked)
    assert found.exit_code == 0, found.output
    (statistic,) = [json.loads(Path("rows.summary.json").read_text())["statistic"]]
    wanted = {
        "mean@own_rows:first": y[:, 0].mean(),
        "quantile:0.5@own_rows:first": np.quantile(y[:, 0], 0.5, method="inverted_cdf"),
        "above:0.2@own_rows:largest": np.mean(y.max(axis=1) > 0.2),
    }
    assert statistic["name"] == asked
    assert statistic["value"] == pytest.approx(wanted[asked], rel=1e-6)
    assert statistic["interval"] == [statistic["value"], statistic["value"]]
    assert f"{statistic['value']:.6g}, 90 % in" in found.output
    for wrong, why in (
        ("median", "mean, quantile:Q or above:VALUE"),
        ("mean", "--statistic mean@module:function: rows have 2 outputs"),
        ("mean@own_rows:nothing", "--statistic own_rows:nothing"),
    ):
        shutil.rmtree("rows.npz.parts", ignore_errors=True)
        refused = invoke(*command, "--statistic", wrong)
        assert refused.exit_code == 2
        assert why in " ".join(refused.output.split())
