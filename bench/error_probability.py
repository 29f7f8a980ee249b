"""Measure whether a server's error probability keeps its limits, and the worth of ordering.

    python bench/error_probability.py [--data-dir FOLDER]      # some minutes

With the server's own parts, but without workers: LeNet5 on MNIST; decoding is calibrated on
training images, and test images are decoded in groups under straggler sets. In each, the worker of
one query straggles, and up to three others. A query is looked at before the last two answers come,
before the last one, and with all that come, and is answered once its error probability is below
the limit. Only queries whose own worker straggles count.

Writes results/error_probability.json, which docs/serving.md shows.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from _report import environment, write_json

from nercc_jax import NeRCC
from nercc_jax.cli._workload import load_worker_model
from nercc_jax.evaluation._answers import batched
from nercc_jax.risk import Accuracy, ErrorProbability
from nercc_jax.serving import Coder
from nercc_jax.serving._dispatch import QueryOrdering
from nercc_jax.serving.adapt._decoding import DecodingScores, calibrate_decoding
from nercc_jax.serving.core._request import Request

MODEL, OUTPUTS = "lenet5-mnist", "logits"
CALIBRATION, TEST, SETS, ROWS = 1024, 2048, 100, 8
LIMITS = (0.05, 0.02, 0.01, 0.005, 0.002)
# K, N, queries in a group, and whether they are arranged.
CASES = (
    (4, 8, 4, False),
    (4, 8, 4, True),
    (4, 8, 2, False),
    (8, 20, 8, False),
    (8, 20, 4, False),
)
PACKAGES = ("jax", "jaxlib", "numpy", "nercc-jax")
RESULTS = Path(__file__).parent / "results"


def arranged(arranger: QueryOrdering, x: np.ndarray, few: int) -> tuple[np.ndarray, list[float]]:
    """Return queries as the groups of `ROWS` rows that a server makes, and seconds for each."""
    groups, seconds = [], []
    for part in x.reshape(-1, ROWS * few, *x.shape[1:]):
        queries = Request(part, np.zeros((len(part), 1)), 0.0, 1.0, False).queries
        begin = time.perf_counter()
        cells = arranger.assign(queries, [ROWS] * few, 0)
        seconds.append(time.perf_counter() - begin)
        groups += [[query.x for query in row] for row in zip(*cells, strict=True)]
    return np.asarray(groups), seconds


def assess(
    coder: Coder, decoding: DecodingScores, model: Any, groups: np.ndarray
) -> dict[str, Any]:
    """Return how many stragglers' queries are wrong if all are decoded, and by limit."""
    few, shape = groups.shape[1], groups.shape[2:]
    coded = coder.encode(groups, np.arange(coder.num_workers))
    answers = np.asarray(model(coded.reshape(-1, *shape))).reshape(*coded.shape[:2], -1)
    own = np.asarray(model(groups.reshape(-1, *shape))).reshape(len(groups), few, -1).argmax(-1)
    layout, estimate = coder.layout(few), decoding.of(few)
    assert isinstance(estimate, ErrorProbability)  # logits, so labels are judged
    sent = np.concatenate([*coder.first[:few], layout.extras])
    random = np.random.default_rng(0)
    probabilities, wrong = [], []  # (looks, samples) of each set
    for _ in range(SETS):
        others = random.permutation(np.setdiff1d(sent, layout.own[random.integers(few)]))
        responded = len(others) - random.integers(min(4, len(others)))
        looks = []
        for number in (responded - 2, responded - 1, responded):
            mask = np.isin(np.arange(coder.num_workers), others[: max(number, 1)])
            given = np.where(mask[:, None, None], answers, 0)
            found = coder.decode(given, mask, len(groups), estimate)
            assert found.score is not None
            wrong_now = found.predictions[:, :few].argmax(-1) != own
            looks.append((found.score[:, :few], wrong_now))
        missing = [place for place in range(few) if not mask[layout.own[place]].any()]
        probabilities.append([seen[:, missing].ravel() for seen, _ in looks])
        wrong.append([differ[:, missing].ravel() for _, differ in looks])
    seen, differ = np.concatenate(probabilities, axis=1), np.concatenate(wrong, axis=1)
    by_limit = []
    for share in LIMITS:
        sure = seen <= estimate.limit(share)
        first = sure.argmax(axis=0)
        given = sure.any(axis=0)
        mistaken = given & differ[first, np.arange(len(first))]
        summary = {"wrong": float(mistaken.mean()), "again": float(1 - given.mean())}
        by_limit.append({"asked": share} | summary)
    return {"all_wrong": float(differ[-1].mean()), "limits": by_limit}


def timed(call: Any, repeats: int = 64) -> float:
    """Return the median, in seconds."""
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="A server's error probabilities of single queries, offline."
    )
    parser.add_argument("--data-dir", type=Path, default=None)
    data_dir = parser.parse_args().data_dir
    network = load_worker_model(MODEL, OUTPUTS)
    calibration, _ = network.images("train", data_dir, CALIBRATION, 0)
    x, _ = network.images("test", data_dir, TEST, 1)
    model, known, rows, seconds = batched(network, 256), {}, [], {}
    for num_data, num_workers, few, ordering in CASES:
        if (num_data, num_workers) not in known:
            coder = Coder(NeRCC(num_data, num_workers, points="interleaved", lambda_dec=0.0))
            accuracy = Accuracy(max_disagreement=max(LIMITS))
            decoding = calibrate_decoding(coder, network, calibration, accuracy)
            known[num_data, num_workers] = coder, decoding
        coder, decoding = known[num_data, num_workers]
        groups = x.reshape(-1, few, *x.shape[1:])
        if ordering:
            arranger = QueryOrdering(coder, x.shape[1:], ROWS)
            arranger.compile()
            groups, spent = arranged(arranger, x, few)
            seconds |= {"arrange": float(np.median(spent)), "arrange_most": max(spent)}
            values = np.ones((num_workers, ROWS, 10), np.float32)
            mask, estimate = np.ones(num_workers, bool), decoding.of(few)
            seconds["decode"] = timed(lambda: coder.decode(values, mask, ROWS))  # noqa: B023
            seconds["assess"] = timed(lambda: coder.decode(values, mask, ROWS, estimate))  # noqa: B023
        about = {"num_data": num_data, "num_workers": num_workers, "queries": few}
        rows.append(about | {"arranged": ordering, **assess(coder, decoding, model, groups)})
        print(rows[-1], flush=True)
    print(seconds)
    summary = {
        "model": MODEL,
        "calibration": CALIBRATION,
        "test": TEST,
        "sets": SETS,
        "batch": ROWS,
    }
    summary |= {"seconds": seconds, "rows": rows, "environment": environment(PACKAGES)}
    write_json(RESULTS / "error_probability.json", summary)


if __name__ == "__main__":
    main()
