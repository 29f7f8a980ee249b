"""Compare fillings for places of a group without a query, offline, for the server's choice.

    python bench/short_groups.py            # a minute, on the digits that scikit-learn brings

Ways to code fewer queries than a code's K on its N workers, by what decoding makes of the queries
there are:

- **smaller code**: an encoder through some of the alphas, spread out, the same decoder; **as
  served**, where as much redundancy is sent for each query as in a full group, and no more;
- **repeats**: each query in several neighbouring places;
- **earlier**: earlier queries, whose answers are known, in the other places. For interleaved codes
  only, of which the server has such answers; they need no worker.

For interleaved codes only those queries are compared whose own worker straggles: others are exact.
Writes `results/short_groups.json`.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import numpy as np
from _report import environment, write_json

from nercc_jax import NeRCC
from nercc_jax.codes._points import Layout
from nercc_jax.serving.core._coder import Coder, few_encoders
from nercc_models import load_data, load_model

MODEL = "lenet5-digits"
# K, N, layout, stragglers: the published layout, and the server's.
SETTINGS: tuple[tuple[int, int, Layout, int], ...] = (
    (8, 12, "chebyshev", 2),
    (8, 20, "chebyshev", 5),
    (4, 8, "interleaved", 1),
    (4, 8, "interleaved", 2),
    (8, 12, "interleaved", 2),
)
PACKAGES = ("jax", "jaxlib", "numpy", "nercc-jax")
RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Way:
    """An encoder for some queries, the alphas they are decoded at, and who is sent something.

    `own[i]` is the worker that has query i itself; -1 where none has. `known` are answers that no
    worker is needed for.
    """

    matrix: np.ndarray
    places: np.ndarray
    own: np.ndarray
    sent: np.ndarray
    known: np.ndarray


def ways(code: NeRCC, few: int) -> dict[str, Way]:
    coder = Coder(code)
    order = coder._order
    everyone, nobody = np.arange(code.num_workers), np.arange(0)
    full = np.asarray(code.encoder_matrix())
    matrix, nothing = few_encoders(code, order)[few - 1], np.full(few, -1)
    query = np.arange(code.num_data) * few // code.num_data
    repeats, at = full @ np.eye(few)[query], np.searchsorted(query, np.arange(few))
    if not coder.systematic:
        return {
            "smaller code": Way(matrix, order[:few], nothing, everyone, nobody),
            "repeats": Way(repeats, at, nothing, everyone, nobody),
        }
    own = np.array([coder.first[place][0] for place in range(few)])
    worker = np.array([np.flatnonzero(full[:, place] > 0.999)[0] for place in range(code.num_data)])
    served = np.concatenate([own, coder.layout(few).extras])
    return {
        "smaller code": Way(matrix, order[:few], own, everyone, nobody),
        "smaller code, as served": Way(matrix, order[:few], own, served, nobody),
        "repeats": Way(repeats, at, worker[at], everyone, nobody),
        "earlier": Way(full, np.arange(few), worker[:few], everyone, worker[few:]),
    }


def measure(
    model, images: np.ndarray, code: NeRCC, stragglers: int, few: int, sets: int
) -> Iterator[tuple[str, float, float]]:
    """Return each way's disagreement and mean squared error, one figure for each set."""
    decoder = eqx.filter_jit(lambda code, mask: code.decoder_matrix(mask))
    groups = images[: len(images) // code.num_data * code.num_data]
    groups = groups.reshape(-1, code.num_data, images.shape[1])
    own = model(groups[:, :few].reshape(-1, images.shape[1])).reshape(len(groups), few, -1)
    for name, way in ways(code, few).items():
        random = np.random.default_rng(few)
        x = groups[:, : way.matrix.shape[1]]
        y = model(np.einsum("nk,gkd->gnd", way.matrix, x).reshape(-1, images.shape[1]))
        y = y.reshape(len(groups), code.num_workers, -1)
        for _ in range(sets):
            mask = np.isin(np.arange(code.num_workers), way.sent)
            read = np.arange(few)
            late = np.setdiff1d(way.sent, way.known)
            if way.own[0] >= 0:  # a query's own worker straggles, and others of those sent
                read = random.integers(few, size=1)
                mask[way.own[read]] = False
                late = np.setdiff1d(late, way.own[read])
            number = stragglers - (way.own[0] >= 0)
            mask[random.choice(late, min(number, len(late)), replace=False)] = False
            if not mask.any():
                continue
            matrix = np.asarray(decoder(code, mask))[way.places[read]]
            u = np.einsum("kn,gnm->gkm", matrix, y)
            f = own[:, read]
            yield name, np.mean(u.argmax(-1) != f.argmax(-1)), np.mean((u - f) ** 2)


def rows(sets: int) -> Iterator[dict[str, Any]]:
    network = load_model(MODEL)
    images = np.asarray(network.preprocess(load_data(network.data, "test").images))
    shape = images.shape[1:]
    images = images[np.random.default_rng(0).permutation(len(images))].reshape(len(images), -1)
    compiled = eqx.filter_jit(network)
    for num_data, num_workers, layout, stragglers in SETTINGS:
        systematic = layout == "interleaved"
        code = NeRCC(num_data, num_workers, points=layout, lambda_dec=0.0 if systematic else None)
        for few in range(1, num_data):
            found: dict[str, list[list[float]]] = {}
            model = lambda x: np.asarray(compiled(x.reshape(-1, *shape).astype(np.float32)))  # noqa: E731
            for name, *scores in measure(model, images, code, stragglers, few, sets):
                found.setdefault(name, []).append(scores)
            for name, scores in found.items():
                disagreement, mse = np.transpose(scores)
                yield {
                    "num_data": num_data,
                    "num_workers": num_workers,
                    "points": layout,
                    "stragglers": stragglers,
                    "queries": few,
                    "way": name,
                    "disagreement": disagreement.mean(),
                    "disagreement_ci95": 1.96 * disagreement.std(ddof=1) / sets**0.5,
                    "mse": mse.mean(),
                }


def main() -> None:
    parser = argparse.ArgumentParser(description="What to put into the places of short groups.")
    parser.add_argument("--sets", type=int, default=20, help="straggler sets")
    arguments = parser.parse_args()
    results = []
    for row in rows(arguments.sets):
        results.append(row)
        print(
            f"K={row['num_data']} N={row['num_workers']} {row['points']:11} "
            f"S={row['stragglers']} {row['queries']} queries, {row['way']:23} "
            f"disagreement {100 * row['disagreement']:5.2f} +- "
            f"{100 * row['disagreement_ci95']:.2f} %, MSE {row['mse']:.3f}",
            flush=True,
        )
    write_json(
        RESULTS / "short_groups.json",
        {
            "environment": environment(PACKAGES),
            "model": MODEL,
            "sets": arguments.sets,
            "rows": results,
        },
    )


if __name__ == "__main__":
    main()
