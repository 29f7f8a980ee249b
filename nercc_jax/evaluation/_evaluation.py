"""Codes side by side: the same data points, the same stragglers, the same metrics."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray
from scipy.special import stdtrit

from ..codes import AbstractCode, decode_groups, encode_groups
from ..inference import Model, run_workers
from ..stragglers import AbstractStragglers


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over straggler sets and the half width of its 95 % interval (Student's t).

    The half width is NaN for a single set, whose spread cannot be told.
    """

    mean: float
    half_width: float

    @classmethod
    def over(cls, values: Sequence[float]) -> "Estimate":
        """The estimate from one value a straggler set."""
        count, mean = len(values), float(np.mean(values))
        if count < 2:
            return cls(mean, float("nan"))
        error = np.std(values, ddof=1) / np.sqrt(count)
        return cls(mean, float(stdtrit(count - 1, 0.975) * error))


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one code did under one law of stragglers.

    With u_k the decoded and f_k the model's own outputs (m numbers each) of the K data points of a
    group, over all groups and straggler sets:

    - `mse`: mean of (u - f)^2 over data points and outputs;
    - `rmse`: root of the mean squared L2 norm, sqrt(mean |u_k - f_k|^2);
    - `mean_l2`: mean L2 norm, mean |u_k - f_k| (the literature calls both RMSE);
    - `rel_acc`: share of data points with argmax u_k = argmax f_k;
    - `accuracy`: the same against the true labels; None without labels;
    - `lost`: share of data points that were not recovered. They count as wrong in `rel_acc` and
      `accuracy`, and are left out of the three errors.
    """

    code: str
    stragglers: str
    mse: Estimate
    rmse: Estimate
    mean_l2: Estimate
    rel_acc: Estimate
    accuracy: Estimate | None
    lost: Estimate
    num_data_points: int
    num_sets: int


def evaluate(
    model: Model,
    codes: Mapping[str, AbstractCode],
    x: Float[ArrayLike, "points ..."],
    stragglers: Mapping[str, AbstractStragglers],
    *,
    key: PRNGKeyArray,
    num_sets: int = 20,
    labels: Int[ArrayLike, " points"] | None = None,
    further_models: Mapping[str, Sequence[Model]] | None = None,
    channel: Callable[[Array, PRNGKeyArray], Array] | None = None,
    batch_size: int = 256,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[Evaluation]:
    """Evaluates codes by name under laws of stragglers by name: a row for each pair.

    The data points are cut into groups of K in the order given; a remainder that fills no group is
    left out (see `num_data_points`). A straggler set is one mask for all groups, drawn from `key`,
    and the same for all codes. The model, (B, ...) to (B, outputs), runs once on each data point
    and coded data point, `batch_size` at a time. `further_models` are, by the name of a code whose
    workers run others beside it (`worker_models`), those others in order. `channel` is what happens
    to all workers' answers (groups, N, outputs) on their way to the decoder, with a key of its own
    for every set: noise, or another precision. `progress` may wrap the sequence of (law, set) pairs
    to show a bar.

    Raises: ValueError where the codes differ in K or N, fewer than K data points come, they are
    no floats, they or the model's outputs on them are not finite, shapes do not agree, or the
    further models are not those that the codes' workers run.
    """
    num_data, num_workers = _common_size(codes)
    groups = cut_groups(x, num_data)
    used = groups.shape[0] * num_data
    if num_sets < 1:
        raise ValueError(f"num_sets must be 1 or more, not {num_sets}")
    if labels is not None and np.shape(labels) != np.shape(x)[:1]:
        raise ValueError(
            f"labels have shape {np.shape(labels)}; x has {np.shape(x)[0]} data points"
        )
    targets = None if labels is None else jnp.asarray(np.asarray(labels)[:used])

    run = batched(model, batch_size)
    originals = own_outputs(run, groups)
    further = {
        name: tuple(batched(other, batch_size) for other in others)
        for name, others in (further_models or {}).items()
    }
    if unknown := further.keys() - codes.keys():
        raise ValueError(f"further_models names {sorted(unknown)}; the codes are {list(codes)}")
    answers = {
        name: all_answers((run, *further.get(name, ())), code, groups)
        for name, code in codes.items()
    }

    pairs = [(law, index) for law in stragglers for index in range(num_sets)]
    scores: dict[tuple[str, str], list[dict[str, float]]] = {}
    for law, index in progress(pairs):
        place = list(stragglers).index(law)
        draw = jax.random.fold_in(jax.random.fold_in(key, place), index)
        available = stragglers[law].available(draw, num_workers)
        for name, code in codes.items():
            received = answers[name]
            if channel is not None:
                received = _send(channel, received, jax.random.fold_in(draw, 1))
            score = score_set(code, received, originals, targets, available)
            scores.setdefault((name, law), []).append({m: float(v) for m, v in score.items()})
    return [
        Evaluation(
            name, law, **_estimates(scores[name, law]), num_data_points=used, num_sets=num_sets
        )
        for law in stragglers
        for name in codes
    ]


def _common_size(codes: Mapping[str, AbstractCode]) -> tuple[int, int]:
    sizes = {name: (code.num_data, code.num_workers) for name, code in codes.items()}
    if not sizes:
        raise ValueError("there are no codes to evaluate")
    if len(set(sizes.values())) != 1:
        raise ValueError(f"codes to compare must have the same (num_data, num_workers): {sizes}")
    return next(iter(sizes.values()))


def cut_groups(x: ArrayLike, num_data: int) -> np.ndarray:
    """Data points in groups of K, in the order given, without a remainder: (groups, K, ...).

    Raises: ValueError where there is no group, or data points are no floats or not finite.
    """
    x = np.asarray(x)
    groups = x.shape[0] // num_data
    if groups == 0:
        raise ValueError(f"{x.shape[0]} data points fill no group of {num_data}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}: codes work on floats, so convert it first")
    if not np.isfinite(x).all():
        raise ValueError("data points must be finite: take out those that are not")
    return x[: groups * num_data].reshape(groups, num_data, *x.shape[1:])


def own_outputs(
    run: Callable[[ArrayLike], Array], groups: np.ndarray
) -> Float[Array, "points outputs"]:
    """What the served model makes of the data points themselves.

    Raises: ValueError where that is no finite vector for each.
    """
    originals = run(groups.reshape(-1, *groups.shape[2:]))
    if originals.ndim != 2 or not np.isfinite(originals).all():
        raise ValueError(
            "the model must map data points to finite vectors (points, outputs): got shape "
            f"{originals.shape}"
        )
    return originals


def batched(model: Model, batch_size: int) -> Callable[[ArrayLike], Array]:
    """The model over any number of data points, in batches of one shape: one compilation."""
    compiled = eqx.filter_jit(model)

    def run(x: ArrayLike) -> Array:
        x = np.asarray(x)
        pad = -x.shape[0] % batch_size
        padded = np.concatenate([x, np.repeat(x[-1:], pad, axis=0)])
        parts = [
            compiled(jnp.asarray(padded[i : i + batch_size])) for i in range(0, len(x), batch_size)
        ]
        return jnp.concatenate(parts)[: x.shape[0]]

    return run


def all_answers(models: Sequence[Model], code: AbstractCode, groups: np.ndarray) -> Array:
    """All workers' answers: they do not depend on who straggles."""
    return run_workers(models, code, eqx.filter_jit(encode_groups)(code, jnp.asarray(groups)))


@eqx.filter_jit
def _send(channel: Callable[[Array, PRNGKeyArray], Array], answers: Array, key: PRNGKeyArray):
    received = channel(answers, key)
    if received.shape != answers.shape:
        raise ValueError(f"the channel made {received.shape} of answers {answers.shape}")
    return received


@eqx.filter_jit
def score_set(
    code: AbstractCode,
    answers: Float[Array, "groups num_workers outputs"],
    originals: Float[Array, "points outputs"],
    labels: Int[Array, " points"] | None,
    available: Bool[Array, " num_workers"],
) -> dict[str, Array]:
    """The metrics of `Evaluation` for one straggler set, the same for all groups."""
    masks = jnp.broadcast_to(available, answers.shape[:2])
    decoded = decode_groups(code, answers, masks)
    recovered = decoded.recovered.reshape(-1)
    predictions = decoded.predictions.reshape(originals.shape)
    error = jnp.where(recovered[:, None], predictions - originals, 0)
    squared_norm = jnp.sum(error**2, axis=1)
    count = jnp.sum(recovered)  # 0 gives NaN errors: there is nothing to compare
    choice = jnp.argmax(predictions, axis=1)
    score = {
        "mse": jnp.sum(squared_norm) / count / originals.shape[1],
        "rmse": jnp.sqrt(jnp.sum(squared_norm) / count),
        "mean_l2": jnp.sum(jnp.sqrt(squared_norm)) / count,
        "rel_acc": jnp.mean(recovered & (choice == jnp.argmax(originals, axis=1))),
        "lost": jnp.mean(~recovered),
    }
    if labels is not None:
        score["accuracy"] = jnp.mean(recovered & (choice == labels))
    return score


def _estimates(scores: list[dict[str, float]]) -> dict[str, Any]:
    """An `Estimate` for each metric; accuracy is None without labels."""
    estimates = {metric: Estimate.over([score[metric] for score in scores]) for metric in scores[0]}
    return {"accuracy": None, **estimates}
