"""Systems that tails.py compares: schedulers, each with its code, policy and surrogate."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

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
from nercc_jax.serving import BatchingPolicy, Predictor
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


def works(data_dir: Path) -> dict[str, Callable[[], Work]]:
    """Return makers of works by name; each is loaded when it is wanted."""
    return {
        "lenet5": lambda: _classifier("lenet5-mnist", data_dir, 0.1, student=False),
        "repvgg": lambda: _classifier("repvgg-cifar10", data_dir, 0.1),
        "vit": lambda: _classifier("vit-cifar10", data_dir, 0.1),
        "lotka-volterra": lambda: _function(data_dir),
    }


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
    hedged = BatchingPolicy(straggler_threshold=THRESHOLD, **base)
    three = dataclasses.replace(hedged, copies=3)
    known = dataclasses.replace(
        three, max_disagreement=wanted, tolerance=work.tolerance, redundancy="uncertain"
    )
    known_once = dataclasses.replace(known, redundancy="always")
    found = [
        System("as it comes", Uncoded(1), dataclasses.replace(hedged, copies=1)),
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
    at_once = dataclasses.replace(three, straggler_threshold=1.2, hedge_copies=2)
    ours.append(System("two at once, 1.2 x median", Uncoded(1), at_once))
    for most in MAX_CALLS:
        budget = dataclasses.replace(three, max_calls=most)
        ours.append(System(f"hedging picked, {most:g} calls", Uncoded(1), budget))
        picked = dataclasses.replace(known_once, max_calls=most)
        ours.append(System(f"picked, {most:g} calls", Replication(1, 2), picked, knows))
    return (*found, *ours)


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
