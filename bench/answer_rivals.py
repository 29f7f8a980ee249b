"""Compare the checks of wrong answers with duplication, a checksum, and robust decoding.

    python bench/answer_rivals.py [--data-dir FOLDER] [--seeds N] [--quick]

LeNet5 on MNIST, with the faults of `wrong_answers.py`; whose rows show what the checks find.

- *Duplication*: two workers compute each query, and the fault strikes one.
- *Checksum*: the last linear layer has a further output, the sum of all others by the sum of its
  weights (Huang and Abraham 1984, "Algorithm-Based Fault Tolerance for Matrix Operations"). It
  travels with the answer. An answer is wrong if they differ by more than ten times as much as
  rounding made them differ in past answers. Old weights come with a checksum of their own; bits
  flip in the weights after it was made.
- *Robust decoding*: 10 queries are coded for 12 or 20 workers, on repeated points, which find most;
  one to three workers of each group answer with the fault. `robust_decode` knows how many. What
  counts is a changed label of the coded query. Each group is judged for itself: together, groups of
  the same workers find more (docs/adversaries.md).

Adds "rivals" to results/wrong_answers.json (--quick: wrong_answers-quick.json).
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _report import environment, write_json
from _settings import PACKAGES
from adversaries import robust
from wrong_answers import IMAGES, JUDGED, PAST, RESULTS, Work, counted, faulty, images, stale

from nercc_jax import NeRCC

Flags = Callable[[np.ndarray], np.ndarray]

DATA, CODED, WRONG = 10, (12, 20), (1, 2, 3)
SAME = 1e-3  # as far as answers of two workers may differ (`AnswerChecks`)
ROUNDING = 10.0  # times the largest difference of past checksums


def encoded(model: Any) -> Any:
    """Return LeNet5 with a further output, the sum of the others by the sum of its weights."""

    def last(model: Any) -> list[Any]:
        return [model.state["fc3"][name].get_value() for name in ("kernel", "bias")]

    summed = [jnp.append(w, w.sum(axis=-1, keepdims=True), axis=-1) for w in last(model)]
    return eqx.tree_at(last, model, summed)


def checksum_error(answers: np.ndarray) -> np.ndarray:
    """Return by how much each answer's last output is not the sum of the others."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.abs(answers[:, :-1].sum(axis=1, dtype=np.float64) - answers[:, -1])


def duplication(work: Work, judged: np.ndarray, seed: int) -> dict[str, Any]:
    right = work.answers(judged)
    scale = np.abs(right).max(axis=1)

    def differ(answers: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", over="ignore"):
            largest = np.maximum(np.abs(answers).max(axis=1), scale)
            return ~(np.abs(answers - right).max(axis=1) <= SAME * largest)

    wrong = faulty(work, right, judged, seed)
    return found(work, "duplication", 2.0, right, wrong, differ)


def checksum(work: Work, past: np.ndarray, judged: np.ndarray, seed: int) -> dict[str, Any]:
    summing = dataclasses.replace(work, model=encoded(work.model))
    right = summing.answers(judged)
    limit = ROUNDING * checksum_error(summing.answers(past)).max()
    wrong = faulty(summing, right, judged, seed) | stale(work, judged, seed, encoded)

    def differ(answers: np.ndarray) -> np.ndarray:
        return ~(checksum_error(answers) <= limit)

    return found(work, "checksum of the last layer", 1.0, right, wrong, differ, outputs=10)


def decoding(work: Work, judged: np.ndarray, workers: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield what `robust_decode` suspects of one to three wrong answers in each group."""
    code, groups = NeRCC(DATA, workers, points="repeated"), len(judged) // DATA
    parts = work.x[judged].reshape(groups, DATA, *work.x.shape[1:])
    coded = np.asarray(jax.vmap(code.encode)(jnp.asarray(parts)))
    # By worker: what it was asked before is of the group before.
    sent = dataclasses.replace(work, x=np.concatenate(np.moveaxis(coded, 1, 0)))
    everything = np.arange(len(sent.x))
    right = sent.answers(everything)
    wrong = faulty(sent, right, everything, seed)
    random = np.random.default_rng([seed, workers])
    liars = np.argsort(random.random((workers, groups)), axis=0)
    decode = robust(code, "reject").decode
    for number in WRONG:
        struck = (liars < number).ravel()

        def suspected(answers: np.ndarray, struck=struck, number=number) -> np.ndarray:
            given = np.where(struck[:, None], answers, right)
            finite = np.isfinite(given).all(axis=1, keepdims=True)
            by_group = np.moveaxis(np.where(finite, given, 0).reshape(workers, groups, -1), 0, 1)
            return np.asarray(decode(by_group, number)[1]).T.ravel()

        name = f"robust_decode, {number} wrong of {workers}"
        yield found(work, name, workers / DATA, right, wrong, suspected, only=struck)


def found(
    work: Work,
    check: str,
    calls: float,
    right: np.ndarray,
    wrong: dict[str, np.ndarray],
    flags: Flags,
    *,
    outputs: int | None = None,
    only: np.ndarray | slice = slice(None),
) -> dict[str, Any]:
    """Return a row of the results: what a rival finds of each fault, and of right answers."""
    row = {"work": work.name, "check": check, "calls": calls}
    row["false_alarms"] = float(np.mean(flags(right)))
    row["found"] = {
        kind: counted(work, each[only, :outputs], right[only, :outputs], flags(each)[only])
        for kind, each in wrong.items()
    }
    return row


def rivals(work: Work, seed: int) -> Iterator[dict[str, Any]]:
    order = np.random.default_rng([seed, 0]).permutation(len(work.x))[: PAST + JUDGED]
    past, judged = order[:PAST], order[PAST:]
    yield duplication(work, judged, seed)
    yield checksum(work, past, judged, seed)
    for workers in CODED:
        yield from decoding(work, judged, workers, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed")
    options = parser.parse_args()
    path = RESULTS / ("wrong_answers-quick.json" if options.quick else "wrong_answers.json")
    kept = json.loads(path.read_text()) if path.exists() else {}
    rows = []
    for seed in range(1 if options.quick else options.seeds):
        for row in rivals(images(IMAGES[0], options.data_dir), seed):
            shares = {
                kind: round(each["found"] / max(each["matter"], 1), 3)
                for kind, each in row["found"].items()
            }
            print(row["check"], row["calls"], row["false_alarms"], shares, flush=True)
            rows.append({"seed": seed} | row)
            about = {"rivals": rows, "rivals_environment": environment(PACKAGES)}
            write_json(path, kept | about)


if __name__ == "__main__":
    main()
