"""Where the workers' points should lie for a model: measured, layout against layout."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float, PRNGKeyArray

from ..codes import NeRCC
from ..codes._checks import check_fields
from ..codes._points import coincident
from ..codes._trees import groups_of
from ..evaluation._answers import Recorder, batched, mean_losses
from ..evaluation._criteria import Criterion, point_criterion
from ..evaluation._objective import Trial, draw_sets
from ..inference.models import Model
from ..stragglers import AbstractStragglers
from ._sampling import Sampling, split_points
from ._tune import Descent, rounding_error, tune

SearchCriterion: TypeAlias = Literal["mse", "cross_entropy", "disagreement"]
# What points follow: data points' own floats, or a function of a batch of them.
Follow: TypeAlias = Literal["inputs"] | Callable[[Any], Any]

# A code's objective, and its errors under each law by the search's criterion, by that of gradient
# descent, and its disagreement.
Score: TypeAlias = tuple[float, np.ndarray, np.ndarray, np.ndarray]
by_law = eqx.filter_jit(Trial.by_law)

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


@dataclasses.dataclass(frozen=True)
class LayoutTuning:
    """Settings of the gradient descent that tunes the best layouts of a search.

    Attributes:
        best: The number of layouts that are tuned.
        criterion: As in `nested_objective`. Default: the search's; for "disagreement", which has no
            slope, "cross_entropy".
        points: Whether the regression points are tuned.
        descent: Length, speed and judgements.

    Raises:
        ValueError: The number is negative, or the criterion unknown.
    """

    best: int = 2
    criterion: Criterion | None = None
    points: bool = True
    descent: Descent = dataclasses.field(default_factory=Descent)

    def __post_init__(self):
        check_fields(self, "best", least=0)
        if self.criterion is not None:
            point_criterion(self.criterion)  # says what is wrong with it


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
        sampling: What is held out, and whether data points come grouped; its `held_out_sets` are
            drawn of each law for either part of the data. A step of gradient descent draws as many
            groups and sets as it says.
        tuning: How many of the best layouts are tuned, and how.
        batch_size: Data points in a call of the model.
        on_stage: Called with a description of the next stage.

    Raises:
        ValueError: K and N do not allow the layouts, there are none, or the criterion is unknown;
            and as `tune` and `make_trial`.
    """
    if criterion not in get_args(SearchCriterion):
        known = ", ".join(get_args(SearchCriterion))
        raise ValueError(f"criterion must be one of {known}, not {criterion!r}")
    if not layouts:
        raise ValueError("there are no layouts to search")
    if not stragglers:
        raise ValueError("there are no laws of stragglers")
    if wrong := [each for each in follow if isinstance(each, str) and each != "inputs"]:
        raise ValueError(f"follow has 'inputs' or functions, not {wrong[0]!r}")
    slope = tuning.criterion or ("cross_entropy" if criterion == "disagreement" else criterion)
    codes = _untuned_codes(num_data, num_workers, layouts)
    # What is folded into the key differs, so that no draws are the same.
    training, held = split_points(x, num_data, sampling, jax.random.fold_in(key, 0))

    def scored_on(points: np.ndarray, draw: int) -> tuple[Recorder, Callable[..., Score]]:
        """Return the recorder of groups, and the function to a code's score on them."""
        recorder = Recorder(batched(model, batch_size), groups_of(points, num_data), batch_size)
        key_sets, laws = jax.random.fold_in(key, draw), tuple(stragglers)
        sets = draw_sets(stragglers, key_sets, num_workers, sampling.held_out_sets)
        trial = Trial(None, None, *sets, jnp.ones(len(laws)), laws, criterion, 1.0)

        def score(code: NeRCC, follow: Follow | None = None, trial: Trial = trial) -> Score:
            if follow is None:
                answers = recorder.of(code)
            else:
                answers = recorder.following(code, None if isinstance(follow, str) else follow)
            if not np.isfinite(answers.coded).all():
                unknown = np.full(len(laws), np.nan)
                return np.inf, unknown, unknown, unknown
            criteria = criterion, slope, "disagreement"
            judged = [by_law(trial, code, each) for each in mean_losses(answers, sets[0], criteria)]
            height = float(judged[0][1])
            own, slopes, wrong = (np.asarray(errors) for errors, _ in judged)
            return height if np.isfinite(height) else np.inf, own, slopes, wrong

        scales = score(codes[0][1])[1]
        if not np.isfinite(scales).all():
            raise ValueError(
                f"under the laws {laws} the first layout's errors are {scales}: leave out laws "
                "under which nobody answers; and the model must give finite answers on coded data "
                "points, mixtures of data points"
            )
        if criterion != "disagreement":
            trial = dataclasses.replace(trial, scales=jnp.asarray(scales))
        return recorder, functools.partial(score, trial=trial)

    on_stage(f"judging {len(codes)} untuned codes")
    first, score = scored_on(training, 1)
    best: dict[str, tuple[NeRCC, Score]] = {}
    scored = [(name, (code, score(code))) for name, code in codes]
    for name, found in sorted(scored, key=lambda named: named[1][1][0]):
        best.setdefault(name, found)
    least = float(rounding_error(slope, first.form, jnp.asarray(first.own)))
    drawn = Sampling(sampling.groups_per_step, sampling.sets_per_step, grouped=sampling.grouped)
    candidates, evaluations = [(name, code, False) for name, code in codes], 0
    for name, (code, found) in list(best.items())[: tuning.best]:
        # Tuning counts errors relative to the code's own.
        laws = zip(stragglers.items(), found[2], strict=True)
        if erring := dict(law for law, error in laws if error > least):
            on_stage(f"tuning {name}")
            tuned = tune(
                model, (code,), training, erring, key=jax.random.fold_in(key, 3),
                points=tuning.points, criterion=slope, sampling=drawn, descent=tuning.descent,
            )  # fmt: skip
            candidates.append((name, tuned.code, True))
            evaluations += tuned.evaluations
    on_stage(f"judging {len(candidates)} codes on held-out groups")
    second, score = scored_on(held, 2)
    judged = []
    for name, code, is_tuned in candidates:
        for each in (None, *follow):
            height, _, _, wrong = score(code, each)
            candidate = LayoutCandidate(name, code, is_tuned, height, float(wrong.mean()), each)
            judged.append(candidate)
    judged.sort(key=lambda candidate: candidate.objective)
    return LayoutSearch(tuple(judged), evaluations + first.evaluations + second.evaluations)


def _untuned_codes(
    num_data: int, num_workers: int, layouts: Sequence[str]
) -> list[tuple[str, NeRCC]]:
    """Return each layout's code as it comes and with other smoothing, by name.

    An exact one comes first where it is possible: the earlier of two equals is preferred.
    """
    codes, seen = [], set()
    for name in layouts:
        code = NeRCC(num_data, num_workers, points=name)
        points = code.alpha.tobytes(), code.beta.tobytes()
        if points in seen:
            continue
        seen.add(points)
        own = bool(jnp.any(coincident(code.beta, code.alpha)))
        kept = {"gap_exponent": code.gap_exponent, "end_penalty": code.end_penalty, "points": name}
        for exact in (True, False) if own else (False,):
            # Interpolation is exact as it is.
            for factor in (1.0, 100.0) if exact else (1.0, 0.0, 100.0):
                smoothing = {"lambda_dec": factor * code.lambda_dec, "exact": exact}
                codes.append((name, NeRCC(num_data, num_workers, **kept, **smoothing)))
    return codes
