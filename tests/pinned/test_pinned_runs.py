"""Runs over rows, the picker, the planner and options, pinned from outside; names may be added."""

import json
import threading
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import options_of, run_command
from conftest import require
from pinned_values import PINNED, TABLES

from nercc_jax import DevicePool, Replication, plan
from nercc_jax.pools import Fault, Faults, run_rows
from nercc_jax.serving import BatchingPolicy, CodedBatcher, Coder
from nercc_jax.stragglers import TraceLatency
from nercc_jax.testing import SimulatedPool

NAMES = {name: set(names) for name, names in TABLES["runs"].items()}
SERVICE = 0.05  # seconds of a call that does not straggle; others take eleven times as long


def swing(x):
    if (x[:, 0] > 0.9).any():
        raise ArithmeticError("no solution here")
    return np.sin(3 * x).cumsum(axis=1)


def test_run_rows_predicts_within_the_tolerance_or_computes():
    """How many rows are predicted is the learner's affair; that some are, and how well, is not."""
    known, x = threading.Event(), np.random.default_rng(0).uniform(-1, 0.9, (3000, 1))
    options = {"num_workers": 4, "tolerance": 0.1, "rows_per_call": 2}
    # A call takes 0.1 s, and the run 38 s, unless a learner saves them.
    function = lambda x: (known.wait(0.1), swing(x))[1]  # noqa: E731
    options["on_progress"] = lambda news: news.predicted and known.set()
    found = run_rows(function, x, DevicePool, **options)
    errors = np.sqrt(np.mean((found.values - function(x)) ** 2, axis=1))
    predicted = found.status == "predicted"
    assert set(found.status.tolist()) == {"computed", "predicted"}
    assert not np.stack([errors, found.score])[:, ~predicted].any()
    assert max(errors.max(), found.score.max()) <= 0.1
    assert np.mean((errors <= found.score)[predicted]) > 0.7, "nine tenths are promised"
    assert NAMES["summary"] <= found.summary.keys()


def test_run_rows_keeps_what_is_done_and_goes_on(tmp_path):
    """Statuses after an interruption, the folder's files, and who may resume."""
    folder, function = tmp_path / "rows", mock.Mock(wraps=swing)
    options = {"tolerance": 0.0, "num_workers": 2, "folder": folder, "rows_per_call": 1}
    x = np.where(np.arange(1000) == 7, 1.0, np.linspace(-1, 0.8, 1000))[:, None]

    def interrupt(news):
        if news.done:
            raise KeyboardInterrupt

    first = run_rows(function, x, DevicePool, **options, on_progress=interrupt)
    assert first.stopped == "interrupted"
    assert {"computed", "waiting"} <= set(first.status.tolist())
    assert NAMES["folder"] - {"summary.json"} <= {path.name for path in folder.iterdir()}
    with np.load(folder / "part-000000.npz") as part:
        assert NAMES["part"] <= set(part)
    for other, resume in ((x, False), (x + 1, True)):
        with pytest.raises(ValueError, match=r"earlier run|inputs was"):
            run_rows(function, other, DevicePool, **options, resume=resume)
    function.reset_mock()
    second = run_rows(function, x, DevicePool, **options, resume=True)
    assert second.status.tolist() == ["computed"] * 7 + ["unknown"] + ["computed"] * 992
    np.testing.assert_array_equal(second.values, np.where(x == 1.0, np.nan, np.sin(3 * x)))
    assert second.reasons == {7: "ArithmeticError: no solution here"}
    again = [call.args[0].item() for call in function.call_args_list]
    assert not np.isin(x[first.status == "computed"], again).any()


def test_the_command_run_has_its_exit_codes_and_files_and_resumes(tmp_path, monkeypatch):
    """0 done, 2 an option does not fit, 3 rows are missing; a table, or a folder of parts."""
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).uniform(-1, 0.8, (40, 3))
    np.save("x.npy", x)
    np.save("odd.npy", np.where(np.arange(40)[:, None] == 5, 1.0, x))
    command = "run --model test_pinned_runs:swing --num-workers 4 --groups 4 --tolerance 0.01"
    for arguments, code in (
        ("x.npy --output y.npz", 0),
        ("x.npy --output y.csv", 0),
        ("odd.npy --output folder", 3),
        ("odd.npy --output folder", 2),  # it is there
        ("x.npy --output folder --resume", 2),  # other inputs
        ("odd.npy --output folder --resume", 3),  # once more
        ("x.npy --num-workers none", 2),
    ):
        assert run_command(*f"{command} --inputs {arguments}".split())[0] == code, arguments
    with np.load("y.npz") as found:
        assert NAMES["npz"] <= set(found)
        np.testing.assert_array_equal(found["predictions"], swing(x))
    assert NAMES["summary"] <= set(json.loads((tmp_path / "y.summary.json").read_text()))
    assert NAMES["csv"] <= set((tmp_path / "y.csv").read_text().splitlines()[0].split(","))
    assert NAMES["folder"] <= {path.name for path in (tmp_path / "folder").iterdir()}


@pytest.mark.parametrize(("trace", "most", "redundancy", "hedges", "tail"), TABLES["picker"])
def test_the_picker_chooses_by_trace_and_budget(trace, most, redundancy, hedges, tail):
    """As `serve --max-calls` does; thresholds that foresee the same may differ, no more."""
    random, seconds, number = np.random.default_rng(1), [], 1300
    struck = {
        "late calls": {"probability": 0.05},
        "slow worker": {"workers": [0]},
        "hard queries": {"score": lambda x: np.asarray(x)[:, 0], "least_score": 1.645},
    }[trace]
    delay = Fault("delay", latency=TraceLatency(jnp.array([10 * SERVICE])), **struck)
    take = lambda size: SERVICE * random.uniform(0.95, 1.05)  # noqa: E731
    pool = SimulatedPool(lambda x: np.asarray(x)[:, :3], 24, seconds=take, faults=Faults([delay]))
    policy = BatchingPolicy(straggler_threshold=1.35, copies=3, max_calls=most)
    with CodedBatcher(pool, Coder(Replication(1, 2)), (4,), (3,), policy=policy) as batcher:

        def come(arrived):
            reply = batcher.submit(random.normal(size=(1, 4)).astype(np.float32))
            reply.add_done_callback(lambda _: seconds.append(pool.clock.now() - arrived))

        for arrival in np.arange(number) / 130:
            pool.clock.at(arrival, lambda arrival=arrival: come(arrival))
        pool.clock.run(20.0)
        picked, report = batcher.status()["policy"], pool.report()
    assert (picked["redundancy"], picked["hedges"]) == (redundancy, hedges)
    assert 1.0 < picked["straggler_threshold"] <= 1.35
    assert (report.answered + report.late) / len(seconds) < most
    assert np.quantile(seconds[number // 2 :], 0.99) < tail * SERVICE


@pytest.mark.parametrize(("trace", "disagreement", "extra", "system", "tail"), TABLES["plan"])
def test_plan_recommends_what_the_trace_allows(trace, disagreement, extra, system, tail):
    """To a planner a slow worker is one call in twenty; each is the best by more than 3 %."""
    random = np.random.default_rng(0)
    x = random.normal(size=(480, 1)) * [0.5, -0.3, 0.8] + 0.05 * random.normal(size=(480, 3))
    calls, usual = np.arange(2000), SERVICE * random.uniform(0.95, 1.05, 2000)
    slower = {
        "none": 0.0,
        "late calls": 10 * SERVICE * (random.random(2000) < 0.05),
        "slow worker": 10 * SERVICE * (calls % 20 == 0),
        "hard queries": 2 * usual * np.maximum(random.uniform(-2.33, 1, 2000), 0),
    }[trace]

    def model(batch):
        along = batch @ jnp.array([0.5, -0.3, 0.8])
        return jnp.stack([along, 0.4 - 0.1 * along**2, -along], axis=-1)

    asked = {"max_extra_work": extra, "max_disagreement": disagreement, "max_workers": 8}
    asked |= {"num_queries": 4, "num_data": (4,), "layouts": ("interleaved",)}
    x, latency = x.astype(np.float32), TraceLatency(jnp.asarray(usual + slower))
    best = plan(model, x, latency, key=jax.random.key(3), **asked).recommended
    assert best.system.startswith(system)
    assert best.p99 < tail * SERVICE
    assert best.extra_work <= extra
    assert best.most_disagreement <= disagreement


@pytest.mark.parametrize("command", PINNED["options"])
def test_help_lists_the_options(command):
    if command == "serve":
        require("pydantic_settings", "serve")
    assert not set(PINNED["options"][command]) - options_of(command), "they have gone"
