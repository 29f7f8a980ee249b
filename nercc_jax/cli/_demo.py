"""`nercc demo`: coded inference under stragglers, compared with copies and a student."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from nercc_models import SoftmaxModel, list_students, load_student, multiplications, student_card

from ..codes import AbstractCode, Berrut, NeRCC, Replication, load_code
from ..codes.workers import call_model
from ..evaluation import Estimate, pictures
from ..evaluation.answers import batched
from ..evaluation.tables import text_table
from ..inference import coded_inference
from ..schemes import Scheme
from ..surrogates import Surrogate
from ..tuning import Descent, learn_decoder, tune
from ._command import of_option
from ._comparison import compare, points_for, straggler_laws
from ._options import Options
from ._output import show, write_json
from ._workload import find_workload

RATE = 0.1  # share of the workers that straggle, independently of each other


def demo(options: Options) -> None:
    """Compare NeRCC with BACC, copies and a student when workers straggle.

    Each group of K data points is encoded as N coded data points, and each worker runs the model on
    one of them. S of the N workers straggle. All K predictions are recovered from the answers of
    the other workers, and compared with the model's predictions without coding.
    """
    given, size = None, (options.num_data, options.num_workers)
    if options.code is not None:
        with of_option(f"--code {options.code}"):
            given = load_code(options.code)
        size = given.num_data, given.num_workers
    num_data, num_workers = size
    if num_workers < num_data:
        raise ValueError(
            f"--num-workers {num_workers}: the codes compared need at least as many workers as "
            f"data points, {num_data}"
        )
    laws = straggler_laws(*size, options.max_stragglers)
    (model, data), seed, console = find_workload(options), options.seed, Console()
    x = points_for(options, data, "test", num_data)
    training = data.shuffled("train", options.max_inputs or 1000, seed)
    codes: dict[str, AbstractCode] = {"NeRCC published": NeRCC(*size, lambda_dec=0.0)}
    if given is not None:
        codes["NeRCC tuned"] = given

    def tuned() -> AbstractCode:
        cost = multiplications(lambda batch: call_model(model, batch), x.shape[1:])
        if 20 * len(x) * cost > 1e11 and jax.default_backend() == "cpu":  # some seconds
            raise ValueError("the model is large: see `nercc tune` and --code")
        key, descent = jax.random.key(seed), Descent(60)
        return tune(model, NeRCC(*size), training, laws, key=key, descent=descent).code

    def learned() -> AbstractCode:
        code, key = [*codes.values()][-1], jax.random.key(seed)
        return learn_decoder(model, code, training, key=key, num_groups=100)

    made = {"NeRCC tuned": tuned} if given is None else {}
    for name, make in (made | {"NeRCC learned": learned}).items():
        try:
            with console.status(f"{name}: compiles first ..."):
                codes[name] = make()
        except ValueError as error:  # for example model outputs that are not finite
            show(console, f"no {name}: {error}")
    codes |= {"BACC": Berrut(*size), "replication": Replication(*size)}
    what = f"{options.model}, K={num_data}, N={num_workers}"
    rows = compare(console, options, model, codes, x, laws, what)
    with console.status("measuring labels kept for an amount of work; compiles first ..."):
        del codes["replication"]
        kept = kept_labels(model, x, codes, options)
    straggle = f"{100 * RATE:g} % of the workers straggle"
    if kept:
        cells = [(r.system, str(r.workers), f"{r.calls:.2f}", r.kept.percent()) for r in kept]
        columns = ("system", "workers", "calls a query", "labels kept, %")
        show(
            console,
            f"\nLabels kept against work, where {straggle}. A repeated call is exact, and its\n"
            "answer comes later; the student is the shipped one",
            f"{text_table([columns, *cells])}\n\n{kept_words(kept)}",
        )
    panels = {"mse": (f"MSE of {options.outputs}", True)}
    if options.outputs != "values":
        panels["rel_acc"] = ("labels kept (RelAcc)", False)
    pictures.straggler_figure(rows, panels, what).savefig(options.plot, dpi=130)
    show(console, f"picture: {options.plot.resolve()}")
    records = [row._asdict() | {"kept": dataclasses.asdict(row.kept)} for row in kept]
    about = {"model": options.model, "data": data.source, "outputs": options.outputs}
    about |= {"seed": seed, "num_data": num_data, "num_workers": num_workers}
    write_json(console, options.numbers, about | {"labels_kept": records}, rows.records())


class Kept(NamedTuple):
    """The share of labels that a system keeps, and the number of model calls a query."""

    system: str
    workers: int
    calls: float
    kept: Estimate


def kept_labels(
    model: Any, test: np.ndarray, codes: Mapping[str, AbstractCode], options: Options
) -> list[Kept]:
    """Return the labels kept by codes on all workers, and by copies with and without the student.

    The list is empty for a model without a shipped student, for values, or for too few data points.
    """
    name, seed = options.model, options.seed
    num_data, many = next(iter(codes.values())).num_data, next(iter(codes.values())).num_workers
    shipped = options.inputs is None and name in list_students()
    if not shipped or options.outputs == "values" or len(test) < 4 * num_data:
        return []
    card, student = student_card(name), load_student(name)
    if options.outputs == "probabilities":
        student = SoftmaxModel(student)
    cost = card["multiplications"] / card["base_multiplications"]
    judged = test[: len(test) // num_data * num_data]
    groups = judged.reshape(-1, num_data, *judged.shape[1:])
    few, two = num_data + max(num_data // 4, 1), 2 * num_data
    own, guess = (np.asarray(batched(each, 256)(judged)).argmax(-1) for each in (model, student))
    placed = Scheme(
        NeRCC(num_data, few, points="repeated", exact=True),
        Surrogate(student),
        redundancy="uncertain",
        straggler_share=RATE,
    )
    # For each system: its workers, the student's cost in calls a query, and labels of lost queries.
    systems: dict[str, Any] = {
        f"replication on {two} workers": (Replication(num_data, two), two, 0.0, -1),
        f"replication on {many} workers": (Replication(num_data, many), many, 0.0, -1),
        **{system: (code, many, 0.0, -1) for system, code in codes.items()},
        "replication, else surrogate": (Replication(num_data, few), few, cost, guess),
        # The student runs on the copies, too.
        "copies by the student's doubt": (placed, few, cost * (1 + few / num_data), -1),
    }
    # These two need no run: a straggling call is lost, or repeated.
    rows = [
        Kept("uncoded", num_data, 1.0, Estimate(1 - RATE, 0.0)),
        Kept("hedging: lost calls again", num_data, 1 + RATE, Estimate(1.0, 0.0)),
    ]
    for system, (run, workers, student_calls, lost) in systems.items():
        # Systems with equally many workers have the same stragglers.
        infer, shares, draw = coded_inference(model, run), [], np.random.default_rng(seed)
        for _ in range(10):  # straggler sets
            masks = draw.random((len(groups), workers)) >= RATE
            found = np.asarray(infer(judged if run is placed else groups, masks))
            found = found.reshape(len(judged), -1)
            labels = np.where(np.isfinite(found).all(-1), found.argmax(-1), lost)
            shares.append(float(np.mean(labels == own)))
        calls = workers / num_data + student_calls
        rows.append(Kept(system, workers, calls, Estimate.over(shares)))
    return rows


def kept_words(rows: list[Kept]) -> str:
    """Return a summary of the table in two sentences."""

    def best(*systems: str) -> str:
        chosen = [row for row in rows if row.system.startswith(systems)]
        row = max(chosen, key=lambda row: (row.kept.mean, -row.calls))
        return f"{100 * row.kept.mean:.1f} % ({row.system}, {row.calls:.2f} calls a query)"

    return (
        "Labels kept without the student: "
        f"{best('replication on')} by copies, {best('NeRCC', 'BACC')} by codes. "
        f"With it: {best('replication, else', 'copies by')} by copies."
    )
