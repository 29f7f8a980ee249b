"""`nercc demo`: coded inference under stragglers, on real data, next to other codes."""

import dataclasses
from collections.abc import Callable, Sequence
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
from ..evaluation import Estimate, evaluate, pictures
from ..evaluation._answers import batched
from ..inference import coded_inference, order_points
from ..schemes import Scheme, calibrate_error_probability, reexecute
from ..stragglers import IndependentStragglers
from ..surrogates import Surrogate, fit_surrogate
from ..tuning import learn_decoder
from ._comparison import evaluating, straggler_laws, straggler_table
from ._errors import of_option
from ._options import Options
from ._output import make_table, print_whole, write_json
from ._process import compile_quickly
from ._workload import WorkerModel, Workload, find_workload

# Groups that the demo learns a decoder from: a second or two, where `learn_decoder` takes more.
_GROUPS = 100
RATE = 0.1  # share of the workers that straggle, independently of each other
_AGAIN = 0.05  # share of the data points, the least certain, that the model answers itself
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
    with evaluating(console) as progress:
        further: Any = {"key": key, "num_sets": options.sets, "progress": progress}
        rows = evaluate(model, codes, x, laws, **further)
    what = (
        f"{options.model}, K={num_data}, N={num_workers}, {rows[0].num_data_points} data points x "
        f"{options.sets} straggler sets"
    )
    console.print(f"\n{what}; means over the sets with 95 % intervals; * is the best in a row.")
    # Replication recovers exact predictions or none: it has no error to compare.
    approximate = [row for row in rows if row.code != "replication"]
    title = f"MSE of decoded {options.outputs}"
    print_whole(console, straggler_table(approximate, "mse", title, best="min"))
    panels = {"mse": (f"MSE of {options.outputs}", True)}
    if options.outputs != "values":
        title = (
            "RelAcc: % of predictions with the label that the uncoded model gives; those not "
            "recovered count as wrong"
        )
        print_whole(console, straggler_table(rows, "rel_acc", title, best="max"))
        panels["rel_acc"] = ("labels kept (RelAcc)", False)
    with console.status("measuring labels kept for an amount of work; compiles first ..."):
        sized = dataclasses.replace(options, num_data=num_data, num_workers=num_workers)
        kept_rows = kept_labels(workload, x, sized)
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
        straggle = f"{100 * RATE:g} % of the workers straggle"
        above.append(lambda part: pictures.costs_figure(kept_rows, straggle, part))
    pictures.comparison_figure(rows, panels, what, above).savefig(options.plot, dpi=150)
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


def kept_labels(workload: Workload, test: np.ndarray, options: Options) -> list[Kept]:
    """Return the labels kept by the published method, its rivals, and a scheme on few workers.

    The scheme's error probability is calibrated on the first half of the test data, and all systems
    are compared on the second. There are none for a model without a shipped student, nor for few
    data points.
    """
    from nercc_models import list_students, load_student, student_card

    model, name, num_data, seed = workload.model, workload.name, options.num_data, options.seed
    shipped = workload.x is None and name in list_students()
    if not shipped or options.outputs == "values" or len(test) < 4 * num_data:
        return []
    card, student = student_card(name), WorkerModel(load_student(name), options.outputs)
    cost = card["multiplications"] / card["base_multiplications"]
    half = len(test) // 2
    judged = test[half:][: (len(test) - half) // num_data * num_data]
    groups = judged.reshape(-1, num_data, *judged.shape[1:])
    cheap = batched(student, 256)
    own, guess = (np.asarray(each(judged)).argmax(-1) for each in (batched(model, 256), cheap))
    few, many, two = num_data + max(num_data // 4, 1), options.num_workers, 2 * num_data
    # Known without being run: a straggling call is lost, or exact.
    rows = [
        Kept("one worker a query", "uncoded", num_data, 1.0, Estimate(1 - RATE, 0.0)),
        Kept("lost calls again, later", "hedging", num_data, 1 + RATE, Estimate(1.0, 0.0)),
    ]

    def labels(predictions: Any) -> np.ndarray:
        """Return the label of each prediction; -1 where it is lost."""
        found = np.asarray(predictions)
        return np.where(np.isfinite(found).all(-1), found.argmax(-1), -1).ravel()

    def add(system: str, look: str, workers: int, more: float, run: Any) -> None:
        """Add a system that takes `more` calls a query beyond its workers' own.

        It is a code or a scheme, or a function of straggler sets that returns labels.
        """
        if isinstance(run, AbstractCode | Scheme):
            infer, x = coded_inference(model, run), judged if isinstance(run, Scheme) else groups
            run = lambda masks: labels(infer(x, masks))  # noqa: E731
        draw, shares = np.random.default_rng(seed), []
        for _ in range(_SETS):
            masks = draw.random((len(judged) // num_data, workers)) >= RATE
            shares.append(float(np.mean(run(masks) == own)))
        calls = workers / num_data + more
        rows.append(Kept(system, look, workers, calls, Estimate.over(shares)))

    add("two copies", "replication", two, 0.0, Replication(num_data, two))
    add("BACC", "BACC", many, 0.0, Berrut(num_data, many))
    published = NeRCC(num_data, many, lambda_dec=0.0)
    add("NeRCC as published", "NeRCC published", many, 0.0, published)
    copies, look = coded_inference(model, Replication(num_data, few)), "replication, else surrogate"

    def else_guessed(masks: np.ndarray) -> np.ndarray:
        found = labels(copies(groups, masks))
        return np.where(found < 0, guess, found)

    add("copies, else the student", look, few, cost, else_guessed)
    code = NeRCC(num_data, few, points="repeated", exact=True)
    placed = Scheme(code, Surrogate(student), redundancy="uncertain", straggler_share=RATE)
    look = "copies by the student's doubt"
    add(look, look, few, cost * (1 + few / num_data), placed)  # it runs on the copies, too

    # The scheme: similar queries in one group, the student as a surrogate.
    code = NeRCC(num_data, few, points="repeated")
    laws = {"stragglers": IndependentStragglers(RATE)}
    keys = jax.random.split(jax.random.key(seed))

    def arranged(x: np.ndarray) -> np.ndarray:
        return x[np.asarray(order_points(x, num_data, features=np.asarray(cheap(x))))]

    fit = arranged(workload.points("train", options.max_inputs or 1000, seed))
    surrogate = fit_surrogate(model, student, code, fit, laws, key=keys[0])
    probability = calibrate_error_probability(
        model, code, arranged(test[:half]), laws, key=keys[1], surrogate=surrogate, num_sets=20
    )
    scheme = Scheme(code, surrogate, probability, order="surrogate")
    infer = coded_inference(model, scheme, with_status=True)
    known: dict[bytes, Any] = {}  # both rows are for the same stragglers

    def assessed(masks: np.ndarray) -> Any:
        if masks.tobytes() not in known:
            known[masks.tobytes()] = infer(judged, masks)
        return known[masks.tobytes()]

    add("scheme", "scheme", few, cost, lambda masks: labels(assessed(masks).decoded.predictions))
    add(
        *("scheme, uncertain 5 % again", "scheme, uncertain again", few, cost + _AGAIN),
        lambda masks: labels(
            reexecute(model, judged, assessed(masks), share=_AGAIN).decoded.predictions
        ),
    )
    return rows


def kept_table(rows: Sequence[Kept]) -> Table:
    title = (
        f"Labels kept against work, where {100 * RATE:g} % of the workers straggle. A repeated "
        "call is exact, and its\nanswer comes later. The scheme: repeated points, similar queries "
        "in one group, the shipped student\nas a surrogate, and an error probability that decides "
        "what to run again"
    )
    columns = ("system", "workers", "calls a query", "labels kept, %")

    def cells(row: Kept) -> tuple[str, ...]:
        low, high = (100 * end for end in row.kept.interval(share=True))
        between = f" {low:.1f}–{high:.1f}" if high > low else ""
        kept = f"{100 * row.kept.mean:.1f}{between}"
        return row.system, str(row.workers), f"{row.calls:.2f}", kept

    return make_table(title, columns, map(cells, rows))
