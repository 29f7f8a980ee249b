"""Check what accelerators would run, without one: compile for a TPU v5e or an H100.

    python bench/compiled.py [--platform tpu|cuda] [--only PATTERN ...] [--quick] [--update]
                             [--keep FOLDER] [--budget FILE]

Each program of `_compiled_programs.py` is compiled for a description of the device and read; none
is run. The command fails (1) where one does not compile, has float64 or a callback to the host,
lets the device round the factors of a product of the spline mathematics, or is over its budget in
`compiled_budget.json`. That is written by hand: `--update` writes what was counted into `results/`
and leaves it alone. `774/110` is 774 where 110 are allowed. Columns:

- launches: kernels started while all answers are sound, loops counted by their turns; `worst` when
  an answer is broken or the product would lose digits. On a TPU, which starts none, instructions.
- loops: 3 x 19 are three loops of 19 turns, open those whose turns depend on data.
- cycles: what XLA:TPU estimates of itself, without scalar work.

TPU needs `pip install 'jax[tpu]'`, CUDA `pip install 'jax[cuda12]'`: packages, no devices. The
counts are of one version of the compiler; budgets are for the one that is pinned in `.ci/compiled`,
which installs it and runs this.
"""

import argparse
import dataclasses
import fnmatch
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from _compiled_budget import (
    BUDGET_FILE,
    Budget,
    Budgets,
    Measured,
    failures,
    load_budgets,
)
from _compiled_hlo import has_float64, rounded_products, summarise
from _compiled_target import Compiled, compile_program, devices, prepare

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("jax", "jaxlib", "equinox", "flax", "numpy")
_PLUGINS = {"tpu": ("libtpu",), "cuda": ("jax-cuda12-plugin",)}
_COLUMNS = {
    "program": 42,
    "compile": 8,
    "launches": 10,
    "worst": 10,
    "loops": 44,
    "temporary": 10,
    "cycles": 13,
    "collectives": 11,
    "verdict": 0,
}
_LONGEST_ERROR = 200


def chosen(names: Sequence[str], patterns: Sequence[str], budgets: Budgets) -> list[str]:
    """Return the programs that fit a pattern, and those that they are compared with."""
    fitting = {
        name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
    compared = {other for name in fitting for other in budgets.get(name, Budget()).times}
    return [name for name in names if name in fitting | compared]


def measure(compiled: Compiled) -> Measured:
    """Return the numbers of a compiled program."""
    summary = summarise(compiled.hlo)
    return Measured(
        compile_s=compiled.seconds,
        launches=summary.cost.launches,
        worst=summary.cost.worst,
        loops=len(summary.counted_loops),
        open_loops=len(summary.open_loops),
        turns=tuple(sorted(loop.turns or 0 for loop in summary.counted_loops)),
        sources=dict(Counter(loop.source for loop in summary.counted_loops)),
        open_sources=dict(Counter(loop.source for loop in summary.open_loops)),
        temp_bytes=compiled.temp_bytes,
        cycles=summary.cost.cycles,
        collectives=summary.collectives,
        rounded=len(rounded_products(compiled.stablehlo)),
        float64=summary.float64 or has_float64(compiled.stablehlo),
        callbacks=summary.callbacks,
    )


def attempt(
    make: Callable[[list[Any]], Any], described: list[Any], keep: Callable[[Compiled], None]
) -> Measured:
    """Compile one program; what the compiler raises is a result, too."""
    start = time.perf_counter()
    try:
        compiled = compile_program(make(described), described)
    except Exception as error:  # of any kind: a trace, a lowering or the compiler may fail
        message = " ".join(f"{type(error).__name__}: {error}".split())
        return Measured(time.perf_counter() - start, error=message[:_LONGEST_ERROR])
    keep(compiled)
    return measure(compiled)


def save(folder: Path | None, name: str, compiled: Compiled) -> None:
    """Write the program's text, before and after the compiler."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    stem = "".join(letter if letter.isalnum() else "_" for letter in name)
    (folder / f"{stem}.stablehlo.txt").write_text(compiled.stablehlo)
    (folder / f"{stem}.hlo.txt").write_text(compiled.hlo)


def row(cells: Sequence[str]) -> str:
    """Return cells in columns: text to the left, numbers to the right."""
    left = ("program", "loops", "verdict")
    return "  ".join(
        cell.ljust(width) if column in left else cell.rjust(width)
        for cell, (column, width) in zip(cells, _COLUMNS.items(), strict=True)
    ).rstrip()


def cells(name: str, found: Measured, budget: Budget, failed: bool) -> list[str]:
    """Return a program's row; a count with a limit shows both, `774/110`."""

    def count(key: str) -> str:
        shown = f"{getattr(found, key):,}"
        return f"{shown}/{budget.limits[key]:,}" if key in budget.limits else shown

    if found.error is not None:
        return [name, f"{found.compile_s:.1f} s", *[""] * 6, "FAILS"]
    loops = [f"{times} x {turns:,}" for turns, times in Counter(found.turns).items()]
    loops += [f"{found.open_loops} open"] if found.open_loops else []
    return [
        name,
        f"{found.compile_s:.1f} s",
        count("launches"),
        count("worst"),
        ", ".join(loops),
        f"{found.temp_bytes / 1e6:,.1f} MB",
        count("cycles"),
        count("collectives"),
        "FAILS" if failed else "ok",
    ]


def write_results(platform: str, kind: str, results: Mapping[str, Measured]) -> Path:
    """Add to what was measured before: the other programs' numbers stay."""
    from _report import environment, write_json

    path = RESULTS / f"compiled-{platform}.json"
    kept = json.loads(path.read_text())["programs"] if path.exists() else {}
    kept |= {name: dataclasses.asdict(found) for name, found in results.items()}
    where = environment((*_PACKAGES, *_PLUGINS[platform]))
    write_json(path, {"environment": where, "compiled_for": kind, "programs": kept})
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--platform", choices=("tpu", "cuda"), default="tpu")
    parser.add_argument("--only", nargs="*", default=["*"], metavar="PATTERN", help="names: 'try*'")
    parser.add_argument("--quick", action="store_true", help="without what compiles slowly")
    parser.add_argument("--update", action="store_true", help="write the counts, not the budget")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="save the programs' texts")
    parser.add_argument("--budget", type=Path, default=BUDGET_FILE, help="another budget")
    options = parser.parse_args()
    try:
        prepare(options.platform)
    except ImportError as error:
        sys.exit(f"bench/compiled.py: {error}")
    from _compiled_programs import PROGRAMS, SLOW

    budgets = load_budgets(options.platform, options.budget)
    names = [name for name in PROGRAMS if not (options.quick and name in SLOW)]
    names = chosen(names, options.only, budgets)
    if not names:
        sys.exit(f"bench/compiled.py: no program fits {options.only}; there are {list(PROGRAMS)}")
    described = devices(options.platform)
    print(f"{options.platform}: {described[0].device_kind}\n{row(list(_COLUMNS))}")
    results: dict[str, Measured] = {}
    result: dict[str, list[str]] = {}
    for name in names:
        results[name] = attempt(
            PROGRAMS[name],
            described,
            lambda compiled, name=name: save(options.keep, name, compiled),
        )
        budget = budgets.get(name, Budget())
        result[name] = list(failures(name, budget, results))
        print(row(cells(name, results[name], budget, bool(result[name]))), flush=True)
    if options.update:
        print(f"wrote {write_results(options.platform, described[0].device_kind, results)}")
    failed = {name: words for name, words in result.items() if words}
    print(f"\n{len(names) - len(failed)} of {len(names)} programs keep to their budget")
    for name, words in failed.items():
        print(f"  {name}: {'; '.join(words)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
