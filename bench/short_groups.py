"""What to put into the places of a group that no query came for: offline, for the server's choice.

    python bench/short_groups.py            # a minute, on the digits that scikit-learn brings

Three ways to code fewer queries than a code's K on its N workers, by what decoding makes of the
queries there are:

- **smaller code**: an encoder through some of the alphas, spread evenly, the same decoder;
- **repeats**: each query in several neighbouring places;
- **earlier**: earlier queries, whose answers are known, in the other places. For interleaved codes
  only, of which the server has such answers; they need no worker.

For interleaved codes only those queries are compared whose own worker straggles: others are exact.
Writes `results/short_groups.json`.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import numpy as np
from _report import environment, write_json

from nercc_jax import NeRCC
from nercc_jax.serving._coder import few_encoder, repeated_encoder
from nercc_models import load_data, load_model

MODEL = "lenet5-digits"
# K, N, layout, stragglers: the published layout, and the server's.
SETTINGS = (
    (8, 12, "chebyshev", 2),
    (8, 20, "chebyshev", 5),
    (4, 8, "interleaved", 1),
    (4, 8, "interleaved", 2),
    (8, 12, "interleaved", 2),
)
RESULTS = Path(__file__).parent / "results"


def measure(model, images, code: NeRCC, systematic: bool, stragglers: int, few: int, sets: int):
    """Disagreement and mean squared error of each way, one figure a straggler set."""
    random = np.random.default_rng(few)
    num_data, num_workers = code.num_data, code.num_workers
    decoder = eqx.filter_jit(lambda code, mask: code.decoder_matrix(mask))
    everything = np.asarray(code.encoder_matrix())
    groups = images[: len(images) // num_data * num_data].reshape(-1, num_data, images.shape[1])
    ways = {
        "smaller code": few_encoder(code, few),
        "repeats": repeated_encoder(code, few),
    }
    if systematic:  # they come first, as they do in the server; the rest are earlier ones
        ways = {name: (matrix, places) for name, (matrix, places) in ways.items()}
        ways["earlier"] = everything, np.arange(few)
    wanted = model(groups[:, :few].reshape(-1, images.shape[1])).reshape(len(groups), few, -1)
    for name, (matrix, places) in ways.items():
        x = groups[:, : matrix.shape[1]]
        y = model(np.einsum("nk,gkd->gnd", matrix, x).reshape(-1, images.shape[1]))
        y = y.reshape(len(groups), num_workers, -1)
        for _ in range(sets):
            mask = np.ones(num_workers, bool)
            if systematic:  # a query's own worker straggles, and others that were sent something
                own = places[random.integers(few)]
                known = np.arange(few, num_data) if name == "earlier" else np.arange(0)
                others = np.setdiff1d(np.arange(num_workers), [own, *known])
                mask[[own, *random.choice(others, stragglers - 1, replace=False)]] = False
                read = np.flatnonzero(places == own)
            else:
                mask[random.choice(num_workers, stragglers, replace=False)] = False
                read = np.arange(few)
            u = np.einsum("kn,gnm->gkm", np.asarray(decoder(code, mask)), y)[:, places[read]]
            f = wanted[:, read]
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
            found: dict[str, list[tuple[float, float]]] = {}
            model = lambda x: np.asarray(compiled(x.reshape(-1, *shape).astype(np.float32)))  # noqa: E731
            for name, *scores in measure(model, images, code, systematic, stragglers, few, sets):
                found.setdefault(name, []).append(tuple(scores))
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=20, help="straggler sets")
    arguments = parser.parse_args()
    results = []
    for row in rows(arguments.sets):
        results.append(row)
        print(
            f"K={row['num_data']} N={row['num_workers']} {row['points']:11} "
            f"S={row['stragglers']} {row['queries']} queries, {row['way']:12} "
            f"disagreement {100 * row['disagreement']:5.2f} +- "
            f"{100 * row['disagreement_ci95']:.2f} %, MSE {row['mse']:.3f}",
            flush=True,
        )
    write_json(
        RESULTS / "short_groups.json",
        {"environment": environment(), "model": MODEL, "sets": arguments.sets, "rows": results},
    )


if __name__ == "__main__":
    main()
