"""Runs over rows, the picker, the planner and the commands' options, pinned from outside.

Names of files and options may be added, and a learner may predict other rows with other numbers.
"""

import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pinned_values import COMMANDS, VALUES, options_of, run_command

from nercc_jax import DevicePool, Replication, plan
from nercc_jax.pools import Fault, Faults, run_rows
from nercc_jax.serving import BatchingPolicy, CodedBatcher, Coder
from nercc_jax.stragglers import TraceLatency
from nercc_jax.testing import SimulatedPool

OWN = """import numpy as np
def swing(x):
    if (x[:, 0] > 0.9).any():
        raise ArithmeticError("no solution here")
    return np.sin(3 * x).cumsum(axis=1)
"""
SERVICE = 0.05  # seconds of a call that does not straggle; stragglers take eleven times as long
LATE = TraceLatency(jnp.array([10 * SERVICE]))


def test_run_rows_predicts_within_the_tolerance_or_computes():
    """How many rows are predicted is the learner's affair; that some are, and how well, is not."""
    known, rows = threading.Event(), np.random.default_rng(0).uniform(-1, 1, (3000, 1))
    exact = np.concatenate([np.sin(3 * rows), np.cos(2 * rows)], axis=1)

    def function(x):
        known.wait(0.1)  # 75 s in all, unless a learner makes it worth nothing
        return np.concatenate([np.sin(3 * x), np.cos(2 * x)], axis=1)

    result = run_rows(
        function, rows, DevicePool, num_workers=4, tolerance=0.1, rows_per_call=2,
        on_progress=lambda news: known.set() if news.predicted else None,
    )  # fmt: skip
    computed, predicted = (result.status == each for each in ("computed", "predicted"))
    assert (computed | predicted).all()
    assert predicted.sum() > 1000
    np.testing.assert_array_equal(result.values[computed], exact[computed])
    assert not result.score[computed].any()
    assert (result.score[predicted] <= 0.1).all()
    errors = np.sqrt(np.mean((result.values - exact) ** 2, axis=1))
    assert (errors[predicted] <= result.score[predicted]).mean() > 0.75  # nine tenths are promised
    assert errors.max() < 0.1
    names = {"rows", "rows_done", "computed", "predicted", "unknown", "learned_from", "seconds"}
    assert names <= result.summary.keys()


def test_run_rows_keeps_what_is_done_and_goes_on(tmp_path):
    """Statuses after an interruption, the folder's files, and who may resume."""
    rows, calls = np.arange(200.0)[:, None], []

    def function(x):
        calls.append(len(x))
        if (x == 7).any():
            raise ArithmeticError("no solution here")
        return 2 * x

    def interrupt(news):
        if news.done:
            raise KeyboardInterrupt

    options = {"tolerance": 0.0, "num_workers": 2, "folder": tmp_path / "rows", "rows_per_call": 1}
    first = run_rows(function, rows, DevicePool, **options, on_progress=interrupt)
    assert first.stopped == "interrupted"
    assert "waiting" in first.status
    assert {"waiting", "computed", "unknown"} >= set(first.status.tolist())
    assert {"manifest.json", "part-000000.npz"} <= {
        path.name for path in options["folder"].iterdir()
    }
    with np.load(options["folder"] / "part-000000.npz") as part:
        assert {"index", "predictions", "deviation", "score", "exact", "done"} <= set(part)
    for other, resume in ((rows, False), (rows + 1, True)):
        with pytest.raises(ValueError, match=r"earlier run|inputs was"):
            run_rows(function, other, DevicePool, **options, resume=resume)
    calls.clear()
    second = run_rows(function, rows, DevicePool, **options, resume=True)
    assert second.status.tolist() == ["computed"] * 7 + ["unknown"] + ["computed"] * 192
    np.testing.assert_array_equal(np.delete(second.values, 7, 0), np.delete(2 * rows, 7, 0))
    assert np.isnan(second.values[7]).all()
    assert second.reasons == {7: "ArithmeticError: no solution here"}
    assert len(calls) < 200, "what was done is not computed again"


def test_the_command_run_has_its_exit_codes_and_files_and_resumes(tmp_path, monkeypatch):
    """0 done, 1 nothing, 2 an option does not fit, 3 rows are missing; a file, or parts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "pinned_own.py").write_text(OWN)
    x = np.random.default_rng(0).uniform(-1, 0.8, (40, 3))
    np.save("x.npy", x)
    np.save("odd.npy", np.where(np.arange(40)[:, None] == 5, 1.0, x))
    common = ["run", "--model", "pinned_own:swing", "--num-workers", "4", "--tolerance", "0.01"]

    def run(*arguments, common=common):
        return run_command(*common, "--groups", "4", *arguments)[0]

    assert run("--inputs", "x.npy", "--output", "y.npz") == 0
    with np.load("y.npz") as found:
        assert {"predictions", "deviation", "bar", "exact"} <= set(found)
        np.testing.assert_array_equal(found["predictions"], np.sin(3 * x).cumsum(axis=1))
    names = {"rows", "computed", "predicted", "unknown", "model", "inputs", "tolerance"}
    assert names <= set(json.loads((tmp_path / "y.summary.json").read_text()))
    assert run("--inputs", "x.npy", "--output", "y.csv") == 0
    columns = (tmp_path / "y.csv").read_text().splitlines()[0].split(",")
    assert [name for name in columns if name.startswith("output")] == [
        "output_0",
        "output_1",
        "output_2",
    ]
    assert {"deviation", "bar", "exact", "status", "reason"} <= set(columns)
    assert run("--inputs", "odd.npy", "--output", "folder") == 3
    files = {path.name for path in (tmp_path / "folder").iterdir()}
    assert {"manifest.json", "part-000000.npz", "summary.json"} <= files
    assert run("--inputs", "odd.npy", "--output", "folder") == 2, "it is there"
    assert run("--inputs", "x.npy", "--output", "folder", "--resume") == 2, "other inputs"
    assert run("--inputs", "odd.npy", "--output", "folder", "--resume") == 3, "once more"
    assert run("--inputs", "x.npy", "--tolerance", "-1") == 2


TRACES = {
    "5 % of calls late": {"latency": LATE, "probability": 0.05},
    "a slow worker": {"latency": LATE, "workers": [0]},
    "hard queries": {"latency": LATE, "score": lambda x: np.asarray(x)[:, 0], "least_score": 1.645},
}


@pytest.mark.parametrize(
    ("trace", "most", "redundancy", "hedges", "tail"),
    [
        ("5 % of calls late", 1.1, "none", True, 3.0),
        ("5 % of calls late", 2.1, "always", True, 3.0),
        ("a slow worker", 1.1, "none", True, 3.0),
        ("a slow worker", 2.1, "always", True, 1.5),
        ("hard queries", 1.1, "none", False, 11.5),
        ("hard queries", 2.1, "none", False, 11.5),
    ],
)
def test_the_picker_chooses_what_the_trace_and_the_budget_allow(
    trace, most, redundancy, hedges, tail
):
    """Its thresholds may differ by what forecasts cannot tell apart; its kind of setting may not.

    Two thousand queries on 24 simulated workers, as `serve --max-calls` picks for real ones.
    """
    random, seconds = np.random.default_rng(1), []
    pool = SimulatedPool(
        lambda x: np.asarray(x)[:, :3], 24, seconds=lambda size: SERVICE * random.uniform(0.95, 1.05),
        faults=Faults([Fault("delay", **TRACES[trace])]),
    )  # fmt: skip
    policy = BatchingPolicy(straggler_threshold=1.35, copies=3, max_calls=most, ordering=False)
    with CodedBatcher(pool, Coder(Replication(1, 2)), (4,), (3,), policy=policy) as batcher:

        def come(arrived):
            reply = batcher.submit(random.normal(size=(1, 4)).astype(np.float32))
            reply.add_done_callback(lambda _: seconds.append(pool.clock.now() - arrived))

        for query in range(2000):
            pool.clock.at(query / 130, lambda when=query / 130: come(when))
        pool.clock.run(2000 / 130 + 5)
        picked, report = batcher.status()["policy"], pool.report()
    assert (picked["redundancy"], picked["hedges"]) == (redundancy, hedges)
    assert 1.0 < picked["straggler_threshold"] <= 1.35
    assert len(seconds) == 2000
    assert (report.answered + report.late) / 2000 < most
    assert np.quantile(seconds[1000:], 0.99) < tail * SERVICE


@pytest.mark.parametrize(
    ("trace", "disagreement", "extra", "system", "p99"),
    [
        ("none", 0.02, 0.5, "uncoded", 0.0526),
        ("5 % of calls late", 0.02, 0.5, "NeRCC", 0.06),
        ("5 % of calls late", 0.0, 1.0, "replication", 0.06),
        ("a slow worker", 0.0, 0.1, "hedged", 0.11),
        ("hard queries", 0.02, 0.5, "NeRCC", 0.125),
    ],
)
def test_plan_recommends_what_the_trace_allows(trace, disagreement, extra, system, p99):
    """Each is the best by more than the 3 % below which the planner takes the cheaper one.

    To a planner a trace is a law of calls: a slow worker is one call in twenty.
    """
    random = np.random.default_rng(0)
    x = random.normal(size=(480, 1)) * [0.5, -0.3, 0.8] + 0.05 * random.normal(size=(480, 3))
    calls, usual = np.arange(2000), SERVICE * random.uniform(0.95, 1.05, 2000)
    slower = {
        "none": 0 * calls,
        "5 % of calls late": 10 * SERVICE * (random.random(2000) < 0.05),
        "a slow worker": 10 * SERVICE * (calls % 20 == 0),
        "hard queries": 2 * usual * np.maximum(random.uniform(-2.33, 1, 2000), 0),
    }

    def model(batch):
        along = batch @ jnp.array([0.5, -0.3, 0.8])
        return jnp.stack([along, 0.4 - 0.1 * along**2, -along], axis=-1)

    found = plan(
        model, x.astype(np.float32), TraceLatency(jnp.asarray(usual + slower[trace])),
        key=jax.random.key(3), num_queries=4, num_data=(4,), layouts=("interleaved",),
        max_workers=8, max_extra_work=extra, max_disagreement=disagreement,
    )  # fmt: skip
    assert found.recommended.system.startswith(system), found.reason
    assert found.recommended.p99 < p99
    assert found.recommended.extra_work <= extra
    assert found.recommended.most_disagreement <= disagreement
    assert found.recommended.held_out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_options(command):
    pinned = set(json.loads(VALUES.read_text())["options"][command])
    assert not pinned - options_of(command), "they have gone"
