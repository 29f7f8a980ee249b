"""`nercc demo`: coded inference under stragglers, on real data, next to other codes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from ..codes import (
    AbstractCode,
    Berrut,
    BerrutSpline,
    Lagrange,
    NeRCC,
    Replication,
    load_code,
)
from ..evaluation import Estimate, pictures
from ..evaluation._answers import batched
from ..inference import coded_inference
from ..schemes import Scheme
from ..surrogates import Surrogate
from ..tuning import learn_decoder
from ._command import of_option
from ._comparison import compare, straggler_laws
from ._options import Options
from ._output import make_table, print_whole, write_json
from ._process import compile_quickly
from ._workload import WorkerModel, Workload, find_workload

# Groups that the demo learns a decoder from: a second or two, where `learn_decoder` takes more.
_GROUPS = 100
RATE = 0.1  # share of the workers that straggle, independently of each other
_SETS = 10  # straggler sets


def demo(options: Options) -> None:
    """Compare codes at each number of stragglers, and labels kept against work."""
    num_data, num_workers, seed = options.num_data, options.num_workers, options.seed
    codes: dict[str, AbstractCode] = {}
    if options.code is not None:
        with of_option(f"--code {options.code}"):
            codes = {"tuned": load_code(options.code)}
        num_data, num_workers = codes["tuned"].num_data, codes["tuned"].num_workers
    if num_workers < num_data:
        raise ValueError(
            f"--num-workers {num_workers}: the codes compared need at least as many workers as "
            f"data points, {num_data}"
        )
    laws = straggler_laws(num_data, num_workers, options.max_stragglers)
    codes["NeRCC"] = nercc = NeRCC(num_data, num_workers)
    workload = find_workload(options)
    model, key, console = workload.model, jax.random.key(seed), Console()
    x = workload.groups("test", options, num_data)
    compile_quickly(model, x, 20 * len(x))
    training = workload.points("train", options.max_inputs or 1000, seed)
    if len(training) >= num_data:
        try:
            with console.status("learning a decoder ..."):
                learned = learn_decoder(model, nercc, training, key=key, num_groups=_GROUPS)
            codes["NeRCC learned"] = learned
        except ValueError as error:  # other codes take what is not finite for stragglers
            console.print(f"no decoder was learned: {error}", soft_wrap=True)
    size = num_data, num_workers
    codes |= {"BACC": Berrut(*size), "BSCC": BerrutSpline(*size), "LCC": Lagrange(*size)}
    codes["replication"] = Replication(*size)
    what = f"{options.model}, K={num_data}, N={num_workers}"
    rows = compare(console, options, model, codes, x, laws, what)
    panels = {"mse": (f"MSE of {options.outputs}", True)}
    if options.outputs != "values":
        panels["rel_acc"] = ("labels kept (RelAcc)", False)
    with console.status("measuring labels kept for an amount of work; compiles first ..."):
        coded = {"BACC": codes["BACC"], "NeRCC published": NeRCC(*size, lambda_dec=0.0)}
        coded |= {name: codes[name] for name in ("NeRCC learned", "tuned") if name in codes}
        kept_rows = kept_labels(workload, x, coded, options)
    above: list[Callable[[Any], Any]] = []
    if options.outputs != "values" and x.ndim == 4 and x.shape[-1] in (1, 3):
        # One batch: K images, N coded ones, and K labels decoded without a fifth of the workers.
        some, coded = x[:num_data], np.asarray(nercc.encode(x[:num_data]))
        available = np.random.default_rng(seed).permutation(num_workers) >= num_workers // 5
        run = batched(model, num_workers)
        own, decoded = np.asarray(run(some)), nercc.decode(np.asarray(run(coded)), available)
        grey = x.shape[-1] == 1
        images, mixtures = (each[..., 0] if grey else each for each in (some, coded))
        labels = [np.asarray(each).argmax(-1).tolist() for each in (decoded, own)]
        above.append(
            lambda part: pictures.batch_figure(images, mixtures, available, *labels, into=part)
        )
    if kept_rows:
        print_whole(console, kept_table(kept_rows))
        console.print(kept_words(kept_rows), highlight=False)
        straggle = f"{100 * RATE:g} % of the workers straggle"
        above.append(lambda part: pictures.costs_figure(kept_rows, straggle, part))
    title = f"{what}, {rows[0].num_data_points} data points x {options.sets} straggler sets"
    pictures.straggler_figure(rows, panels, title, above).savefig(options.plot, dpi=150)
    console.print(f"picture: {options.plot.resolve()}", soft_wrap=True)
    about = {"model": options.model, "data": workload.source, "outputs": options.outputs}
    about |= {"seed": seed, "num_data": num_data, "num_workers": num_workers}
    kept = []
    for row in kept_rows:
        low, high = row.kept.interval(share=True)
        record = {"system": row.system, "workers": row.workers, "calls": row.calls}
        kept.append(record | {"kept": row.kept.mean, "kept_low": low, "kept_high": high})
    write_json(console, options.numbers, about | {"labels_kept": kept}, rows.records())


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
    shipped = workload.x is None and name in list_students()
    if not shipped or options.outputs == "values" or len(test) < 4 * num_data:
        return []
    card, student = student_card(name), WorkerModel(load_student(name), options.outputs)
    cost = card["multiplications"] / card["base_multiplications"]
    judged = test[: len(test) // num_data * num_data]
    groups = judged.reshape(-1, num_data, *judged.shape[1:])
    few, two = num_data + max(num_data // 4, 1), 2 * num_data
    own, guess = (np.asarray(batched(each, 256)(judged)).argmax(-1) for each in (model, student))
    # Known without being run: a straggling call is lost, or exact.
    rows = [
        Kept("one worker a query", "uncoded", num_data, 1.0, Estimate(1 - RATE, 0.0)),
        Kept("lost calls again, later", "hedging", num_data, 1 + RATE, Estimate(1.0, 0.0)),
    ]

    def add(
        system: str, look: str, workers: int, run: Any, cost: float = 0.0, lost: Any = -1
    ) -> None:
        """Add a code or a scheme, with the student's calls a query, and the labels of what is lost.

        It runs with the same stragglers for all systems of as many workers.
        """
        infer, shares = coded_inference(model, run), []
        x, draw = judged if isinstance(run, Scheme) else groups, np.random.default_rng(seed)
        for _ in range(_SETS):
            masks = draw.random((len(groups), workers)) >= RATE
            found = np.asarray(infer(x, masks)).reshape(len(judged), -1)
            labels = np.where(np.isfinite(found).all(-1), found.argmax(-1), lost)
            shares.append(float(np.mean(labels == own)))
        rows.append(Kept(system, look, workers, workers / num_data + cost, Estimate.over(shares)))

    add("two copies", "replication", two, Replication(num_data, two))
    for system, code in codes.items():
        add(system, system, many, code)
    copies, look = Replication(num_data, few), "replication, else surrogate"
    add("copies, else the student", look, few, copies, cost, guess)
    code = NeRCC(num_data, few, points="repeated", exact=True)
    look = "copies by the student's doubt"
    placed = Scheme(code, Surrogate(student), redundancy="uncertain", straggler_share=RATE)
    add(look, look, few, placed, cost * (1 + few / num_data))  # it runs on the copies, too
    return rows


def kept_table(rows: Sequence[Kept]) -> Table:
    title = (
        f"Labels kept against work, where {100 * RATE:g} % of the workers straggle. A repeated "
        "call is exact, and its\nanswer comes later; the student is the shipped one"
    )
    columns = ("system", "workers", "calls a query", "labels kept, %")

    def cells(row: Kept) -> tuple[str, ...]:
        low, high = (100 * end for end in row.kept.interval(share=True))
        between = f" {low:.1f}–{high:.1f}" if high > low else ""
        kept = f"{100 * row.kept.mean:.1f}{between}"
        return row.system, str(row.workers), f"{row.calls:.2f}", kept

    return make_table(title, columns, map(cells, rows))


def kept_words(rows: Sequence[Kept]) -> str:
    """Return what follows from the table, in two sentences."""

    def words(some: Sequence[Kept], of: str = "") -> str:
        best = max(some, key=lambda row: (row.kept.mean, -row.calls))
        return f"{100 * best.kept.mean:.1f} %{of} ({best.system}, {best.calls:.2f} calls a query)"

    copies = [row for row in rows if row.look == "replication"]
    coded = [row for row in rows if row.look.startswith(("NeRCC", "BACC", "tuned"))]
    helped = [row for row in rows if "student" in row.system]
    return (
        f"Without the student, copies keep {words(copies, ' of the labels')}, and codes "
        f"{words(coded)}. With it, copies keep {words(helped)}."
    )
