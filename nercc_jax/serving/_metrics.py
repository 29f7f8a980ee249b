"""The metrics of served models: one table of them, for Prometheus and for the status page."""

import collections
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, get_args

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ..codes import AbstractCode
from ..codes._kept import kept_matrices
from ..pools import AbstractPool
from ..pools.backend import WorkerState

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_SHORT = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1)
_SHARES = (1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_RECENT = 60.0  # seconds that the status page's latencies cover, ...
_MOST = 50_000  # ... unless there are more requests than this

OUTCOMES = (
    *("ok", "deadline", "failed", "cancelled"),
    *("invalid", "overloaded", "queue_full", "draining"),
)
ANSWERS = ("exact", "decoded", "predicted", "reexecuted")


class _Row(NamedTuple):
    """A metric: its name after `nercc_`, its help, the measures that it counts, and how.

    A metric with a `label` has a series for each of the measures, called by the label's value; one
    with `buckets` is a histogram, any other a counter.
    """

    name: str
    help: str
    measures: Mapping[str, str]  # to values of the label
    label: str | None = None
    buckets: tuple[int | float, ...] | None = None


def _one(name: str, text: str, *buckets: int | float, measure: str | None = None) -> _Row:
    return _Row(name, text, {measure or name: ""}, None, buckets or None)


_TENTHS = tuple(np.linspace(0.1, 1, 10).round(1).tolist())
_TABLE = (
    _Row(
        "requests",
        "Requests by outcome.",
        {f"request_{each}": each for each in OUTCOMES},
        "outcome",
    ),
    _Row(
        "queries",
        "Queries by how they were answered.",
        {f"query_{each}": each for each in ANSWERS},
        "answer",
    ),
    _one("high_priority_queries", "Queries of high priority.", measure="high_priority"),
    _one("request_seconds", "Seconds from arrival to answer.", *_SECONDS, measure="request_ok"),
    _one("queue_seconds", "Seconds from arrival until sent to a worker.", *_SECONDS),
    _one("compute_seconds", "Seconds from sent until answered.", *_SECONDS),
    _one("group_fill", "Share of a group's places that queries took.", *_TENTHS),
    _one("batch_size", "Queries in one worker call.", *(2**power for power in range(8))),
    _one("workers_responded", "Answers of a group when it was decoded.", *range(1, 33)),
    _one("stragglers", "Coded data points that were not waited for.", measure="straggler"),
    _one("order_seconds", "Seconds to order the queries of a batch.", *_SHORT),
    _one("encode_seconds", "Seconds to encode a group.", *_SHORT),
    _one("decode_seconds", "Seconds to decode a group.", *_SHORT),
    _one("predict_seconds", "Seconds to predict a group's queries.", *_SHORT),
    _one("learn_seconds", "Seconds of a learning step, on a thread of its own.", *_SECONDS),
    _one("internal_errors", "Failures of the server, see its log.", measure="internal_error"),
    _one("drifts", "Times that predictions were wrong more often than promised.", measure="drift"),
    _one("policy_changes", "Times that another setting was picked.", measure="policy_change"),
    _one("reexecutions", "Queries sent a second time.", measure="reexecution"),
    _one(
        "hedge_limits",
        "Time that copies of late queries took, over the time after which a call is late: where "
        "most are over 1, copies are as slow as what they copy.",
        *(0.25, 0.5, 1, 2, 5, 10, 20),
    ),
    _one("over_budget", "Uncertain answers given because the budget was spent."),
    _one(
        "expected_disagreement",
        "Probability that the label of a decoded or predicted query is not the model's own.",
        *_SHARES,
    ),
    _one(
        "expected_error",
        "Error bar of a decoded or predicted query whose outputs are values, over the tolerance.",
        *_TENTHS,
    ),
    _Row(
        "audited",
        "Decoded or predicted queries by whether the model's own answer, which came later, agrees: "
        "it has the same label, or, of values, is within the error bar.",
        {"audit_same": "same", "audit_other": "other", "audit_unknown": "unknown"},
        "label",
    ),
    _Row(
        "checked_answers",
        "Suspicious answers of the model: computed again, of which two workers agreed or none did "
        "in time (open), and wrong ones.",
        {f"check_{each}": each for each in ("again", "agreed", "open", "wrong")},
        "result",
    ),
    _one("fenced_workers", "Times that a worker was fenced.", measure="worker_fenced"),
    _one("released_workers", "Fenced workers that were released.", measure="worker_released"),
)


@dataclasses.dataclass(frozen=True)
class Spent:
    """The number of times that something happened, and its seconds in total."""

    count: int = 0
    seconds: float = 0.0


class Metrics:
    """The metrics of all models of a server, in a registry of their own."""

    def __init__(self, registry: CollectorRegistry):
        self._reports = _PoolReports()
        registry.register(self._reports)
        self._waiting = Gauge(
            "nercc_queue_queries", "Queries that wait to be sent.", ("model",), registry=registry
        )
        self._metrics: list[tuple[_Row, Any]] = []
        for row in _TABLE:
            labels = ("model",) if row.label is None else ("model", row.label)
            kind: Any = Counter if row.buckets is None else Histogram
            options = {} if row.buckets is None else {"buckets": row.buckets}
            metric = kind(f"nercc_{row.name}", row.help, labels, registry=registry, **options)
            self._metrics.append((row, metric))

    def add_model(self, model: str, pool: AbstractPool, code: AbstractCode) -> Gauge:
        """Add a model, and return the gauge of its queue."""
        self._reports.served[model] = pool, code
        return self._waiting.labels(model)

    def remove_model(self, model: str) -> None:
        """Let a model's workers and queue go; what was counted stays."""
        self._reports.served.pop(model, None)
        self._waiting.labels(model).set_function(lambda: 0.0)

    def recorders(self, model: str) -> dict[str, list[Callable[[float], Any]]]:
        """Return for each measure the functions that record a number for a model."""
        found: dict[str, list[Callable[[float], Any]]] = collections.defaultdict(list)
        for row, metric in self._metrics:
            for measure, value in row.measures.items():
                series = metric.labels(*((model,) if row.label is None else (model, value)))
                if row.buckets is not None:
                    found[measure].append(series.observe)
                elif measure.startswith(("request_", "audit_")):  # the number is no count
                    found[measure].append(lambda _, series=series: series.inc())
                else:
                    found[measure].append(series.inc)
        return dict(found)


class Meter:
    """The metrics of one model, with what its status needs besides.

    `waiting` is the gauge of its queue.
    """

    def __init__(self, metrics: Metrics, model: str, pool: AbstractPool, code: AbstractCode):
        self._lock = threading.Lock()
        self._recorders = metrics.recorders(model)
        self.waiting = metrics.add_model(model, pool, code)
        self.close = functools.partial(metrics.remove_model, model)
        # For the status page, and Triton's statistics.
        self._counts: collections.Counter[str] = collections.Counter()
        self._sums: collections.defaultdict[str, float] = collections.defaultdict(float)
        self.last_answer = 0.0  # by the wall clock; 0 for none yet
        self._recent: collections.deque[tuple[float, float]] = collections.deque(maxlen=_MOST)
        self._responded = np.zeros(code.num_workers + 1, int)

    def observe(self, what: str, number: int | float) -> None:
        number = float(number)
        if np.isnan(number):  # an expected disagreement that is not known yet
            return
        with self._lock:
            self._counts[what] += 1
            self._sums[what] += number
            for record in self._recorders[what]:
                record(number)
            if what == "request_ok":
                self._recent.append((time.monotonic(), number))
                self.last_answer = time.time()
            elif what == "workers_responded":
                self._responded[min(int(number), len(self._responded) - 1)] += 1

    def spent(self) -> Mapping[str, Spent]:
        """Return the numbers and seconds of requests, and of all that takes time."""
        with self._lock:
            return {
                what: Spent(self._counts[what], seconds)
                for what, seconds in self._sums.items()
                if what.startswith("request_") or what.endswith("_seconds")
            }

    @property
    def answered(self) -> int:
        with self._lock:
            return int(sum(self._sums[f"query_{answer}"] for answer in ANSWERS))

    def status(self) -> dict[str, Any]:
        with self._lock:
            counts, sums = dict(self._counts), dict(self._sums)
            recent = list(self._recent)
            responded = self._responded.tolist()
        answers = {answer: int(sums.get(f"query_{answer}", 0)) for answer in ANSWERS}
        requests = {outcome: counts.get(f"request_{outcome}", 0) for outcome in OUTCOMES}
        expected = counts.get("expected_disagreement", 0)
        number = sum(answers.values())
        now = time.monotonic()
        seconds = np.array([value for at, value in recent if now - at <= _RECENT])
        bins, _ = np.histogram(seconds, bins=(0, *_SECONDS, np.inf))
        shares = {"p50_ms": 0.5, "p99_ms": 0.99, "p999_ms": 0.999}
        approximate = answers["decoded"] + answers["predicted"]
        return {
            "totals": {
                "requests": sum(requests.values()),
                "queries": answers,
                "errors": {name: count for name, count in requests.items() if name != "ok"},
                "groups": counts.get("group_fill", 0),
                "stragglers": int(sums.get("straggler", 0)),
                "reexecutions": int(sums.get("reexecution", 0)),
            },
            "latency": {
                "bounds_ms": [1000 * bound for bound in _SECONDS],
                "counts": bins.tolist(),
                **{
                    name: 1000 * float(np.quantile(seconds, share)) if len(seconds) else None
                    for name, share in shares.items()
                },
                "number": len(seconds),
                "seconds": _RECENT if len(recent) < _MOST else now - recent[0][0],
            },
            "responded": {"counts": responded},
            "fidelity": {
                "decoded_share": approximate / number if number else None,
                "expected_disagreement": (
                    sums["expected_disagreement"] / expected if expected else None
                ),
            },
        }


class _PoolReports(Collector):
    """Collects what all pools and codes report at the moment."""

    def __init__(self):
        self.served: dict[str, tuple[AbstractPool, AbstractCode]] = {}  # by model

    def collect(self) -> Iterator[Metric]:
        served = dict(self.served)  # models come and go
        reports = {model: pool.report() for model, (pool, _) in served.items()}
        workers = GaugeMetricFamily("nercc_workers", "Workers by state.", labels=["model", "state"])
        calls = CounterMetricFamily(
            "nercc_worker_calls", "Calls of workers by result.", labels=["model", "result"]
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
            "Decoder matrices that were cached (hit) or computed (miss).",
            labels=["model", "result"],
        )
        for model, (_, code) in served.items():
            kept = kept_matrices(code)
            if kept is not None:
                lookups.add_metric([model, "hit"], kept.lookups.hits)
                lookups.add_metric([model, "miss"], kept.lookups.misses)
        yield lookups
        for name, text, field in (
            ("worker_deaths", "Workers lost and replaced.", "deaths"),
            ("worker_hung", "Workers lost because they hung.", "hung"),
            ("worker_copies", "Second copies sent (hedges).", "copies"),
            ("worker_seconds", "Seconds of workers' time that calls took.", "seconds"),
            ("worker_wasted_seconds", "Seconds of it that were of no use.", "wasted_seconds"),
        ):
            family = CounterMetricFamily(f"nercc_{name}", text, labels=["model"])
            for model, report in reports.items():
                family.add_metric([model], getattr(report, field))
            yield family
