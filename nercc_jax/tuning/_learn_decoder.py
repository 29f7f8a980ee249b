"""A decoder learned from the model's answers to coded data points, without gradients."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import ArrayLike, Float, Int, PRNGKeyArray, PyTree, Shaped

from ..codes import AbstractCode, LearnedDecoder, Replication, regression_points
from ..codes.learned_decoder import Regression
from ..codes.trees import to_device
from ..evaluation.answers import batched, coded_outputs, cut_groups, own_outputs
from ..inference.models import Model
from ..stragglers import ExactStragglers, straggler_sets

# Data points (points, ...) to a permutation of them.
Order: TypeAlias = Callable[[Any], Int[Any, " points"]]
# Candidates for the noise of answers, relative to their mean square: cross-validation chooses one.
_NOISES = (0.0, 1e-5, 1e-4, 1e-3)
_AT_ONCE = 1 << 22  # numbers of coded data points, or of outputs, that are held at a time


def learn_decoder(
    model: Model,
    code: AbstractCode,
    x: PyTree[Shaped[ArrayLike, "points ..."]],
    *,
    key: PRNGKeyArray,
    order: Order | None = None,
    num_groups: int | None = None,
    batch_size: int = 256,
) -> LearnedDecoder:
    """Run the model on coded data points, and return the code with the decoder that fits best.

    Data points are drawn into groups at random, each equally often; the model answers all N coded
    data points of each group. The second moments of the answers and of the model's own outputs give
    the linear decoder with the least mean squared error for every straggler set (`LearnedDecoder`).
    The moments of a cubic spline through the code's points, scaled to the recorded ones, are added
    with the weight of 2 (N + K) outputs, which helps if there are few groups. Answers are assumed
    to be noisy, by the amount with which folds predict a left-out fold best. Without noise, the
    decoder would rely on small differences of two workers that nearly always gave the same answer.

    The encoder stays as it is: `tune` it before. An order of the data points, a surrogate or a
    worker's dtype change the answers' moments, so learn with those that will be served. The decoder
    can be learned for copies, too (`Replication`, or "repeated" points): a data point whose copies
    are all lost is then predicted from the other data points, which helps most if these are
    ordered. The mean is over unscaled outputs, so large outputs count more.

    Args:
        model: A function of a batch, (B, ...) to (B, outputs...), which is compiled.
        code: A code with regression points `alpha` and `beta`, or `Replication`.
        x: Unlabelled data points, such as will be served; at least K, better thousands.
        key: Random key.
        order: Returns a permutation of data points (points, ...), which are then cut into groups in
            that order: `Scheme.arrange`, or `lambda x: order_points(x, K, buffer_size=K)` for an
            order within the group. Default: groups at random.
        num_groups: The number of groups; 8 (N + K) by default. Fewer cost less and decode worse: on
            LeNet5 (100, 20) the mean RMSE was 45 % below the tuned spline's with 960 groups, 42 %
            with 200, 26 % with 20, and 14 % above it with 5.
        batch_size: The number of data points in a call of the model.

    Raises:
        ValueError: The code has no points, x fills no group or is not finite, `order` does not
            return a permutation, the model is in training mode, or one of its outputs is not
            finite.

    >>> import jax, jax.numpy as jnp
    >>> from nercc_jax import NeRCC
    >>> from nercc_jax.tuning import learn_decoder
    >>> model, x = jnp.tanh, jax.random.normal(jax.random.key(0), (64, 3))
    >>> code = learn_decoder(model, NeRCC(4, 10), x, key=jax.random.key(1))
    >>> code.decode(model(code.encode(x[:4])), jnp.arange(10) != 2).shape
    (4, 3)
    """
    both = [getattr(code, name, None) for name in ("beta", "alpha")]
    if isinstance(code, Replication):
        both = regression_points(code.num_data, code.num_workers, "repeated")[::-1]
    if any(each is None for each in both):
        raise ValueError(
            f"{type(code).__name__} has no regression points alpha and beta, along which a decoder "
            "is learned: take NeRCC, Berrut or Replication"
        )
    places = np.concatenate([np.asarray(each) for each in both])
    groups = num_groups if num_groups is not None else 8 * len(places)
    if groups < 1:
        raise ValueError(f"num_groups must be at least 1, not {num_groups}")
    cut_groups(x, code.num_data)  # whose checks these are
    x = jax.tree.map(np.asarray, x)
    run = batched(model, batch_size)
    outputs = own_outputs(run, jax.tree.map(lambda leaf: leaf[None], x))[0][0]
    own = outputs.astype(np.float64)
    # Each permutation of all data points is cut into groups.
    seeds = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
    points = len(own)
    whole, drawn = points // code.num_data, []
    for _ in range(-(-groups // whole)):
        chosen = seeds.permutation(points)[: whole * code.num_data]
        if order is not None:
            found = np.asarray(order(to_device(jax.tree.map(lambda leaf: leaf[chosen], x))))  # noqa: B023
            if not np.array_equal(np.sort(found), np.arange(len(chosen))):
                raise ValueError(
                    f"order must return a permutation of {len(chosen)} data points, not {found}"
                )
            chosen = chosen[found]
        drawn.append(chosen.reshape(-1, code.num_data))
    drawn = np.concatenate(drawn)[:groups]
    # Only some groups' outputs are in memory at a time; each fold of groups is kept as a triangle.
    largest = max(own.shape[1], sum(leaf[0].size for leaf in jax.tree.leaves(x)))
    at_once = max(1, _AT_ONCE // (len(places) * largest))
    folds = [np.zeros((0, len(places)))] * 4
    for done in range(0, groups, at_once):
        some = drawn[done : done + at_once]
        here = jax.tree.map(lambda leaf: leaf[some], x)  # noqa: B023
        coded = coded_outputs([run], code, here, batch_size, outputs[some]).astype(np.float64)
        if not np.isfinite(coded).all():
            raise ValueError(
                "the model's answers to coded data points must be finite; they are not for "
                f"workers {np.flatnonzero(~np.isfinite(coded).all(axis=(0, 2)))[:10].tolist()}"
            )
        pairs = np.concatenate([coded, own[some]], axis=1).swapaxes(1, 2)
        for fold, known in enumerate(folds):
            fresh = pairs[(fold - done) % len(folds) :: len(folds)].reshape(-1, len(places))
            folds[fold] = _triangle(known, fresh)
    encoder, total = code.encoder_matrix(), float(groups * own.shape[1])
    noise = _best_noise(folds, places, code.num_workers, total, key)
    root = _root_of_moments(np.concatenate(folds), places, code.num_workers, total, noise)
    return LearnedDecoder(encoder, root.astype(encoder.dtype))


def _root_of_moments(
    rows: Float[np.ndarray, "rows places"],
    places: Float[np.ndarray, " places"],
    num_workers: int,
    total: float,
    noise: float,
) -> Float[np.ndarray, "places places"]:
    """Return a root of the moments of `total` recorded outputs and of a smooth curve.

    `rows` are a root of the recorded moments. The curve counts as two outputs for each place. Its
    covariance is that for which a cubic spline is the regression; its straight line and the rest
    are scaled to their sizes in the recorded moments. The noise of answers is relative to their
    mean square.
    """
    t, prior, recorded = places.astype(np.float64) + 1, 2 * len(places), rows / np.sqrt(total)
    least, most = np.minimum.outer(t, t), np.maximum.outer(t, t)
    line = np.linalg.qr(np.stack([np.ones_like(t), t], axis=1))[0].T
    # Rounding may make eigenvalues slightly negative.
    values, vectors = np.linalg.eigh(least**2 * (3 * most - least) / 6)
    bent = np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T

    def sizes(root: np.ndarray) -> tuple[float, float]:
        straight = np.sum((root @ line.T) ** 2)
        return straight, np.sum(root**2) - straight

    straight, rest = sizes(recorded)
    path = np.concatenate([np.sqrt(rest / sizes(bent)[1]) * bent, np.sqrt(straight) * line])
    spread = np.sqrt(noise * np.sum(rows[:, :num_workers] ** 2) / num_workers)
    further = [np.sqrt(prior) * path, spread * np.eye(len(places))[:num_workers]]
    return _triangle(rows, np.concatenate(further)) / np.sqrt(total + prior)


def _best_noise(
    folds: list[Float[np.ndarray, "rows places"]],
    places: Float[np.ndarray, " places"],
    num_workers: int,
    total: float,
    key: PRNGKeyArray,
) -> float:
    """Return the noise of answers with which the other folds predict a left-out fold best.

    It has the least geometric mean of the error over numbers of stragglers: none, half of N - K,
    and N - K.
    """
    if not all(len(fold) for fold in folds):
        return _NOISES[0]
    most = max(2 * num_workers - len(places), 0)
    laws = [ExactStragglers(number) for number in sorted({0, most // 2, most})]
    masks = [np.asarray(straggler_sets(law, key, num_workers, 4)) for law in laws]
    heights = []
    for noise in _NOISES:
        errors = np.zeros(len(masks))
        for place, left_out in enumerate(folds):
            others = np.concatenate([each for i, each in enumerate(folds) if i != place])
            known = total * (1 - 1 / len(folds))
            root = _root_of_moments(others, places, num_workers, known, noise)
            answers, outputs = np.split(left_out, [num_workers], axis=1)
            for law, sets in enumerate(masks):
                matrices = [Regression(root, mask).matrix for mask in sets]
                wrong = [np.sum((answers @ matrix.T - outputs) ** 2) for matrix in matrices]
                errors[law] += np.mean(wrong)
        heights.append(np.mean(np.log(errors + np.finfo(float).tiny)))
    return _NOISES[int(np.argmin(heights))]


def _triangle(
    rows: Float[np.ndarray, "rows places"], further: Float[np.ndarray, "further places"]
) -> Float[np.ndarray, "some places"]:
    """Return a triangle, of at most K + N rows, with the second moments of all rows."""
    return np.asarray(np.linalg.qr(np.concatenate([rows, further]), mode="r"))
