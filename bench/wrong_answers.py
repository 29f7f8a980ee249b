"""Find answers that are wrong, and the workers that give them, by what a surrogate predicts.

    python bench/wrong_answers.py [--data-dir FOLDER] [--seeds N] [--quick | --runs]

A server's own parts, without its threads. A learner takes 2,000 of the model's right answers as
they come, of which it keeps 1,024, and the check is calibrated on those that came last, each before
it is learned. 3,000 others are judged: as they are, which gives the false alarms, and with faults,
none of which calibration saw. The rivals have the same right answers: an output-only check, which
does not know the query, and for networks their students. Of a classifier, faults that change the
label count; of a function, those that change an answer by a tenth of the outputs' deviation.

Then workers: each gives the judged answers in random order with one fault, and is checked by
`AnswerChecks` with clean workers beside it, after it was trusted.

`--runs` measures `run_rows(check_answers=)` instead, on the functions: of eight workers one swaps
all answers, and one some, in a run over 2,000 rows. What counts is the rows that are wrong in the
end.

Writes results/wrong_answers.json (--quick: wrong_answers-quick.json).
"""

import argparse
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _lying_models as lies
import equinox as eqx
import numpy as np
from _functions_cases import EXPENSIVE, load
from _report import environment, read_json, write_json
from _settings import PACKAGES

from nercc_jax.pools import DevicePool, Fault, Faults
from nercc_jax.risk import Accuracy
from nercc_jax.risk._answer_check import AnswerCheck, fit_answer_check
from nercc_jax.risk.votes import AnswerChecks
from nercc_jax.rows import run_rows
from nercc_jax.serving.adapt._online_calibration import (
    BATCH,
    CalibratedSurrogate,
    OnlineCalibration,
)
from nercc_jax.surrogates import Surrogate
from nercc_models import load_data, load_model, load_student

RESULTS = Path(__file__).parent / "results"
PAST, JUDGED, WORKERS, ANSWERS = 2000, 3000, 8, 300
RATES, SERVED = (0.01, 0.015, 0.02, 0.03), 0.02  # of which workers are checked at the last
IMAGES = ("lenet5-mnist", "repvgg-cifar10")
STALE, DRAWS = (0.1, 0.2, 0.3, 0.5), 5
SECONDS = 0.005  # of a row, in runs over rows
INTERMITTENT = (0.02, 0.05, 0.1, 0.2)  # shares of swapped answers of a worker


@dataclasses.dataclass(frozen=True)
class Work:
    """A model, its inputs, and whether its answers are labels."""

    name: str
    x: np.ndarray
    model: Callable[[Any], Any]
    labels: bool
    student: Callable[[Any], Any] | None = None

    def answers(
        self, rows: np.ndarray | slice, model: Callable[[Any], Any] | None = None
    ) -> np.ndarray:
        """Return the answers of the model, or of a changed one, to some inputs."""
        model, x = self.model if model is None else model, self.x[rows]
        parts = [_run(model, part) for part in np.array_split(x, len(x) // 500)]
        return np.concatenate([np.asarray(part, np.float32) for part in parts])


@eqx.filter_jit
def _run(model: Callable[[Any], Any], x: np.ndarray) -> Any:
    return model(x)


def images(name: str, data_dir: Path) -> Work:
    network = load_model(name)
    x = network.preprocess(load_data(network.data, "test", data_dir=data_dir).images)
    return Work(name, np.asarray(x, np.float32), network, True, load_student(name))


def function(name: str, data_dir: Path) -> Work:
    case = load(name, data_dir)
    return Work(name, case.inputs(True, 0, PAST + JUDGED), case.function, False)


def matters(work: Work, wrong: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return which wrong answers count."""
    if work.labels:
        return wrong.argmax(axis=1) != right.argmax(axis=1)
    return np.sqrt(np.mean((wrong - right) ** 2, axis=1)) > 0.1 * right.std()


def faulty(work: Work, right: np.ndarray, order: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Return wrong answers to the judged queries, by fault."""
    found = {
        "swapped": np.concatenate([right[:1], right[:-1]]),  # each by the one before
        "stuck": np.repeat(right[:1], len(right), axis=0),
    }
    kinds: dict[str, lies.BitField] = {"flipped bit": "any", "flipped exponent bit": "exponent"}
    for name, bits in kinds.items():
        random = np.random.default_rng([seed, 1])
        flipped = [lies.flip_bit(row, bits, random) for row in right]
        found[f"{name} of the answer"] = np.stack(flipped)
    if work.labels:
        flipped = lies.flip_activation(work.model, "exponent", (seed, 3))
        each = [flipped(work.x[place : place + 1]) for place in order.tolist()]
        found["flipped exponent bit of an activation"] = np.concatenate(each).astype(np.float32)
        found |= stale(work, order, seed)
        for draw in range(DRAWS):
            changed = lies.flip_weight(work.model, (seed, draw))
            found[f"flipped exponent bit of a weight/{draw}"] = work.answers(order, changed)
    return found


def stale(
    work: Work, order: np.ndarray, seed: int, load: Callable[[Any], Any] = lambda model: model
) -> dict[str, np.ndarray]:
    """Return the answers of stale models, after `load` was done to each."""
    return {
        f"stale weights {size:g}/{draw}": work.answers(
            order, load(lies.stale(work.model, size, (seed, draw)))
        )
        for draw in range(DRAWS)
        for size in STALE
    }


def online(work: Work, surrogate: Any, x: np.ndarray, right: np.ndarray) -> dict[float, Any]:
    """Return the checks of a server that has seen these answers, by rate."""
    tolerance = None if work.labels else float(0.1 * right.std())
    target = Accuracy(tolerance=tolerance, max_disagreement=0.05 if work.labels else None)
    calibration = OnlineCalibration(surrogate, target, check_rate=RATES[0])
    for begin in range(0, len(x) - BATCH + 1, BATCH):
        calibration.add(x[begin : begin + BATCH], right[begin : begin + BATCH])
    checks = {}
    for rate in RATES:
        calibration._check_rate = rate
        checks[rate] = _suspicious(calibration._calibrate())
    return checks


def _suspicious(calibrated: CalibratedSurrogate) -> Any:
    return lambda x, own: calibrated.expect(x).suspicious(range(len(x)), own)


def output_only(work: Work, rate: float, right: np.ndarray) -> Any:
    """Return a check that does not know the query, on as many answers as the others."""
    right = right[-len(right) // 2 :]

    def nothing(number: int) -> tuple[np.ndarray, np.ndarray]:
        mean = np.tile(right.mean(axis=0), (number, 1))
        return mean, np.full(number, right.std(), np.float32)

    check: AnswerCheck = fit_answer_check(
        *nothing(len(right)), right, rate, labels=work.labels, seed=0
    )
    return lambda x, own: check.suspicious(*nothing(len(x)), own)


def evaluate(work: Work, seed: int) -> list[dict[str, Any]]:
    """Return what each check finds of each fault at each rate."""
    order = np.random.default_rng([seed, 0]).permutation(len(work.x))[: PAST + JUDGED]
    past, judged = order[:PAST], order[PAST:]
    right, known = work.answers(judged), work.answers(past)
    wrong = faulty(work, right, judged, seed)
    checks = {
        "learner": online(work, None, work.x[past], known),
        "output only": {rate: output_only(work, rate, known) for rate in RATES},
    }
    if work.student is not None:
        checks["student"] = online(work, Surrogate(work.student), work.x[past], known)
    rows = []
    for rate in RATES:
        for name, by_rate in checks.items():
            check = by_rate[rate]
            flags = {kind: check(work.x[judged], each) for kind, each in wrong.items()}
            flags["none"] = check(work.x[judged], right)
            row = {"work": work.name, "seed": seed, "rate": rate, "check": name}
            row["false_alarms"] = float(np.mean(flags["none"]))
            row["found"] = {kind: counted(work, wrong[kind], right, flags[kind]) for kind in wrong}
            if work.labels and name != "output only" and rate == SERVED:
                row["workers"] = workers(work, right, wrong, flags, seed)
            rows.append(row)
    return rows


def counted(work: Work, wrong: np.ndarray, right: np.ndarray, flags: np.ndarray) -> dict[str, int]:
    """Count faults that matter and those found, of answers that a pool does not refuse."""
    finite = np.isfinite(wrong).all(axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        count = finite & matters(work, wrong, right)
        differ = finite & (np.abs(wrong - right).max(axis=1) > 1e-3 * np.abs(right).max(axis=1))
    return {
        "matter": int(count.sum()),
        "found": int((count & flags).sum()),
        "differ": int(differ.sum()),
        "differ_found": int((differ & flags).sum()),
        "refused": int((~finite).sum()),
    }


def workers(
    work: Work,
    right: np.ndarray,
    wrong: dict[str, np.ndarray],
    flags: dict[str, np.ndarray],
    seed: int,
) -> list[dict[str, Any]]:
    """Return after how many answers each faulty worker is fenced."""
    random, found = np.random.default_rng([seed, 2]), []
    for kind, answers in {"clean": right, **wrong}.items():
        shares = (1.0, *INTERMITTENT) if kind == "swapped" else (1.0,)
        for share in shares:
            struck = random.random(len(right)) < share
            given = np.where(struck[:, None], answers, right)
            seen = np.where(struck, flags["none" if kind == "clean" else kind], flags["none"])
            count = matters(work, given, right) & np.isfinite(given).all(axis=1)
            times = [fenced_after(right, given, seen, random) for _ in range(10)]
            found.append(
                {"kind": kind, "share": share, "wrong_labels": float(np.mean(count)),
                 "fenced_after": times}
            )  # fmt: skip
    return found


def fenced_after(
    right: np.ndarray, given: np.ndarray, seen: np.ndarray, random: np.random.Generator
) -> int | None:
    """Return how many answers a worker gives until it is fenced; None if it never is."""
    checks = AnswerChecks(WORKERS, 0.5, None, lambda what, number: None)
    for worker in range(WORKERS):
        checks._records[worker].probation = 0
        checks._monitor.add(worker, right=1000)
    places = random.permutation(len(right))[:ANSWERS]
    for number, place in enumerate(places.tolist(), 1):
        if not np.isfinite(given[place]).all():
            continue  # a pool refuses it
        (held,) = checks.screen(0, seen[place : place + 1])
        if not held:
            continue
        candidates = {0: given[place]}
        for other in (1, 2):
            candidates[other] = right[place]
            if checks.compare(right[place], candidates) is not None:
                break
        if 0 in checks.fenced:
            return number
    return None


def run(work: Work, seed: int, faults: Faults, rate: float | None) -> dict[str, Any]:
    """Run over the first rows, on threads that wait for `SECONDS` a row, and count wrong rows."""
    x = work.x[:PAST]
    right = work.answers(slice(0, PAST))
    table = {row.tobytes(): y for row, y in zip(x, right, strict=True)}
    calls: list[int] = []

    def served(rows: np.ndarray) -> np.ndarray:
        calls.append(len(rows))
        time.sleep(SECONDS * len(rows))
        return np.stack([table[row.tobytes()] for row in rows])

    def pool(function: Any, number: int, **options: Any) -> DevicePool:
        return DevicePool(function, number, faults=faults, **options)

    options: dict[str, Any] = {"tolerance": 0.0, "check_answers": rate, "seed": seed}
    found = run_rows(served, x, pool, num_workers=WORKERS, **options)
    assert found.values is not None
    wrong = matters(work, found.values.reshape(right.shape), right)
    checked = {name: found.summary.get(name) for name in ("suspicious", "corrected", "fenced")}
    about = {"work": work.name, "seed": seed, "rate": rate, "rows": len(x)}
    return about | checked | {
        "unknown": found.summary["unknown"],
        "computed_rows": sum(calls),
        "wrong_rows": int(wrong[found.status == "computed"].sum()),
        "seconds": found.summary["seconds"],
    }  # fmt: skip


def runs(work: Work, seed: int) -> Iterator[dict[str, Any]]:
    """Yield runs without faults and with wrong workers, with checks and without."""
    swap, some = Fault("swap", workers=(2,)), Fault("swap", 0.1, workers=(5,))
    for name, faults in {"none": (), "one swaps, one sometimes": (swap, some)}.items():
        for rate in (None, 0.01):
            yield {"faults": name} | run(work, seed, Faults(faults, seed=seed), rate)


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table."""
    lines = []
    for key in sorted({(row["work"], row["check"], row["rate"]) for row in rows}):
        some = [row for row in rows if (row["work"], row["check"], row["rate"]) == key]
        alarms = [100 * row["false_alarms"] for row in some]
        text = f"{key[0]:15} {key[1]:12} {key[2]:.3f}: {np.mean(alarms):.2f} % false alarms"
        text += f" ({min(alarms):.2f} to {max(alarms):.2f});"
        kinds = dict.fromkeys(kind.partition("/")[0] for kind in some[0]["found"])
        for kind in kinds:
            each = [row["found"][name] for row in some for name in row["found"]
                    if name.partition("/")[0] == kind]  # fmt: skip
            matter, found = (sum(one[what] for one in each) for what in ("matter", "found"))
            text += f" {kind} {100 * found / max(matter, 1):.1f} % of {matter};"
        lines.append(text)
        times = [
            [np.inf if time is None else time for time in worker["fenced_after"]]
            for row in some
            for worker in row.get("workers", ())
            if worker["wrong_labels"] >= 0.02
        ]
        clean = [worker["fenced_after"] for row in some for worker in row.get("workers", ())
                 if worker["kind"] == "clean"]  # fmt: skip
        if times:
            within = np.concatenate(times) <= 100
            lines.append(
                f"{'':15} {len(times)} workers with 2 % wrong labels or more: "
                f"{100 * np.mean(within):.1f} % fenced within 100 answers, median "
                f"{np.median(np.concatenate(times)):g}; clean fenced "
                f"{sum(time is not None for each in clean for time in each)} of "
                f"{sum(map(len, clean))}"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="LeNet5 alone, one seed")
    parser.add_argument("--runs", action="store_true", help="runs over rows alone")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # one for each worker that is fenced
    path = RESULTS / ("wrong_answers-quick.json" if options.quick else "wrong_answers.json")
    kept = read_json(path)
    if options.runs:
        found = kept | {"runs": []}
        for name in EXPENSIVE:
            work = function(name, options.data_dir)
            for seed in range(options.seeds):
                for each in runs(work, seed):
                    print(each, flush=True)
                    found["runs"].append(each)
                    write_json(path, found | {"runs_environment": environment(PACKAGES)})
        return
    works = [images(name, options.data_dir) for name in IMAGES[: 1 if options.quick else None]]
    if not options.quick:
        works += [function(name, options.data_dir) for name in EXPENSIVE]
    seeds = [100] if options.quick else range(options.seeds)
    rows = []
    for work in works:
        for seed in seeds:
            rows += evaluate(work, seed)
            about = {"environment": environment(PACKAGES)}
            write_json(path, kept | about | {"rows": rows})
    print("\n".join(summary(rows)), flush=True)


if __name__ == "__main__":
    main()
