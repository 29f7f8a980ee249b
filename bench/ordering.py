"""Ordering data points: what it costs beside the model, and what it buys.

    python bench/ordering.py [--only NAMES] [--parts NAMES] [--quick] [--data-dir FOLDER]

- Cost: seconds for 1,000 images, the random projection and the path together, beside the model's
  own on the same images in the same run, by turns; and what compiling takes. On a busy machine
  look at the least of the repeats.
- Paths: `short_path` beside the other ways that were tried, by length (1: no order), seconds for
  1,024 rows, and disagreement of repeated points at (60, 20, 20).
- Disagreement (1 - RelAcc) of NeRCC(K, N) as it is untuned, by features, buffer, layout, with its
  95 % interval over straggler sets; the same sets for all.

Writes results/ordering.json (--quick: ordering-quick.json). Needs MNIST and CIFAR-10 as parquet
files (`models/data.py` says where).
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _report import CompileCounter, Contender, clock, environment, interleaved, write_json
from _settings import PACKAGES
from rich.console import Console
from rich.table import Table

from nercc_jax import ExactStragglers, NeRCC
from nercc_jax.cli._options import Outputs
from nercc_jax.cli._workload import load_worker_model
from nercc_jax.codes._decoding import AMPLIFICATION
from nercc_jax.evaluation import Estimate
from nercc_jax.evaluation._answers import batched, cut_groups
from nercc_jax.inference import order_points
from nercc_jax.inference._ordering import random_projection
from nercc_jax.inference._paths import distances_of, nearest_neighbour, short_path

RESULTS = Path(__file__).parent / "results"
MODELS: dict[str, Outputs] = {"lenet5-mnist": "logits", "repvgg-cifar10": "probabilities"}
Cell: TypeAlias = tuple[int, int, int]  # N, K, stragglers
CELLS: tuple[Cell, ...] = ((60, 20, 20), (24, 20, 2))
LAYOUTS = ("repeated", "chebyshev")
BUFFERS = (20, 256, 1024)
IMAGES = 1000  # that the cost is measured for
COUNTER = CompileCounter()


@dataclasses.dataclass(frozen=True)
class Size:
    """Data points, straggler sets, repeats of what is timed, rows of a path."""

    points: int = 1024
    sets: int = 20
    repeats: int = 15


QUICK = Size(points=256, sets=4, repeats=3)


class Images:
    """A model with images, and its own predictions of them."""

    def __init__(self, name: str, size: Size, data_dir: Path):
        self.name = name
        self.network = load_worker_model(name, MODELS[name])
        self.run = batched(self.network, 256)
        self.x, _ = self.network.images("test", data_dir, size.points, 0)
        self.own = np.asarray(self.run(self.x))
        self.features = {
            "pixels": self.x.reshape(len(self.x), -1),
            "projection": np.asarray(random_projection(self.x)),
            "outputs": self.own,
        }

    def disagreement(self, order: np.ndarray, layout: str, cell: Cell, sets: int) -> Estimate:
        """Return a layout's disagreement in one cell, when the images come in this order."""
        num_data = cell[1]
        encoder, decoders = matrices(layout, cell, sets)
        groups = cut_groups(self.x[order], num_data)
        own = self.own[order][: groups.shape[0] * num_data].reshape(*groups.shape[:2], -1)
        if layout == "repeated":  # its coded data points are the data points, which have run
            answers = own[:, encoder.argmax(axis=1)]
        else:
            coded = np.tensordot(groups, encoder, axes=(1, 1))
            coded = np.moveaxis(coded, -1, 1).reshape(-1, *self.x.shape[1:])
            answers = np.asarray(self.run(coded)).reshape(len(groups), len(encoder), -1)
        wanted = own.argmax(axis=-1)
        shares = []
        for decoder in decoders:
            decoded = np.einsum("kn,gnm->gkm", decoder, answers)
            shares.append(float(np.mean(decoded.argmax(axis=-1) != wanted)))
        return Estimate.over(shares)


@functools.cache
def matrices(layout: str, cell: Cell, sets: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the encoder, and a decoder for each straggler set; the order does not matter."""
    num_workers, num_data, stragglers = cell
    code = NeRCC(num_data, num_workers, points=layout)
    law = ExactStragglers(stragglers)
    masks = jnp.stack([law.available(jax.random.key(i), num_workers) for i in range(sets)])
    decoders = np.asarray(_decoders(code, masks))
    # Above it, decoding would not take the product with the matrix.
    if np.abs(decoders).sum(axis=-1).max() > AMPLIFICATION:
        raise ValueError(f"{layout} points at {cell}: a decoder loses digits")
    encoder = np.asarray(code.encoder_matrix())
    if layout == "repeated" and not np.allclose(encoder, encoder.round(), atol=1e-5):
        raise ValueError("repeated points do not give the data points themselves")
    return encoder, decoders


@eqx.filter_jit
def _decoders(code: NeRCC, masks: jax.Array) -> jax.Array:
    return jax.vmap(code.decoder_matrix)(masks)


def principal(rows: np.ndarray) -> np.ndarray:
    """Order by the first principal component, nearly: twenty steps of power iteration."""
    centred = rows - rows.mean(axis=0)
    direction = centred[np.argmax(np.sum(centred**2, axis=1))]
    for _ in range(20):
        direction = centred.T @ (centred @ direction)
        direction = direction / max(np.linalg.norm(direction), 1e-30)
    return np.argsort(centred @ direction)


def bisection(rows: np.ndarray) -> np.ndarray:
    """Order by halves along the first principal component, and their halves by their own."""

    def halves(chosen: np.ndarray) -> np.ndarray:
        if len(chosen) <= 2:
            return chosen
        chosen = chosen[principal(rows[chosen])]
        middle = len(chosen) // 2
        return np.concatenate([halves(chosen[:middle]), halves(chosen[middle:])])

    return halves(np.arange(len(rows)))


@jax.jit
def nearest(rows: jax.Array) -> jax.Array:
    """Return `short_path` without 2-opt."""
    centred = rows - jnp.mean(rows, axis=0)
    start = jnp.argmax(jnp.sum(centred**2, axis=1))
    return nearest_neighbour(distances_of(centred), start)


WAYS: dict[str, Callable[[Any], Any]] = {
    "none": lambda rows: np.arange(len(rows)),
    "principal component": principal,
    "bisection": bisection,
    "nearest neighbour": nearest,
    "and 2-opt (short_path)": short_path,
}


def paths(images: Images, size: Size) -> Iterator[dict[str, Any]]:
    """Return ways to order, by projection and by the model's outputs."""
    for features in ("projection", "outputs"):
        rows = images.features[features].astype(np.float32)
        apart = rows.astype(np.float64)
        plain = np.linalg.norm(np.diff(apart, axis=0), axis=1).sum()
        for name, way in WAYS.items():
            call = Contender(lambda way=way, rows=rows: jax.block_until_ready(way(rows)))
            order = np.asarray(call.call())
            result = images.disagreement(order, "repeated", CELLS[0], size.sets)
            yield {
                "model": images.name,
                "features": features,
                "way": name,
                "length": np.linalg.norm(np.diff(apart[order], axis=0), axis=1).sum() / plain,
                "seconds": float(np.median([clock(call) for _ in range(size.repeats)])),
                "disagreement": dataclasses.asdict(result),
            }


def cost(images: Images, size: Size) -> Iterator[dict[str, Any]]:
    """Return the seconds of the model and of ordering, a buffer each, by turns."""
    x = np.resize(images.x, (IMAGES, *images.x.shape[1:]))
    placed = jnp.asarray(x)
    calls = {
        "model": lambda: images.run(x),
        "projection": lambda: random_projection(placed),
        **{
            f"order, buffer {buffer}": lambda buffer=buffer: order_points(
                placed, 20, buffer_size=buffer
            )
            for buffer in BUFFERS
        },
    }
    compiled = {}
    for name, call in calls.items():
        before = COUNTER.seconds
        jax.block_until_ready(call())
        compiled[name] = COUNTER.seconds - before
    before = COUNTER.compilations
    order_points(placed[::-1], 20, buffer_size=BUFFERS[-1])
    again = COUNTER.compilations - before - 1  # the reversal is a program, too
    contenders = {
        name: Contender(lambda call=call: jax.block_until_ready(call()))
        for name, call in calls.items()
    }
    timings = interleaved(contenders, size.repeats)
    for name, timing in timings.items():
        yield {
            "model": images.name,
            "what": name,
            **timing.summary(),
            "least_s": min(timing.seconds),
            "share_of_model": timing.ratio(timings["model"]),
            "least_share": min(timing.seconds) / min(timings["model"].seconds),
            "compile_s": compiled[name],
            "compilations_for_other_data": again,
        }


def bought(images: Images, size: Size) -> Iterator[dict[str, Any]]:
    """Disagreement by features, buffer, layout and cell."""
    for features, buffer in [("none", 0), *((f, b) for f in images.features for b in BUFFERS)]:
        order = np.arange(len(images.x))
        if features != "none":
            rows = images.features[features]
            order = np.asarray(order_points(images.x, 20, features=rows, buffer_size=buffer))
        for layout in LAYOUTS:
            for cell in CELLS:
                result = images.disagreement(order, layout, cell, size.sets)
                yield {
                    "model": images.name,
                    "features": features,
                    "buffer": buffer,
                    "layout": layout,
                    "cell": cell,
                    "disagreement": dataclasses.asdict(result),
                }


PARTS = {"cost": cost, "paths": paths, "bought": bought}


def show(title: str, rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(_shown(value) for value in row.values()))
    console.print(table)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"{100 * value['mean']:.2f} +- {100 * value['half_width']:.2f} %"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a small version")
    parser.add_argument("--only", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--data-dir", type=Path, default=RESULTS.parents[2] / "shared" / "data")
    options = parser.parse_args()
    size = QUICK if options.quick else Size()
    console = Console(width=150, emoji=False)
    path = RESULTS / ("ordering-quick.json" if options.quick else "ordering.json")
    for name in options.only:
        images = Images(name, size, options.data_dir)
        for part in options.parts:
            start = environment(PACKAGES)
            rows = list(PARTS[part](images, size))
            show(f"{name}: {part}", rows, console)
            results = json.loads(path.read_text()) if path.exists() else {"models": {}}
            result = {"environment": start, "size": dataclasses.asdict(size), "rows": rows}
            results["models"].setdefault(name, {})[part] = result
            write_json(path, results)
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
