"""What `nercc distill` does: the model and its inputs, training with a bar, the card."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..serving import Servable, make_servable
from ._progress import steps_bar
from ._workload import find_workload


def find_base(
    model: str, weights: Path | None, inputs: Path | None, data_dir: Path | None, seed: int
) -> tuple[Servable, np.ndarray, np.ndarray, dict[str, Any]]:
    """The model with its shapes, inputs to train on and to score on, and where they are from."""
    found = find_workload(model, weights=weights, inputs=inputs, data_dir=data_dir)
    x, test = found.points("train", 1 << 30, seed), found.points("test", 1000, seed)
    if not len(test):
        raise ValueError(f"{found.source} has {len(x)} inputs: needs five or more")
    served = make_servable(model.rpartition("/")[2].replace(":", "."), found.model, x.shape[1:])
    if served.uncodable or not served.outputs.alone:
        raise ValueError(
            f"{served.name} must return one float32 array, for a student to learn, not "
            f"{'; '.join(map(str, served.outputs.parts))}"
        )
    return served, x, test, {"base": model, "data": found.source}


def distill_with_bar(
    console: Console,
    served: Servable,
    x: np.ndarray,
    test: np.ndarray,
    share: float,
    output: Path,
    about: dict[str, Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Trains and writes the student; returns its card."""
    from flax import nnx

    from nercc_models.distill import write_student
    from nercc_models.distillation import distill
    from nercc_models.students import multiplications, plan_within

    cost = multiplications(served.model, served.inputs.shape)
    plan = plan_within(share * cost, served.inputs.shape, served.outputs.shape)
    student = plan.build(nnx.Rngs(options["seed"]))
    with steps_bar(console) as progress:
        task = progress.add_task("the model's answers ...", total=None)

        def on_step(step: int, total: int) -> None:
            progress.update(task, completed=step, total=total)

        def on_epoch(entry: dict[str, Any]) -> None:
            described = f"agreement {entry['agreement']:.1%}, error {entry['relative_mse']:.3f}"
            progress.update(task, description=described)

        trained = distill(served.model, student, x, on_step=on_step, on_epoch=on_epoch, **options)
    return write_student(output, served.model, plan, trained, test, about)[1]
