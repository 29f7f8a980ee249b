"""A pool by options, which `nercc run` and the settings of `nercc serve` have by the same names."""

from collections.abc import Callable
from typing import Any

from ._devices import DevicePool
from ._faults import Faults
from ._pool import AbstractPool
from ._ray import RayPool


def open_pool(
    model: Any,
    num_workers: int,
    asked: Any,
    *,
    num_data: int | None = None,
    score: Callable[[Any], Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> AbstractPool:
    """Open the pool that options ask for, with the faults to inject for trials.

    Args:
        model: The model.
        num_workers: N, as many workers as there are unless `asked` says otherwise.
        asked: The options: `pool`, `workers`, `worker_dtype`, what a Ray actor needs, and rates of
            faults.
        num_data: K, as many workers as a pool of Ray actors begins with; no node has more than
            N - K. Default: one is enough, anywhere.
        score: The score of a row, by which straggling calls are chosen.
        seed: Of the faults.
        **options: Further arguments of the pool.

    Raises:
        ValueError: A rate, or a table of wrong workers, does not fit.
        RuntimeError: The workers do not start.
    """
    faults = Faults.from_rates(
        service_delay=getattr(asked, "service_delay_s", 0.0),
        straggler_rate=asked.straggler_rate,
        straggler_delay=asked.straggler_delay_s,
        straggler_score=score,
        straggler_leaning=asked.straggler_leaning,
        death_rate=asked.death_rate,
        wrong_workers=asked.wrong_workers,
        wrong_rate=asked.wrong_rate,
        seed=seed,
    )
    options |= {"faults": faults, "worker_dtype": asked.worker_dtype}
    count = asked.workers or num_workers
    if asked.pool != "ray":
        return DevicePool(model, count, **options)
    amounts = {"num_cpus": asked.worker_cpus, "num_gpus": asked.worker_gpus}
    amounts |= {"resources": asked.worker_resources or None}
    actor = dict(getattr(asked, "actor_options", {}))
    actor |= {name: each for name, each in amounts.items() if each is not None}
    options["max_per_node"] = None if num_data is None else num_workers - num_data or None
    options["min_workers"] = 1 if num_data is None else min(num_data, count)
    return RayPool(model, count, actor_options=actor, **options)
