"""Functions that are smooth in their inputs: what a learner from past answers is worth to a code.

    python bench/functions.py [--only NAME ...] [--cells CELL ...] [--draws N] [--quick]
        [--learners] [--sweeps] [--data-dir FOLDER]

For eight real functions, four cells of workers and stragglers: codes, copies with what fills their
gaps, a learner with and without redundancy, and what is picked on other data. Judged by RMSE
relative to the outputs' spread, by how many errors are within 90 % bars, and by recall@10 for
embeddings; over ten draws of past answers, inputs and stragglers, with 95 % intervals. Writes
results/functions.json, which docs/functions.md shows. CIFAR-10 needs its parquet file
(`models/data.py` says where).
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _functions_cases import NAMES, SIMULATORS, Case, load
from _functions_systems import ALONE, CELLS, NUM_DATA, Bench, Cell, Draw, Numbers, Size, picked
from _report import environment, read_json, write_json
from _settings import PACKAGES
from rich.console import Console

from nercc_jax import NeRCC, Scheme

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SWEEPS = 100  # the first seed of sweeps: of none that points were tried out on
QUICK = Size(groups=2, sets=2, chosen=1, judged=2, sweeps=2)


def main() -> None:
    options = _parse()
    console = Console(emoji=False)
    path = RESULTS / ("functions-quick.json" if options.quick else "functions.json")
    size = QUICK if options.quick else Size(judged=options.draws)
    for name in options.only or NAMES:
        measure(load(name, options.data_dir), size, options, path, console.log)
    console.print(f"results: {path}")


def measure(case: Case, size: Size, options: argparse.Namespace, path: Path, log: Any) -> None:
    """Measure some cells of one function, or all, and its sweep.

    What is measured is on disk at once. With `learners` the learners alone are judged again.

    With `learners` the learners alone are judged again.
    """
    start = time.perf_counter()
    bench = Bench(case, dataclasses.replace(size, judged=0) if options.sweeps else size, log)
    for cell in [] if options.sweeps else CELLS:
        if options.cells and cell.name not in options.cells:
            continue
        known = read_json(path)[case.name]["cells"][cell.name] if options.learners else None
        for summary in _measured(bench, cell, known):
            summary["seconds"] = round(time.perf_counter() - start, 1)
            summary["environment"] = environment(PACKAGES)
            _keep(path, case, size, {"cells": {cell.name: summary}})
        log(f"{case.name} {cell.name}: measured in {time.perf_counter() - start:.0f} s")
        start = time.perf_counter()
    if case.name in SIMULATORS and not options.cells:
        _keep(path, case, size, {"sweep": sweep(bench) | {"draws": size.sweeps}})


def _keep(path: Path, case: Case, size: Size, found: dict[str, Any]) -> None:
    """Write what was found in addition to what is there already."""
    results = read_json(path)
    summary = results.setdefault(case.name, {})
    summary |= {"about": case.about}
    if "cells" in found or "size" not in summary:
        summary["size"] = dataclasses.asdict(size)
    summary.setdefault("environment", environment(PACKAGES))  # of older cells
    summary |= found | {"cells": summary.get("cells", {}) | found.get("cells", {})}
    write_json(path, results)


def _measured(
    bench: Bench, cell: Cell, known: Mapping[str, Any] | None
) -> Iterator[dict[str, Any]]:
    """Yield one cell after each draw; with what is known of it, as `measure`."""
    bench.prepare(cell, rivals=known is None)
    *_, chosen = bench.measure(cell, judging=False, rivals=False)
    name = picked(chosen)
    before = {"chosen": {}, "systems": {}} if known is None else known
    for judged in bench.measure(cell, judging=True, rivals=known is None, bars={ALONE, name}):
        yield {
            "picked": name,
            "chosen": before["chosen"] | bench.chosen(),
            "systems": before["systems"] | {name: _columns(rows) for name, rows in judged.items()},
        }


def sweep(bench: Bench) -> dict[str, Any]:
    """Return the RMSE of sweeps of the first parameter in 20 steps, draw by draw.

    Sweeps have the code's points and others; which of those that follow is picked is chosen on as
    many other sweeps.

    At the ends of a sweep what is lost has neighbours on one side only, so the redundant workers
    may have points there: copies, between the last two, or a step beyond the sweep; and the spline
    may end otherwise than a natural one.
    """
    alpha = np.asarray(NeRCC(NUM_DATA, NUM_DATA, points="interleaved").alpha)
    last, next_to_it = alpha[[0, -1]], alpha[[1, -2]]
    beside = {
        "the last two copied": (last, next_to_it),
        "the last copied twice": (last, last),
        "the last copied, and one halfway": (last, (last + next_to_it) / 2),
    }
    schemes = {
        "fixed points": _sweeping("interleaved", None),
        "following points": _sweeping("interleaved", swept),
    }
    for name, ends in beside.items():
        points = alpha, np.concatenate([alpha, *ends])
        schemes[f"following points, {name}"] = _sweeping(points, swept)
        free = _sweeping(points, swept, ends="not-a-knot")
        schemes[f"following points, {name}; not a knot"] = free
    inner = 0.9 * alpha / np.abs(alpha).max()  # a mean step of room at each end
    ends = inner[[0, -1]]
    points = inner, np.concatenate([inner, ends, np.sign(ends)])
    schemes["following points, the last copied, and one beyond"] = _sweeping(points, swept)
    chosen, judged = (
        {name: _errors(bench, scheme, judging) for name, scheme in schemes.items()}
        for judging in (False, True)
    )
    following = [name for name, scheme in schemes.items() if scheme.follow is not None]
    return {"picked": min(following, key=lambda name: np.mean(chosen[name])), "rmse": judged}


def _sweeping(points: Any, follow: Any, **ends: Any) -> Scheme:
    code = NeRCC(NUM_DATA, CELLS[0].num_workers, points=points, lambda_dec=0.0, **ends)
    return Scheme(code, follow=follow)


def _errors(bench: Bench, scheme: Scheme, judging: bool) -> list[float]:
    """Return a scheme's error on sweeps, draw by draw."""
    found = []
    for seed in range(SWEEPS, SWEEPS + bench.size.sweeps):
        x = bench.inputs(judging, seed, bench.size.groups * NUM_DATA)
        value = np.sort(x[:, 0].reshape(-1, NUM_DATA), axis=1).ravel()
        x = np.tile(x.mean(axis=0), (len(x), 1)).astype(np.float32)
        x[:, 0] = value
        own = bench.outputs(x)
        draw = Draw(x[:0], own[:0], x, own, np.arange(len(x)), None, 2 * seed + judging)
        masks = draw.masks(CELLS[0], bench.size.sets)
        found.append(_by_groups(bench.decode(scheme, draw, masks)[0], own))
    return found


def swept(x: jax.Array) -> jax.Array:
    """Return the parameter that a sweep's points differ by."""
    return x[:, :1]


def _by_groups(predictions: jax.Array, own: jax.Array) -> float:
    """Return the RMSE over the spread within the sweeps, each about its own mean."""
    own = jnp.reshape(own, (-1, NUM_DATA, own.shape[-1]))
    error = jnp.reshape(predictions, (-1, *own.shape)) - own
    spread = own - jnp.mean(own, axis=1, keepdims=True)
    return float(jnp.sqrt(jnp.mean(error**2) / jnp.mean(spread**2)))


def _columns(rows: list[Numbers]) -> dict[str, list[Any]]:
    """Return a list for each number, with an entry for each draw; absent ones are left out."""
    columns = {name: [getattr(row, name) for row in rows] for name in vars(rows[0])}
    return {name: values for name, values in columns.items() if any(values)}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=NAMES)
    parser.add_argument("--cells", nargs="*", choices=[cell.name for cell in CELLS])
    parser.add_argument("--draws", type=int, default=Size().judged, help="to judge by")
    parser.add_argument("--sweeps", action="store_true", help="sweeps alone")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--learners",
        action="store_true",
        help="keep the rivals that are there",
    )
    parser.add_argument("--data-dir", type=Path, default=HERE.parent.parent / "shared" / "data")
    return parser.parse_args()


if __name__ == "__main__":
    main()
