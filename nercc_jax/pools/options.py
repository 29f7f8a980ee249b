"""A pool by options, which `nercc run` and the settings of `nercc serve` have by the same names."""

import math
from collections.abc import Mapping
from typing import Any

from ._devices import DevicePool
from ._faults import Faults
from ._pool import AbstractPool
from ._ray import RayPool

# By what a value of a fault must be, the names of those faults.
_FAULTS = {
    "seconds, from 0 to a day": ("service_delay_s", "straggler_delay_s"),
    "a share, from 0 to 1": ("straggler_rate", "death_rate", "wrong_rate"),
    "`norm`, or module:function": ("straggler_score",),
    "a table of whole numbers, {swap = [1]}": ("wrong_workers",),
    "a whole number": ("fault_seed",),
}


def check_faults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table of faults to inject, once its names and values are seen to be right.

    Raises:
        ValueError: There is no such fault, or its value does not fit.
    """
    kinds, found = {name: kind for kind, names in _FAULTS.items() for name in names}, dict(given)
    for name, value in given.items():
        if name not in kinds:
            raise ValueError(f"there is no fault {name!r}, only {', '.join(kinds)}")
        number = type(value) in (int, float)
        if name == "straggler_score":
            fits = isinstance(value, str)
        elif name == "wrong_workers":
            fits = isinstance(value, Mapping) and {*value} <= {"swap"}
            fits = fits and all(type(each) is int for each in value.get("swap", ()))
        elif name == "fault_seed":
            fits = type(value) is int and value >= 0
        else:
            most = 86_400.0 if name.endswith("_s") else 1  # a day, or all
            fits = number and 0 <= value <= most and not math.isnan(value)
            found[name] = float(value) if fits else value
        if not fits:
            raise ValueError(f"{name} is {kinds[name]}, not {value!r}")
    return found


def open_pool(
    model: Any,
    num_workers: int,
    asked: Any,
    *,
    num_data: int | None = None,
    seed: int = 0,
    **options: Any,
) -> AbstractPool:
    """Open the pool that options ask for, with the faults to inject for trials.

    Args:
        model: The model.
        num_workers: N, as many workers as there are unless `asked` says otherwise.
        asked: The options: `pool`, `workers`, `worker_dtype`, `actor_options`, and `faults`, as
            `check_faults` returns them, with a function as the `straggler_score`.
        num_data: K, as many workers as a pool of Ray actors begins with (default: one).
        seed: Of the faults, unless they have one.
        **options: Further arguments of the pool.

    Raises:
        RuntimeError: The workers do not start.
    """
    rates = dict(asked.faults or {})
    seed = rates.pop("fault_seed", seed)
    rates = {name.removesuffix("_s"): each for name, each in rates.items()}
    options |= {"faults": Faults.from_rates(**rates, seed=seed), "worker_dtype": asked.worker_dtype}
    count = asked.workers or num_workers
    if asked.pool != "ray":
        return DevicePool(model, count, **options)
    options["min_workers"] = min(num_data or 1, count)
    return RayPool(model, count, actor_options=asked.actor_options or {}, **options)
