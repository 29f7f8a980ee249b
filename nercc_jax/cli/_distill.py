"""`nercc distill`: a small student of a model, from unlabelled inputs and the model's answers."""

import datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from ..serving._servable import Servable, load_callable, make_servable
from ._errors import told_plainly
from ._progress import steps_bar
from ._workload import DataDir, answering, check_folder, read_array


def distill_command(
    model: Annotated[
        str, typer.Option(help="A shipped model (`nercc models` lists them), or module:function.")
    ] = "lenet5-digits",
    data_dir: DataDir = None,
    inputs: Annotated[
        Path | None,
        typer.Option(
            help="Unlabelled inputs (.npy), one a row, as the model takes them; needed for "
            "module:function, instead of the data set for a shipped model."
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Given to module:function, which then makes the model.")
    ] = None,
    share: Annotated[
        float,
        typer.Option(help="The student's multiplications as a share of the model's, at most."),
    ] = 0.07,
    queries: Annotated[
        int | None,
        typer.Option(help="Answers to learn from; twice the inputs (4,000 at least) if unset."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="How often the student goes over them.")] = 20,
    mixed: Annotated[
        float, typer.Option(help="Share of the queries that are weighted sums of inputs.")
    ] = 0.5,
    learning_rate: Annotated[float, typer.Option(help="Of Adam, at its highest.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    output: Annotated[
        Path, typer.Option(help="Where to write the weights (.safetensors); the card lies beside.")
    ] = Path("nercc-student.safetensors"),
) -> None:
    """Train a cheap student to answer as a model does, on the model's own scale.

    Needs no labels. A tenth of the inputs, 1,000 at most, is kept to measure how often student and
    model agree; of a shipped model it is the test images. `nercc_models.load_student_file` reads
    the student back.
    """
    with told_plainly():
        if output.suffix != ".safetensors":
            raise ValueError(f"--output {output}: its name must end in .safetensors")
        check_folder("--output", output)
        if not 0 < share <= 1:
            raise ValueError(f"--share {share} lies outside (0, 1]")
        if epochs < 1:
            raise ValueError(f"--epochs {epochs}: needs one or more")
        served, x, test, about = _workload(model, weights, inputs, data_dir, seed)
        queries = max(2 * len(x), 4000) if queries is None else queries
        about |= {
            "num_queries": queries,
            "epochs": epochs,
            "mixed": mixed,
            "learning_rate": learning_rate,
            "seed": seed,
            "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "made_by": "nercc distill",
        }
        console = Console()
        options = {
            "num_queries": queries,
            "epochs": epochs,
            "mixed": mixed,
            "learning_rate": learning_rate,
            "batch_size": min(128, max(queries // 8, 1)),
            "seed": seed,
        }
        told = _distill(console, served, x, test, share, output, about, options)
        console.print(told, soft_wrap=True, highlight=False, markup=False)
        console.print(f"student: {output.resolve()}", soft_wrap=True, highlight=False)


def _workload(
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
    return served, x, test, {"base": model, "data": source}


def _read(path: Path) -> np.ndarray:
    """A file's array, one data point a row, float32."""
    if not path.is_file():
        raise ValueError(f"--inputs {path}: there is no such file")
    x = read_array(path, f"--inputs {path}")
    if x.ndim < 2:
        raise ValueError(f"--inputs {path} has shape {x.shape}: needs one input a row")
    return x


def _distill(
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

    cost = multiplications(served.model, served.shape)
    plan = plan_within(share * cost, served.shape, served.outputs)
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
