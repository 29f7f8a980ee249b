"""Evidence on all rows, weighted by how likely they straggle, beside that on stragglers alone.

    python bench/propensity.py [--draws 10]

What may be given out for stragglers is decided by comparisons with other stragglers
(`StragglerRisk`), which takes some of them. A classifier of "is a row late?" on the features of the
error probability could bring in all other rows, too, each with the weight of a straggler like it
(importance weighting: Shimodaira 2000; its effective number of rows by Kish 1965). Both choose a
limit after some queries, LeNet5's on MNIST with a learner of 1,280 answers, and are judged on the
stragglers among 5,000 others. Writes results/propensity.json.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _report import environment, write_json
from _tails_systems import Work, works
from dependent import hardness
from scipy.special import betainc, expit

from nercc_jax.risk import logistic_regression
from nercc_jax.risk._error_probability import error_features
from nercc_jax.risk._straggler_risk import AccuracyTarget, StragglerRisk, StragglerRow, risk_cap
from nercc_jax.serving.adapt._online_calibration import BATCH, OnlineCalibration
from nercc_jax.stragglers import RowLatency, TraceLatency

RESULTS = Path(__file__).parent / "results" / "propensity.json"
LEARNED, JUDGED, RATE = 1280, 5000, 0.05
_MISS = 0.25  # as `StragglerRisk` has it
_NONE, _LATE = TraceLatency([0.0]), TraceLatency([0.5])
LAWS = {
    "random": RowLatency.independent(_NONE, _LATE, RATE),
    "half from the hardest 12 %": RowLatency.leaning_to(_NONE, _LATE, RATE),
    "smallest 5 % of margins": RowLatency.extreme(_NONE, _LATE, RATE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--data-dir", type=Path, default=None)
    options = parser.parse_args()
    work = works(options.data_dir)["lenet5"]()
    cells = [cell for seed in range(options.draws) for cell in measure(work, seed)]
    write_json(RESULTS, {"environment": environment(("jax", "numpy", "scipy")), "cells": cells})
    keys = ("law", "allowed", "queries", "way")
    for key in dict.fromkeys(tuple(cell[name] for name in keys) for cell in cells):
        same = [cell for cell in cells if tuple(cell[name] for name in keys) == key]
        late, given, wrong = (
            sum(cell[name] for cell in same) for name in ("late", "given", "wrong")
        )
        broken = np.mean([cell["wrong"] > cell["allowed"] * cell["given"] for cell in same])
        share = wrong / given if given else float("nan")
        print(*key, f"given {given / late:.3f} wrong {share:.4f} broken {broken:.2f}", flush=True)


def measure(work: Work, seed: int) -> list[dict[str, Any]]:
    """Return what both ways give out, and how much of that is wrong, for each law and promise."""
    order = np.random.default_rng(seed).permutation(len(work.queries))
    x, own = work.queries[order], work.answers[order]
    cells = []
    for allowed in (0.1, 0.01):
        target = AccuracyTarget(max_disagreement=allowed)
        calibration = OnlineCalibration(None, target)
        for begin in range(0, LEARNED, BATCH):
            calibration.add(*(each[begin : begin + BATCH] for each in (x, own)))
        surrogate = calibration.calibrated
        assert surrogate is not None
        rest, theirs = x[LEARNED:], own[LEARNED:]
        parts = [surrogate.predict(rest[i : i + 872]) for i in range(0, len(rest), 872)]
        values, probability, deviation = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("values", "disagreement", "error_bound")
        )
        given = jnp.asarray(values)
        deviation = jnp.asarray(deviation / surrogate.factor)
        features = np.asarray(error_features(given, deviation, given, None), float)
        wrong = values.argmax(axis=1) != theirs.argmax(axis=1)
        for law, latency in LAWS.items():
            scores = jnp.asarray(hardness(work, theirs))
            late = np.asarray(latency.straggles(jax.random.key(seed), scores))
            judged = np.arange(len(late)) >= len(late) - JUDGED
            for queries in (400, 1000, 3000):
                past = slice(0, queries)
                known = features[past], probability[past], wrong[past], late[past]
                limits = {"stragglers": by_stragglers(target, *known[1:]),
                          "weighted": by_weights(allowed, *known)}  # fmt: skip
                for way, limit in limits.items():
                    given = judged & late & (probability <= min(limit, risk_cap(allowed)))
                    cells.append({
                        "seed": seed, "law": law, "allowed": allowed, "queries": queries,
                        "way": way, "late": int(np.sum(judged & late)),
                        "given": int(given.sum()), "wrong": int(np.sum(given & wrong)),
                    })  # fmt: skip
    return cells


def by_stragglers(
    target: AccuracyTarget, probability: np.ndarray, wrong: np.ndarray, late: np.ndarray
) -> float:
    """Return the limit by `StragglerRisk`."""
    risk = StragglerRisk(target, needs_evidence=True)
    for each, other in zip(probability[late].tolist(), wrong[late].tolist(), strict=True):
        risk.add(StragglerRow(each, 0.0, other, 0.0), given=False)
    grid = np.sort(probability)
    admitted = grid[risk.admits(grid, np.zeros(len(grid)))]
    return float(admitted[-1]) if admitted.size else -1.0


def by_weights(
    allowed: float,
    features: np.ndarray,
    probability: np.ndarray,
    wrong: np.ndarray,
    late: np.ndarray,
) -> float:
    """Return the limit by all rows, weighted by their probability of being late."""
    weights = expit(features @ logistic_regression(features, late))
    order = np.argsort(probability, kind="stable")
    weights, error = weights[order], wrong[order]
    total, squares = np.cumsum(weights), np.cumsum(weights**2)
    number = total**2 / squares
    errors = np.cumsum(weights * error) / total * number
    # The binomial distribution at numbers that are no integers.
    good = np.flatnonzero(betainc(number - errors, errors + 1, 1 - allowed) <= _MISS)
    return float(probability[order][good[-1]]) if good.size else -1.0


if __name__ == "__main__":
    main()
