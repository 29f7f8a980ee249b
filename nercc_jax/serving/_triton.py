"""Triton's extensions of the protocol: a model's configuration, and its statistics."""

from collections.abc import Mapping
from typing import Any

from ..pools import PoolReport
from ._metrics import Meter, Spent
from ._protocol import VERSION, input_types, output_types
from ._servable import Servable
from ._settings import ModelSettings

# What the server's metadata call them.
EXTENSIONS = ("model_configuration", "schedule_policy", "statistics")


def configuration(servable: Servable, settings: ModelSettings) -> dict[str, Any]:
    """As Triton's model configuration says it; what has no counterpart here is left out.

    `max_batch_size` is of one request, as `nercc_max_queries` in the metadata;
    `preferred_batch_size` are those that workers get.
    """
    policy = settings.policy()
    return {
        "name": servable.name,
        "platform": "nercc_jax",
        "backend": "nercc_jax",
        "max_batch_size": policy.max_queue_size,
        "input": [_tensor(each) for each in input_types(servable)],
        "output": [_tensor(each) for each in output_types(servable)],
        "dynamic_batching": {
            "preferred_batch_size": list(policy.batch_sizes),
            "max_queue_delay_microseconds": round(1e6 * policy.batch_wait_timeout_s),
            "priority_levels": 2,
            "default_priority_level": 2,
        },
    }


def statistics(servable: Servable, meter: Meter, report: PoolReport) -> dict[str, Any]:
    """As Triton's statistics say it: how often something happened, and how long it took in all.

    `success` are requests that were answered, `fail` all others (the time of those refused at once
    is not measured). `queue` is from a request's arrival until its first query is sent, and
    `compute_infer` from then until it is answered. Encoding and decoding are within that, and of
    groups: so `compute_input` and `compute_output`, which count as often (`perf_analyzer` insists),
    have no time. `execution_count` are workers' calls, coded ones and copies included, that
    answered in time. There is no cache, and nothing is told by batch size.
    """
    spent = meter.spent()
    none = Spent()
    failed = [spent[each] for each in spent if each.startswith("request_") and each != "request_ok"]
    computed = spent.get("compute_seconds", none)
    durations = {
        "success": spent.get("request_ok", none),
        "fail": sum(failed, none),
        "queue": spent.get("queue_seconds", none),
        "compute_input": Spent(computed.count),
        "compute_infer": computed,
        "compute_output": Spent(computed.count),
        "cache_hit": none,
        "cache_miss": none,
    }
    return {
        "name": servable.name,
        "version": VERSION,
        "last_inference": round(1e3 * meter.last_answer),
        "inference_count": meter.answered,
        "execution_count": report.answered,
        "inference_stats": {
            name: {"count": each.count, "ns": round(1e9 * each.seconds)}
            for name, each in durations.items()
        },
        "batch_stats": [],
    }


def _tensor(told: Mapping[str, Any]) -> dict[str, Any]:
    """A tensor of the metadata, less the axis of the batch."""
    kind = {"BYTES": "STRING"}.get(told["datatype"], told["datatype"])
    return {"name": told["name"], "data_type": f"TYPE_{kind}", "dims": told["shape"][1:]}
