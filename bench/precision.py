"""Measure the cost in labels of workers at another precision: bfloat16 against float32.

    python bench/precision.py [--quick] [--only MODEL] [--dtypes bfloat16 float16] [--output FOLDER]

RelAcc is the share of test images whose decoded label is the one that the uncoded model in float32
gives; relative accuracy is the share of right labels by the uncoded float32 model's. Workers run
the shipped model in `worker_dtype`, weights included; encoding and decoding are in float32. The
code is NeRCC with the defaults of its constructor, or the published form, lambda_dec = 0 and
Chebyshev points. All dtypes meet the same groups and the same straggler sets, so what the dtype
costs is measured by pairs: the mean over sets of the difference, and half its 95 % interval.
"alone" is the uncoded model in that dtype.

No times: CPUs have no bfloat16 products, and tell nothing of how fast accelerators are.

Needs MNIST and CIFAR-10 as parquet files (`models/data.py` says where). Writes
results/precision.json.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _report import environment, write_json
from _settings import PACKAGES
from jaxtyping import Array
from rich.console import Console
from rich.table import Table

from nercc_jax import ExactStragglers, NeRCC
from nercc_jax.cli._workload import WorkerModel, load_worker_model
from nercc_jax.evaluation import Estimate, record_answers
from nercc_jax.evaluation._answers import batched
from nercc_jax.inference import cast_model
from nercc_jax.stragglers import straggler_sets

HERE = Path(__file__).parent
MODELS = ("lenet5-mnist", "repvgg-cifar10", "vit-cifar10")
SIZES = ((20, 8), (100, 20))
STRAGGLERS = (0, 2)
DTYPES = ("bfloat16",)  # of float16 XLA lacks the products of ViT's attention on CPUs
SEED = 20261126


def codes(num_workers: int, num_data: int) -> dict[str, NeRCC]:
    return {
        "NeRCC untuned": NeRCC(num_data, num_workers),
        "NeRCC, lambda_dec = 0": NeRCC(num_data, num_workers, lambda_dec=0.0),
    }


def main() -> None:
    options = _parse()
    console, rows, points, sets = Console(emoji=False), [], 1000, 20
    if options.quick:
        points, sets = 160, 5
    start = time.perf_counter()
    for model in MODELS if options.only is None else (options.only,):
        network = load_worker_model(model, "logits")
        for num_workers, num_data in SIZES:
            x, labels = network.images("test", options.data_dir, points // 40 * 40, SEED)
            rows += measure(network, model, num_workers, num_data, x, labels, sets, options.dtypes)
            console.log(f"{model} ({num_workers}, {num_data})")
            jax.clear_caches()
    summary = {
        "environment": environment(PACKAGES),
        "seconds": round(time.perf_counter() - start, 1),
        "matmul_precision": jax.config.jax_default_matmul_precision,  # pyright: ignore
        "test_images": points // 40 * 40,
        "straggler_sets": sets,
        "seed": SEED,
        "rows": rows,
    }
    name = "precision-quick.json" if options.quick else "precision.json"
    write_json(options.output / name, summary)
    console.print(table(rows))


def measure(
    network: WorkerModel,
    model: str,
    num_workers: int,
    num_data: int,
    x: np.ndarray,
    labels: np.ndarray,
    sets: int,
    dtypes: Sequence[str],
) -> list[dict[str, Any]]:
    """Return rows of all codes at one (N, K): by stragglers and dtype."""
    own = np.argmax(batched(network, 256)(x), axis=-1)
    alone = {None: own, **{each: _alone(network, each, x) for each in dtypes}}
    rows = []
    decoders = codes(num_workers, num_data)  # of one encoder: workers answer once for all
    some = next(iter(decoders.values()))
    answers_in = {
        each: record_answers(network, some, x, worker_dtype=each) for each in (None, *dtypes)
    }
    for name, code in decoders.items():
        seen: dict[tuple[int, str | None], np.ndarray] = {}
        np.testing.assert_array_equal(code.encoder_matrix(), some.encoder_matrix())
        for dtype, recorded in answers_in.items():
            answers = eqx.tree_at(lambda known: known.code, recorded, code)
            for stragglers in STRAGGLERS:
                law, key = ExactStragglers(stragglers), jax.random.key(SEED + stragglers)
                masks = straggler_sets(law, key, num_workers, sets)
                found = np.asarray(_labels(answers, masks)).reshape(len(masks), -1)
                seen[stragglers, dtype] = found
        for (stragglers, dtype), found in seen.items():
            usual = seen[stragglers, None]
            rows.append(
                {
                    "model": model,
                    "num_workers": num_workers,
                    "num_data": num_data,
                    "code": name,
                    "stragglers": stragglers,
                    "worker_dtype": dtype or "float32",
                    "sets": len(found),
                    "rel_acc": _estimate(found == own),
                    "rel_acc_less_float32": _estimate(
                        (found == own).astype(float) - (usual == own)
                    ),
                    "relative_accuracy": _estimate((found == labels) / np.mean(own == labels)),
                    "labels_other_than_float32_workers": float(np.mean(found != usual)),
                    "alone_rel_acc": float(np.mean(alone[dtype] == own)),
                    "uncoded_accuracy": float(np.mean(own == labels)),
                }
            )
    return rows


@eqx.filter_jit
def _labels(answers: Any, masks: Array) -> Array:
    def of_set(mask: Array) -> Array:
        return jnp.argmax(answers.decode(mask).predictions, axis=-1)

    return jax.lax.map(of_set, masks)


def _alone(network: WorkerModel, dtype: str, x: np.ndarray) -> np.ndarray:
    return np.argmax(batched(cast_model(network, dtype), 256)(x), axis=-1)


def _estimate(values: np.ndarray) -> dict[str, float | None]:
    """Return the mean over straggler sets, and half its 95 % interval; none of a single set."""
    estimate = Estimate.over([float(each) for each in values.mean(axis=1)])
    half = estimate.half_width
    return {"mean": estimate.mean, "half_width": None if np.isnan(half) else half}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title="RelAcc in %, and what the dtype costs, in points; ± half 95 % intervals")
    for column in ("model, (N, K), stragglers", "code", "workers", "RelAcc", "cost", "alone"):
        shown.add_column(column, no_wrap=True)
    for row in rows:
        place = f"{row['model']} ({row['num_workers']}, {row['num_data']}), {row['stragglers']}"
        cost = (
            "" if row["worker_dtype"] == "float32" else _described(row["rel_acc_less_float32"], "+")
        )
        alone = f"{100 * row['alone_rel_acc']:.1f}"
        summary = _described(row["rel_acc"], "")
        shown.add_row(place, row["code"], row["worker_dtype"], summary, cost, alone)
    return shown


def _described(each: dict[str, float | None], sign: str) -> str:
    half = "" if each["half_width"] is None else f" ± {100 * each['half_width']:.2f}"
    return f"{100 * (each['mean'] or 0):{sign}.2f}{half}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="160 images, 5 straggler sets")
    parser.add_argument("--only", choices=MODELS, help="one model")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), help="of the workers")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--data-dir", type=Path, default=HERE.parent.parent / "shared" / "data")
    return parser.parse_args()


if __name__ == "__main__":
    main()
