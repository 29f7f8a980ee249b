"""The metrics of served models, for Prometheus: one table of what is measured, and one of pools."""

import itertools
from collections.abc import Iterator
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ..codes import AbstractCode
from ..codes._kept import kept_matrices
from ..pools import AbstractPool
from ..pools.backend import WorkerState
from ._meter import ANSWERS, OUTCOMES, SECONDS, Meter

_SHORT = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1)
_SHARES = (1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_TENTHS = tuple(place / 10 for place in range(1, 11))

# A metric's name after `nercc_`, its measure, its help, and a histogram's buckets; without any it
# is a counter. Those with a label have a measure for each of its values, which follows the name.
_TABLE = (
    ("requests", "request_", "Requests by outcome.", ()),
    ("queries", "query_", "Queries by how they were answered.", ()),
    ("audited", "audit_", "Approximate answers, by whether the model's own agreed later.", ()),
    ("checked_answers", "check_", "Suspicious answers, by what computing them again showed.", ()),
    ("high_priority_queries", "high_priority", "Queries of high priority.", ()),
    ("stragglers", "straggler", "Coded data points that were not waited for.", ()),
    ("reexecutions", "reexecution", "Queries sent a second time.", ()),
    ("over_budget", "over_budget", "Uncertain answers given as the budget was spent.", ()),
    ("drifts", "drift", "Times that predictions were wrong more often than promised.", ()),
    ("policy_changes", "policy_change", "Times that another setting was picked.", ()),
    ("fenced_workers", "worker_fenced", "Times that a worker was fenced.", ()),
    ("released_workers", "worker_released", "Fenced workers that were released.", ()),
    ("internal_errors", "internal_error", "Failures of the server, see its log.", ()),
    ("request_seconds", "request_ok", "Seconds from arrival to answer.", SECONDS),
    ("queue_seconds", "queue_seconds", "Seconds from arrival until sent to a worker.", SECONDS),
    ("compute_seconds", "compute_seconds", "Seconds from sent until answered.", SECONDS),
    ("learn_seconds", "learn_seconds", "Seconds of a learning step, on its own thread.", SECONDS),
    ("order_seconds", "order_seconds", "Seconds to order the queries of a batch.", _SHORT),
    ("encode_seconds", "encode_seconds", "Seconds to encode a group.", _SHORT),
    ("decode_seconds", "decode_seconds", "Seconds to decode a group.", _SHORT),
    ("predict_seconds", "predict_seconds", "Seconds to predict a group's queries.", _SHORT),
    ("group_fill", "group_fill", "Share of a group's places that queries took.", _TENTHS),
    ("batch_size", "batch_size", "Queries in one worker call.", (1, 2, 4, 8, 16, 32, 64, 128)),
    ("workers_responded", "workers_responded", "Answers of a decoded group.", range(1, 33)),
    ("hedge_limits", "hedge_limits", "Seconds of late queries' copies, over the limit of lateness; "
     "over 1, copies are as slow as what they copy.", (0.25, 0.5, 1, 2, 5, 10, 20)),
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
# What a pool reports: the metric, its help, and by the value of `result` the report's field.
_OF_POOLS = (
    ("worker_calls", "Calls of workers by result.",
     {"answered": "answered", "late": "late", "error": "errors"}),
    ("worker_deaths", "Workers lost and replaced.", {"": "deaths"}),
    ("worker_hung", "Workers lost because they hung.", {"": "hung"}),
    ("worker_copies", "Second copies sent (hedges).", {"": "copies"}),
    ("worker_seconds", "Seconds of workers' time that calls took.", {"": "seconds"}),
    ("worker_wasted_seconds", "Seconds of it that were of no use.", {"": "wasted_seconds"}),
)  # fmt: skip


class Metrics(Collector):
    """The metrics of all models of a server, in a registry."""

    def __init__(self, registry: CollectorRegistry):
        self.meters: dict[str, Meter] = {}  # by model
        registry.register(self)

    def add(self, model: str, pool: AbstractPool, code: AbstractCode) -> Meter:
        """Return the meter of a model, which takes the place of an earlier one of that name."""
        buckets = {measure: edges for _, measure, _, edges in _TABLE if edges}
        self.meters[model] = Meter(pool, code, buckets)
        return self.meters[model]

    def collect(self) -> Iterator[Metric]:
        def family(kind: Any, name: str, text: str, label: str = "") -> Any:
            return kind(f"nercc_{name}", text, labels=["model", label] if label else ["model"])

        meters = dict(self.meters)  # models come and go
        for name, measure, text, edges in _TABLE:
            label, values = _LABELS.get(measure, ("", ("",)))
            kind = HistogramMetricFamily if edges else CounterMetricFamily
            found, by_edge = family(kind, name, text, label), [*map(floatToGoString, edges), "+Inf"]
            for model, value in itertools.product(meters, values):
                count, total, counts = meters[model].read(measure + value)
                if edges:
                    buckets = zip(by_edge, itertools.accumulate(counts), strict=True)
                    found.add_metric([model], list(buckets), total)
                else:  # the number that comes with a request or an audit is no count
                    times = measure in ("request_", "audit_")
                    found.add_metric([model, value], count if times else total)
            yield found
        waiting = family(GaugeMetricFamily, "queue_queries", "Queries that wait to be sent.")
        workers = family(GaugeMetricFamily, "workers", "Workers by state.", "state")
        text = "Decoder matrices that were cached (hit) or computed (miss)."
        lookups = family(CounterMetricFamily, "decoder_lookups", text, "result")
        reports = {}
        for model, meter in meters.items():
            waiting.add_metric([model], meter.waiting())
            if meter.served is not None:
                pool, code = meter.served
                report = reports[model] = pool.report()
                for state in get_args(WorkerState):
                    number = sum(worker.state == state for worker in report.workers)
                    workers.add_metric([model, state], number)
                if (kept := kept_matrices(code)) is not None:
                    lookups.add_metric([model, "hit"], kept.lookups.hits)
                    lookups.add_metric([model, "miss"], kept.lookups.misses)
        yield from (waiting, workers, lookups)
        for name, text, fields in _OF_POOLS:
            found = family(CounterMetricFamily, name, text, "" if "" in fields else "result")
            for model, value in itertools.product(reports, fields):
                found.add_metric([model, value], getattr(reports[model], fields[value]))
            yield found
