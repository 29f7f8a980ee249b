"""The last part of `nercc demo`: labels kept against work, for a scheme and its rivals."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
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
from ..inference.models import Model
from ..schemes import AssessedPredictions, Scheme, calibrate_error_probability, reexecute
from ..stragglers import IndependentStragglers
from ..surrogates import fit_surrogate
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


@dataclasses.dataclass(frozen=True)
class Queries:
    """A model, its student with its relative cost, and data points.

    A surrogate is fitted to the `fit` ones. Of the `test` ones, an error probability is calibrated
    on the first half, and all systems are compared on the second.
    """

    model: Model
    student: Model
    cost: float
    fit: np.ndarray
    test: np.ndarray


def shipped_queries(
    workload: Workload, test: np.ndarray, num_data: int, count: int, seed: int
) -> Queries | None:
    """Return the queries of a shipped model with a student; None for others, and for few inputs.

    `test` are its data points to calibrate on and to compare on; a surrogate is fitted to `count`
    others at most.
    """
    from nercc_models import list_students, load_student, student_card

    model = workload.name
    if workload.x is not None or model not in list_students() or workload.model.outputs == "values":
        return None
    if len(test) < 4 * num_data:
        return None
    card = student_card(model)
    return Queries(
        workload.model,
        WorkerModel(load_student(model), workload.model.outputs),
        card["multiplications"] / card["base_multiplications"],
        workload.points("train", count, seed),
        test,
    )


def kept_labels(queries: Queries, num_data: int, num_workers: int, seed: int) -> list[Kept]:
    """Return the labels kept by the published method, its rivals, and a scheme on few workers."""
    judged = queries.test[len(queries.test) // 2 :]
    judged = judged[: len(judged) // num_data * num_data]
    run, student = batched(queries.model, 256), batched(queries.student, 256)
    own, guess = (np.asarray(each(judged)).argmax(-1) for each in (run, student))
    recorder = Recorder(run, groups_of(judged, num_data), 256)
    few, many = num_data + max(num_data // 4, 1), num_workers

    def kept(infer: Callable[[np.ndarray], np.ndarray], workers: int) -> Estimate:
        draw = np.random.default_rng(seed)
        shares = []
        for _ in range(_SETS):
            masks = draw.random((len(judged) // num_data, workers)) >= RATE
            shares.append(float(np.mean(infer(masks) == own)))
        return Estimate.over(shares)

    def labels(code: AbstractCode) -> Callable[[np.ndarray], np.ndarray]:
        y = recorder.form.split(recorder.of(code).coded)
        return lambda masks: _labels(decode_groups(code, y, masks).predictions).ravel()

    def else_student(masks: np.ndarray) -> np.ndarray:
        """Return the labels of copies, and the student's where no copy answers."""
        found = copies(masks)
        return np.where(found < 0, guess, found)

    published = NeRCC(num_data, many, lambda_dec=0.0)
    copies = labels(Replication(num_data, few))
    return [
        # Known without being run: a straggling call is lost, or exact.
        Kept("one worker a query", "uncoded", num_data, 1.0, Estimate(1 - RATE, 0.0)),
        Kept("lost calls again, later", "hedging", num_data, 1 + RATE, Estimate(1.0, 0.0)),
        *(
            Kept(name, look, n, n / num_data, kept(labels(code), n))
            for name, look, n, code in (
                ("two copies", "replication", 2 * num_data, Replication(num_data, 2 * num_data)),
                ("BACC", "BACC", many, Berrut(num_data, many)),
                ("NeRCC as published", "NeRCC published", many, published),
            )
        ),
        Kept(
            "copies, else the student",
            "replication, else surrogate",
            few,
            few / num_data + queries.cost,
            kept(else_student, few),
        ),
        *_with_scheme(queries, judged, own, NeRCC(num_data, few, points="repeated"), kept, seed),
    ]


def _with_scheme(
    queries: Queries,
    judged: np.ndarray,
    own: np.ndarray,
    code: NeRCC,
    kept: Callable[..., Estimate],
    seed: int,
) -> Iterator[Kept]:
    laws = {"stragglers": IndependentStragglers(RATE)}
    keys = jax.random.split(jax.random.key(seed))
    student = batched(queries.student, 256)

    def arranged(x: np.ndarray) -> np.ndarray:
        return x[np.asarray(order_points(x, code.num_data, features=np.asarray(student(x))))]

    surrogate = fit_surrogate(
        queries.model, queries.student, code, arranged(queries.fit), laws, key=keys[0]
    )
    calibrate = arranged(queries.test[: len(queries.test) // 2])
    probability = calibrate_error_probability(
        queries.model, code, calibrate, laws, key=keys[1], surrogate=surrogate, num_sets=20
    )
    infer = coded_inference(
        queries.model, Scheme(code, surrogate, probability, order="surrogate"), with_status=True
    )
    workers, calls = code.num_workers, code.num_workers / code.num_data + queries.cost

    known: dict[bytes, AssessedPredictions] = {}  # both rows are for the same stragglers

    def assessed(masks: np.ndarray) -> AssessedPredictions:
        name = masks.tobytes()
        if name not in known:
            known[name] = infer(judged, masks)
        return known[name]

    def labels(masks: np.ndarray) -> np.ndarray:
        return _labels(assessed(masks).decoded.predictions)

    def again(masks: np.ndarray) -> np.ndarray:
        sure = reexecute(queries.model, judged, assessed(masks), share=_AGAIN)
        return _labels(sure.decoded.predictions)

    yield Kept("scheme", "scheme", workers, calls, kept(labels, workers))
    name, look = "scheme, uncertain 5 % again", "scheme, uncertain again"
    yield Kept(name, look, workers, calls + _AGAIN, kept(again, workers))


def _labels(predictions: Any) -> np.ndarray:
    """Return the label of each prediction; -1 where it is lost."""
    found = np.asarray(predictions)
    return np.where(np.isfinite(found).all(-1), found.argmax(-1), -1)


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
