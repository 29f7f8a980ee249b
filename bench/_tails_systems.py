"""Systems that tails.py compares: schedulers, each with its code, policy and surrogate."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _balancers import NEVER, NO_COPIES, AbstractRule, Balancer, LeastLoaded, Prequal

from nercc_jax import (
    AbstractCode,
    Berrut,
    ExactStragglers,
    NeRCC,
    Parity,
    Replication,
    Uncoded,
    load_code,
    save_code,
    tune,
)
from nercc_jax.pools import AbstractPool
from nercc_jax.serving import BatchingPolicy, Predictor
from nercc_jax.stragglers.simulate import Hedge
from nercc_models import load_data, load_model, load_parity_model, load_student, student_card

CODES = Path(__file__).parent / "results" / "codes"
THRESHOLD = 1.35
DEADLINE = 60.0


@dataclasses.dataclass(frozen=True)
class Work:
    """A served model: queries, its own answers, and the allowance for other answers.

    `wanted` is the share of stragglers' labels that may be another, by law where it is another than
    usual; or None with a `tolerance`: then answers may be off by so much. `student` costs
    `student_calls` of a call. `training()`: others of `model`, to tune codes on.
    """

    name: str
    queries: np.ndarray
    answers: np.ndarray
    wanted: float | None
    tolerance: float | None = None
    student: Any = None
    student_calls: float = 0.0
    model: str | None = None
    training: Callable[[], np.ndarray] = lambda: np.zeros(0)


@dataclasses.dataclass(frozen=True)
class System:
    """A way to serve: `models` are the pool's for the code's `worker_models`."""

    name: str
    code: AbstractCode
    policy: BatchingPolicy
    predictor: Callable[[], Predictor] | None = None
    models: tuple[int, ...] = (0,)
    balancer: Callable[[AbstractPool], Balancer] | None = None  # instead of code and policy


def works(data_dir: Path) -> dict[str, Callable[[], Work]]:
    """Return makers of works by name; each is loaded when it is wanted."""
    return {
        ANY: _any_model,
        "lenet5": lambda: _classifier("lenet5-mnist", data_dir, 0.1, student=False),
        "repvgg": lambda: _classifier("repvgg-cifar10", data_dir, 0.1),
        "vit": lambda: _classifier("vit-cifar10", data_dir, 0.1),
        "lotka-volterra": lambda: _function(data_dir),
    }


def _any_model() -> Work:
    """Return numbers that stand for any model: of exact answers, no tail depends on it."""
    queries = np.arange(10_000, dtype=np.float32)[:, None]
    answers = np.random.default_rng(0).normal(size=(len(queries), 2)).astype(np.float32)
    return Work(ANY, queries, answers, None, tolerance=1e-6)


def _classifier(name: str, data_dir: Path, wanted: float, student: bool = True) -> Work:
    network = load_model(name)
    data = network.data
    x = np.asarray(network.preprocess(load_data(data, "test", data_dir=data_dir).images))
    y = _in_batches(network, x)
    cheap = load_student(name) if student else None
    card = student_card(name)
    share = card["multiplications"] / card["base_multiplications"]

    def training() -> np.ndarray:
        images = load_data(data, "train", data_dir=data_dir).images
        chosen = np.random.default_rng(0).permutation(len(images))[:1000]
        return np.asarray(network.preprocess(images[chosen]))

    queries = x.astype(np.float32)
    return Work(name, queries, y, wanted, None, cheap, share * student, name, training)


def _function(data_dir: Path) -> Work:
    import _functions_cases as cases

    case = cases.load("Lotka-Volterra", data_dir)
    x = case.inputs(True, 0, 5000)
    y = _in_batches(case.function, x)
    return Work("Lotka-Volterra", x, y, None, tolerance=0.05 * float(y.std()))


def _in_batches(function: Any, x: np.ndarray, size: int = 100) -> np.ndarray:
    run = eqx.filter_jit(function)
    parts = [np.asarray(run(jnp.asarray(x[i : i + size]))) for i in range(0, len(x), size)]
    return np.concatenate(parts).astype(np.float32)


ANY = "any model"
# Rules that say which worker's queue a query joins.
RULES: dict[str, Callable[..., AbstractRule]] = {
    "least loaded": lambda: LeastLoaded(1000),
    "power of two": lambda: LeastLoaded(2),
    "Prequal": Prequal,
}
# What is tried: triggers in medians, probes a query, and quantiles above which a worker is hot.
TRIGGERS = (1.05, 1.1, 1.2, 1.35, 1.5, 2.0, 3.0, 5.0)
PROBES, Q_RIF = (1, 2, 3), (0.5, 0.75, 0.84, 0.9, 0.99)
# Calls a query that a policy which picks by the measured tail may spend.
MAX_CALLS = (1.1, 1.35)
# Queries of ParM's groups, for which parity models were trained; (N, K) of interleaved codes.
PARITIES = (2, 4)
INTERLEAVED = ((6, 4), (8, 4))
# Half a per cent of all labels where 5 % straggle, one where 15 % do.
WANTED = {"15 %": 0.065}


def systems(work: Work, law: str) -> tuple[System, ...]:
    """Return all systems that are compared on this work under a law, the simplest first."""
    wanted = None if work.wanted is None else WANTED.get(law, work.wanted)
    base = {"deadline_s": DEADLINE, "ordering": False, "max_batch_size": 8}
    base["outputs"] = "logits" if work.tolerance is None else None  # of a function, by its limit
    hedged = BatchingPolicy(straggler_threshold=THRESHOLD, **base)
    three = dataclasses.replace(hedged, copies=3)
    known = dataclasses.replace(
        three, max_disagreement=wanted, tolerance=work.tolerance, redundancy="uncertain"
    )
    known_once = dataclasses.replace(known, redundancy="always")
    found = [
        System("no copies", Uncoded(1), dataclasses.replace(hedged, copies=1)),
        System(
            "hedged, p95",
            Uncoded(1),
            BatchingPolicy(quantile=0.95, straggler_threshold=1.0, **base),
        ),
        System(
            "hedged, p90", Uncoded(1), BatchingPolicy(quantile=0.9, straggler_threshold=1.0, **base)
        ),
        System(f"hedged, {THRESHOLD} x median", Uncoded(1), three),
        System("two copies", Replication(1, 2), three),
    ]
    if work.model == "lenet5-mnist":
        # A group is filled up within two service times.
        patient = dataclasses.replace(hedged, batch_wait_timeout_s=2.0 * 0.055)
        for place, k in enumerate(PARITIES, start=1):
            found.append(System(f"ParM, k = {k}", Parity(k, k + 1), patient, models=(0, place)))
        found += [
            System(f"NeRCC ({n}, {k})", tuned_code(work, n, k), patient) for n, k in INTERLEAVED
        ]
        ten = dataclasses.replace(patient, wait_for=10)
        found.append(System("BACC (12, 8)", Berrut(8, 12), ten))

    def knows() -> Predictor:
        return Predictor(work.student)

    if wanted is not None:
        # ParM's cheap backup: however likely it is wrong.
        any_label = dataclasses.replace(known_once, max_disagreement=0.999)
        found.append(System("surrogate alone", Uncoded(1), any_label, knows))
    ours = [
        System("known, else hedged", Uncoded(1), known_once, knows),
        System("known, uncertain twice", Replication(1, 2), known, knows),
    ]
    for most in MAX_CALLS:
        picked = dataclasses.replace(known_once, max_calls=most)
        ours.append(System(f"picked, {most:g} calls", Replication(1, 2), picked, knows))
    return (*found, *ours)


def rivals(picks: Mapping[str, Sequence[Any]]) -> tuple[System, ...]:
    """Return what answers exactly, with the parameters that were picked for a law (`tune_rivals`).

    The least loaded of all workers is also the power of as many choices as serve best.
    """
    hedging = BatchingPolicy(
        deadline_s=DEADLINE, ordering=False, max_batch_size=8, copies=3, straggler_threshold=1.2
    )
    at_once = dataclasses.replace(hedging, hedge_copies=2)
    found = [System("two at once, 1.2 x median", Uncoded(1), at_once)]
    for most in MAX_CALLS:
        picked = dataclasses.replace(hedging, straggler_threshold=THRESHOLD, max_calls=most)
        found.append(System(f"hedging picked, {most:g} calls", Uncoded(1), picked))
    for name in RULES:
        if name != "least loaded":  # about the same as "no copies"
            found.append(balanced(name, picks, NO_COPIES))
        for most in MAX_CALLS:
            hedged = hedged_name(name, most)
            found.append(balanced(name, picks, Hedge(*picks[hedged]), hedged))
    return tuple(found)


def hedged_name(rule: str, most: float) -> str:
    """Return the name of a rule that is hedged by a budget."""
    return f"{rule}, hedged, {most:g} calls"


def balanced(rule: str, picks: Mapping[str, Sequence[Any]], hedge: Hedge, name: str = "") -> System:
    """Return a rule of `RULES` with these parameters, and copies."""

    def balancer(pool: AbstractPool) -> Balancer:
        return Balancer(pool, RULES[rule](*picks.get(rule, ())), hedge)

    return System(name or rule, Uncoded(1), BatchingPolicy(), balancer=balancer)


def tune_rivals(
    measure: Callable[[System], Mapping[str, float]], prequal: Sequence[Any] | None
) -> dict[str, Sequence[Any]]:
    """Pick the parameters of rivals, which have the least p99 and p99.9 in sum.

    Args:
        measure: Returns what a system makes of other traffic than it is judged by.
        prequal: Probes and Q_RIF, if they are picked already.
    """

    def tail(cell: Mapping[str, float]) -> float:
        return cell["p99_ms"] + cell["p999_ms"]

    def of_prequal(parameters: Sequence[Any]) -> float:
        return tail(measure(balanced("Prequal", {"Prequal": parameters}, NO_COPIES)))

    picks: dict[str, Sequence[Any]] = {
        "Prequal": prequal or min(itertools.product(PROBES, Q_RIF), key=of_prequal)
    }
    for rule in RULES:
        found: dict[tuple[float, int], Mapping[str, float]] = {}
        for at_once in (1, 2, 3):
            for threshold in reversed(TRIGGERS):
                hedge = Hedge(threshold, at_once)
                cell = found[threshold, at_once] = measure(balanced(rule, picks, hedge))
                if cell["calls"] > max(MAX_CALLS):
                    break  # an earlier trigger costs more
        for most in MAX_CALLS:
            allowed = [key for key, cell in found.items() if cell["calls"] <= most]
            picks[hedged_name(rule, most)] = min(
                allowed, key=lambda key: tail(found[key]), default=(NEVER, 1)
            )
    return picks


def parity_models(work: Work) -> list[Any]:
    """Return ParM's parity models, compiled when they are called."""
    return [eqx.filter_jit(load_parity_model(str(work.model), k, "logits")) for k in PARITIES]


def tuned_code(work: Work, num_workers: int, num_data: int) -> NeRCC:
    """Return an interleaved code tuned for up to four stragglers, or its file.

    Queries go out as they came: tuning walks on log lambda_enc, which is 0 in the end.
    """
    path = CODES / f"{work.model}-{num_workers}-{num_data}-interleaved.json"
    if path.exists():
        code = load_code(path)
        assert isinstance(code, NeRCC)
        return code
    start = NeRCC(num_data, num_workers, points="interleaved", lambda_dec=0.0)
    # Without stragglers it is exact already.
    most = min(4, num_workers - num_data)
    stragglers = {str(s): ExactStragglers(s) for s in range(1, most + 1)}
    model, x = load_model(str(work.model)), jnp.asarray(work.training())
    code = tune(model, start, x, stragglers, key=jax.random.key(0), points=True).code
    code = code.replace(lambda_enc=0.0)
    about = {"model": work.model, "outputs": "logits", "stragglers": list(stragglers)}
    save_code(path, code, about)
    return code
