"""What tails.py compares: batchers, each with its code, policy and what it knows beside."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from _latency_systems import Law
from _latency_systems import laws as usual_laws

from nercc_jax import AbstractCode, NeRCC, Parity, Replication, Uncoded, load_code
from nercc_jax.pools import Episodes, Fault
from nercc_jax.serving import BatchingPolicy, Predictor
from nercc_models import load_data, load_model, load_parity_model, load_student, student_card

CODES = Path(__file__).parent / "results" / "codes"
PATIENCE = 1.35
DEADLINE = 60.0


@dataclasses.dataclass(frozen=True)
class Work:
    """What is served: queries, the model's own answers, and what is wanted of others.

    `wanted` is the share of stragglers' labels that may be another, by law where it is another
    than usual; or None with a `tolerance`: then answers may be off by so much. `student` costs
    `student_calls` of a call.
    """

    name: str
    queries: np.ndarray
    answers: np.ndarray
    wanted: float | None
    tolerance: float | None = None
    student: Any = None
    student_calls: float = 0.0
    model: str | None = None


@dataclasses.dataclass(frozen=True)
class System:
    """A way to serve: `models` are the pool's for the code's `worker_models`."""

    name: str
    code: AbstractCode
    policy: BatchingPolicy
    predictor: Callable[[], Predictor] | None = None
    models: tuple[int, ...] = (0,)


def works(data_dir: Path) -> dict[str, Callable[[], Work]]:
    """By name; each is loaded when it is wanted."""
    return {
        "lenet5": lambda: _classifier("lenet5-mnist", data_dir, 0.1, student=False),
        "repvgg": lambda: _classifier("repvgg-cifar10", data_dir, 0.1),
        "vit": lambda: _classifier("vit-cifar10", data_dir, 0.1),
        "lotka-volterra": lambda: _function(data_dir),
    }


def _classifier(name: str, data_dir: Path, wanted: float, student: bool = True) -> Work:
    network = load_model(name)
    x = np.asarray(network.preprocess(load_data(network.data, "test", data_dir=data_dir).images))
    y = _in_batches(network, x)
    cheap = load_student(name) if student else None
    card = student_card(name)
    share = card["multiplications"] / card["base_multiplications"]
    return Work(name, x.astype(np.float32), y, wanted, None, cheap, share * student, model=name)


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


# Half a per cent of all labels where 5 % straggle, one where 15 % do.
WANTED = {"15 %": 0.065}


def systems(work: Work, law: str) -> tuple[System, ...]:
    """All that are compared on this work under a law, the simplest first."""
    wanted = None if work.wanted is None else WANTED.get(law, work.wanted)
    base = {"deadline_s": DEADLINE, "ordering": False, "max_batch_size": 8}
    hedged = BatchingPolicy(patience=PATIENCE, **base)
    three = dataclasses.replace(hedged, copies=3)
    known = dataclasses.replace(
        three, max_disagreement=wanted, tolerance=work.tolerance, redundancy="doubtful"
    )
    known_once = dataclasses.replace(known, redundancy="always")
    found = [
        System("as it comes", Uncoded(1), dataclasses.replace(hedged, copies=1)),
        System("hedged, p95", Uncoded(1), BatchingPolicy(quantile=0.95, patience=1.0, **base)),
        System("hedged, p90", Uncoded(1), BatchingPolicy(quantile=0.9, patience=1.0, **base)),
        System(f"hedged, {PATIENCE} x median", Uncoded(1), three),
        System("two copies", Replication(1, 2), three),
    ]
    if work.model == "lenet5-mnist":
        patient = dataclasses.replace(hedged, batch_wait_timeout_s=2.0 * 0.055)
        found.append(System("ParM, k = 2", Parity(2, 3), patient, models=(0, 1)))
        code = load_code(CODES / "latency-lenet5-mnist-6-4-interleaved.json")
        assert isinstance(code, NeRCC)
        found.append(System("NeRCC (6, 4)", code, patient))

    def knows() -> Predictor:
        return Predictor(work.student)

    ours = [
        System("known, else hedged", Uncoded(1), known_once, knows),
        System("known, doubtful twice", Replication(1, 2), known, knows),
    ]
    return (*found, *ours)


def parity_model(work: Work) -> Any:
    """ParM's parity model of two queries, on the host."""
    run = eqx.filter_jit(load_parity_model(str(work.model), 2, "logits"))
    return lambda x: np.asarray(run(jnp.asarray(x)))


def laws(base: float, workers: int) -> dict[str, Law]:
    """By name. A rack that dies loses what it has in hand, and comes back."""
    found = {law.name: law for law in usual_laws(base, workers)}
    rack = tuple(range(workers // 4))
    found["rack dies"] = Law(
        "rack dies",
        f"{len(rack)} of the {workers} workers hang together for 2 s every 20 s, on average, and "
        "come back a second later",
        (Fault("hang", 1.0, workers=rack, episodes=Episodes(20.0, 2.0, seed=77, origin=0.0)),),
    )
    return found
