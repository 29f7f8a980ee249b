"""Measure the cost of coding on any device, and how near it is to the device's limits.

    python bench/accelerator.py [--only PATTERN ...] [--groups G ...] [--dtypes D ...]
                                [--seconds S] [--gigabytes G] [--output FOLDER]

Encoding, decoding (mask given and traced) and coded inference against the bare product and the bare
model on the same N coded data points and on K data points; ordering; splines; a step of tuning.
Compiled programs, timed in turn, each call until its result is ready: medians and quartiles. Beside
them the least time that the device could take: the operations of the mathematics and the program's
arguments and results, each moved once, at the device's limits (its data sheet's, or measured).

A case that takes longer than `--seconds` for three rounds of its parts, or more than `--gigabytes`,
is left out, and so are larger ones of its family; the results say so. Results are added to those of
the same device, and with `--only` held against the same limits. docs/accelerators.md shows them,
with the counts of `bench/compiled.py --update` for devices that are not there.
"""

import argparse
import dataclasses
import fnmatch
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _accelerator_cases import Case, Part, Steps, cases
from _accelerator_limits import Limits, limits_of
from _compiled_hlo import summarise
from _report import Contender, Timing, clock, environment, interleaved, warmed, write_json

RESULTS = Path(__file__).parent / "results"
FILE = "accelerator.json"
_PACKAGES = ("nercc-jax", "jax", "jaxlib", "equinox", "flax", "numpy")
_ROUNDS = (3, 31)  # of a case's parts, at least and at most
_LONGEST_ERROR = 200


class TooLarge(Exception):
    """A case that takes more than it may."""


@dataclasses.dataclass(frozen=True)
class Built:
    """A part, compiled; what XLA counts in it, and what it must move."""

    part: Part
    call: Contender
    compile_s: float
    moved: int
    counts: dict[str, float]


def compile_part(part: Part) -> Built:
    start = time.perf_counter()
    arguments = jax.device_put(part.arguments)
    compiled = jax.jit(part.function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    result = jax.block_until_ready(compiled(*arguments))
    check_finite(result)
    moved = sum(leaf.nbytes for leaf in jax.tree.leaves((arguments, result)))
    call = Contender(lambda: jax.block_until_ready(compiled(*arguments)))
    return Built(part, call, seconds, moved, xla_counts(compiled))


def check_finite(result: Any) -> None:
    """Raise ValueError for results that are not finite: decoding those takes another way."""
    for leaf in jax.tree.leaves(result):
        if jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating) and not np.all(
            np.isfinite(np.asarray(leaf, np.float32))
        ):
            raise ValueError("a result is not finite")


def xla_counts(compiled: Any) -> dict[str, float]:
    """Return XLA's own count of a program (a loop's body once), and its launches on a GPU."""
    found = compiled.cost_analysis() or {}
    counts = {"flops": found.get("flops", 0.0), "bytes": found.get("bytes accessed", 0.0)}
    memory = compiled.memory_analysis()
    if memory is not None:
        counts["temp_bytes"] = memory.temp_size_in_bytes
    if jax.default_backend() == "gpu":
        counts["launches"] = summarise(compiled.as_text() or "").cost.launches
    return counts


def measure(case: Case, limits: Limits, seconds: float) -> dict[str, Any]:
    """Return all of a case's timings; raise TooLarge when three rounds would take too long."""
    made = case.build()
    if isinstance(made, Steps):
        timing = Timing(tuple(made.run()))
        return {"step": summary(timing, limits, case.dtype, made.flops, 0, False)}
    built, spent = {}, 0.0
    for name, part in made.items():
        built[name] = compile_part(part)
        spent += clock(built[name].call)
        if _ROUNDS[0] * spent > seconds:
            raise TooLarge(
                f"{_ROUNDS[0]} rounds up to its part '{name}' take {_ROUNDS[0] * spent:.0f} s, "
                f"more than {seconds:g}"
            )
    rounds = int(np.clip(seconds / (2 * spent), *_ROUNDS))  # each call is warmed
    quick = spent < 0.1
    contenders = {name: warmed(one.call) if quick else one.call for name, one in built.items()}
    timings = interleaved(contenders, rounds)
    return {name: _row(built[name], timings, name, limits, case.dtype) for name in built}


def _row(
    built: Built, timings: Mapping[str, Timing], name: str, limits: Limits, dtype: str
) -> dict[str, Any]:
    part = built.part
    row = summary(timings[name], limits, dtype, part.flops, built.moved, part.precise)
    row |= {"compile_s": built.compile_s, "xla": built.counts}
    row["by"] = {
        other: timings[name].ratio(timings[other])
        for other in ("product", "bare, K", "bare, N")
        if other in timings and other != name
    }
    return row


def summary(
    timing: Timing, limits: Limits, dtype: str, flops: float, moved: float, precise: bool
) -> dict[str, Any]:
    """Median and quartiles, and the share of it that the device's limit would take."""
    least, limit = limits.seconds(flops, moved, dtype, precise)
    return {
        "median_s": timing.median,
        "quartiles_s": [timing.quantile(0.25), timing.quantile(0.75)],
        "repeats": len(timing.seconds),
        "flops": flops,
        "moved_bytes": moved,
        "least_s": least,
        "limit": limit,
        "share": least / timing.median,
    }


def measure_all(
    chosen: Iterable[Case], limits: Limits, seconds: float, gigabytes: float
) -> dict[str, dict[str, Any]]:
    """Return by name a case's timings, or why it was left out."""
    results: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    for case in chosen:
        row = {f: getattr(case, f) for f in ("kind", "subject", "groups", "dtype")}
        start = time.perf_counter()
        try:
            if case.family in skipped:
                raise TooLarge(f"{skipped[case.family]} was too large")
            if case.moved > gigabytes * 1e9:
                raise TooLarge(f"its data take {case.moved / 1e9:.1f} GB")
            row["parts"] = measure(case, limits, seconds)
        except (TooLarge, jax.errors.JaxRuntimeError) as error:  # a device's memory may not do
            row["left_out"] = " ".join(str(error).split())[:_LONGEST_ERROR]
            skipped.setdefault(case.family, f"{case.groups} group{'s' * (case.groups > 1)}")
        results[case.name] = row
        print(f"{time.perf_counter() - start:6.1f} s  {line(case, row)}", flush=True)
    return results


def line(case: Case, row: Mapping[str, Any]) -> str:
    if "left_out" in row:
        return f"{case.name}: left out, {row['left_out']}"
    parts = (
        f"{name} {1e3 * p['median_s']:.3g} ms ({100 * p['share']:.2g} %)"
        for name, p in row["parts"].items()
    )
    return f"{case.name}: {'; '.join(parts)}"


def add_results(path: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """Add to what was measured on the same device before: the other cases stay."""
    content = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    label = run["environment"]["device"]
    kept = content["runs"].get(label, {}).get("cases", {})
    content["runs"][label] = {**run, "cases": kept | run["cases"]}
    write_json(path, content)
    return content


def kept_limits(path: Path, label: str) -> Limits | None:
    """Return the limits of the device's other cases."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else {}
    return Limits(**runs[label]["limits"]) if label in runs else None


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", nargs="*", default=["*"], metavar="PATTERN", help="'decode*'")
    parser.add_argument("--groups", nargs="*", type=int, default=[1, 16, 256])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=10.0, help="a case may take (10)")
    parser.add_argument("--gigabytes", type=float, help="its data may take (2 on a CPU, else 16)")
    parser.add_argument("--output", type=Path, help="folder (default: results/)")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_arguments()
    jax.config.update("jax_enable_x64", False)
    results = options.output or RESULTS
    device = jax.devices()[0]
    start = environment(_PACKAGES)
    whole = options.only == ["*"]
    limits = (not whole and kept_limits(results / FILE, start["device"])) or limits_of(device)
    print(f"{start['device']}: {limits}")
    every = cases(sorted(options.groups), options.dtypes)
    chosen = [c for c in every if any(fnmatch.fnmatchcase(c.name, p) for p in options.only)]
    gigabytes = options.gigabytes or (2.0 if device.platform == "cpu" else 16.0)
    found = measure_all(chosen, limits, options.seconds, gigabytes)
    after = {"load_average_after": list(os.getloadavg())}
    run = {
        "environment": start | after,
        "limits": dataclasses.asdict(limits),
        "cases": found,
    }
    add_results(results / FILE, run)
    print(f"wrote {results / FILE}")


if __name__ == "__main__":
    main()
