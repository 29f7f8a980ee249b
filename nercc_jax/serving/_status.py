"""The status of a served model: what the status page shows, from its parts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..pools import AbstractPool
from ._batcher import CodedBatcher
from ._metrics import ANSWERS, OUTCOMES, SECONDS, Meter
from .core._coder import Coder
from .protocol._servable import Servable
from .settings import ModelSettings


def status_of(
    servable: Servable,
    coder: Coder,
    settings: ModelSettings,
    batcher: CodedBatcher,
    pool: AbstractPool,
    meter: Meter,
) -> dict[str, Any]:
    """Return a model's status, as JSON has it."""
    learned, policy, report = batcher.status(), batcher.policy, pool.report()
    values = policy.outputs == "values"

    def totals(prefix: str, names: Sequence[str]) -> dict[str, int]:
        return {name: int(meter.read(f"{prefix}{name}")["total"]) for name in names}

    answers, requests = totals("query_", ANSWERS), totals("request_", OUTCOMES)
    right, wrong = totals("audit_", ("same", "other")).values()
    approximate, queries = answers["decoded"] + answers["predicted"], sum(answers.values())
    expected = meter.read("expected_disagreement")
    fidelity = {
        "decoded_share": approximate / queries if queries else None,
        "expected_disagreement": expected["sum"] / expected["count"] if expected["count"] else None,
        "audited": right + wrong,
        "audited_wrong": wrong / (right + wrong) if right + wrong else None,
        "stragglers": learned["decoding"],
    }
    if policy.tolerance is not None:
        fidelity["expected_beyond_bar"] = 1 - policy.coverage

    seconds = meter.read("request_ok")
    number, bounds = int(seconds["count"]), [1000 * bound for bound in SECONDS]
    below, edges = [0, *(int(seconds[str(bound)]) for bound in SECONDS), number], [0, *bounds]
    latency = {"bounds_ms": bounds, "counts": np.diff(below).tolist(), "number": number}
    for name, share in (("p50_ms", 0.5), ("p99_ms", 0.99), ("p999_ms", 0.999)):
        place = float(np.interp(share * number, below, [*edges, bounds[-1]]))
        latency[name] = place if number else None

    # Why nothing is coded or decoded.
    exact = "outputs are values without a tolerance: all answers are exact; set a tolerance, or "
    exact += "outputs = 'logits' if they are scores of labels"
    few = f"{pool.num_workers} workers for {coder.num_workers} coded data points of a group"
    saturated = "the pool is saturated: queries wait for a worker, none is spare for codes"
    uncalibrated = "nothing is decoded: give `inputs` to calibrate on, or max_disagreement = 1"
    promised = coder.can_decode and policy.accuracy.promises
    hints = (
        (batcher.waiting and not pool.idle, saturated),
        (servable.uncodable, f"nothing is coded: {servable.uncodable}"),
        (pool.num_workers < coder.num_workers, few),
        (coder.can_decode and values and policy.tolerance is None, exact),
        (promised and learned["decoding"] is None, uncalibrated),
    )
    code = {"num_data": coder.num_data, "num_workers": coder.num_workers}
    return {
        "name": servable.name,
        "health": dataclasses.asdict(batcher.health()),
        "hints": [hint for holds, hint in hints if holds],
        "code": {"name": type(coder.code).__name__, **code},
        "outputs": "values" if values else "scores",
        **{name: learned[name] for name in ("policy", "predictor", "checks")},
        "pool": {"kind": settings.pool, "num_workers": pool.num_workers},
        "workers": [
            {"state": worker.state, "deaths": worker.deaths, "busy_s": worker.busy_seconds}
            for worker in report.workers
        ],
        "queue": {
            "waiting": batcher.waiting,
            "max": policy.max_queue_size,
            "in_flight": batcher.in_flight,
        },
        "totals": {
            "requests": sum(requests.values()),
            "queries": answers,
            "errors": {name: count for name, count in requests.items() if name != "ok"},
            "groups": int(meter.read("group_fill")["count"]),
            "stragglers": int(meter.read("straggler")["total"]),
            "reexecutions": int(meter.read("reexecution")["total"]),
            "deaths": report.deaths,
        },
        "latency": latency,
        "fidelity": fidelity,
    }
