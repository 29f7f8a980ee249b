"""The options by which `nercc run` and the settings of `nercc serve` describe a pool."""

from collections.abc import Callable, Mapping
from typing import Any

from ._devices import DevicePool
from ._faults import Faults
from ._pool import AbstractPool
from ._ray import RayPool

_SECONDS = (
    "seconds, from 0 to a day",
    lambda value: type(value) in (int, float) and 0 <= value <= 86_400,
)
_SHARE = "a share, from 0 to 1", lambda value: type(value) in (int, float) and 0 <= value <= 1
# For each fault: a description of its valid values, and a predicate that tests them.
_FAULTS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "service_delay_s": _SECONDS,
    "straggler_delay_s": _SECONDS,
    "straggler_rate": _SHARE,
    "death_rate": _SHARE,
    "wrong_rate": _SHARE,
    "straggler_score": ("module:function", lambda value: isinstance(value, str)),
    "wrong_workers": (
        "a table of whole numbers, {swap = [1]}",
        lambda value: (
            isinstance(value, Mapping)
            and {*value} <= {"swap"}
            and all(type(each) is int for each in value.get("swap", ()))
        ),
    ),
    "fault_seed": ("a whole number", lambda value: type(value) is int and value >= 0),
}


def check_faults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checked table of faults to inject, with numbers other than the seed as floats.

    Raises:
        ValueError: There is no such fault, or its value does not fit.
    """
    for name, value in given.items():
        if name not in _FAULTS:
            raise ValueError(f"there is no fault {name!r}, only {', '.join(_FAULTS)}")
        if not _FAULTS[name][1](value):
            raise ValueError(f"{name} is {_FAULTS[name][0]}, not {value!r}")
    whole = {name for name, value in given.items() if type(value) is int} - {"fault_seed"}
    return {name: float(value) if name in whole else value for name, value in given.items()}


def open_pool(
    model: Any,
    num_workers: int,
    asked: Any,
    *,
    num_data: int | None = None,
    seed: int = 0,
    **options: Any,
) -> AbstractPool:
    """Open the pool that options describe, with the faults to inject for trials.

    Args:
        model: The model.
        num_workers: The number of workers, unless `asked.workers` is set.
        asked: The options, as attributes: `pool`, `workers`, `worker_dtype`, `actor_options`, and
            `faults`, as `check_faults` returns them, with a function as the `straggler_score`.
        num_data: The number of workers to wait for, in a pool of Ray actors (default: one).
        seed: The faults' seed, if they have no `fault_seed`.
        **options: Further arguments of the pool.

    Raises:
        RuntimeError: The workers do not start.
    """
    rates = dict(asked.faults or {})
    seed, wrong = rates.pop("fault_seed", seed), rates.pop("wrong_workers", {})
    rates["wrong_workers"] = wrong.get("swap", ())
    rates = {name.removesuffix("_s"): each for name, each in rates.items()}
    options |= {"faults": Faults.from_rates(**rates, seed=seed), "worker_dtype": asked.worker_dtype}
    count = asked.workers or num_workers
    if asked.pool != "ray":
        return DevicePool(model, count, **options)
    options["min_workers"] = min(num_data or 1, count)
    return RayPool(model, count, actor_options=asked.actor_options or {}, **options)
