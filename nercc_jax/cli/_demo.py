"""`nercc demo`: coded inference under stragglers, on real data, next to copies and a student."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console

from ..codes import AbstractCode, Berrut, NeRCC, Replication, load_code
from ..evaluation import Estimate, pictures
from ..evaluation._answers import batched
from ..inference import coded_inference
from ..schemes import Scheme
from ..surrogates import Surrogate
from ..tuning import Descent, learn_decoder, tune
from ._command import of_option
from ._comparison import compare, share_text, straggler_laws
from ._options import Options
from ._output import print_table, write_json
from ._process import compile_quickly
from ._workload import WorkerModel, Workload, find_workload

RATE = 0.1  # share of the workers that straggle, independently of each other
_SETS = 10  # straggler sets


def demo(options: Options) -> None:
    """Compare codes at each number of stragglers, and labels kept against work."""
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
    workload, seed, console = find_workload(options), options.seed, Console()
    model, x = workload.model, workload.groups("test", options, num_data)
    small = compile_quickly(model, x, 20 * len(x))
    published = NeRCC(*size, lambda_dec=0.0)
    codes = {"NeRCC published": published}
    codes |= _fitted(console, workload, options, given or published, laws, small)
    codes |= {"BACC": Berrut(*size), "replication": Replication(*size)}
    what = f"{options.model}, K={num_data}, N={num_workers}"
    rows = compare(console, options, model, codes, x, laws, what)
    with console.status("measuring labels kept for an amount of work; compiles first ..."):
        del codes["replication"]
        kept = kept_labels(workload, x, codes, options)
    above: list[tuple[float, Callable[[Any], Any]]] = []
    if options.outputs != "values" and x.ndim == 4 and x.shape[-1] in (1, 3):
        # One batch: K images, N coded ones, and K labels decoded without a fifth of the workers.
        some, coded = x[:num_data], np.asarray(published.encode(x[:num_data]))
        available = np.random.default_rng(seed).permutation(num_workers) >= num_workers // 5
        run = batched(model, num_workers)
        own, decoded = np.asarray(run(some)), published.decode(np.asarray(run(coded)), available)
        pair = (each[..., 0] if x.shape[-1] == 1 else each for each in (some, coded))
        labels = (np.asarray(each).argmax(-1).tolist() for each in (decoded, own))
        batch: Any = (*pair, available, *labels)
        above.append((4.3, lambda part: pictures.batch_figure(*batch, into=part)))
    if kept:
        print_table(
            console,
            f"Labels kept against work, where {100 * RATE:g} % of the workers straggle. A repeated "
            "call is exact, and its\nanswer comes later; the student is the shipped one",
            ("system", "workers", "calls a query", "labels kept, %"),
            [
                (row.system, str(row.workers), f"{row.calls:.2f}", share_text(row.kept))
                for row in kept
            ],
        )
        console.print(kept_words(kept), highlight=False)
        straggle = f"{100 * RATE:g} % of the workers straggle"
        above.append((4.6, lambda part: pictures.costs_figure(kept, straggle, part)))
    panels = {"mse": (f"MSE of {options.outputs}", True)}
    if options.outputs != "values":
        panels["rel_acc"] = ("labels kept (RelAcc)", False)
    pictures.straggler_figure(rows, panels, what, above).savefig(options.plot, dpi=130)
    console.print(f"picture: {options.plot.resolve()}", soft_wrap=True)
    about = {"model": options.model, "data": workload.source, "outputs": options.outputs}
    about |= {"seed": seed, "num_data": num_data, "num_workers": num_workers}
    records = []
    for row in kept:
        low, high = row.kept.interval(share=True)
        record = {"system": row.system, "workers": row.workers, "calls": row.calls}
        records.append(record | {"kept": row.kept.mean, "kept_low": low, "kept_high": high})
    write_json(console, options.numbers, about | {"labels_kept": records}, rows.records())


def _fitted(
    console: Console,
    workload: Workload,
    options: Options,
    start: AbstractCode,
    laws: Mapping[str, Any],
    small: bool,
) -> dict[str, AbstractCode]:
    """Return the code tuned here, or the one that was given, and with a learned decoder.

    Large models, and those that JAX cannot trace, are not tuned here.
    """
    training = workload.points("train", options.max_inputs or 1000, options.seed)
    key, found = jax.random.key(options.seed), {}
    if options.code is not None:
        found["NeRCC tuned"] = start
    elif not small:
        console.print("no code is tuned here, for so large a model: see `nercc tune` and --code")
    elif len(training) >= 2 * start.num_data:
        try:
            with console.status("tuning a code; compiles first ..."):
                descent, begin = Descent(60), NeRCC(start.num_data, start.num_workers)
                tuned = tune(workload.model, begin, training, laws, key=key, descent=descent)
            found["NeRCC tuned"] = tuned.code
            console.print(
                f"tuned a code: {descent.steps} steps, {tuned.seconds:.1f} s", style="dim"
            )
        except ValueError as error:
            console.print(f"no code was tuned: {error}", soft_wrap=True)
    if len(training) >= start.num_data:
        code = found.get("NeRCC tuned", start)
        try:
            with console.status("learning a decoder ..."):
                learned = learn_decoder(workload.model, code, training, key=key, num_groups=100)
            found["NeRCC learned"] = learned
        except ValueError as error:  # other codes take what is not finite for stragglers
            console.print(f"no decoder was learned: {error}", soft_wrap=True)
    return found


@dataclasses.dataclass(frozen=True)
class Kept:
    """The share of labels that a system keeps, and the model's calls that a query costs."""

    system: str
    look: str
    workers: int
    calls: float
    kept: Estimate


def kept_labels(
    workload: Workload, test: np.ndarray, codes: Mapping[str, AbstractCode], options: Options
) -> list[Kept]:
    """Return the labels kept by codes on all workers, and by copies with and without the student.

    There are none for a model without a shipped student, nor for few data points.
    """
    from nercc_models import list_students, load_student, student_card

    model, name, seed = workload.model, workload.name, options.seed
    num_data, many = next(iter(codes.values())).num_data, next(iter(codes.values())).num_workers
    shipped = options.inputs is None and name in list_students()
    if not shipped or options.outputs == "values" or len(test) < 4 * num_data:
        return []
    card, student = student_card(name), WorkerModel(load_student(name), options.outputs)
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
    also = "replication, else surrogate"
    # Each has its look, its workers, the student's calls a query, and the labels of what is lost.
    systems: list[Any] = [
        ("two copies", "replication", Replication(num_data, two), two, 0.0, -1),
        (f"copies on {many} workers", "replication", Replication(num_data, many), many, 0.0, -1),
        *((system, system, code, many, 0.0, -1) for system, code in codes.items()),
        ("copies, else the student", also, Replication(num_data, few), few, cost, guess),
        # The student runs on the copies, too.
        (*2 * ("copies by the student's doubt",), placed, few, cost * (1 + few / num_data), -1),
    ]
    # Known without being run: a straggling call is lost, or exact.
    rows = [
        Kept("one worker a query", "uncoded", num_data, 1.0, Estimate(1 - RATE, 0.0)),
        Kept("lost calls again, later", "hedging", num_data, 1 + RATE, Estimate(1.0, 0.0)),
    ]
    for system, look, run, workers, student_calls, lost in systems:
        # All systems of as many workers meet the same stragglers.
        infer, shares, draw = coded_inference(model, run), [], np.random.default_rng(seed)
        for _ in range(_SETS):
            masks = draw.random((len(groups), workers)) >= RATE
            found = np.asarray(infer(judged if run is placed else groups, masks))
            found = found.reshape(len(judged), -1)
            labels = np.where(np.isfinite(found).all(-1), found.argmax(-1), lost)
            shares.append(float(np.mean(labels == own)))
        calls = workers / num_data + student_calls
        rows.append(Kept(system, look, workers, calls, Estimate.over(shares)))
    return rows


def kept_words(rows: Sequence[Kept]) -> str:
    """Return what follows from the table, in two sentences."""

    def words(some: Sequence[Kept], of: str = "") -> str:
        best = max(some, key=lambda row: (row.kept.mean, -row.calls))
        return f"{100 * best.kept.mean:.1f} %{of} ({best.system}, {best.calls:.2f} calls a query)"

    copies = [row for row in rows if row.look == "replication"]
    coded = [row for row in rows if row.look.startswith(("NeRCC", "BACC"))]
    helped = [row for row in rows if "student" in row.system]
    return (
        f"Without the student, copies keep {words(copies, ' of the labels')}, and codes "
        f"{words(coded)}. With it, copies keep {words(helped)}."
    )
