"""Runs over a data set: nothing lost, nothing mixed up, whatever happens to the workers."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import invoke
from conftest import require

from nercc_jax import (
    DevicePool,
    NeRCC,
    Parity,
    Replication,
    coded_inference,
    pool_inference,
    save_code,
)
from nercc_jax.rows import run_groups
from nercc_models import load_data, load_inputs, load_model


def numbered(count, groups, num_data):
    """Batches (groups, K, 1) whose data points are the numbers from 0 on: no two are alike."""
    numbers = np.arange(count * groups * num_data, dtype=np.float32)
    return list(numbers.reshape(count, groups, num_data, 1))


def linear(batch):
    """Whole numbers stay whole, and exact in float32."""
    return jnp.concatenate([3 * batch + 1, -batch], axis=1)


def exact(x):
    return np.concatenate([3 * x + 1, -x], axis=-1)


# The function under the command.


def grouped(code, count, pool, **options):
    """A run over the numbers from 0 on, and their values."""
    x = np.arange(count, dtype=np.float32)[:, None]
    with pool:
        return run_groups(pool, code, x, **options), exact(x)


def test_rows_come_in_order_and_are_exact():
    """Of 20 batches of two groups of K = 3; K groups of K are groups, too."""
    for groups, batches in ((2, 20), (3, 14)):
        pool = DevicePool(linear, 6, example=np.zeros((groups, 1), np.float32))
        found, y = grouped(Replication(3, 6), 120, pool, enough=5, groups=groups)
        np.testing.assert_array_equal(found.arrays["predictions"], y)
        assert found.summary["batches"] == batches
        assert found.summary["lost"] == 0


def failing_on(*numbers):
    """A model that raises where a batch holds one of the numbers."""

    def model(batch):
        if np.isin(batch, numbers).any():
            raise RuntimeError("this one is not for me")
        return np.asarray(exact(batch))

    return model


def test_groups_go_over_the_data_carry_ids_and_are_resumed_by_the_same_run_only(tmp_path, untyped):
    """A run of Python's is the command's: its folder, its table, and what it prints."""
    x, ids = numbered(1, 11, 2)[0].reshape(22, 1), [f"n{number}" for number in range(22)]
    options = {"groups": 2, "batches": 4, "ids": ids, "folder": tmp_path / "rows"}
    code, seen = Replication(2, 4), []
    with DevicePool(failing_on(3), 4, compiled=False) as pool:
        found = run_groups(pool, code, x, **options)
        index, lost = found.arrays["index"], np.isin(np.arange(16), [1, 3])
        np.testing.assert_array_equal(
            found.arrays["recovered"], ~lost
        )  # 3, and what is sent with it
        np.testing.assert_array_equal(found.arrays["predictions"][~lost], exact(x[index])[~lost])
        assert [*found.reasons] == np.flatnonzero(lost).tolist()
        assert "cannot be recovered" in found.reasons[3]
        assert found.columns()["id"].tolist() == ids[:16]
        assert "batches" in str(found)
        for changed, message in (
            ({"groups": 1, "resume": True}, "groups was 2 and is 1"),
            ({"ids": None, "resume": True}, "ids was"),
            ({"x": x + 1, "resume": True}, "inputs was"),
            ({"code": NeRCC(2, 4), "resume": True}, "code was"),
            ({}, "has the parts of an earlier run"),
            ({"groups": 0, "folder": None}, "groups must be"),
            ({"deadline": np.nan, "folder": None}, "a positive number of seconds, not nan"),
            ({"ids": [1], "folder": None}, "each of 22 rows"),
        ):
            with pytest.raises(ValueError, match=message):
                run_groups(pool, **{"code": code, "x": x} | options | changed)
    with DevicePool(linear, 4) as pool:
        options |= {"resume": True, "batches": 2}  # the one with lost data points, and the fifth
        again = run_groups(pool, code, x, on_progress=seen.append, **options)
        assert seen[0].done == 14
        assert (again.summary["batches"], again.summary["lost"]) == (2, 0)
        np.testing.assert_array_equal(again.arrays["predictions"], exact(x[:20]))
        again = run_groups(pool, code, x, **options)
        np.testing.assert_array_equal(again.arrays["predictions"], exact(x))


# The command.


def load(path):
    with np.load(path) as file:
        return dict(file)


def run(*arguments):
    return invoke("run", *arguments)


SMALL = ["--num-data", "4", "--num-workers", "8", "--max-inputs", "30", "--groups", "2"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "result.npz"
    return run(*SMALL, "--output", str(path)), path


def test_run_tells_what_it_saw(small):
    result, path = small
    assert result.exit_code == 0, result.output
    for word in (
        "30 data points of 'test', NeRCC with K=4, N=8; decoding at 6 answers, or after 30 s; "
        "8 workers (devices)",
        "batches",
        "rows per second",
        "stragglers per batch",
        str(path),
        str(path.with_suffix(".summary.json")),
    ):
        assert word in result.output
    summary = json.loads(path.with_suffix(".summary.json").read_text())
    assert (summary["model"], summary["code"]) == ("lenet5-digits", "NeRCC with K=4, N=8")
    assert (summary["data_points"], summary["batches"], summary["lost"]) == (30, 4, 0)
    assert summary["deaths_by_worker"] == [0] * 8
    rows = load(path)
    assert summary["stragglers_per_batch"] * 4 == np.sum(~rows["responded"][[0, 8, 16, 24]])


def test_the_result_is_what_coded_inference_makes_of_the_workers_that_responded(small):
    rows = load(small[1])
    data = load_data("digits", "test", limit=30)
    np.testing.assert_array_equal(rows["index"], np.arange(30))
    np.testing.assert_array_equal(rows["label"], data.labels)
    np.testing.assert_array_equal(rows["batch"], np.arange(30) // 8)
    assert rows["recovered"].all()
    assert (rows["responded"].sum(axis=1) >= 6).all()
    network = load_model("lenet5-digits")
    filled = np.arange(32) % 30  # the last group is filled from the start
    x = np.asarray(network.preprocess(data.images[filled])).reshape(8, 4, 32, 32, 1)
    responded = rows["responded"][filled].reshape(8, 4, 8)
    expected = coded_inference(network, NeRCC(4, 8))(x, jnp.asarray(responded[:, 0]))
    expected = np.asarray(expected).reshape(32, -1)[:30]
    np.testing.assert_allclose(rows["predictions"], expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(rows["predicted"], rows["predictions"].argmax(axis=1))


def test_deaths_and_delays_on_trial_lose_nothing(tmp_path):
    faults = (
        "--faults straggler_rate=0.1,straggler_delay_s=0.2,death_rate=0.1 --outputs probabilities"
    )
    path = tmp_path / "result.npz"
    result = run(*SMALL, "--max-inputs", "96", *faults.split(), "--output", str(path))
    assert result.exit_code == 0, result.output
    assert "deaths" in result.output
    rows = load(path)
    assert len(rows["index"]) == 96
    assert rows["recovered"].all()
    np.testing.assert_allclose(rows["predictions"].sum(axis=1), 1, atol=1e-3)


def test_what_is_lost_is_nan_and_told(tmp_path):
    path = tmp_path / "result.npz"
    options = "--batches 2 --faults straggler_rate=1,straggler_delay_s=60 --deadline-s 0.1"
    result = run(*SMALL, *options.split(), "--output", str(path))
    assert result.exit_code == 3
    assert "16 rows are unknown: row 0: no worker answered within 0.1 s" in result.output
    assert "0 of 30 rows are done" in result.output
    assert "Traceback" not in result.output
    rows = load(path)
    assert not rows["recovered"].any()
    assert np.isnan(rows["predictions"]).all()
    assert (rows["predicted"] == -1).all()
    assert not rows["responded"].any()


def after_each_call(monkeypatch, change):
    """Have each result of `pool_inference` changed before a run gets it."""

    def changed(*arguments, **options):
        infer = pool_inference(*arguments, **options)
        return lambda *call: change(infer(*call))

    monkeypatch.setattr("nercc_jax.rows._groups.pool_inference", changed)


def test_what_is_recovered_of_a_batch_is_reported_and_why_the_rest_is_not(tmp_path, monkeypatch):
    """A lost row rests on nobody's answers; the trouble is reported though the last went well."""

    tries = []

    def spoilt(result):
        tries.append(result)
        if len(tries) > 1:
            return result
        recovered = np.array([[True, False, True, True], [False] * 4])
        decoded = eqx.tree_at(lambda each: each.recovered, result.decoded, recovered)
        return dataclasses.replace(result, decoded=decoded)

    after_each_call(monkeypatch, spoilt)
    path = tmp_path / "result.npz"
    result = run(*SMALL, "--max-inputs", "16", "--output", str(path))
    assert result.exit_code == 3
    assert "5 rows are unknown: row 1: 5 of 8 data points cannot be recovered" in result.output
    rows = load(path)
    lost = np.isin(np.arange(16), [1, 4, 5, 6, 7])
    np.testing.assert_array_equal(rows["recovered"], ~lost)
    assert not rows["responded"][lost].any()
    assert (rows["responded"][~lost].sum(axis=1) >= 6).all()
    assert (rows["predicted"] == -1).tolist() == lost.tolist()


def test_a_run_goes_on_where_it_ended(tmp_path, monkeypatch, small):
    """What was written is not computed again, after whatever end; Ctrl-C writes what is done."""
    path, calls = tmp_path / "result.npz", []

    def ending(result):
        calls.append(result)
        if len(calls) in (2, 4):
            raise KeyboardInterrupt if len(calls) == 2 else MemoryError
        return result

    after_each_call(monkeypatch, ending)
    result = run(*SMALL, "--output", str(path))
    assert result.exit_code == 130
    assert "interrupted: 8 of 30 rows are done" in result.output
    assert load(path)["recovered"].tolist() == [True] * 8
    path.unlink()
    assert run(*SMALL, "--resume", "--output", str(path)).exit_code == 1
    assert not path.exists()
    refused = run(*SMALL, "--output", str(path))
    assert refused.exit_code == 2
    assert "has the parts of an earlier run: give --resume" in refused.output
    result = run(*SMALL, "--resume", "--output", str(path))
    assert result.exit_code == 0, result.output
    assert "16 rows are done already" in result.output
    assert len(calls) == 2 * 2 + 2  # of four batches, two were done
    rows, whole = load(path), load(small[1])
    # Who answers in time, and so what is predicted, differs between runs.
    for name in ("index", "batch", "label", "recovered"):
        np.testing.assert_array_equal(rows[name], whole[name])
    assert {each.name for each in tmp_path.iterdir()} == {"result.npz", "result.summary.json"}
    path = tmp_path / "later.npz"
    first = run(*SMALL, "--batches", "1", "--output", str(path))  # one now, the others later
    assert (first.exit_code, "8 of 30 rows are done" in first.output) == (0, True)
    assert run(*SMALL, "--resume", "--output", str(path)).exit_code == 0
    assert len(load(path)["index"]) == 30


def test_a_code_with_further_models_is_refused(tmp_path):
    save_code(tmp_path / "code.json", Parity(2, 3))
    result = run("--code", str(tmp_path / "code.json"))
    assert result.exit_code == 2
    assert "Parity has workers that run other models" in result.output


# -- A function of one's own on each row, within a tolerance or computed ---------------------------


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


def broken(x):
    return {"y": x}


def traced(x):
    return x[:, :1] * np.array([1.0, -1.0])


def weighed(path):
    weights = np.load(path)
    return lambda x: x @ weights


def first(y):
    return y[:, 0]


def largest(y):
    return y.max(axis=1)
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


def run_own(function, *arguments, inputs="x.npy"):
    command = ["run", "--model", f"nercc_own_rows:{function}", "--inputs", inputs, *arguments]
    return invoke(*command)


def own(function, x=None):
    import nercc_own_rows  # pyright: ignore[reportMissingImports]

    return getattr(nercc_own_rows, function)(np.load("x.npy") if x is None else x)


TOLERANT = ("--tolerance", "0.01", "--num-workers", "4", "--deadline-s", "20")


@pytest.mark.parametrize("function", ["flat", "boxes", "some_nan"])
def test_rows_are_what_the_function_gives_to_the_bit(folder, function):
    result = run_own(function, *TOLERANT, "--output", "y.npz")
    assert result.exit_code == 0, result.output
    assert "computed 50, predicted 0, waiting 0" in result.output
    assert ("not finite" in result.output) == (function == "some_nan"), "it is kept all the same"
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


def test_a_function_that_gives_no_array_ends_the_run_in_words(folder):
    result = run_own("broken", *TOLERANT)
    assert result.exit_code == 1
    assert "the function gave a dict: an array (rows, ...) is needed" in result.output
    assert "Traceback" not in result.output
    assert not list(folder.glob("*.parts"))


def test_inputs_come_as_arrays_or_tables(tmp_path):
    require("pyarrow", "data")
    import pyarrow
    from pyarrow import parquet

    x = np.random.default_rng(1).normal(size=(7, 2))
    np.savez(tmp_path / "x.npz", x)
    np.savetxt(tmp_path / "x.csv", x, delimiter=",", fmt="%.17g")
    parquet.write_table(pyarrow.table({"a": x[:, 0], "b": x[:, 1]}), tmp_path / "x.parquet")
    for name in ("x.npz", "x.csv", "x.parquet"):
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
def test_results_have_all_outputs_and_the_ids(folder, output):
    """A table has a column for each output."""
    require("pyarrow", "data")
    path, table = str(named_table("csv")), ["--columns", "a,b,n", "--id-column", "name"]
    result = run_own("boxes", *TOLERANT, *table, "--output", output, inputs=path)
    assert result.exit_code == 0, result.output
    wanted = own("boxes", np.array([NAMED[name] for name in "abn"], float).T).reshape(3, 12)
    names = [f"output_{place}" for place in range(12)]
    further = ["deviation", "bar", "exact", "status", "reason"]
    if output in ("y", "y.npz"):
        found = load(Path(output) / "part-000000.npz" if output == "y" else output)
    else:
        if output == "y.csv":
            with open(output) as file:
                rows = list(csv.DictReader(file))
        else:
            from pyarrow import parquet

            rows = parquet.read_table(output).to_pylist()
        assert set(rows[0]) == {"id", *names, *further}
        assert [str(row["exact"]).lower() for row in rows] == ["true"] * 3
        values = [[float(row[name]) for name in names] for row in rows]
        found = {"id": np.array([row["id"] for row in rows]), "predictions": np.array(values)}
    assert found["id"].tolist() == NAMED["name"]
    np.testing.assert_array_equal(found["predictions"].reshape(3, 12), wanted)


WEIGHED = "--model nercc_own_rows:weighed --inputs x.npy --weights w.npy"
ROWS_BY_NAME = "--model nercc_own_rows:boxes --inputs table.csv --columns a,b,n --id-column name"
# By what changes: a run, and what makes it another: a file, or further options.
OTHERS = {
    "code": (
        "--code code.json --max-inputs 8",
        lambda: save_code("code.json", NeRCC(2, 4, lambda_dec=0.5)),
    ),
    "groups": (" ".join(SMALL), "--groups 1"),
    "weights": (
        f"{WEIGHED} --num-data 2 --num-workers 4",
        lambda: np.save("w.npy", np.full((3, 2), 2, np.float32)),
    ),
    "weights of rows": (
        f"{WEIGHED} --tolerance 0",
        lambda: np.save("w.npy", np.full((3, 2), 2, np.float32)),
    ),
    "ids": (f"{ROWS_BY_NAME} {' '.join(TOLERANT)}", "--id-column n"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_run_goes_on_as_it_was_and_not_as_another(folder, what):
    """Nor with the same file, should another code or weights have been written to it meanwhile."""
    asked, change = OTHERS[what]
    named_table("csv")
    save_code("code.json", NeRCC(2, 4))
    np.save("w.npy", np.ones((3, 2), np.float32))
    options = [*asked.split(), "--output", "results"]
    assert run(*options).exit_code == 0
    assert json.loads(Path("results/manifest.json").read_text())["complete"]
    index = np.sort(parts_of(Path("results"))["index"])
    np.testing.assert_array_equal(index, np.arange(len(index)))
    again = run(*options, "--resume")  # there is nothing left to do
    assert (again.exit_code, f"{len(index)} rows are done already" in again.output) == (0, True)
    if callable(change):
        change()
    else:
        options += change.split()
    again = run(*options, "--resume")
    assert again.exit_code == 2
    changed = f"holds another run, with which --resume cannot go on: {what.split()[0]} was"
    assert changed in again.output


def test_a_coded_run_carries_ids_too(folder):
    table = ["--columns", "a,b", "--id-column", "name"]
    code = ["--num-data", "2", "--num-workers", "4", "--groups", "1000000000"]
    for count in (2, 3):
        more = [*code, "--output", f"y{count}.csv", "--max-inputs", str(count)]
        result = run_own("traced", *table, *more, inputs=str(named_table("csv")))
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
    result = run_own("swing", "--tolerance", "1", inputs=str(path))
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
    ("asked", "wanted"),
    [
        ("mean@nercc_own_rows:first", lambda y: y[:, 0].mean()),
        (
            "quantile:0.5@nercc_own_rows:first",
            lambda y: np.quantile(y[:, 0], 0.5, method="inverted_cdf"),
        ),
        ("above:0.2@nercc_own_rows:largest", lambda y: np.mean(y.max(axis=1) > 0.2)),
    ],
    ids=["mean", "quantile", "above"],
)
def test_a_statistic_of_all_rows_is_printed_and_written(folder, asked, wanted):
    exact = ("--num-workers", "2", "--tolerance", "0", "--output", "rows.npz", "--statistic")
    found = run_own("swing", *exact, asked)
    assert found.exit_code == 0, found.output
    statistic = json.loads(Path("rows.summary.json").read_text())["statistic"]
    assert statistic["name"] == asked
    assert statistic["value"] == pytest.approx(wanted(own("swing")), rel=1e-6)
    assert statistic["interval"] == [statistic["value"], statistic["value"]]
    assert f"{statistic['value']:.6g}, 90 % in" in found.output
    for wrong, why in (
        ("median", "mean, quantile:Q or above:VALUE"),
        ("mean", "--statistic mean@module:function: rows have 20 outputs"),
        ("mean@nercc_own_rows:nothing", "--statistic nercc_own_rows:nothing"),
    ):
        shutil.rmtree("rows.npz.parts", ignore_errors=True)
        refused = run_own("swing", *exact, wrong)
        assert refused.exit_code == 2
        assert why in " ".join(refused.output.split())
