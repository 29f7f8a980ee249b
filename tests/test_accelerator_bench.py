"""The accelerator benchmark: its smallest case is timed, and results are kept by device."""

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import bench_modules, require


@pytest.fixture(scope="module")
def bench():
    """bench/accelerator.py and its neighbours, which import each other."""
    require("matplotlib", "demo")
    parts = {name: f"_accelerator_{name}" for name in ("cases", "limits")}
    with bench_modules(command="accelerator", **parts) as found:
        yield found


def _limits(bench):
    return bench.limits.Limits(1e9, 1e10, 2e10, 4e10, "made up")


def _case(bench, name):
    (case,) = [c for c in bench.cases.cases([1], ["float32"]) if c.name == name]
    return case


ENCODE = "encode: (20, 8), 3,072 numbers, float32"


def test_the_smallest_case_is_timed(bench):
    found = bench.command.measure_all([_case(bench, ENCODE)], _limits(bench), 0.5, 1.0)
    parts = found[ENCODE]["parts"]
    assert set(parts) == {"product", "encode"}
    encode = parts["encode"]
    # Eight data points, twenty coded ones, the matrix and the code's own numbers.
    assert encode["moved_bytes"] >= 4 * (28 * 3_072 + 160)
    assert encode["flops"] == 2 * 160 * 3_072
    assert encode["share"] == encode["least_s"] / encode["median_s"]
    low, high = encode["quartiles_s"]
    assert low <= encode["median_s"] <= high
    assert encode["by"]["product"] > 0


def test_what_is_too_large_is_left_out_with_what_is_larger(bench):
    small = _case(bench, ENCODE)
    many = dataclasses.replace(small, groups=16)
    found = bench.command.measure_all([small, many], _limits(bench), 0.0, 1.0)
    reasons = [row["left_out"] for row in found.values()]
    assert "3 rounds" in reasons[0]
    assert reasons[1] == "1 group was too large"
    (row,) = bench.command.measure_all([small], _limits(bench), 1.0, 1e-6).values()
    assert "GB" in row["left_out"]


def test_an_answer_that_is_not_finite_is_not_timed(bench):
    bench.command.check_finite((jnp.ones(2, jnp.bfloat16), jnp.arange(2)))
    with pytest.raises(ValueError, match="not finite"):
        bench.command.check_finite(jnp.array([1.0, np.nan]))


@pytest.mark.parametrize(
    ("dtype", "precise", "seconds", "limit"),
    [
        ("float32", True, 10.0, "flops"),
        ("float32", False, 5.0, "flops"),
        ("bfloat16", False, 3.0, "bytes"),
    ],
)
def test_the_slower_of_the_two_limits_counts(bench, dtype, precise, seconds, limit):
    assert _limits(bench).seconds(1e11, 3e9, dtype, precise) == (seconds, limit)


def test_a_device_that_is_not_known_is_measured(bench):
    unknown = SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
    assert bench.limits.limits_of(unknown).bandwidth == 3.35e12
    measured = bench.limits.measure_limits(1 << 20, 64)
    assert min(measured.bandwidth, measured.float32, measured.bfloat16) > 0
    assert measured.source.startswith("measured")


def _part(median, **by):
    rest = {"repeats": 3, "least_s": median / 4, "limit": "flops", "share": 0.25}
    return {"median_s": median, "quartiles_s": [median, median], "by": by, **rest}


def _results(device):
    coded = {"bare, N": 1.25, "bare, K": 3.5}
    parts = {"bare, K": _part(0.001), "bare, N": _part(0.002)}
    parts |= {name: _part(0.0025, **coded) for name in ("mask given", "mask traced")}
    row = {"kind": "inference", "subject": "LeNet5 (20, 8)", "groups": 1, "dtype": "float32"}
    environment = {"device": device, "cpu": "a processor", "cores": 2, "python": "3.11"}
    environment |= {"versions": {"jax": "0"}, "date": "2026-01-01T00:00:00"}
    environment |= {"load_average": [0.0], "load_average_after": [0.0]}
    large = {**row, "subject": "ViT", "left_out": "it takes 99 s"}
    limits = {"bandwidth": 1e9, "float32": 1e9, "default": 1e9, "bfloat16": 1e9, "source": "a test"}
    cases = {"small": {**row, "parts": parts}, "large": large}
    return {"environment": environment, "limits": limits, "cases": cases}


def test_results_of_a_device_are_added_to_its_own(bench, tmp_path):
    path = tmp_path / "accelerator.json"
    run = _results("cpu: cpu")
    bench.command.add_results(path, run)
    more = {**run, "cases": {"other": run["cases"]["small"]}}
    bench.command.add_results(path, more)
    content = bench.command.add_results(path, _results("gpu: a card"))
    assert set(content["runs"]["cpu: cpu"]["cases"]) == {"small", "large", "other"}
    assert set(content["runs"]) == {"cpu: cpu", "gpu: a card"}
    assert bench.command.kept_limits(path, "cpu: cpu").source == "a test"
    assert bench.command.kept_limits(path, "cpu: another") is None
