"""Where the workers' points should lie for a model: measured, layout against layout."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray

from ..codes import NeRCC
from ..codes._checks import check_fields
from ..codes._points import coincident
from ..evaluation._answers import Recorder, batched, mean_losses
from ..evaluation._criteria import Criterion, point_criterion
from ..evaluation._objective import draw_sets
from ..inference.models import Model, check_model
from ..stragglers import AbstractStragglers
from ._descent import Descent
from ._sampling import Sampling, split_points
from ._tune import ROUNDING, TuningStep, cost_of_the_mean, tune

SearchCriterion: TypeAlias = Literal["mse", "cross_entropy", "disagreement"]
# What points follow: data points' own floats, or a function of a batch of them.
Follow: TypeAlias = Literal["inputs"] | Callable[[Any], Any]

# The plain ones first: a mixture whose points are theirs is left out.
SEARCHED = (
    "chebyshev",
    "interleaved",
    "repeated",
    "systematic:0.5",
    "systematic:1",
    "mixed:0.25",
    "mixed:0.5",
    "mixed:0.75",
)

# What is folded into the key, for draws that must not be the same.
_SPLIT, _FIRST_SETS, _HELD_OUT_SETS, _TUNING = 0, 1, 2, 3

# What lambda_dec starts from, by the untuned code's.
_SMOOTHINGS = (1.0, 0.0, 100.0)


@dataclasses.dataclass(frozen=True)
class LayoutTuning:
    """Settings of the gradient descent that tunes the best layouts of a search.

    Attributes:
        best: The number of layouts that are tuned.
        criterion: As in `nested_objective`. Default: the search's; for "disagreement", which has no
            slope, "cross_entropy".
        points: Whether the regression points are tuned.
        sampling: What a step draws.
        descent: Length, speed and judgements.
        on_step: Called with each entry of the history, and the code that it started from.

    Raises:
        ValueError: The number is negative.
    """

    best: int = 2
    criterion: Criterion | None = None
    points: bool = True
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    descent: Descent = dataclasses.field(default_factory=Descent)
    on_step: Callable[[TuningStep, NeRCC], None] = lambda step, code: None

    def __post_init__(self):
        check_fields(self, "best", least=0)


@dataclasses.dataclass(frozen=True)
class LayoutCandidate:
    """A code that `search_layout` judged, and how it did on the held-out groups.

    `layout` is the name of the layout that its points are of, or, if `tuned`, were of at the start.
    `objective` is what the search went by, `disagreement` the share of labels that differ from the
    model's own (1 - RelAcc), the mean over laws. With `follow` the points follow the data, group by
    group, as a `Scheme` has it.
    """

    layout: str
    code: NeRCC
    tuned: bool
    objective: float
    disagreement: float
    follow: Follow | None = None


@dataclasses.dataclass(frozen=True)
class LayoutSearch:
    """The result of `search_layout`: all candidates, the best on the held-out groups first.

    `evaluations` counts the data points and coded data points that the model ran on.
    """

    candidates: tuple[LayoutCandidate, ...]
    evaluations: int
    seconds: float

    @property
    def code(self) -> NeRCC:
        """Return the best candidate's code."""
        return self.candidates[0].code

    @property
    def follow(self) -> Follow | None:
        """Return what the best candidate's points follow, for `Scheme(search.code, follow=...)`."""
        return self.candidates[0].follow

    @property
    def best_of_layouts(self) -> tuple[LayoutCandidate, ...]:
        """Return the best untuned candidate of each layout, and the tuned ones; the best first.

        Those that follow the data are listed by themselves.
        """
        firsts: dict[Any, LayoutCandidate] = {}
        for candidate in self.candidates:
            firsts.setdefault((candidate.layout, candidate.tuned, candidate.follow), candidate)
        return tuple(firsts.values())


def search_layout(
    model: Model,
    x: Float[ArrayLike, "points ..."],
    num_data: int,
    num_workers: int,
    stragglers: Mapping[str, AbstractStragglers],
    *,
    key: PRNGKeyArray,
    layouts: Sequence[str] = SEARCHED,
    follow: Sequence[Follow] = (),
    criterion: SearchCriterion = "disagreement",
    power: float = 1.0,
    sampling: Sampling = Sampling(held_out_share=0.5, held_out_sets=64),  # noqa: B008
    tuning: LayoutTuning = LayoutTuning(),
    batch_size: int = 256,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> LayoutSearch:
    """Find the NeRCC code whose points and smoothing suit a model, without labels.

    Every layout is tried with several decoders: little smoothing to much, interpolation, and
    answers at a data point's own place exact or smoothed. All are judged on the same groups and
    straggler sets. The model runs once on each distinct coded data point. Then the best layouts are
    tuned by gradient descent, points included, and the best on held-out groups is the result. So
    there it is no worse than any layout as it comes, nor than replication: "repeated" points
    rebuild what all copies lost. The result depends on `key` alone.

    Args:
        model: A function of a batch, (B, ...) to (B, outputs); differentiable, if layouts are
            tuned.
        x: Unlabelled data points.
        num_data: K.
        num_workers: N.
        stragglers: Laws by name; one code is sought for all of them.
        key: Random key.
        layouts: Names as in `regression_points`. One whose points are another's for this K and N is
            left out.
        follow: What points may follow in addition: "inputs" or functions of a batch (features, or
            the one parameter that data points differ by). Every code is judged as it is, and with
            its points as far apart as the data points are in each of these. That helps where the
            order is a path through them, and hurts where it is none. Points are tuned as they are.
        criterion: "mse", "cross_entropy" (for logits), or "disagreement", the share of labels that
            differ. Errors count relative to the first layout's untuned code, but "disagreement" as
            it is.
        power: The power of the mean over laws, as in `make_trial`.
        sampling: What is held out, and whether data points come grouped; its `held_out_sets` are
            drawn of each law for either part of the data.
        tuning: How many of the best layouts are tuned, and how.
        batch_size: Data points in a call of the model.
        on_stage: Called with a description of the next stage.

    Raises:
        ValueError: K and N do not allow the layouts, there are none, or the criterion is unknown;
            and as `tune` and `make_trial`.
    """
    start = time.perf_counter()
    slope = tuning.criterion or ("cross_entropy" if criterion == "disagreement" else criterion)
    _check(criterion, slope, layouts, stragglers, power)
    if wrong := [each for each in follow if isinstance(each, str) and each != "inputs"]:
        raise ValueError(f"follow has 'inputs' or functions, not {wrong[0]!r}")
    check_model(model)
    plain = _plain_codes(num_data, num_workers, layouts)
    training, held = split_points(x, num_data, sampling, jax.random.fold_in(key, _SPLIT))

    def score(points: np.ndarray, draw: int) -> _Scores:
        groups = sampling.cut_held_out(points, num_data)
        recorder = Recorder(batched(model, batch_size), groups, batch_size)
        sets = draw_sets(
            stragglers, jax.random.fold_in(key, draw), num_workers, sampling.held_out_sets
        )
        return _Scores(recorder, tuple(stragglers), sets, (criterion, slope), power, plain[0][1])

    # Groups are made as those that judge.
    made = {name: getattr(sampling, name) for name in ("grouped", "order", "buffer_size")}
    drawn = dataclasses.replace(tuning.sampling, **made)
    on_stage(f"judging {len(plain)} untuned codes")
    first = score(training, _FIRST_SETS)
    best: dict[str, NeRCC] = {}
    for name, code in sorted(plain, key=lambda named: first.of(named[1])[0]):
        best.setdefault(name, code)
    candidates = [(name, code, False) for name, code in plain]
    evaluations = 0
    for name in list(best)[: tuning.best]:
        if laws := first.laws_to_tune(best[name]):
            on_stage(f"tuning {name}")
            tuned = tune(
                model, (best[name],), training, {law: stragglers[law] for law in laws},
                key=jax.random.fold_in(key, _TUNING), points=tuning.points, criterion=slope,
                power=power, sampling=drawn, descent=tuning.descent,
                on_step=tuning.on_step,
            )  # fmt: skip
            candidates.append((name, tuned.code, True))
            evaluations += tuned.evaluations
    on_stage(f"judging {len(candidates)} codes on held-out groups")
    second = score(held, _HELD_OUT_SETS)
    judged = [
        LayoutCandidate(*named, *second.of(named[1], each), each)
        for named in candidates
        for each in (None, *follow)
    ]
    evaluations += first.recorder.evaluations + second.recorder.evaluations
    judged.sort(key=lambda candidate: candidate.objective)
    return LayoutSearch(tuple(judged), evaluations, time.perf_counter() - start)


def _plain_codes(
    num_data: int, num_workers: int, layouts: Sequence[str]
) -> list[tuple[str, NeRCC]]:
    """Return the layouts' untuned codes by name, the first layout's own code first."""
    codes: list[tuple[str, NeRCC]] = []
    seen = []
    for name in layouts:
        code = NeRCC(num_data, num_workers, points=name)
        points = (code.alpha.tobytes(), code.beta.tobytes())
        if points not in seen:
            seen.append(points)
            codes += [(name, start) for start in _starts(code, name)]
    return codes


def _starts(code: NeRCC, points: str) -> list[NeRCC]:
    """Return a layout's code as it comes, and with other smoothing.

    An exact one comes first where it is possible: the earlier of two equals is preferred.
    """
    own = bool(jnp.any(coincident(code.beta, code.alpha)))
    return [
        NeRCC(
            code.num_data,
            code.num_workers,
            points=points,
            lambda_dec=factor * code.lambda_dec,
            gap_exponent=code.gap_exponent,
            end_penalty=code.end_penalty,
            exact=exact,
        )
        for exact in ((True, False) if own else (False,))
        for factor in _SMOOTHINGS
        if factor > 0 or not exact  # interpolation is exact as it is
    ]


class _Scores:
    """Scores of codes on the same groups and straggler sets."""

    def __init__(
        self,
        recorder: Recorder,
        laws: Sequence[str],
        sets: tuple[Bool[Array, "sets num_workers"], Int[Array, " sets"]],
        criteria: tuple[Criterion, Criterion],
        power: float,
        reference: NeRCC,
    ):
        """Prepare the scores.

        Args:
            recorder: The model's answers.
            laws: Names of the laws.
            sets: Straggler sets, and the law of each, as by `draw_sets`.
            criteria: The criterion of the search, and that of gradient descent.
            power: The power of the mean over laws.
            reference: The code whose errors count as 1.

        Raises:
            ValueError: An error of the reference is not finite.
        """
        self.recorder, self._criteria, self._power = recorder, criteria, power
        self._laws = laws
        available, law = sets
        answering = np.asarray(jnp.any(available, axis=1))  # where nobody answers there is nothing
        self._available, self._law = available[answering], np.asarray(law)[answering]
        self._scales = np.ones(len(self._laws))
        errors = self._errors(reference)[0]
        if not np.isfinite(errors).all():
            raise ValueError(
                f"under the laws {self._laws} the first layout's errors are {errors}: leave out "
                "laws under which nobody answers; and the model must give finite answers on coded "
                "data points, mixtures of data points"
            )
        if criteria[0] != "disagreement":
            self._scales = np.maximum(errors, np.finfo(errors.dtype).tiny)

    def of(self, code: NeRCC, follow: Follow | None = None) -> tuple[float, float]:
        """Return the objective, infinite where an answer is not finite, and the disagreement."""
        errors, _, disagreements = self._errors(code, follow)
        objective = np.mean((errors / self._scales) ** self._power) ** (1 / self._power)
        return float(objective) if np.isfinite(objective) else np.inf, float(disagreements.mean())

    def laws_to_tune(self, code: NeRCC) -> list[str]:
        """Return the laws under which a code errs: tuning counts errors relative to its own."""
        own = self.recorder.own.reshape(-1, self.recorder.own.shape[-1])
        cost = float(cost_of_the_mean(self._criteria[1], self.recorder.form, jnp.asarray(own)))
        erring = self._errors(code)[1] > ROUNDING * cost
        return [name for name, errs in zip(self._laws, erring, strict=True) if errs]

    def _errors(
        self, code: NeRCC, follow: Follow | None = None
    ) -> Float[np.ndarray, "criteria laws"]:
        """Return the means of both criteria, and of labels that differ, under each law."""
        if follow is None:
            answers = self.recorder.of(code)
        else:
            function = None if isinstance(follow, str) else follow
            answers = self.recorder.following(code, function)
        if not np.isfinite(answers.coded).all():
            return np.full((3, len(self._laws)), np.nan)
        criteria = (*self._criteria, "disagreement")
        errors = np.asarray(mean_losses(answers, self._available, criteria))
        places = range(len(self._laws))
        with np.errstate(invalid="ignore"):  # of no set the mean is NaN
            means = [errors[:, self._law == p].sum(1) / np.sum(self._law == p) for p in places]
        return np.stack(means, axis=1)


def _check(
    criterion: str,
    slope: Criterion,
    layouts: Sequence[str],
    stragglers: Mapping[str, AbstractStragglers],
    power: float,
) -> None:
    if criterion not in get_args(SearchCriterion):
        known = ", ".join(get_args(SearchCriterion))
        raise ValueError(f"criterion must be one of {known}, not {criterion!r}")
    point_criterion(slope)  # says what is wrong with it
    if not layouts:
        raise ValueError("there are no layouts to search")
    if not stragglers:
        raise ValueError("there are no laws of stragglers")
    if not power >= 1:
        raise ValueError(f"power must be 1 or more, not {power}")
