"""What is counted and measured of one model: for Prometheus, and for the status page."""

import collections
import dataclasses
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ..codes import AbstractCode, kept_matrices
from ..pools import AbstractPool, WorkerState
from ._policy import Measure

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_SHORT = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1)
_SHARES = (1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_RECENT = 60.0  # seconds that the status page's latencies cover, ...
_MOST = 50_000  # ... unless there are more

OUTCOMES = (
    *("ok", "deadline", "failed", "cancelled"),
    *("invalid", "overloaded", "queue_full", "draining"),
)
ANSWERS = ("exact", "decoded", "predicted", "reexecuted")


@dataclasses.dataclass(frozen=True)
class Spent:
    """How often something happened, and the seconds that it took in all."""

    count: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.count + other.count, self.seconds + other.seconds)


class Meters:
    """The metrics of all models of a server, in a registry of their own."""

    def __init__(self, registry: CollectorRegistry):
        def make(kind: Any, name: str, what: str, *labels: str, **options: Any) -> Any:
            return kind(f"nercc_{name}", what, ("model", *labels), registry=registry, **options)

        collector = _Reports()
        registry.register(collector)
        self.served = collector.served
        self.requests = make(Counter, "requests", "Requests by how they ended.", "outcome")
        self.queries = make(Counter, "queries", "Queries by how they were answered.", "answer")
        self.high = make(Counter, "high_priority_queries", "Queries that came with high priority.")
        self.latency = make(
            Histogram,
            "request_seconds",
            "From arrival to answer, of requests that got one.",
            buckets=_SECONDS,
        )
        self.queued = make(
            Histogram, "queue_seconds", "From arrival until sent to a worker.", buckets=_SECONDS
        )
        self.computed = make(
            Histogram,
            "compute_seconds",
            "From then until answered, of requests that were.",
            buckets=_SECONDS,
        )
        self.waiting = make(Gauge, "queue_queries", "Queries that wait to be sent.")
        self.fill = make(
            Histogram,
            "group_fill",
            "Share of a group's places that queries took.",
            buckets=np.linspace(0.1, 1, 10).round(1).tolist(),
        )
        self.batch = make(
            Histogram,
            "batch_size",
            "Queries in one worker call.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
        )
        self.heard = make(
            Histogram,
            "workers_heard",
            "Answers of a group when it was decoded.",
            buckets=tuple(range(1, 33)),
        )
        self.stragglers = make(Counter, "stragglers", "Coded data points given up.")
        self.order = make(
            Histogram, "order_seconds", "Arranging queries that go out together.", buckets=_SHORT
        )
        self.encode = make(Histogram, "encode_seconds", "Encoding a group.", buckets=_SHORT)
        self.decode = make(Histogram, "decode_seconds", "Decoding a group.", buckets=_SHORT)
        self.predict = make(
            Histogram, "predict_seconds", "Predicting a group's queries.", buckets=_SHORT
        )
        self.learn = make(
            Histogram,
            "learn_seconds",
            "Learning from answers, beside the queries.",
            buckets=_SECONDS,
        )
        self.internal = make(
            Counter, "internal_errors", "Failures of the server itself, told in its log."
        )
        self.drifts = make(
            Counter, "drifts", "Times that predictions were wrong more often than promised."
        )
        self.policy_changes = make(
            Counter, "policy_changes", "Times that another patience or redundancy was picked."
        )
        self.reexecutions = make(Counter, "reexecutions", "Queries sent a second time.")
        self.over_budget = make(
            Counter, "over_budget", "Doubtful queries answered as decoded: the budget was spent."
        )
        self.expected = make(
            Histogram,
            "expected_disagreement",
            "Probability that the label of a decoded or predicted query is not the model's own.",
            buckets=_SHARES,
        )
        self.audited = make(
            Counter,
            "audited",
            "Decoded or predicted queries that were answered later, too.",
            "label",
        )


class Meter:
    """One model's: `observe` is what a batcher tells."""

    def __init__(self, meters: Meters, model: str, pool: AbstractPool, code: AbstractCode):
        self._lock = threading.Lock()
        self._outcomes = {o: meters.requests.labels(model, o) for o in OUTCOMES}
        self._answers = {a: meters.queries.labels(model, a) for a in ANSWERS}
        self._audits = {label: meters.audited.labels(model, label) for label in ("same", "other")}
        self._counters = {
            "high_priority": meters.high.labels(model),
            "straggler": meters.stragglers.labels(model),
            "reexecution": meters.reexecutions.labels(model),
            "over_budget": meters.over_budget.labels(model),
            "drift": meters.drifts.labels(model),
            "policy_change": meters.policy_changes.labels(model),
            "internal_error": meters.internal.labels(model),
        }
        self._histograms = {
            "queue_seconds": meters.queued.labels(model),
            "compute_seconds": meters.computed.labels(model),
            "batch_size": meters.batch.labels(model),
            "group_fill": meters.fill.labels(model),
            "order_seconds": meters.order.labels(model),
            "encode_seconds": meters.encode.labels(model),
            "decode_seconds": meters.decode.labels(model),
            "predict_seconds": meters.predict.labels(model),
            "learn_seconds": meters.learn.labels(model),
            "workers_heard": meters.heard.labels(model),
            "expected_disagreement": meters.expected.labels(model),
        }
        self._latency = meters.latency.labels(model)
        self.waiting = meters.waiting.labels(model)
        # For the status page, and Triton's statistics.
        self._totals: collections.Counter[str] = collections.Counter()
        self._seconds: collections.defaultdict[str, float] = collections.defaultdict(float)
        self.last_answer = 0.0  # by the clock on the wall, 0: none yet
        self._recent: collections.deque[tuple[float, float]] = collections.deque(maxlen=_MOST)
        self._heard = np.zeros(code.num_workers + 1, int)
        meters.served[model] = pool, code

    def observe(self, what: Measure, number: int | float) -> None:
        """Takes a measurement, from any thread."""
        with self._lock:
            self._take(what, float(number))

    def _take(self, what: str, number: float) -> None:
        kind, _, detail = what.partition("_")
        if kind == "request" or detail == "seconds":
            self._totals[what] += 1
            self._seconds[what] += number
        if kind == "request":
            self._outcomes[detail].inc()
            if detail == "ok":
                self._latency.observe(number)
                self._recent.append((time.monotonic(), number))
                self.last_answer = time.time()
        elif kind == "query":
            self._totals[what] += int(number)
            self._answers[detail].inc(number)
        elif kind == "audit":
            self._audits[detail].inc()
        elif what in self._counters:
            self._totals[what] += int(number)
            self._counters[what].inc(number)
        else:
            if what == "workers_heard":
                self._heard[min(int(number), len(self._heard) - 1)] += 1
            elif what == "group_fill":
                self._totals["group"] += 1
            elif what == "expected_disagreement":
                if np.isnan(number):  # nothing is known yet
                    return
                self._totals["expected"] += 1
                self._totals["expected_sum"] += number  # pyright: ignore[reportArgumentType]
            self._histograms[what].observe(number)

    def spent(self) -> Mapping[str, Spent]:
        """By measure, of requests and of what takes seconds."""
        with self._lock:
            return {what: Spent(self._totals[what], s) for what, s in self._seconds.items()}

    @property
    def answered(self) -> int:
        """Queries, however they were."""
        with self._lock:
            return sum(self._totals[f"query_{answer}"] for answer in ANSWERS)

    def status(self) -> dict[str, Any]:
        """The parts of a model's status that are counted here."""
        with self._lock:
            totals = dict(self._totals)
            recent = list(self._recent)
            heard = self._heard.tolist()

        def total(name: str) -> int:
            return int(totals.get(name, 0))

        answers = {answer: total(f"query_{answer}") for answer in ANSWERS}
        expected = total("expected")
        number = sum(answers.values())
        guessed = answers["decoded"] + answers["predicted"]
        return {
            "totals": {
                "requests": sum(total(f"request_{outcome}") for outcome in OUTCOMES),
                "queries": answers,
                "errors": {o: total(f"request_{o}") for o in OUTCOMES if o != "ok"},
                "groups": total("group"),
                "stragglers": total("straggler"),
                "reexecutions": total("reexecution"),
            },
            "latency": _latencies(recent),
            "heard": {"counts": heard},
            "fidelity": {
                "decoded_share": guessed / number if number else None,
                "expected_disagreement": totals["expected_sum"] / expected if expected else None,
            },
        }


def _latencies(recent: list[tuple[float, float]]) -> dict[str, Any]:
    now = time.monotonic()
    seconds = np.array([value for at, value in recent if now - at <= _RECENT])
    counts, _ = np.histogram(seconds, bins=(0, *_SECONDS, np.inf))
    quantiles = [
        1000 * float(np.quantile(seconds, share)) if len(seconds) else None
        for share in (0.5, 0.99, 0.999)
    ]
    return {
        "bounds_ms": [1000 * bound for bound in _SECONDS],
        "counts": counts.tolist(),
        **dict(zip(("p50_ms", "p99_ms", "p999_ms"), quantiles, strict=True)),
        "number": len(seconds),
        "seconds": _RECENT if len(recent) < _MOST else now - recent[0][0],
    }


class _Reports(Collector):
    """What all pools and codes report, as it is when somebody asks."""

    def __init__(self):
        self.served: dict[str, tuple[AbstractPool, AbstractCode]] = {}  # by model

    def collect(self) -> Iterator[Metric]:
        reports = {model: pool.report() for model, (pool, _) in self.served.items()}
        workers = GaugeMetricFamily("nercc_workers", "Workers by state.", labels=["model", "state"])
        calls = CounterMetricFamily(
            "nercc_worker_calls", "Calls by what came of them.", labels=["model", "result"]
        )
        for model, report in reports.items():
            states = collections.Counter(worker.state for worker in report.workers)
            for state in get_args(WorkerState):
                workers.add_metric([model, state], states[state])
            for result, number in (
                ("answered", report.answered),
                ("late", report.late),
                ("error", report.errors),
            ):
                calls.add_metric([model, result], number)
        yield workers
        yield calls
        lookups = CounterMetricFamily(
            "nercc_decoder_lookups",
            "Decoders' matrices that were kept (hit) or had to be made (miss).",
            labels=["model", "result"],
        )
        for model, (_, code) in self.served.items():
            kept = kept_matrices(code)
            if kept is not None:
                lookups.add_metric([model, "hit"], kept.lookups.hits)
                lookups.add_metric([model, "miss"], kept.lookups.misses)
        yield lookups
        for name, what, field in (
            ("worker_deaths", "Workers lost and replaced.", "deaths"),
            ("worker_hung", "Workers that hung, of those.", "hung"),
            ("worker_copies", "Second copies sent (hedges).", "copies"),
            ("worker_seconds", "Workers' time that calls took.", "seconds"),
            ("worker_wasted_seconds", "What of it nobody used.", "wasted_seconds"),
        ):
            family = CounterMetricFamily(f"nercc_{name}", what, labels=["model"])
            for model, report in reports.items():
                family.add_metric([model], getattr(report, field))
            yield family
