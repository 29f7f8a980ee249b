"""A plan of `nercc plan` carried out before a real pool: what it promised beside what is seen.

    python bench/plan.py nercc-plan/plan.json [--batches 500]

What is seen goes beside others into results/plan.json. Needs the plan's data set as parquet files
(`models/data.py` says where), unless it comes with a package.
"""

import argparse
import dataclasses
import json
import queue
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _report import environment, read_json, write_json
from scipy.stats import binom

from nercc_jax import DevicePool
from nercc_jax.cli._plan import latency_law
from nercc_jax.cli._workload import load_worker_model
from nercc_jax.evaluation import Estimate
from nercc_jax.evaluation._answers import batched
from nercc_jax.inference import order_points
from nercc_jax.planning import Plan
from nercc_jax.planning._planner import DOUBTED, KNOWN
from nercc_jax.pools import AbstractPool, Batch, Fault, Faults
from nercc_jax.stragglers.simulate import own_workers
from nercc_jax.surrogates.surrogate import decode_with_deviation

RESULTS = Path(__file__).parent / "results" / "plan.json"
PACKAGES = ("jax", "jaxlib", "numpy", "equinox", "flax")
_WARM_UP = 5  # batches that are not counted
_DEADLINE = 60.0  # seconds after which a batch is given up


@dataclasses.dataclass(frozen=True)
class Served:
    """Outcomes of queries that came together: -1 is the label of a lost one."""

    seconds: float
    labels: np.ndarray
    sent: int


class PlanServer:
    """Serves queries as a plan recommends, from the thread that calls."""

    def __init__(self, pool: AbstractPool, plan: Plan, clock: Callable[[], float] = time.monotonic):
        self._pool, self._plan, self._row, self._clock = pool, plan, plan.recommended, clock
        code = self._row.code
        self._matrix = np.asarray(code.encoder_matrix(), np.float32)
        self._own = own_workers(code)
        self._workers = code.num_workers

        @jax.jit
        def decode(values, mask):
            decoded, deviation = decode_with_deviation(code, None, values[None], mask[None])
            error_probability = jnp.zeros_like(deviation)
            if plan.error_probability is not None:
                error_probability = plan.error_probability(decoded.predictions, deviation)
            label = jnp.where(decoded.recovered, jnp.argmax(decoded.predictions, axis=-1), -1)
            return label[0], error_probability[0]

        self._decode = decode

    def serve(self, x: np.ndarray) -> Served:
        """Send the queries x now; return when the last of them has a label."""
        return _Run(self, x).run()


class _Run:
    """One batch of queries: the coded data points first, then a place for each further copy."""

    def __init__(self, server: PlanServer, x: np.ndarray):
        self._server, self._x, self._row = server, x, server._row
        self._workers, self._k = server._workers, self._row.num_data
        self._groups = len(x) // self._k
        self._first = self._groups * self._workers  # place of the first further copy
        self._labels = np.full(len(x), -1)
        self._pending = np.ones(len(x), bool)
        self._decided = np.zeros(self._groups, bool)
        self._copies = 1
        self._sent = 0

    def run(self) -> Served:
        server, row = self._server, self._row
        inbox: queue.SimpleQueue[None] = queue.SimpleQueue()
        places = self._first + len(self._x) * max(row.copies, 2)
        start = server._clock()
        with server._pool.open(
            places, needed=places, copies=1, on_change=lambda _: inbox.put(None)
        ) as batch:
            self._send(batch, np.arange(self._first), self._coded())
            while self._pending.any():
                now = server._clock() - start
                if now > _DEADLINE:
                    break
                # One look for both: an answer between two looks would be seen by neither.
                available = np.array(batch.available)
                self._hear(batch, available)
                self._hedge(batch, now)
                for group in np.flatnonzero(~self._decided).tolist():
                    self._look(batch, available, group, now)
                if not self._pending.any():
                    break
                wait = self._next_look(now) - (server._clock() - start)
                try:
                    inbox.get(timeout=max(wait, 1e-4))
                except queue.Empty:
                    continue
            return Served(server._clock() - start, self._labels, self._sent)

    def _coded(self) -> np.ndarray:
        x = self._x.reshape(self._groups, self._k, -1)
        coded = self._server._matrix @ x
        return coded.reshape(self._first, *self._x.shape[1:])

    def _send(self, batch: Batch, places: np.ndarray, x: np.ndarray) -> None:
        self._server._pool.send(batch, places.tolist(), list(x[:, None]))
        self._sent += len(places)

    def _give(self, query: int, label: int) -> None:
        self._labels[query], self._pending[query] = label, False

    def _hear(self, batch: Batch, available: np.ndarray) -> None:
        """Record answers to uncoded queries."""
        for place in np.flatnonzero(available).tolist():
            if place >= self._first:
                query = (place - self._first) % len(self._x)
            else:
                group, worker = divmod(place, self._workers)
                own = np.flatnonzero(self._server._own[:, worker])
                if not own.size:
                    continue
                query = group * self._k + int(own[0])
            if self._pending[query]:
                answer = batch.answer(place)
                assert answer is not None
                self._give(query, int(np.argmax(answer[0])))

    def _hedge(self, batch: Batch, now: float) -> None:
        """Send further copies of what is not answered, in their time."""
        row, late = self._row, np.flatnonzero(self._pending)
        if row.hedge_after is None or self._copies >= row.copies or not late.size:
            return
        if now >= self._next_hedge(row.hedge_after):
            for _ in range(min(row.hedge_copies, row.copies - self._copies)):
                place = self._first + (self._copies - 1) * len(self._x)
                self._copies += 1
                self._send(batch, place + late, self._x[late])

    def _next_hedge(self, after: float) -> float:
        """Return when further copies go out."""
        return after * (1 + (self._copies - 1) // self._row.hedge_copies)

    def _look(self, batch: Batch, available: np.ndarray, group: int, now: float) -> None:
        """Decode a group when its rule says so, and send again what is uncertain."""
        row, queries = self._row, slice(group * self._k, (group + 1) * self._k)
        mask = available[group * self._workers : (group + 1) * self._workers]
        enough = mask.sum() >= row.wait_for and now >= row.min_wait
        if not (enough or mask.all()) or row.hedge_after is not None:
            return
        self._decided[group] = True
        pending = np.flatnonzero(self._pending[queries])
        if not pending.size:
            return
        labels, error_probability = np.full(self._k, -1), np.full(self._k, np.inf)
        if row.points is not None:
            labels, error_probability = self._decoded(batch, group, mask)
        for k in pending.tolist():
            if row.limit is None or error_probability[k] <= row.limit:
                self._give(group * self._k + k, int(labels[k]))
        again = np.flatnonzero(self._pending[queries]) + group * self._k
        if again.size:
            self._send(batch, self._first + again, self._x[again])

    def _decoded(self, batch: Batch, group: int, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first = group * self._workers
        answers = [batch.answer(first + worker) for worker in np.flatnonzero(mask).tolist()]
        given = np.concatenate([answer for answer in answers if answer is not None])
        values = np.zeros((self._workers, given.shape[1]), np.float32)
        values[mask] = given
        labels, error_probability = self._server._decode(values, mask)
        return np.asarray(labels), np.asarray(error_probability)

    def _next_look(self, now: float) -> float:
        row = self._row
        if row.hedge_after is not None:
            more = self._copies < row.copies
            return self._next_hedge(row.hedge_after) if more else now + 1.0
        waiting = not self._decided.all() and now < row.min_wait
        return row.min_wait if waiting else now + 1.0


def run_plan(path: Path, data_dir: Path | None, batches: int) -> dict[str, Any]:
    """Run a saved plan with a pool whose calls take the law's time more.

    On test images, which chose nothing in the plan, batch after batch, round and round. They are
    put in order before the clock runs.
    """
    plan = Plan.load(path)
    row, asked = plan.recommended, plan.asked
    if row.order == "surrogate" or row.system in (KNOWN, DOUBTED):
        raise ValueError("a plan that orders or answers by a surrogate cannot be carried out here")
    network = load_worker_model(plan.about["model"], plan.about["outputs"])
    images, _ = network.images("test", data_dir, 5000, 1)
    if row.order is not None:
        size = asked["buffer_size"]
        images = images[np.asarray(order_points(images, row.num_data, buffer_size=size))]
    own = np.argmax(np.asarray(batched(network, 256)(images)), axis=1)
    queries = asked["num_queries"]
    faults = Faults((Fault("delay", latency=latency_law(plan.about["latency"])),), seed=11)
    workers = 2 * queries // row.num_data * row.num_workers + queries  # spare ones: nothing queues
    served = []
    with DevicePool(network, workers, example=images[:1], faults=faults) as pool:
        server = PlanServer(pool, plan)
        for number in range(_WARM_UP + batches):
            chosen = (number * queries + np.arange(queries)) % (len(images) // queries * queries)
            outcome = server.serve(images[chosen])
            served.append((outcome, float(np.mean(outcome.labels != own[chosen]))))
    served = served[_WARM_UP:]
    seconds = np.array([outcome.seconds for outcome, _ in served])
    ranks = np.clip(binom.ppf([0.025, 0.975], len(seconds), 0.99).astype(int), 0, len(seconds) - 1)
    # The same images come again in each round: one value for each batch of them.
    rounds = min(len(images) // queries, batches)
    wrong = Estimate.over(
        [float(np.mean([w for _, w in served[i::rounds]])) for i in range(rounds)]
    )
    sent = np.mean([outcome.sent for outcome, _ in served]) / queries - 1
    return {
        "plan": plan.reason,
        "asked": asked,
        "about": plan.about,
        "batches": batches,
        "queries": queries * batches,
        "images": min(len(images), queries * batches),
        "promised": {
            "p50_ms": 1e3 * row.p50,
            "p99_ms": 1e3 * row.p99,
            "disagreement": row.disagreement.mean,
            "most_disagreement": row.most_disagreement,
            "extra_work": row.extra_work,
        },
        "seen": {
            "p50_ms": 1e3 * float(np.quantile(seconds, 0.5)),
            "p99_ms": 1e3 * float(np.quantile(seconds, 0.99)),
            "p99_interval_ms": (1e3 * np.sort(seconds)[ranks]).tolist(),
            "later_than_promised": float(np.mean(seconds > row.p99)),
            "later_by_2_percent": float(np.mean(seconds > 1.02 * row.p99)),
            "disagreement": wrong.mean,
            "half_width": wrong.half_width,
            "extra_work": float(sent),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument("--batches", type=int, default=500, help="of queries")
    parser.add_argument("--data-dir", type=Path, default=None)
    summary = parser.parse_args()
    seen = run_plan(summary.plan, summary.data_dir, summary.batches)
    print(json.dumps(seen, indent=1))
    name = ", ".join(str(seen["about"][part]) for part in ("model", "latency", "seed"))
    write_json(RESULTS, read_json(RESULTS) | {name: {"environment": environment(PACKAGES)} | seen})


if __name__ == "__main__":
    main()
