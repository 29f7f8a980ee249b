"""The measurements of served models, in one table, for Prometheus and the server's status."""

import collections
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ..pools import AbstractPool
from ..pools.backend import WorkerState

OUTCOMES = ("ok", "deadline", "failed", "cancelled")
OUTCOMES += ("invalid", "overloaded", "queue_full", "draining")
ANSWERS = ("exact", "decoded", "predicted", "reexecuted")

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_SHORT = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1)
_SHARES = (1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_TENTHS = tuple(place / 10 for place in range(1, 11))

# A metric's name after `nercc_`, its measure, its help, and the buckets of a histogram, empty for a
# counter. A metric with a label has one measure for each value of it: the prefix and the value.
_TABLE = (
    ("requests", "request_", "Requests by outcome.", ()),
    ("queries", "query_", "Queries by how they were answered.", ()),
    ("audited", "audit_", "Approximate answers, by whether the model's own agreed later.", ()),
    ("checked_answers", "check_", "Suspicious answers, by what computing them again showed.", ()),
    ("stragglers", "straggler", "Coded data points that were not waited for.", ()),
    ("reexecutions", "reexecution", "Queries sent a second time.", ()),
    ("drifts", "drift", "Times that predictions were wrong more often than promised.", ()),
    ("fenced_workers", "worker_fenced", "Times that a worker was fenced.", ()),
    ("internal_errors", "internal_error", "Failures of the server, see its log.", ()),
    ("request_seconds", "request_ok", "Seconds from arrival to answer.", SECONDS),
    ("queue_seconds", "queue_seconds", "Seconds from arrival until sent to a worker.", SECONDS),
    ("compute_seconds", "compute_seconds", "Seconds from sent until answered.", SECONDS),
    ("encode_seconds", "encode_seconds", "Seconds to encode a group.", _SHORT),
    ("decode_seconds", "decode_seconds", "Seconds to decode a group.", _SHORT),
    ("predict_seconds", "predict_seconds", "Seconds to predict a group's queries.", _SHORT),
    ("group_fill", "group_fill", "Share of a group's places that queries took.", _TENTHS),
    ("batch_size", "batch_size", "Queries in one worker call.", (1, 2, 4, 8, 16, 32, 64, 128)),
    ("workers_responded", "workers_responded", "Answers of a decoded group.", range(1, 33)),
    ("expected_disagreement", "expected_disagreement", "Probabilities that approximate labels are "
     "not the model's own.", _SHARES),
    ("expected_error", "expected_error", "Error bars of values, over the tolerance.", _TENTHS),
)  # fmt: skip
_LABELS = {
    "request_": ("outcome", OUTCOMES),
    "query_": ("answer", ANSWERS),
    "audit_": ("label", ("same", "other", "unknown")),
    "check_": ("result", ("again", "agreed", "open", "wrong")),
}
# Metrics of a pool: the name, the help, and the report's field for each value of `result`.
_OF_POOLS = (
    ("worker_calls", "Calls of workers by result.",
     {"answered": "answered", "late": "late", "error": "errors"}),
    ("worker_deaths", "Workers lost and replaced.", {"": "deaths"}),
    ("worker_hung", "Workers lost because they hung.", {"": "hung"}),
    ("worker_copies", "Second copies sent (hedges).", {"": "copies"}),
    ("worker_seconds", "Seconds of workers' time that calls took.", {"": "seconds"}),
    ("worker_wasted_seconds", "Seconds of it that were of no use.", {"": "wasted_seconds"}),
)  # fmt: skip


class Meter:
    """The measurements of one model.

    Attributes:
        pool: The model's pool; None once it is closed.
        waiting: Returns the number of queries that wait to be sent.
    """

    def __init__(self, pool: AbstractPool, counts: Mapping[str, Sequence[Counter | Histogram]]):
        """Create a meter; `counts` has the metrics of each measure."""
        self.pool: AbstractPool | None = pool
        self.waiting: Callable[[], float] = lambda: 0
        self._counts = counts

    def observe(self, what: str, number: int | float) -> None:
        """Record a measurement, from any thread. NaN, for unknown, is ignored."""
        if math.isnan(number):
            return
        for metric in self._counts[what]:
            if isinstance(metric, Histogram):
                metric.observe(number)
            else:  # requests and audits pass seconds or 1, and count as one each
                metric.inc(1 if what.startswith(("request_", "audit_")) else number)

    def read(self, what: str) -> dict[str, float]:
        """Return a counter's "total", and a histogram's "count", "sum" and cumulative buckets."""
        families = [family for metric in self._counts[what] for family in metric.collect()]
        samples = [sample for family in families for sample in family.samples]
        return {s.labels.get("le", s.name.rpartition("_")[2]): s.value for s in samples}

    def close(self) -> None:
        """Release the pool and the queue; the counts stay."""
        self.pool, self.waiting = None, lambda: 0


class Metrics(Collector):
    """The metrics of all models of a server, in a registry."""

    def __init__(self, registry: CollectorRegistry):
        self.meters: dict[str, Meter] = {}  # by model
        self._metrics: list[tuple[str, Counter | Histogram]] = []  # with their measures
        for name, measure, text, edges in _TABLE:
            labels = ["model", _LABELS[measure][0]] if measure in _LABELS else ["model"]
            about = f"nercc_{name}", text, labels
            made = Histogram(*about, buckets=edges, registry=registry) if edges else None
            self._metrics.append((measure, made or Counter(*about, registry=registry)))
        registry.register(self)

    def add(self, model: str, pool: AbstractPool) -> Meter:
        """Return the meter of a model; it continues the counts of an earlier model of that name."""
        counts = collections.defaultdict[str, list[Counter | Histogram]](list)
        for measure, metric in self._metrics:
            for value in _LABELS[measure][1] if measure in _LABELS else ("",):
                counts[measure + value].append(metric.labels(model, *[value] * bool(value)))
        self.meters[model] = Meter(pool, counts)
        return self.meters[model]

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics that meters do not count: of queues and pools."""
        meters = dict(self.meters)  # a copy, since models may be loaded and unloaded
        reports = {model: each.pool.report() for model, each in meters.items() if each.pool}
        queue = "nercc_queue_queries", "Queries that wait to be sent."
        waiting = GaugeMetricFamily(*queue, labels=["model"])
        for model, meter in meters.items():
            waiting.add_metric([model], meter.waiting())
        workers = GaugeMetricFamily("nercc_workers", "Workers by state.", labels=["model", "state"])
        for model, state in itertools.product(reports, get_args(WorkerState)):
            number = sum(worker.state == state for worker in reports[model].workers)
            workers.add_metric([model, state], number)
        yield from (waiting, workers)
        for name, text, fields in _OF_POOLS:
            labels = ["model"] if "" in fields else ["model", "result"]
            found = CounterMetricFamily(f"nercc_{name}", text, labels=labels)
            for model, value in itertools.product(reports, fields):
                found.add_metric([model, value], getattr(reports[model], fields[value]))
            yield found
