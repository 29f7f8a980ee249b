"""The last part of `nercc demo`: labels kept against work, for a scheme and its rivals."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from rich import box
from rich.table import Table

from ..codes import AbstractCode, Berrut, NeRCC, Replication, decode_groups
from ..codes._trees import groups_of
from ..evaluation import Estimate
from ..evaluation._answers import Recorder, batched
from ..evaluation._pictures import system_look
from ..inference import coded_inference, order_points
from ..schemes import AssessedPredictions, Scheme, calibrate_error_probability, reexecute
from ..stragglers import IndependentStragglers
from ..surrogates import Surrogate, fit_surrogate
from ._options import DemoOptions
from ._workload import WorkerModel, Workload

RATE = 0.1  # share of the workers that straggle, independently of each other
_AGAIN = 0.05  # share of the data points, the least certain, that the model answers itself
_SETS = 10  # straggler sets


@dataclasses.dataclass(frozen=True)
class Kept:
    """The share of labels that a system keeps, and the model's calls that a query costs."""

    system: str
    look: str
    workers: int
    calls: float
    kept: Estimate

    def record(self) -> dict[str, Any]:
        low, high = self.kept.interval(share=True)
        record = {"system": self.system, "workers": self.workers, "calls": self.calls}
        return record | {"kept": self.kept.mean, "kept_low": low, "kept_high": high}


def kept_labels(workload: Workload, test: np.ndarray, options: DemoOptions) -> list[Kept]:
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
    run, cheap = batched(model, 256), batched(student, 256)
    own, guess = (np.asarray(each(judged)).argmax(-1) for each in (run, cheap))
    recorder = Recorder(run, groups_of(judged, num_data), 256)
    few, many = num_data + max(num_data // 4, 1), options.num_workers
    rows = [
        # Known without being run: a straggling call is lost, or exact.
        Kept("one worker a query", "uncoded", num_data, 1.0, Estimate(1 - RATE, 0.0)),
        Kept("lost calls again, later", "hedging", num_data, 1 + RATE, Estimate(1.0, 0.0)),
    ]

    def add(
        system: str,
        look: str,
        workers: int,
        more: float,
        infer: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        """Add a system that takes `more` calls a query beyond its workers' own."""
        draw, shares = np.random.default_rng(seed), []
        for _ in range(_SETS):
            masks = draw.random((len(judged) // num_data, workers)) >= RATE
            shares.append(float(np.mean(infer(masks) == own)))
        calls = workers / num_data + more
        rows.append(Kept(system, look, workers, calls, Estimate.over(shares)))

    def labels(predictions: Any) -> np.ndarray:
        """Return the label of each prediction; -1 where it is lost."""
        found = np.asarray(predictions)
        return np.where(np.isfinite(found).all(-1), found.argmax(-1), -1).ravel()

    def decoding(code: AbstractCode) -> Callable[[np.ndarray], np.ndarray]:
        y = recorder.form.split(recorder.of(code).coded)
        return lambda masks: labels(decode_groups(code, y, masks).predictions)

    two, copies = 2 * num_data, decoding(Replication(num_data, few))
    add("two copies", "replication", two, 0.0, decoding(Replication(num_data, two)))
    add("BACC", "BACC", many, 0.0, decoding(Berrut(num_data, many)))
    published = NeRCC(num_data, many, lambda_dec=0.0)
    add("NeRCC as published", "NeRCC published", many, 0.0, decoding(published))

    look = "replication, else surrogate"
    add(
        *("copies, else the student", look, few, cost),
        lambda masks: np.where((found := copies(masks)) < 0, guess, found),
    )
    code = NeRCC(num_data, few, points="repeated", exact=True)
    doubted = Scheme(code, Surrogate(student), redundancy="uncertain", straggler_share=RATE)
    place = coded_inference(model, doubted)
    look = "copies by the student's doubt"
    # The student runs on the copies, too.
    add(look, look, few, cost * (1 + few / num_data), lambda masks: labels(place(judged, masks)))

    # The scheme: similar queries in one group, the student as a surrogate.
    code = NeRCC(num_data, few, points="repeated")
    laws = {"stragglers": IndependentStragglers(RATE)}
    keys = jax.random.split(jax.random.key(seed))

    def arranged(x: np.ndarray) -> np.ndarray:
        return x[np.asarray(order_points(x, num_data, features=np.asarray(cheap(x))))]

    fit = arranged(workload.points("train", options.max_inputs, seed))
    surrogate = fit_surrogate(model, student, code, fit, laws, key=keys[0])
    probability = calibrate_error_probability(
        model, code, arranged(test[:half]), laws, key=keys[1], surrogate=surrogate, num_sets=20
    )
    scheme = Scheme(code, surrogate, probability, order="surrogate")
    infer = coded_inference(model, scheme, with_status=True)
    known: dict[bytes, AssessedPredictions] = {}  # both rows are for the same stragglers

    def assessed(masks: np.ndarray) -> AssessedPredictions:
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
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("system", no_wrap=True)
    for name in ("workers", "calls a query", "labels kept, %"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        low, high = (100 * end for end in row.kept.interval(share=True))
        between = f" {low:.1f}–{high:.1f}" if high > low else ""
        kept = f"{100 * row.kept.mean:.1f}{between}"
        table.add_row(row.system, str(row.workers), f"{row.calls:.2f}", kept)
    return table


def draw_kept(rows: Sequence[Kept]) -> Callable[[Any], Any]:

    def draw(part: Any) -> None:
        axis = part.subplots()
        left = [row for row in sorted(rows, key=lambda row: row.calls) if row.calls < 1.75]
        for row in rows:
            low, high = (100 * end for end in row.kept.interval(share=True))
            here = row.calls, 100 * row.kept.mean
            ends = [[max(here[1] - low, 0)], [max(high - here[1], 0)]]
            look: dict[str, Any] = system_look(row.look) | {"linestyle": "none"}
            axis.errorbar(*here, ends, ms=8, capsize=2, **look)
            name: dict[str, Any]
            if row in left and here[1] > 95:
                # Stepwise below what costs little: no line crosses another's name.
                step = 0.3 + 0.12 * left.index(row)
                line = {"arrowstyle": "-", "color": look["color"], "lw": 0.6, "relpos": (0, 0.5)}
                name = {"xytext": (here[0] + 0.02, step), "arrowprops": line}
                name["textcoords"] = axis.get_xaxis_transform()
            elif row in left:
                name = {"xytext": (12, 0), "textcoords": "offset points"}
            else:
                name = {"xytext": (-12, 0), "textcoords": "offset points", "ha": "right"}
            axis.annotate(row.system, here, va="center", color=look["color"], fontsize=9, **name)
        axis.set(xlabel="calls of the model a query", ylabel="labels kept, %")
        axis.margins(x=0.05, y=0.08)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(f"{100 * RATE:g} % of the workers straggle", fontsize=10)

    return draw
