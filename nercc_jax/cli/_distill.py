"""`nercc distill`: train a small student on unlabelled inputs and the model's answers."""

import dataclasses
import datetime
import functools
from typing import Any

import equinox as eqx
from flax import nnx
from rich.console import Console

from nercc_models.distill import summary, write_student
from nercc_models.distillation import distill
from nercc_models.students import multiplications, plan_within

from ..codes.workers import call_model
from ._options import Options
from ._output import progress_bar, show
from ._workload import find_workload


def distill_student(options: Options) -> None:
    """Train a cheap student to imitate a model's outputs.

    No labels are needed. A fifth of the inputs, at most 1,000, is held out to measure how often
    student and model agree; for a shipped model, test images are used.
    `nercc_models.load_student_file` loads the student.
    """
    if options.output.suffix != ".safetensors":
        raise ValueError(f"--output {options.output}: its name must end in .safetensors")
    model, data = find_workload(dataclasses.replace(options, outputs="values"))
    seed = options.seed
    x = data.shuffled("train", options.max_inputs or 1 << 30, seed)
    test = data.shuffled("test", 1000, seed)
    if not len(test):
        raise ValueError(f"{data.source} has {len(x)} inputs: needs five or more")
    teacher = functools.partial(call_model, model)
    answer: Any = eqx.filter_eval_shape(teacher, x[:1])
    queries = max(2 * len(x), 4000) if options.answers is None else options.answers
    training = {name: getattr(options, name) for name in ("epochs", "mixed", "learning_rate")}
    training |= {"num_queries": queries, "seed": seed}
    about = {"base": options.model, "data": data.source, "made_by": "nercc distill"} | training
    about["made"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

    console = Console()
    cost = multiplications(teacher, x.shape[1:])
    plan = plan_within(options.share * cost, x.shape[1:], answer.shape[1:])
    student = plan.build(nnx.Rngs(seed))
    with progress_bar(console) as progress:
        task = progress.add_task("the model's answers ...", total=None)

        def on_step(step: int, total: int) -> None:
            progress.update(task, completed=step, total=total)

        def on_epoch(entry: dict[str, Any]) -> None:
            described = f"agreement {entry['agreement']:.1%}, error {entry['relative_mse']:.3f}"
            progress.update(task, description=described)

        further: Any = training | {"batch_size": min(128, max(queries // 8, 1))}
        trained = distill(teacher, student, x, on_step=on_step, on_epoch=on_epoch, **further)
    card = write_student(options.output, teacher, plan, trained, test, about)[1]
    show(console, summary(card))
    show(console, f"student: {options.output.resolve()}")
