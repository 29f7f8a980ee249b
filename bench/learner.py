"""Time a learner from past answers: learning a group's answers, and answering queries.

    python bench/learner.py [--quick] [--repeats N]

One `update` with 32 pairs and one `predict` for 32 queries, together and by themselves, for windows
and numbers of outputs that users have, in addition to making the factor again, and `predict` in a
compiled program. All take turns; nothing may be compiled while they do. LAPACK runs on one thread,
as under `nercc`, unless OPENBLAS_NUM_THREADS says otherwise.

Writes results/learner.json (--quick: learner-quick.json).
"""

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before JAX is imported

import equinox as eqx
import jax
import numpy as np
from _report import CompileCounter, Contender, environment, interleaved, write_json
from _settings import PACKAGES

from nercc_jax.surrogates import Learner, init_learner

RESULTS = Path(__file__).parent / "results"
QUERIES, FEATURES = 32, 16
CASES = ((512, 10), (1024, 10), (1024, 1000), (2048, 10), (4096, 10))  # window, outputs
COUNTER = CompileCounter()


def both(learner: Learner, x: np.ndarray, y: np.ndarray, queries: np.ndarray) -> Any:
    learner = learner.update(x, y)
    return learner, learner.predict(queries)


@eqx.filter_jit
def predict(learner: Learner, x: np.ndarray) -> tuple[jax.Array, jax.Array]:
    return learner.predict(x)


def case(window: int, outputs: int, repeats: int) -> dict[str, Any]:
    """Return the seconds of each call, on a window that is full."""
    random = np.random.default_rng(window + outputs)
    weights = random.normal(size=(FEATURES, outputs)) / 4
    x = random.normal(size=(window, FEATURES)).astype(np.float32)
    learner = init_learner(x, np.sin(x @ weights), capacity=window)
    fresh = random.normal(size=(QUERIES, FEATURES)).astype(np.float32)
    answers, queries = np.sin(fresh @ weights), fresh + 0.1

    def ready(call: Any, *args: Any) -> Contender:
        return Contender(lambda: jax.block_until_ready(call(*args)))

    contenders = {
        "update": ready(Learner.update, learner, fresh, answers),
        "predict": ready(Learner.predict, learner, queries),
        "update and predict": ready(both, learner, fresh, answers, queries),
        "factor anew": ready(Learner.refactorized, learner),
        "predict in a program": ready(predict, learner, queries),
    }
    for contender in contenders.values():
        contender.call()
    before = COUNTER.compilations
    timings = interleaved(contenders, repeats)
    after = learner.update(fresh, answers)
    anew = after.refactorized().predict(queries)[0]
    error = np.abs(after.predict(queries)[0] - anew).max()
    return {
        "window": window,
        "outputs": outputs,
        "queries": QUERIES,
        "compiled_again": COUNTER.compilations - before,
        "error": float(error),
        **{name: timing.summary() for name, timing in timings.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small window, few repeats")
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args()
    cases = ((256, 10),) if options.quick else CASES
    rows = [case(*each, 5 if options.quick else options.repeats) for each in cases]
    for row in rows:
        result = (f"{name} {1e3 * row[name]['median_s']:.1f} ms" for name in row if " " in name)
        alone = (f"{name} {1e3 * row[name]['median_s']:.1f} ms" for name in ("update", "predict"))
        print(f"{row['window']} x {row['outputs']}: {', '.join([*alone, *result])}", flush=True)
    name = "learner-quick.json" if options.quick else "learner.json"
    result = environment(PACKAGES) | {"lapack_threads": os.environ["OPENBLAS_NUM_THREADS"]}
    write_json(RESULTS / name, {"environment": result, "rows": rows})


if __name__ == "__main__":
    main()
