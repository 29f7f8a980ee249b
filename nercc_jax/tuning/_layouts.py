"""Where the workers' points should lie for a model: measured, layout against layout."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray

from ..codes import NeRCC, coincident
from ..evaluation import CodedAnswers, Loss, batched, draw_sets, point_loss
from ..inference import Model
from ..stragglers import AbstractStragglers
from ._tune import split_groups, tune

Objective: TypeAlias = Literal["mse", "cross_entropy", "disagreement"]

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

# What lambda_dec starts from, by the untuned code's.
_SMOOTHINGS = (1.0, 0.0, 100.0)

# An error below this share of what the mean output for every data point would cost is rounding.
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A code that `search_layout` judged, and how it did on the held-out groups.

    `layout` is the name of the layout that its points are of, or, if `tuned`, were of at the start.
    `objective` is what the search went by, `disagreement` the share of labels that differ from the
    model's own (1 - RelAcc), the mean over laws.
    """

    layout: str
    code: NeRCC
    tuned: bool
    objective: float
    disagreement: float


@dataclasses.dataclass(frozen=True)
class LayoutSearch:
    """What `search_layout` found: all candidates, the best on the held-out groups first.

    `evaluations` counts the data points and coded data points that the model ran on.
    """

    candidates: tuple[Candidate, ...]
    evaluations: int
    seconds: float

    @property
    def code(self) -> NeRCC:
        """The best candidate's code."""
        return self.candidates[0].code

    @property
    def best_of_layouts(self) -> tuple[Candidate, ...]:
        """The best untuned candidate of each layout, and the tuned ones; the best first."""
        firsts: dict[tuple[str, bool], Candidate] = {}
        for candidate in self.candidates:
            firsts.setdefault((candidate.layout, candidate.tuned), candidate)
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
    objective: Objective = "disagreement",
    order: float = 1.0,
    grouped: bool = False,
    held_out_share: float = 0.5,
    num_sets: int = 64,
    tune_best: int = 2,
    loss: Loss | None = None,
    batch_size: int = 256,
    on_stage: Callable[[str], None] = lambda stage: None,
    **tuning: Any,
) -> LayoutSearch:
    """Finds the NeRCC code whose points and smoothing suit a model, without labels.

    Every layout stands with several decoders: little smoothing to much, interpolation, and answers
    at a data point's own place exact or smoothed. All are judged on the same groups and straggler
    sets. The model runs once on each distinct coded data point, so layouts that send data points as
    they are share those. Then the best `tune_best` layouts are tuned by gradient descent, points
    included, and what does best on held-out groups is the result. So there it is no worse than any
    layout as it comes, nor than replication: "repeated" points rebuild what all copies lost.

    **Arguments:**

    - `model`: a callable on a batch, (B, ...) to (B, outputs); differentiable, to be tuned.
    - `x`: unlabelled data points; a random `held_out_share` of them, in whole groups, is held out.
      `grouped` as in `tune`.
    - `stragglers`: laws by name; one code is sought for all of them. `num_sets` sets are drawn of
      each, for either part of the data, or all taken if they are fewer.
    - `layouts`: names as in `regression_points`; one whose points K and N make those of another
      before it is left out.
    - `objective`: "mse", "cross_entropy" (outputs that are logits), or "disagreement", the share of
      labels that differ; the power mean over laws, with `order` as in `make_trial`. Errors count
      relative to the first layout's untuned code, but "disagreement" as it is.
    - `loss`: what gradient descent goes by, as in `nested_errors`; unless given, the objective, or
      for "disagreement", which has no slope, "cross_entropy".
    - `on_stage`: called with what is done next. Further options are those of `tune`.

    The result depends on `key` alone. Raises: ValueError for layouts that K and N do not allow, or
    none, for an unknown objective, and as `tune` and `make_trial` do.
    """
    start = time.perf_counter()
    goal = loss or ("cross_entropy" if objective == "disagreement" else objective)
    _check(objective, goal, layouts, stragglers, order, num_sets=num_sets, tune_best=tune_best)
    plain = _plain_codes(num_data, num_workers, layouts)
    units, held = split_groups(np.asarray(x), num_data, key, held_out_share, grouped=grouped)
    seen = units.reshape(-1, *held.shape[2:])
    seen = seen[: len(seen) // num_data * num_data]
    by: Loss = _differs if objective == "disagreement" else objective

    def judge(groups: np.ndarray, place: int) -> _Judge:
        draw, reference = jax.random.fold_in(key, place), plain[0][1]
        answers = CodedAnswers(batched(model, batch_size), groups, batch_size)
        return _Judge(answers, stragglers, draw, num_sets, (by, goal), order, reference)

    on_stage(f"judging {len(plain)} untuned codes")
    first = judge(seen.reshape(-1, *held.shape[1:]), 1)
    best: dict[str, NeRCC] = {}
    for name, code in sorted(plain, key=lambda named: first.scores(named[1])[0]):
        best.setdefault(name, code)
    candidates = [(name, code, False) for name, code in plain]
    evaluations = 0
    for name in list(best)[:tune_best]:
        if laws := first.laws_to_tune(best[name]):
            on_stage(f"tuning {name}")
            options = {"points": True, "order": order, **tuning}
            tuned = tune(
                model, best[name], seen, {law: stragglers[law] for law in laws}, loss=goal,
                key=jax.random.fold_in(key, 3), grouped=grouped, **options,
            )  # fmt: skip
            candidates.append((name, tuned.code, True))
            evaluations += tuned.evaluations
    on_stage(f"judging {len(candidates)} codes on held-out groups")
    second = judge(held, 2)
    judged = [Candidate(*named, *second.scores(named[1])) for named in candidates]
    evaluations += first.answers.evaluations + second.answers.evaluations
    judged.sort(key=lambda candidate: candidate.objective)
    return LayoutSearch(tuple(judged), evaluations, time.perf_counter() - start)


def _plain_codes(
    num_data: int, num_workers: int, layouts: Sequence[str]
) -> list[tuple[str, NeRCC]]:
    """The layouts' untuned codes by the layout's name, the first layout's own code first."""
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
    """A layout's code as it comes, and with other smoothing; where it can be, exact too, and first:
    the earlier one is preferred where two do alike."""
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


class _Judge:
    """Scores of codes on the same groups and straggler sets."""

    def __init__(
        self,
        answers: CodedAnswers,
        stragglers: Mapping[str, AbstractStragglers],
        key: PRNGKeyArray,
        num_sets: int,
        losses: tuple[Loss, Loss],
        order: float,
        reference: NeRCC,
    ):
        """`losses` are what the search goes by and what gradient descent does.

        Raises: ValueError where an error of the reference is not finite.
        """
        self.answers, self._losses, self._order = answers, losses, order
        self._laws = tuple(stragglers)
        available, law = draw_sets(stragglers, key, reference.num_workers, num_sets)
        told = np.asarray(jnp.any(available, axis=1))  # a set in which nobody answers tells nothing
        self._available, self._law = available[told], np.asarray(law)[told]
        self._scales = np.ones(len(self._laws))
        errors = self._errors(reference)[0]
        if not np.isfinite(errors).all():
            raise ValueError(
                f"under the laws {self._laws} the first layout's errors are {errors}: leave out "
                "laws under which nobody answers; and the model must give finite answers on coded "
                "data points, mixtures of data points"
            )
        if losses[0] is not _differs:
            self._scales = np.maximum(errors, np.finfo(errors.dtype).tiny)

    def scores(self, code: NeRCC) -> tuple[float, float]:
        """The objective, infinite where an answer is not finite, and the disagreement."""
        errors, _, disagreements = self._errors(code)
        objective = np.mean((errors / self._scales) ** self._order) ** (1 / self._order)
        return float(objective) if np.isfinite(objective) else np.inf, float(disagreements.mean())

    def laws_to_tune(self, code: NeRCC) -> list[str]:
        """The laws under which a code errs: tuning counts errors relative to its own."""
        originals = jnp.asarray(self.answers.originals)
        mean = jnp.mean(originals, axis=(0, 1))
        mean = jnp.broadcast_to(mean, (len(originals), 1, mean.size))
        ignorant = jnp.ones((1, originals.shape[1], 1), originals.dtype)
        cost = float(_set_errors(self._losses[1:], ignorant, mean, originals)[0, 0])
        erring = self._errors(code)[1] > _ROUNDING * cost
        return [name for name, errs in zip(self._laws, erring, strict=True) if errs]

    def _errors(self, code: NeRCC) -> Float[np.ndarray, "losses laws"]:
        """The mean of both losses, and of labels that differ, under each law."""
        given = self.answers.of(code)
        if not np.isfinite(given).all():
            return np.full((3, len(self._laws)), np.nan)
        matrices = _decoders(code, self._available)
        losses = (*self._losses, _differs)
        arrays = map(jnp.asarray, (given, self.answers.originals))
        errors = np.asarray(_set_errors(losses, matrices, *arrays))
        places = range(len(self._laws))
        with np.errstate(invalid="ignore"):  # of no set the mean is NaN
            means = [errors[:, self._law == p].sum(1) / np.sum(self._law == p) for p in places]
        return np.stack(means, axis=1)


@eqx.filter_jit
def _decoders(
    code: NeRCC, available: Bool[Array, "sets num_workers"]
) -> Float[Array, "sets num_data num_workers"]:
    return jax.vmap(code.decoder_matrix)(available)


@eqx.filter_jit
def _set_errors(
    losses: tuple[Loss, ...],
    matrices: Float[Array, "sets num_data num_workers"],
    given: Float[Array, "groups num_workers outputs"],
    originals: Float[Array, "groups num_data outputs"],
) -> Float[Array, "losses sets"]:
    """As `nested_errors`, of several losses, for answers that are known."""

    of_points = [point_loss(loss) for loss in losses]

    def of_set(matrix: Array) -> Float[Array, " losses"]:
        decoded = jnp.matmul(matrix, given, precision=jax.lax.Precision.HIGHEST)
        return jnp.stack(
            [jnp.mean(jax.vmap(jax.vmap(each))(decoded, originals)) for each in of_points]
        )

    return jax.lax.map(of_set, matrices).T


def _differs(decoded: Array, original: Array) -> Float[Array, ""]:
    """Whether the label is not the model's own."""
    return (jnp.argmax(decoded) != jnp.argmax(original)).astype(decoded.dtype)


def _check(
    objective: str,
    loss: Loss,
    layouts: Sequence[str],
    stragglers: Mapping[str, AbstractStragglers],
    order: float,
    **counts: int,
) -> None:
    if objective not in get_args(Objective):
        known = ", ".join(get_args(Objective))
        raise ValueError(f"objective must be one of {known}, not {objective!r}")
    point_loss(loss)  # says what is wrong with it
    if not layouts:
        raise ValueError("there are no layouts to search")
    if not stragglers:
        raise ValueError("there are no laws of stragglers")
    if not order >= 1:
        raise ValueError(f"order must be 1 or more, not {order}")
    for name, count in counts.items():
        least = 1 if name == "num_sets" else 0
        if not isinstance(count, int) or isinstance(count, bool) or count < least:
            raise ValueError(f"{name} must be an integer from {least} on, not {count!r}")
