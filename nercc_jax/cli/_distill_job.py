"""What `nercc distill` does: the model and its inputs, training with a bar, the card."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..serving._servable import Servable, load_callable, make_servable
from ._progress import steps_bar
from ._workload import answering, read_array


def find_workload(
    model: str, weights: Path | None, inputs: Path | None, data_dir: Path | None, seed: int
) -> tuple[Servable, np.ndarray, np.ndarray, dict[str, Any]]:
    """The model with its shapes, inputs to train on and to score on, and where they are from."""
    own = ":" in model
    given = None if inputs is None else _read(inputs)
    if own and given is None:
        raise ValueError(f"{model}: say what to train on with --inputs FILE.npy")
    if weights is not None and not own:
        raise ValueError(f"--weights is for a model of your own, module:function, not {model!r}")
    network: Any = load_callable(model, weights) if own else answering(model, "logits")
    if given is not None:
        count = min(1000, len(given) // 10)
        order = np.random.default_rng(seed).permutation(len(given))
        x, test = given[np.sort(order[count:])], given[np.sort(order[:count])]
        if count < 1:
            raise ValueError(f"{inputs} has {len(given)} inputs: needs ten or more")
        source = str(inputs)
    else:
        x, _ = network.images("train", data_dir, 1 << 30, seed)
        test, _ = network.images("test", data_dir, 1000, seed)
        source = network.network.data
    served = make_servable(model.replace(":", "."), network, x.shape[1:])
    if served.uncodable or not served.outputs.alone:
        raise ValueError(
            f"{served.name} must return one float32 array, for a student to learn, not "
            f"{'; '.join(map(str, served.outputs.parts))}"
        )
    return served, x, test, {"base": model, "data": source}


def _read(path: Path) -> np.ndarray:
    """A file's array, one data point a row, float32."""
    if not path.is_file():
        raise ValueError(f"--inputs {path}: there is no such file")
    x = read_array(path, f"--inputs {path}")
    if x.ndim < 2:
        raise ValueError(f"--inputs {path} has shape {x.shape}: needs one input a row")
    return x


def distill_with_bar(
    console: Console,
    served: Servable,
    x: np.ndarray,
    test: np.ndarray,
    share: float,
    output: Path,
    about: dict[str, Any],
    options: dict[str, Any],
) -> str:
    """Trains and writes the student; returns what its card says."""
    from flax import nnx

    from nercc_models.distill import told, write_student
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
    return told(write_student(output, served.model, plan, trained, test, about)[1])
