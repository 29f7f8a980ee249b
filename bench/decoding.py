"""Measure whether a server's error probability keeps its limits.

With the server's own parts, but without workers: LeNet5 on MNIST; decoding is calibrated on
training images, and test images are decoded in groups under straggler sets. In each, the worker of
one query straggles, and up to three others. A query is looked at before the last two answers come,
before the last one, and with all that come, and is answered once its error probability is below
the limit. Only queries whose own worker straggles count. Some minutes.
"""

import time
from typing import Any

import numpy as np
from report import Report, environment, show
from workloads import Network, groups_of, in_batches, own_answers

from nercc_jax import NeRCC
from nercc_jax.risk import Accuracy, ErrorProbability
from nercc_jax.serving import Coder, calibrate_decoding

MODEL, OUTPUTS, ROWS = "lenet5-mnist", "logits", 8
LIMITS = (0.05, 0.02, 0.01, 0.005, 0.002)
CASES = ((4, 8, 4), (4, 8, 2), (8, 20, 8), (8, 20, 4))  # K, N, queries in a group


def assess(
    coder: Coder, estimate: ErrorProbability, model: Network, groups: np.ndarray, sets: int
) -> dict[str, Any]:
    """Return how many stragglers' queries are wrong if all are decoded, and by limit."""
    few, workers = groups.shape[1], np.arange(coder.num_workers)
    coded = coder.encode(groups, workers)
    answers = in_batches(model, coded.reshape(-1, *groups.shape[2:]))
    answers = answers.reshape(*coded.shape[:2], -1)
    own, layout = own_answers(model, groups).argmax(-1), coder.layout(few)
    sent = np.concatenate([*coder.first[:few], layout.extras])
    random, seen, differ = np.random.default_rng(0), [], []  # (looks, samples) of each set
    for _ in range(sets):
        others = random.permutation(np.setdiff1d(sent, layout.own[random.integers(few)]))
        responded = len(others) - random.integers(min(4, len(others)))
        looks, mask = [], np.zeros(coder.num_workers, bool)
        for number in (responded - 2, responded - 1, responded):
            mask = np.isin(workers, others[: max(number, 1)])
            given = np.where(mask[:, None, None], answers, 0)
            found = coder.decode(given, mask, len(groups))
            score = coder.score(given, found, estimate)
            looks.append((score[:, :few], found.predictions[:, :few].argmax(-1) != own))
        missing = [place for place in range(few) if not mask[layout.own[place]].any()]
        seen.append([score[:, missing].ravel() for score, _ in looks])
        differ.append([wrong[:, missing].ravel() for _, wrong in looks])
    score, wrong = np.concatenate(seen, axis=1), np.concatenate(differ, axis=1)
    by_limit = []
    for share in LIMITS:
        sure = score <= estimate.limit(share)
        first, given = sure.argmax(axis=0), sure.any(axis=0)
        mistaken = given & wrong[first, np.arange(len(first))]
        summary = {"wrong": float(mistaken.mean()), "again": float(1 - given.mean())}
        by_limit.append({"asked": share} | summary)
    return {"all_wrong": float(wrong[-1].mean()), "limits": by_limit}


def timed(call: Any, repeats: int = 64) -> float:
    """Return the median, in seconds."""
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds[1:]))


def run(report: Report) -> None:
    """Measure each size of code and group."""
    calibration, test, sets, cases = 1024, 2048, 100, CASES
    if report.quick:
        calibration, test, sets, cases = 512, 256, 5, CASES[:2]
    network = Network.load(MODEL, OUTPUTS)
    train, _ = network.images("train", report.data_dir, calibration)
    x, _ = network.images("test", report.data_dir, test, 1)
    known, rows, seconds = {}, [], {}
    for num_data, num_workers, few in cases:
        if (num_data, num_workers) not in known:
            coder = Coder(NeRCC(num_data, num_workers, points="interleaved", lambda_dec=0.0))
            accuracy = Accuracy(max_disagreement=max(LIMITS))
            decoding = calibrate_decoding(coder, network, train, accuracy)
            known[num_data, num_workers] = coder, decoding
        coder, decoding = known[num_data, num_workers]
        groups, estimate = groups_of(x, few), decoding.calibrated[few]
        assert isinstance(estimate, ErrorProbability)  # logits, so labels are judged
        values = np.ones((num_workers, ROWS, 10), np.float32)
        mask = np.ones(num_workers, bool)
        seconds["decode"] = timed(lambda: coder.decode(values, mask, ROWS))  # noqa: B023
        decoded = coder.decode(values, mask, ROWS)
        seconds["score"] = timed(lambda: coder.score(values, decoded, estimate))  # noqa: B023
        about = {"num_data": num_data, "num_workers": num_workers, "queries": few}
        rows.append(about | assess(coder, estimate, network, groups, sets))
        report.log(about)
        show(rows[-1]["limits"])
    content = {"model": MODEL, "calibration": calibration, "test": test, "sets": sets}
    content |= {"batch": ROWS, "seconds": seconds, "rows": rows}
    report.write(content | {"environment": environment("nercc-jax")})
