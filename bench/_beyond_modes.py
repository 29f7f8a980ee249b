"""Every mode that beyond.py measures at one (N, K, S) for one model, on the same stragglers."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from nercc_jax import (
    AbstractCode,
    ExactStragglers,
    NeRCC,
    Parity,
    Replication,
    fit_surrogate,
    search_layout,
)
from nercc_jax.evaluation import Answers, Estimate
from nercc_jax.evaluation._answers import Recorder, batched, mean_losses
from nercc_jax.inference import order_points
from nercc_jax.risk import ErrorProbability
from nercc_jax.risk._error_probability import (
    DecodeAnswers,
    error_probability_from_answers,
    observe_errors,
)
from nercc_jax.stragglers import straggler_sets
from nercc_jax.surrogates import Surrogate
from nercc_jax.surrogates.interface import SurrogatePredictions
from nercc_jax.tuning import Descent, LayoutTuning, Sampling

Model = Callable[..., Array]
_KEPT = eqx.filter_jit(lambda known, mask: known.sums_of(known.decode(mask))["rel_acc"])

# The further layouts are searched too; these are shown by themselves.
SHOWN = ("chebyshev", "interleaved", "repeated")
SHARE = 0.05  # that is executed again
WANTED = (0.005, 0.05)  # shares of the labels given out that a user lets differ
PUBLISHED = np.concatenate([[0.0], np.logspace(-12, 0, 12)])  # lambdas, as one searched for them


@dataclasses.dataclass(frozen=True)
class Order:
    """An order of data points: its features and its buffer; None keeps them as they come."""

    by: str | None = None
    buffer_size: int = 0

    @property
    def name(self) -> str:
        return "no order" if self.by is None else f"{self.by}, buffer {self.buffer_size}"


@dataclasses.dataclass(frozen=True)
class Cell:
    num_workers: int
    num_data: int
    stragglers: int

    @property
    def name(self) -> str:
        return f"({self.num_workers}, {self.num_data}, {self.stragglers})"

    @property
    def law(self) -> dict[str, ExactStragglers]:
        return {"law": ExactStragglers(self.stragglers)}

    def masks(self, seed: int, at_most: int) -> Bool[Array, "sets num_workers"]:
        key = jax.random.fold_in(jax.random.key(seed), 0)
        return straggler_sets(self.law["law"], key, self.num_workers, at_most)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model, its student, and images to choose, calibrate and judge by."""

    model: Model
    student: Model
    choose: np.ndarray
    calibrate: np.ndarray
    judged: np.ndarray
    sets: int
    _said: dict[bytes, np.ndarray] = dataclasses.field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def answers(self, rows: np.ndarray) -> np.ndarray:
        """Return the model's answers to rows, each computed once; most are copies, in all cells."""
        names = [hashlib.sha256(row.tobytes()).digest() for row in rows]
        new = {n: row for n, row in zip(names, rows, strict=True) if n not in self._said}
        if new:
            summary = batched(self.model, 256)(np.stack(list(new.values())))
            self._said.update(zip(new, np.asarray(summary), strict=True))
        return np.stack([self._said[name] for name in names])


class Judged(NamedTuple):
    """Scores of each data point under each set.

    They are its error probability, whether it is wrong, and whether it is given out at each of the
    shares `WANTED`.
    """

    error_probability: Float[np.ndarray, "sets groups num_data"]
    wrong: Bool[np.ndarray, "sets groups num_data"]
    kept: Bool[np.ndarray, "sets groups num_data wanted"]


class Bench:
    """One cell's measurements; `rows` grows as modes are measured."""

    def __init__(self, work: Workload, cell: Cell, log: Callable[[str], Any]):
        self.work, self.cell, self.log = work, cell, log
        self.rows: list[dict[str, Any]] = []
        self.masks = cell.masks(1, work.sets)
        self._student = batched(work.student, 256)
        self._known: dict[tuple[Order, str], Any] = {}

    # Data and answers.

    def groups(self, part: str, order: Order) -> np.ndarray:
        """Return a part of the images, whole groups of K, in this order."""
        x = getattr(self.work, part)
        x = x[: len(x) // self.cell.num_data * self.cell.num_data]
        if order.by is not None:
            features = None if order.by == "pixels" else np.asarray(self._student(x))
            size = max(order.buffer_size, self.cell.num_data)
            x = x[
                np.asarray(order_points(x, self.cell.num_data, features=features, buffer_size=size))
            ]
        return x.reshape(-1, self.cell.num_data, *x.shape[1:])

    def points(self, part: str, order: Order) -> np.ndarray:
        return self.groups(part, order).reshape(-1, *self.work.judged.shape[1:])

    def answers(self, part: str, order: Order, model: str = "model") -> Recorder:
        key = (order, part + model)
        if key not in self._known:
            run = batched(getattr(self.work, model), 256)
            self._known[key] = Recorder(run, self.groups(part, order), 256)
        return self._known[key]

    # Modes.

    def plain(
        self, mode: str, code: AbstractCode, order: Order, part: str = "judged", **more: Any
    ) -> None:
        """Measure a code by itself."""
        known = self.answers(part, order).of(code)
        self.add(mode, _wrong(known, self.masks), order, **more)

    def rivals(self, parity_model: Callable[[int], Model | None]) -> None:
        """Replication, alone and with the surrogate behind it; ParM; the surrogate alone."""
        order, cell = Order(), self.cell
        copies = Replication(cell.num_data, cell.num_workers)
        self.plain("replication", copies, order)
        given = self.answers("judged", order)
        cheap = self.answers("judged", order, "student").own
        off = cheap.argmax(-1) != given.own.argmax(-1)
        lost = np.stack([~np.asarray(copies.recovered(mask)) for mask in self.masks])
        self.add("replication, else surrogate", (lost[:, None] & off).mean(-1), order)
        self.add("surrogate alone", np.tile(off.mean(-1), (len(self.masks), 1)), order)
        parities = cell.num_workers - cell.num_data
        if cell.num_data % parities == 0 and (model := parity_model(cell.num_data // parities)):
            code = Parity(cell.num_data, cell.num_workers)
            known = given.of(code, [batched(model, 256)])
            self.add("ParM", _wrong(known, self.masks), order)

    def published(self) -> NeRCC:
        """Measure the paper's points with the best lambda_dec of a grid, by MSE."""
        shape = (self.cell.num_data, self.cell.num_workers)
        given = self.answers("choose", Order())
        masks = self.cell.masks(2, self.work.sets)
        # The decoder alone differs, and all answers are there.
        recorded = [given.of(NeRCC(*shape, lambda_dec=value)) for value in PUBLISHED]
        errors = [np.mean(mean_losses(each, masks, ("mse",))) for each in recorded]
        return NeRCC(*shape, lambda_dec=float(PUBLISHED[int(np.nanargmin(errors))]))

    def search(self, order: Order, tune_best: int, steps: int) -> dict[str, NeRCC]:
        """Measure the best code of each layout, and ("search") of all, for data in this order."""
        found = search_layout(
            self.work.model, self.points("choose", order), self.cell.num_data,
            self.cell.num_workers, self.cell.law, key=jax.random.key(3),
            sampling=Sampling(held_out_share=0.5, held_out_sets=40, grouped=True),
            tuning=LayoutTuning(best=tune_best, descent=Descent(steps)),
        )  # fmt: skip
        best: dict[str, Any] = {"search": found.candidates[0]}
        for candidate in found.best_of_layouts:
            if candidate.layout in SHOWN and not candidate.tuned:
                best.setdefault(candidate.layout, candidate)
        named = {name: candidate.layout for name, candidate in best.items()}
        self.log(f"{self.cell.name} {order.name}: search picks {named['search']}")
        return {name: candidate.code for name, candidate in best.items()}

    def with_surrogate(self, codes: Mapping[str, NeRCC], order: Order) -> None:
        """Measure the code that does best with the surrogate where it was chosen."""
        code, surrogate, numbers = self.best_with_surrogate(codes, order)
        self.tell("with surrogate", self.judged(code, surrogate, order), order, **numbers)

    def best_with_surrogate(
        self, codes: Mapping[str, NeRCC], order: Order
    ) -> tuple[NeRCC, Surrogate, dict[str, Any]]:
        choices = []
        # What the search picks is often one of the shown ones.
        for name, code in {id(code): (name, code) for name, code in codes.items()}.values():
            surrogate = fit_surrogate(
                self.work.model, self.work.student, code, self.points("choose", order),
                self.cell.law, key=jax.random.key(4), num_sets=40,
            )  # fmt: skip
            _, wrong = self._error_probabilities("choose", order, code, surrogate)
            choices.append((wrong.mean(), name, code, surrogate))
        _, name, code, surrogate = min(choices, key=lambda choice: choice[0])
        numbers = {"layout": name, "theta": float(surrogate.theta), "kappa": float(surrogate.kappa)}
        return code, surrogate, numbers

    def judged(self, code: NeRCC, surrogate: Surrogate | None, order: Order) -> Judged:
        """Return the calibrated error probabilities of the part to judge, and the truth."""
        own = self.answers("calibrate", order).of(code)
        beside = self._beside("calibrate", order, code, surrogate)
        error_probability = error_probability_from_answers(
            own, self.cell.law, jax.random.key(5), 100, surrogate, beside
        )
        score, wrong = self._error_probabilities(
            "judged", order, code, surrogate, error_probability
        )
        limits = [error_probability.limit(share) for share in WANTED]
        return Judged(score, wrong, score[..., None] <= np.array(limits))

    def tell(self, mode: str, judged: Judged, order: Order, **more: Any) -> None:
        """Record a mode as it is, with 5 % by the model, and with as many as are needed."""
        score, wrong = judged.error_probability, judged.wrong
        self.add(mode, wrong.mean(-1), order, **more, bins=_bins(score, wrong))
        rest, flat = wrong.copy(), score.reshape(len(score), -1)
        again = np.argsort(-flat, axis=1)[:, : int(SHARE * flat.shape[1])]
        np.put_along_axis(rest.reshape(flat.shape), again, False, axis=1)
        self.add(f"{mode}, {SHARE:.0%} again", rest.mean(-1), order, **more, again=SHARE)
        for share, kept in zip(WANTED, np.moveaxis(judged.kept, -1, 0), strict=True):
            given = kept & (score > 0)
            self.add(
                f"{mode}, at most {share:.1%}", (wrong & kept).mean(-1), order, **more,
                again=float(1 - kept.mean()), promised=share, given=float(given.mean()),
                wrong_of_given=_share(wrong & given, given),
            )  # fmt: skip

    def _beside(
        self, part: str, order: Order, code: NeRCC, surrogate: Surrogate | None
    ) -> SurrogatePredictions | None:
        """Return the student's outputs, as the knowledge that answers are compared with."""
        if surrogate is None:
            return None
        student = self.answers(part, order, "student").of(code)
        return SurrogatePredictions(own=student.own, coded=student.coded, form=student.form)

    def _error_probabilities(
        self,
        part: str,
        order: Order,
        code: NeRCC,
        surrogate: Surrogate | None,
        error_probability: ErrorProbability | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return each data point's error probability and whether it is wrong, under each set."""
        beside = self._beside(part, order, code, surrogate)
        own = self.answers(part, order).of(code)
        decode = DecodeAnswers(own, surrogate, beside)
        seen = observe_errors(decode, own.own, own.form, self.masks)
        score = (
            jnp.zeros(seen.sure.shape)
            if error_probability is None
            else error_probability.of_features(seen.features)
        )
        return np.asarray(jnp.where(seen.sure, 0, score)), np.asarray(seen.wrong)

    def add(
        self, mode: str, wrong: Float[np.ndarray, "sets groups"], order: Order, **more: Any
    ) -> None:
        """Add a row of the share of labels that are not the model's own."""
        estimate = Estimate.over(wrong)
        self.rows.append(
            {"mode": mode, "order": order.name, "disagreement": estimate.mean,
             "half_width": estimate.half_width, **more}
        )  # fmt: skip


def _share(
    some: Bool[np.ndarray, "sets groups num_data"], of: Bool[np.ndarray, "sets groups num_data"]
) -> tuple[float, float] | None:
    """Return a share of data points over all sets, and half of its 95 % interval; None of none."""
    part, whole = some.sum(-1), of.sum(-1)
    if not whole.any():
        return None
    share = float(part.sum() / whole.sum())
    return share, Estimate.over((part - share * whole) / whole.mean()).half_width


def _bins(
    score: Float[np.ndarray, "sets groups num_data"],
    wrong: Bool[np.ndarray, "sets groups num_data"],
) -> list[dict[str, float]]:
    """Promised and observed disagreement in five bins of as many promised wrong ones each."""
    order = np.argsort(score, axis=None)
    total = np.cumsum(score.ravel()[order]) / max(float(score.sum()), 1e-30)
    bins = []
    for number in range(5):
        chosen = order[(total > number / 5) & (total <= (number + 1) / 5)]
        chosen = chosen[score.ravel()[chosen] > 0]
        if len(chosen):
            bins.append(
                {"number": len(chosen), "promised": float(score.ravel()[chosen].mean()),
                 "observed": float(wrong.ravel()[chosen].mean())}
            )  # fmt: skip
    return bins


def _wrong(
    known: Answers, masks: Bool[Array, "sets num_workers"]
) -> Float[np.ndarray, "sets groups"]:
    """Return the share of labels that are not the model's own; lost ones are wrong."""
    kept = [_KEPT(known, mask) for mask in masks]
    return 1 - np.asarray(kept) / known.code.num_data
