"""Runs over rows whose workers die and hang, and which are killed and resumed, at random.

`NERCC_INTERLEAVINGS=100 pytest -m slow tests/test_interleavings.py` runs a hundred.
"""

import multiprocessing
import os
import time

import numpy as np
import pytest
from schedulers import soon

from nercc_jax import DevicePool
from nercc_jax.pools import Fault, Faults, RowFunction, run_rows
from nercc_jax.stragglers import TraceLatency

NUMBER = int(os.environ.get("NERCC_INTERLEAVINGS", "5"))
ROWS = 500


def rows_of(seed):
    return np.random.default_rng([seed, 0]).normal(size=(ROWS, 3))


def function(x):
    time.sleep(0.01 * len(x))
    return np.stack([np.sin(3 * x).sum(axis=1), x.prod(axis=1) / 3], axis=1)


def run(seed, life, folder, done):
    """One process of a run: its workers have faults of their own in each."""
    random = np.random.default_rng([seed, 1, life])
    faults = [
        Fault("death", random.uniform(0.0, 0.1)),
        Fault("error", random.uniform(0.0, 0.02)),
        Fault("delay", random.uniform(0.0, 0.2), latency=TraceLatency([0.05])),
        Fault("hang", random.uniform(0.0, 0.01)),
    ]
    workers, rows_per_call = int(random.integers(1, 6)), int(random.integers(1, 8))
    options = {"faults": Faults(faults, int(random.integers(2**31))), "compiled": False}
    options |= {"hang_timeout": 0.3, "max_attempts": 20}
    with DevicePool(RowFunction(function), workers, **options) as pool:
        parts = {"folder": folder, "resume": folder.exists()}
        options = {"rows_per_call": rows_per_call, "tolerance": 0.0}
        result = run_rows(function, rows_of(seed), pool, **parts, **options)
    np.savez(done, values=result.values, status=result.status)


def test_a_run_that_was_killed_before_its_manifest_is_begun_again(tmp_path):
    """Its first part was there already, and the folder was refused as nobody's."""
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "part-000000.npz").write_bytes(b"of the run that was killed")
    (folder / ".manifest.json.17").write_bytes(b"half of")
    rows = rows_of(0)[:10]
    result = run_rows(
        function, rows, DevicePool, num_workers=2, tolerance=0.0, folder=folder, resume=True
    )
    np.testing.assert_array_equal(result.values, function(rows))
    (folder / "manifest.json").unlink()
    (folder / "notes.txt").write_text("of somebody else")
    with pytest.raises(ValueError, match="holds no results of a run"):
        run_rows(function, rows, DevicePool, num_workers=2, tolerance=0.0, folder=folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(NUMBER))
def test_a_run_that_is_killed_and_resumed_has_the_functions_own_values(seed, tmp_path):
    random = np.random.default_rng([seed, 2])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nercc_jax.rows"])
    folder, done = tmp_path / "rows", tmp_path / "done.npz"
    kills = int(random.integers(1, 5))
    for life in range(kills + 1):
        # Killed before or while it computes, but for the last.
        process = context.Process(target=run, args=(seed, life, folder, done))
        process.start()
        if random.random() < 0.8:  # otherwise it may be killed before it computes anything
            soon(lambda process=process: folder.exists() or not process.is_alive())
        process.join(random.uniform(0.0, 3.0) if life < kills else 120.0)
        process.kill()
        process.join()
        if done.exists():
            break
    with np.load(done) as found:
        assert set(found["status"].tolist()) == {"computed"}
        np.testing.assert_array_equal(found["values"], function(rows_of(seed)))
