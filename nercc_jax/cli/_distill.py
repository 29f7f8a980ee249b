"""`nercc distill`: a small student of a model, from unlabelled inputs and the model's answers."""

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ._errors import report_errors
from ._options import (
    RESULTS,
    DataDir,
    Inputs,
    ModelName,
    Seed,
    Weights,
    check_files,
    check_folder,
    check_positive_options,
    option,
)

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from ..serving import Servable

_LOW = 0.7  # agreement with the model below which there is a warning
_TRAINING = "Training"


def distill_command(
    model: ModelName = "lenet5-digits",
    weights: Weights = None,
    inputs: Inputs = None,
    data_dir: DataDir = None,
    share: Annotated[
        float,
        option("The student's multiplications, at most, as a share of the model's.", _TRAINING),
    ] = 0.07,
    answers: Annotated[
        int | None,
        option(
            "Answers of the model to learn from (default: twice the inputs, at least 4,000).",
            _TRAINING,
        ),
    ] = None,
    epochs: Annotated[int, option("Passes over those answers.", _TRAINING)] = 20,
    mixed: Annotated[
        float, option("Share of the answers that are to weighted sums of inputs.", _TRAINING)
    ] = 0.5,
    learning_rate: Annotated[float, option("Largest learning rate of Adam.", _TRAINING)] = 3e-3,
    seed: Seed = 0,
    output: Annotated[
        Path,
        option(
            "File for the weights, .safetensors; a card with its scores goes next to it.", RESULTS
        ),
    ] = Path("nercc-student.safetensors"),
) -> None:
    """Train a cheap student to answer as a model does, in the model's own units.

    No labels are needed. A fifth of the inputs, 1,000 at most, is held out to measure how often
    student and model agree; for a shipped model these are the test images.
    `nercc_models.load_student_file` reads the student back.
    """
    with report_errors():
        if output.suffix != ".safetensors":
            raise ValueError(f"--output {output}: its name must end in .safetensors")
        check_folder("--output", output)
        if not 0 < share <= 1:
            raise ValueError(f"--share {share} lies outside (0, 1]")
        check_positive_options(
            "--epochs", epochs, "--answers", answers, "--learning-rate", learning_rate
        )
        if not 0 <= mixed <= 1:
            raise ValueError(f"--mixed {mixed} lies outside [0, 1]")
        check_files(model, weights, inputs)
        # JAX takes a second or two to import: not for --help, nor for a misspelt option.
        from rich.console import Console

        from nercc_models.distill import summary

        served, x, test, about = _find_base(model, weights, inputs, data_dir, seed)
        queries = max(2 * len(x), 4000) if answers is None else answers
        options = {
            "num_queries": queries,
            "epochs": epochs,
            "mixed": mixed,
            "learning_rate": learning_rate,
            "seed": seed,
        }
        about |= options | {
            "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "made_by": "nercc distill",
        }
        options["batch_size"] = min(128, max(queries // 8, 1))
        console = Console()
        card = _distill(console, served, x, test, share, output, about, options)
        console.print(summary(card), soft_wrap=True, highlight=False, markup=False)
        agreement = card["score"]["agreement"]
        if agreement < _LOW:
            console.print(
                f"[yellow]warning:[/yellow] it agrees with the model in {agreement:.0%} of cases "
                "only, which is too few to answer queries with: give more --inputs and --answers, "
                "more --epochs, or a larger --share",
                soft_wrap=True,
                highlight=False,
            )
        console.print(f"student: {output.resolve()}", soft_wrap=True, highlight=False)


def _find_base(
    model: str, weights: Path | None, inputs: Path | None, data_dir: Path | None, seed: int
) -> "tuple[Servable, np.ndarray, np.ndarray, dict[str, Any]]":
    """Return the model with its shapes, inputs to train on and to score on, and their source."""
    from ..serving import make_servable
    from ._workload import find_workload

    found = find_workload(model, weights, inputs, data_dir, "values")
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


def _distill(
    console: "Console",
    served: "Servable",
    x: "np.ndarray",
    test: "np.ndarray",
    share: float,
    output: Path,
    about: dict[str, Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Train and write the student, and return its card."""
    from flax import nnx

    from nercc_models.distill import write_student
    from nercc_models.distillation import distill
    from nercc_models.students import multiplications, plan_within

    from ._output import steps_bar

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
