"""Runs over a data set: nothing lost, nothing mixed up, whatever happens to the workers."""

import dataclasses
import json
import sys

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from commands import invoke

from nercc_jax import (
    DevicePool,
    NeRCC,
    Parity,
    Replication,
    coded_inference,
    pool_inference,
    save_code,
)
from nercc_jax.pools import Fault, Faults
from nercc_jax.rows import run_groups
from nercc_models import load_data, load_model


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


@pytest.mark.parametrize("enough", [6, lambda mask: mask.sum() >= 6])
def test_a_batch_is_decoded_at_the_deadline(enough):
    faults = Faults([Fault("hang", workers=[0])])
    pool = DevicePool(linear, 6, faults=faults, example=np.zeros((1, 1), np.float32))
    found, _ = grouped(NeRCC(2, 6), 2, pool, enough=enough, deadline=3.0)
    assert found.arrays["recovered"].all()
    assert found.summary["stragglers_per_batch"] == 1


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
            ({}, "has the parts of an earlier run"),
            ({"groups": 0, "folder": None}, "groups must be"),
            ({"deadline": np.nan, "folder": None}, "a positive number of seconds, not nan"),
            ({"ids": [1], "folder": None}, "each of 22 rows"),
        ):
            with pytest.raises(ValueError, match=message):
                run_groups(pool, code, x, **options | changed)
    with DevicePool(linear, 4) as pool:
        again = run_groups(pool, code, x, resume=True, on_progress=seen.append, **options)
    assert seen[0].done == 14
    assert (again.summary["batches"], again.summary["lost"]) == (1, 0)
    np.testing.assert_array_equal(again.arrays["predictions"], exact(x[index]))


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


def test_ctrl_c_writes_what_is_done(tmp_path, monkeypatch):
    calls = []

    def interrupted(result):
        calls.append(result)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return result

    after_each_call(monkeypatch, interrupted)
    path = tmp_path / "result.npz"
    result = run(*SMALL, "--output", str(path))
    assert result.exit_code == 130
    assert "interrupted: 16 of 30 rows are done" in result.output
    assert load(path)["recovered"].tolist() == [True] * 16
    refused = run(*SMALL, "--output", str(path))
    assert refused.exit_code == 2
    assert "has the parts of an earlier run: give --resume" in refused.output


def test_a_run_goes_on_where_it_ended(tmp_path, monkeypatch, small):
    """After whatever end: what was written is not computed again."""
    path = tmp_path / "result.npz"

    calls = []

    def dying(result):
        calls.append(result)
        if len(calls) in (2, 4):
            raise MemoryError
        return result

    after_each_call(monkeypatch, dying)
    for _ in range(2):  # a batch each
        assert run(*SMALL, "--resume", "--output", str(path)).exit_code == 1
    assert not path.exists()
    other = run(*SMALL[:-1], "1", "--resume", "--output", str(path))
    assert other.exit_code == 2
    assert "groups was 2 and is 1" in other.output
    result = run(*SMALL, "--resume", "--output", str(path))
    assert result.exit_code == 0, result.output
    assert "16 rows are done already" in result.output
    assert len(calls) == 2 * 2 + 2  # of four batches, two were done
    rows, whole = load(path), load(small[1])
    # Who answers in time, and so what is predicted, differs between runs.
    for name in ("index", "batch", "label", "recovered"):
        np.testing.assert_array_equal(rows[name], whole[name])
    assert {each.name for each in tmp_path.iterdir()} == {"result.npz", "result.summary.json"}


WEIGHED = """
import numpy as np


def make(path):
    weights = np.load(path)
    return lambda batch: batch @ weights
"""


def test_a_run_does_not_go_on_with_another_code(tmp_path):
    """Nor with the same file, should another code have been written to it meanwhile."""
    code, output = tmp_path / "code.json", tmp_path / "results"
    options = ["--code", str(code), "--max-inputs", "8", "--output", str(output)]
    save_code(code, NeRCC(2, 4))
    assert run(*options).exit_code == 0
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["complete"]
    parts = [load(output / part["file"])["index"] for part in manifest["parts"]]
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(8))
    again = run(*options, "--resume")  # there is nothing left to do
    assert (again.exit_code, "8 rows are done already" in again.output) == (0, True)
    save_code(code, NeRCC(2, 4, lambda_dec=0.5))
    again = run(*options, "--resume")
    assert again.exit_code == 2
    assert "holds another run, with which --resume cannot go on: code was" in again.output


def test_a_run_does_not_go_on_with_other_weights(tmp_path, monkeypatch):
    (tmp_path / "nercc_weighed.py").write_text(WEIGHED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "nercc_weighed", raising=False)
    np.save("x.npy", np.ones((4, 3), np.float32))
    np.save("w.npy", np.ones((3, 2), np.float32))
    options = ["--model", "nercc_weighed:make", "--inputs", "x.npy", "--weights", "w.npy"]
    for output, more in (("coded", SMALL[:4]), ("rows", ["--tolerance", "0"])):
        np.save("w.npy", np.ones((3, 2), np.float32))
        assert run(*options, *more, "--output", output).exit_code == 0
        assert run(*options, *more, "--output", output, "--resume").exit_code == 0
        np.save("w.npy", np.full((3, 2), 2, np.float32))
        again = run(*options, *more, "--output", output, "--resume")
        assert again.exit_code == 2
        assert "with which --resume cannot go on: weights was" in again.output


def test_a_code_with_further_models_is_refused(tmp_path):
    save_code(tmp_path / "code.json", Parity(2, 3))
    result = run("--code", str(tmp_path / "code.json"))
    assert result.exit_code == 2
    assert "Parity has workers that run other models" in result.output
