"""The pool that `nercc run` goes over its data on."""

import dataclasses
import functools
import logging
from typing import Any, Literal

from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler

from ..codes import AbstractCode
from ..pools import AbstractPool, DevicePool, Faults, RayPool
from ._errors import fail
from ._options import check_positive
from ._ray_job import RayJob

# How often a batch is dispatched before its data points are lost.
ATTEMPTS = 3
# A worker is taken to hang when all attempts but one are over: the last finds new ones if all hung.
# But not sooner than this many seconds: it may straggle, and a new one needs its time too.
_HANG = 10.0


@dataclasses.dataclass(frozen=True)
class ChosenPool:
    """Which workers: `workers` of them, N unless given; the others as the options are called."""

    kind: Literal["devices", "ray"]
    workers: int | None
    ray: RayJob
    actor_options: dict[str, Any]
    faults: Faults
    deadline: float
    worker_dtype: str | None = None

    def count(self, code: AbstractCode) -> int:
        """How many there are."""
        return code.num_workers if self.workers is None else self.workers

    def open(
        self, console: Console, model: Any, name: str, code: AbstractCode, **options: Any
    ) -> AbstractPool:
        """The pool for a model of that name. Exits with code 1 where it does not start."""
        make: Any = DevicePool
        count = self.count(code)
        if self.kind == "ray":
            show_pools(console)
            self.ray.connect([name])
            make = functools.partial(
                RayPool,
                actor_options=self.actor_options,
                max_per_node=code.num_workers - code.num_data or None,
                min_workers=min(code.num_data, count),
            )
        options |= {
            "faults": self.faults,
            "worker_dtype": self.worker_dtype,
            "hang_timeout": max((ATTEMPTS - 1) * self.deadline, _HANG),
        }
        try:
            with console.status(f"starting {count} workers ({self.kind}) ..."):
                return make(model, count, **options)
        except RuntimeError as error:
            fail(f"the pool did not start: {error}", 1)


def make_faults(rate: float, delay: float, death_rate: float, seed: int) -> Faults:
    """Raises: ValueError for numbers out of range, naming the option."""
    for option, value in (("--straggler-rate", rate), ("--death-rate", death_rate)):
        if not 0 <= value <= 1:
            raise ValueError(f"{option} is a share of the calls, from 0 to 1, not {value}")
    check_positive("--straggler-delay", delay)
    return Faults.on_trial(
        straggler_rate=rate, straggler_delay=delay, death_rate=death_rate, seed=seed
    )


def show_pools(console: Console) -> None:
    """What pools log, such as which Ray was joined, is shown, a line each."""
    log = logging.getLogger("nercc_jax.pools")
    shown: Any = {"show_time": False, "show_level": False, "show_path": False}
    log.handlers[:] = [RichHandler(console=console, highlighter=NullHighlighter(), **shown)]
    log.setLevel(logging.INFO)
