"""Measure the cost of spreading workers over devices, and the gain of partial results.

    python bench/sharding.py [--quick] [--output FOLDER]

Coded inference (NeRCC, K = 8, N = 20) on a mesh of 1, 2, 4 and 8 devices, in float32, against two
programs on one device in the same run, all timed in turn:

- unsharded: `coded_inference` without a mesh;
- uncoded: the model on the K data points of each group, which is 2.5 times less work.

On the CPU the devices are made up: they share its cores, so more of them cannot be faster, and what
is measured is the overhead of spreading. Where there are accelerators, those are taken.

Then one device of four is slowed down (its workers repeat the model), and the whole program is
timed against `partial_inference` that asks for the workers of the other three.
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
import jax.numpy as jnp
import numpy as np
from _report import Contender, Timing, environment, interleaved, write_json
from jax.sharding import Mesh

from nercc_jax import NeRCC, coded_inference
from nercc_jax.inference import partial_inference
from nercc_models import load_model

_K, _N = 8, 20
_DEVICES = (1, 2, 4, 8)
_MODELS = {"lenet5-digits": (1, 8, 64), "repvgg-cifar10": (1, 4)}  # and numbers of groups
_SLOW, _OF, _REPEATED = 3, 4, (1, 10, 40)  # which device, of how many, and its repeats
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


@dataclasses.dataclass(frozen=True)
class Slowed:
    """With one slow device: the whole program, and partial results of the other devices."""

    repeated: int
    whole: Timing
    partial: Timing
    responded: int


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


def measure_slowed(repeated: int, repeats: int) -> Slowed | None:
    """Measure LeNet5 on four devices, the last of which repeats it."""
    if len(jax.devices()) < _OF:
        return None
    model = load_model("lenet5-digits")

    def uneven(batch: jax.Array) -> jax.Array:
        turns = jnp.where(jax.lax.axis_index("workers") == _SLOW, repeated, 1)
        # The input depends on the turn before, or the compiler would run one.
        return jax.lax.fori_loop(1, turns, lambda _, y: model(batch + 0 * y.mean()), model(batch))

    mesh = Mesh(np.array(jax.devices()[:_OF]), ("workers",))
    x = np.random.default_rng(0).standard_normal((8, _K, *model.input_shape), np.float32)
    code = NeRCC(_K, _N)
    everyone = np.ones((8, _N), bool)
    whole = coded_inference(uneven, code, mesh=mesh)
    partial = partial_inference(uneven, code, mesh, grouped=True)
    number = _N - _N // _OF
    responded = []

    def call() -> None:
        decoded = jax.block_until_ready(partial(x, number=number, deadline=60.0))
        responded.append(int(decoded.responded[0].sum()))

    def settled() -> tuple[()]:
        # What the call before has left behind is not this one's.
        jax.block_until_ready(whole(x, everyone))
        return ()

    contenders = {
        "whole": Contender(lambda: jax.block_until_ready(whole(x, everyone)), settled),
        "partial": Contender(call, settled),
    }
    for _ in range(2 * _OF):
        call()  # decoding is compiled for each device that may do it
    timings = interleaved(contenders, repeats)
    return Slowed(repeated, timings["whole"], timings["partial"], int(np.median(responded)))


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


def slowed_table(slowed: list[Slowed]) -> Table:
    table = Table(title=f"LeNet5, 8 groups, {_OF} devices, one slow: ms a call (median)")
    for column in ("slow device's work", "whole program", "partial results", "ratio", "responded"):
        table.add_column(column, justify="right")
    for one in slowed:
        ratio = f"{one.partial.ratio(one.whole):.2f}x"
        responded = f"{one.responded} of {_N}"
        table.add_row(f"{one.repeated}x", _ms(one.whole), _ms(one.partial), ratio, responded)
    return table


def as_json(measured: list[Measured], slowed: list[Slowed]) -> dict[str, Any]:
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
        "slow_device": [
            {
                "repeated": one.repeated,
                "responded": one.responded,
                "whole": one.whole.summary(),
                "partial": one.partial.summary(),
                "partial_by_whole": one.partial.ratio(one.whole),
            }
            for one in slowed
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
    slowed = []
    for repeated in _REPEATED:
        console.log(f"slow device, repeats: {repeated}")
        slowed += [one for one in [measure_slowed(repeated, repeats)] if one is not None]

    tables = [sharding_table(measured), *([slowed_table(slowed)] if slowed else [])]
    for table in tables:
        console.print(table)
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
    content = {"environment": start | after, **as_json(measured, slowed)}
    write_json(folder / "sharding.json", content)
    console.print(f"wrote {folder / 'sharding.json'}")


if __name__ == "__main__":
    main()
