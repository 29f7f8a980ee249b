"""Promises of approximate answers where queries straggle because of what they are.

    python bench/dependent.py [--name after] [--seeds 3] [--only PATTERN]

Every cell is `CodedBatcher` as it is shipped, before simulated workers, with LeNet5: single
queries in a Poisson stream, each of MNIST's 5,000 test images once, or digits in turn; and with
RepVGG and its student on CIFAR-10, and Lotka-Volterra's equations. Which images
are slow depends on the model's own margin (`RowLatency`), and a copy of a slow one is slow, too.
The results go into results/dependent.json under `--name`, so that two versions can stand next to
each other. Needs MNIST as parquet files (`models/data.py` says where).
"""

import argparse
import collections
import dataclasses
import fnmatch
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _report import environment, read_json, write_json
from _tails_systems import Work, works

from nercc_jax import NeRCC, Uncoded
from nercc_jax.pools import Fault, Faults
from nercc_jax.risk import RiskMonitor
from nercc_jax.serving import BatchingPolicy, CodedBatcher, Coder, Predictor
from nercc_jax.serving.adapt._decoding import calibrate_decoding
from nercc_jax.stragglers import RowLatency, TraceLatency
from nercc_jax.testing import SimulatedPool
from nercc_models import load_data, load_model

RESULTS = Path(__file__).parent / "results" / "dependent.json"
WORKERS, SERVICE = 28, 0.05
# Workers that are slow for 3 s, three copies of each slow image, leave room for no more.
RATES = {0.5: 130.0, 3.0: 40.0}  # queries a second, by the seconds of slowness
_WORKS = {"digits": "digits", "Lotka-Volterra": "lotka-volterra", "RepVGG with student": "repvgg"}
WARM_UP = 2000  # queries after which the share that is answered approximately is judged, too
_NOTHING = TraceLatency([0.0])


def _extreme(delay: float) -> RowLatency:
    return RowLatency.extreme(_NOTHING, TraceLatency([delay]), 0.05)


# Cells: the law of the slow rows (None: each call at random), seconds, allowance, kind.
CASES: dict[str, tuple[RowLatency | None, float, float, str]] = {
    "smallest 5 % of margins, 0.5 s": (_extreme(0.5), 0.5, 0.1, "learn"),
    "smallest 5 % of margins, 3 s": (_extreme(3.0), 3.0, 0.1, "learn"),
    "half from the hardest 12 %, 0.5 s": (
        RowLatency.leaning_to(_NOTHING, TraceLatency([0.5]), 0.05), 0.5, 0.1, "learn",
    ),
    "random 5 %, 0.5 s": (None, 0.5, 0.1, "learn"),
    "Lotka-Volterra, largest 10 % of peaks, 0.5 s": (
        RowLatency.extreme(_NOTHING, TraceLatency([0.5]), 0.1), 0.5, 0.1, "function",
    ),
    "Lotka-Volterra, half from the largest 20 %, 0.5 s": (
        RowLatency.leaning_to(_NOTHING, TraceLatency([0.5]), 0.1, hardest=0.2),
        0.5, 0.1, "function",
    ),
    "Lotka-Volterra, random 10 %, 0.5 s": (None, 0.5, 0.1, "function"),
    "RepVGG with student, smallest 5 % of margins, 0.5 s": (_extreme(0.5), 0.5, 0.1, "student"),
    "RepVGG with student, half from the hardest 12 %, 0.5 s": (
        RowLatency.leaning_to(_NOTHING, TraceLatency([0.5]), 0.05), 0.5, 0.1, "student",
    ),
    "RepVGG with student, random 5 %, 0.5 s": (None, 0.5, 0.1, "student"),
    "digits, random 10 %, decoded": (None, 0.5, 0.05, "decode"),
    "digits, random 10 %, inverted in the second half": (None, 0.5, 0.05, "decode inverted"),
    # The bound's constants were chosen on the two cases above, so these judge it.
    "MNIST, random 10 %, decoded": (None, 0.5, 0.05, "decode"),
    "MNIST, random 10 %, inverted in the second half": (None, 0.5, 0.05, "decode inverted"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="after")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="*", metavar="PATTERN")
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.results
    found = read_json(path)
    if fnmatch.fnmatch("monitor", options.only):
        found["monitor"] = [monitor(share) for share in (0.1, 0.05, 0.01)]
        write_json(path, found)
        print(found["monitor"])
    loaded: dict[str, Work] = {}
    for case in CASES:
        if not fnmatch.fnmatch(case, options.only):
            continue
        first = case.split(",")[0]
        name = _WORKS.get(first, "lenet5")
        if name not in loaded:
            loaded[name] = digits() if name == "digits" else works(options.data_dir)[name]()
        work = loaded[name]
        print(case, flush=True)
        cells = [serve(work, case, seed) for seed in range(options.seeds)]
        found.setdefault(options.name, {})[case] = cells
        found["environment"] = environment(("jax", "jaxlib", "numpy"))
        write_json(path, found)
        for cell in cells:
            print(options.name, case, cell, flush=True)


def monitor(promised: float, days: int = 1000, runs: int = 200) -> dict[str, Any]:
    """Count false alarms in days of 1,000 answers, and the answers until a drift is found.

    A drift comes after 1,000 answers of which seven tenths of the promised share were wrong.
    """
    random = np.random.default_rng(0)
    days_wrong = (random.random((days, 1000)) < promised).tolist()
    alarms = [RiskMonitor(promised).add(wrong) for wrong in days_wrong]
    found: dict[str, Any] = {"promised": promised, "days": days, "false_alarms": sum(alarms)}
    for times in (1.5, 2.0, 4.0):
        delays = []
        for _ in range(runs):
            test = RiskMonitor(promised)
            test.add((random.random(1000) < 0.7 * promised).tolist())
            test.alarm, delay = False, 1
            while not test.add([bool(random.random() < times * promised)]):
                delay += 1
            delays.append(delay)
        found[f"delay_{times:g}"] = [float(np.mean(delays)), float(np.quantile(delays, 0.9))]
    return found


def digits() -> Work:
    """Return LeNet5 on scikit-learn's digits, which it is calibrated on."""
    network = load_model("lenet5-digits")

    def images(split: str) -> np.ndarray:
        found = network.preprocess(load_data(network.data, split).images)
        return np.asarray(found, np.float32)

    x = images("test")
    work = Work(
        "lenet5-digits", x, x, 0.05, model="lenet5-digits", training=lambda: images("train")
    )
    return dataclasses.replace(work, answers=own_answers(work, x))


def serve(work: Work, case: str, seed: int) -> dict[str, Any]:
    """Run one cell, and return what was given out, how much of it was wrong, and when."""
    law, delay, allowed, kind = CASES[case]
    random = np.random.default_rng(seed)
    order = np.resize(random.permutation(len(work.queries)), 5000)
    x, own = work.queries[order], work.answers[order]
    if kind == "decode inverted":
        later = len(x) // 2
        x = np.concatenate([x[:later], x.max() + x.min() - x[later:]])
        own = np.concatenate([own[:later], own_answers(work, x[later:])])
    hard = hardness(work, own)
    slow = np.zeros(len(x), bool)
    if law is not None:
        slow = np.asarray(law.straggles(jax.random.key(seed), jnp.asarray(hard)))
        late = {row.tobytes() for row in x[slow]}
        faults = [
            Fault(
                "delay",
                latency=TraceLatency([delay]),
                score=lambda batch: [row.tobytes() in late for row in np.asarray(batch)],
                least_score=1.0,
            )
        ]
    else:
        rate = 0.05 if kind in ("learn", "student") else 0.1
        faults = [Fault("delay", rate, latency=TraceLatency([delay]))]
    table = {row.tobytes(): answer for row, answer in zip(x, own, strict=True)}

    def served(batch: Any) -> Any:
        rows = np.asarray(batch, np.float32)
        known = [table.get(row.tobytes()) for row in rows]
        if all(each is not None for each in known):
            return np.stack([each for each in known if each is not None])
        return own_answers(work, rows)  # coded data points, which are no queries

    learns = kind in ("learn", "function", "student")
    code = Uncoded(1) if learns else NeRCC(4, 8, points="interleaved")
    coder = Coder(code)
    policy = BatchingPolicy(
        straggler_threshold=1.35,
        outputs="logits" if work.tolerance is None else "values",
        max_disagreement=allowed if work.tolerance is None else None,
        tolerance=work.tolerance,
        deadline_s=60.0,
        copies=3,
        batch_wait_timeout_s=0.01 if learns else 0.11,
    )
    decoding = None
    if not learns:
        model = load_model(str(work.model))
        decoding = calibrate_decoding(coder, model, work.training(), policy.accuracy)
    noise = np.random.default_rng(seed + 1)
    pool = SimulatedPool(
        served,
        WORKERS,
        seconds=lambda size: SERVICE + noise.exponential(0.0005),
        faults=Faults(faults, seed=seed),
        hang_timeout=600.0,
    )
    counts: collections.Counter[str] = collections.Counter()
    predictor = Predictor(work.student) if learns else None
    values, seconds = np.zeros_like(own), np.zeros(len(x))
    given: list[tuple[int, bool]] = []  # by time: the query, and whether it was wrong
    said: list[float] = []
    begin, ended = time.time(), [0]
    batcher = CodedBatcher(
        pool, coder, x.shape[1:], own.shape[1:], policy=policy, decoding=decoding,
        predictor=predictor, observe=lambda what, number: counts.update([what]),
    )  # fmt: skip
    with pool, batcher:
        clock: Any = pool.clock

        def hear(number: int, future: Any) -> None:
            ended[0] += 1
            reply = future.result()
            values[number], seconds[number] = reply.values[0], reply.seconds
            if not reply.exact[0]:
                if work.tolerance is None:
                    wrong = reply.values[0].argmax() != own[number].argmax()
                else:  # beyond the bar that was promised for nine of ten
                    error = np.sqrt(np.mean((reply.values[0] - own[number]) ** 2))
                    wrong = error > reply.expected_error[0]
                given.append((number, bool(wrong)))
                said.append(float(reply.expected_disagreement[0]))

        def send(number: int) -> None:
            future = batcher.submit(x[number][None])
            future.add_done_callback(lambda future: hear(number, future))

        for number, when in enumerate(np.cumsum(random.exponential(1 / RATES[delay], len(x)))):
            clock.at(when, lambda number=number: send(number))
        while ended[0] < len(x):
            clock.step()
        clock.run(clock.now() + 10 * delay)
        status = None if predictor is None else predictor.status()
    late = slow if law is not None else seconds > 2 * np.median(seconds)
    return _summary(given, said, allowed, slow, law is not None, len(x) // 2) | {
        "bias": {
            "dropping": _statistics(hard[~late], hard),
            "ours": _statistics(hardness(work, values), hard),
        },
        "latency": [float(np.quantile(seconds, share)) for share in (0.5, 0.95, 0.99)],
        "audited": counts["audit_same"] + counts["audit_other"],
        "unknown": counts["audit_unknown"],
        "drifts": counts["drift"],
        "again": counts["reexecution"],
        "errors": counts["internal_error"],
        "status": status,
        "seconds": round(time.time() - begin, 1),
    }


def hardness(work: Work, outputs: np.ndarray) -> np.ndarray:
    """Return the peaks of a function's outputs, or the negative margins of labels."""
    if work.tolerance is not None:
        return np.abs(outputs).reshape(len(outputs), -1).max(axis=1)
    top = np.sort(outputs, axis=1)
    return top[:, -2] - top[:, -1]


def _statistics(some: np.ndarray, true: np.ndarray) -> list[float]:
    """Return the bias of the mean, in standard deviations, and of the share of the largest 5 %."""
    large = np.quantile(true, 0.95)
    bias = (np.mean(some) - np.mean(true)) / np.std(true)
    return [float(bias), float(np.mean(some > large) - np.mean(true > large))]


def _summary(
    given: list[tuple[int, bool]],
    said: list[float],
    allowed: float,
    slow: np.ndarray,
    by_row: bool,
    half: int,
) -> dict[str, Any]:
    number, wrong = len(given), sum(each for _, each in given)
    beyond = np.cumsum([each - allowed for _, each in given]) if given else np.zeros(1)
    later = [each for place, each in given if place >= half]
    return {
        "queries": len(slow),
        "slow": int(slow.sum()) if by_row else None,
        "approximate": number,
        "wrong": int(wrong),
        "wrong_share": wrong / number if number else None,
        "said": float(np.nanmean(said)) if np.isfinite(said).any() else None,
        "worst_beyond": float(max(beyond.max(), 0.0)),
        "after_warm_up": sum(place >= WARM_UP for place, _ in given),
        "second_half": [len(later), int(sum(later))],
    }


def own_answers(work: Work, x: np.ndarray) -> np.ndarray:
    model = _compiled(str(work.model))
    size = -(-len(x) // 8) * 8
    rows = np.resize(x, (size, *x.shape[1:]))
    parts = [np.asarray(model(jnp.asarray(rows[i : i + 8]))) for i in range(0, size, 8)]
    return np.concatenate(parts)[: len(x)].astype(np.float32)


_MODELS: dict[str, Any] = {}


def _compiled(name: str) -> Any:
    import equinox as eqx

    return _MODELS.setdefault(name, eqx.filter_jit(load_model(name)))


if __name__ == "__main__":
    main()
