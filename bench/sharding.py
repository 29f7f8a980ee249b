"""Measure the cost of spreading workers over devices.

    python bench/sharding.py [--quick] [--output FOLDER]

Coded inference (NeRCC, K = 8, N = 20) on a mesh of 1, 2, 4 and 8 devices, in float32, against two
programs on one device in the same run, all timed in turn:

- unsharded: `coded_inference` without a mesh;
- uncoded: the model on the K data points of each group, which is 2.5 times less work.

On the CPU the devices are made up: they share its cores, so more of them cannot be faster, and what
is measured is the overhead of spreading. Where there are accelerators, those are taken.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

try:
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    sys.exit(f"bench/sharding.py needs {error.name}: pip install '.[demo]' in a clone")

import jax
import numpy as np
from _report import Contender, Timing, environment, interleaved, write_json
from jax.sharding import Mesh

from nercc_jax import NeRCC, coded_inference
from nercc_models import load_model

_K, _N = 8, 20
_DEVICES = (1, 2, 4, 8)
_MODELS = {"lenet5-digits": (1, 8, 64), "repvgg-cifar10": (1, 4)}  # and numbers of groups
_PACKAGES = ("nercc-jax", "jax", "jaxlib", "flax", "numpy")


@dataclasses.dataclass(frozen=True)
class Measured:
    """One model and number of groups: uncoded, unsharded, and by the number of devices."""

    model: str
    groups: int
    uncoded: Timing
    unsharded: Timing
    sharded: dict[int, Timing]
    difference: float  # largest, from unsharded


def measure(name: str, groups: int, repeats: int) -> Measured:
    model = load_model(name)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((groups, _K, *model.input_shape), np.float32)
    masks = rng.uniform(size=(groups, _N)) < 0.85
    code = NeRCC(_K, _N)
    counts = [count for count in _DEVICES if count <= len(jax.devices())]
    calls = {"unsharded": coded_inference(model, code)}
    for count in counts:
        mesh = Mesh(np.array(jax.devices()[:count]), ("workers",))
        calls[str(count)] = coded_inference(model, code, mesh=mesh)
    expected = np.asarray(calls["unsharded"](x, masks))
    results = (np.asarray(calls[str(count)](x, masks)) for count in counts)
    difference = max(float(np.abs(got - expected).max()) for got in results)
    uncoded = jax.jit(lambda model, x: model(x.reshape(-1, *model.input_shape)))
    contenders = {
        one: Contender(lambda call=call: jax.block_until_ready(call(x, masks)))
        for one, call in calls.items()
    }
    contenders["uncoded"] = Contender(lambda: jax.block_until_ready(uncoded(model, x)))
    for contender in contenders.values():
        contender.call()
    timings = interleaved(contenders, repeats)
    sharded = {count: timings[str(count)] for count in counts}
    return Measured(name, groups, timings["uncoded"], timings["unsharded"], sharded, difference)


# --- reporting


def _ms(timing: Timing) -> str:
    return f"{1e3 * timing.median:.3g}"


def sharding_table(measured: list[Measured]) -> Table:
    title = f"Coded inference, K = {_K}, N = {_N}: ms a call (median), and times the unsharded"
    table = Table(title=title)
    counts = list(measured[0].sharded)
    columns = ("groups", "uncoded", "unsharded", *(f"{c} device{'s' * (c > 1)}" for c in counts))
    table.add_column("model")
    for column in (*columns, "difference"):
        table.add_column(column, justify="right")
    for one in measured:
        timings = [f"{_ms(t)} ({t.ratio(one.unsharded):.2f}x)" for t in one.sharded.values()]
        row = (one.model, str(one.groups), _ms(one.uncoded), _ms(one.unsharded), *timings)
        table.add_row(*row, f"{one.difference:.0e}")
    return table


def as_json(measured: list[Measured]) -> dict[str, Any]:
    return {
        "num_data": _K,
        "num_workers": _N,
        "sharding": [
            {
                "model": one.model,
                "groups": one.groups,
                "largest_difference": one.difference,
                "uncoded": one.uncoded.summary(),
                "unsharded": one.unsharded.summary(),
                "sharded": {
                    str(count): timing.summary()
                    | {
                        "by_unsharded": timing.ratio(one.unsharded),
                        "by_uncoded": timing.ratio(one.uncoded),
                    }
                    for count, timing in one.sharded.items()
                },
            }
            for one in measured
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="few repeats; writes no results")
    parser.add_argument("--output", type=Path, help="folder (default: results beside this script)")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(_DEVICES))
    jax.config.update("jax_enable_x64", False)
    start = environment(_PACKAGES)
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    repeats = 5 if arguments.quick else 31

    measured = []
    for name, numbers in _MODELS.items():
        for groups in numbers:
            console.log(f"{name}, groups: {groups}")
            measured.append(measure(name, groups, repeats))

    console.print(sharding_table(measured))
    note = f"{start['device']}, {start['cpu']}, {start['cores']} cores, float32"
    if jax.devices()[0].platform == "cpu":
        note += (
            f"\nThe devices share {start['cores']} cores: more of them cannot be faster, and what "
            "is measured is the overhead of spreading"
        )
    console.print(note)
    if arguments.quick and arguments.output is None:
        return
    folder = arguments.output or Path(__file__).parent / "results"
    after = {"load_average_after": list(os.getloadavg()), "dtype": "float32", "note": note}
    content = {"environment": start | after, **as_json(measured)}
    write_json(folder / "sharding.json", content)
    console.print(f"wrote {folder / 'sharding.json'}")


if __name__ == "__main__":
    main()
