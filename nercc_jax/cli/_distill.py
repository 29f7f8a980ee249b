"""`nercc distill`: a small student of a model, from unlabelled inputs and the model's answers."""

import datetime
from pathlib import Path
from typing import Annotated

import typer

from ._errors import told_plainly
from ._options import (
    DataDir,
    Inputs,
    ModelName,
    Weights,
    check_folder,
    check_model,
    check_positive,
)

_LOW = 0.7  # agreement with the model below which a student is warned of


def distill_command(
    model: ModelName = "lenet5-digits",
    weights: Weights = None,
    inputs: Inputs = None,
    data_dir: DataDir = None,
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

    Needs no labels. A fifth of the inputs, 1,000 at most, is kept to measure how often student and
    model agree; of a shipped model it is the test images. `nercc_models.load_student_file` reads
    the student back.
    """
    with told_plainly():
        if output.suffix != ".safetensors":
            raise ValueError(f"--output {output}: its name must end in .safetensors")
        check_folder("--output", output)
        if not 0 < share <= 1:
            raise ValueError(f"--share {share} lies outside (0, 1]")
        check_positive("--epochs", epochs, "--queries", queries, "--learning-rate", learning_rate)
        if not 0 <= mixed <= 1:
            raise ValueError(f"--mixed {mixed} lies outside [0, 1]")
        check_model(model, weights, inputs)
        # JAX takes a second or two: not for --help, nor for a word that is misspelt.
        from rich.console import Console

        from nercc_models.distill import told

        from ._distill_job import distill_with_bar, find_base

        served, x, test, about = find_base(model, weights, inputs, data_dir, seed)
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
        card = distill_with_bar(console, served, x, test, share, output, about, options)
        console.print(told(card), soft_wrap=True, highlight=False, markup=False)
        agreement = card["score"]["agreement"]
        if agreement < _LOW:
            console.print(
                f"[yellow]warning:[/yellow] it agrees in {agreement:.0%} of cases only, and will "
                "mislead whoever answers with it: give more --inputs and --queries, more --epochs, "
                "or a larger --share",
                soft_wrap=True,
                highlight=False,
            )
        console.print(f"student: {output.resolve()}", soft_wrap=True, highlight=False)
