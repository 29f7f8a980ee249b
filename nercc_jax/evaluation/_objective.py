"""The nested objective: how far decoded predictions are from the model's own."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree, Shaped

from ..codes import AbstractCode, encode_groups
from ..codes._trees import check_leading, groups_of, join, points_of, to_device
from ..inference.models import Model, call_model, run_workers
from ._answers import Answers
from ._criteria import Criterion


def nested_objective(
    model: Model | Sequence[Model],
    code: AbstractCode,
    x: PyTree[Shaped[ArrayLike, "groups num_data ..."]],
    available: Bool[ArrayLike, "sets num_workers"],
    *,
    weights: Float[ArrayLike, " sets"] | None = None,
    criterion: Criterion = "mse",
    originals: PyTree[Float[ArrayLike, "groups num_data ..."]] | None = None,
) -> Float[Array, ""]:
    """Return the mean error of decoded predictions over straggler sets, or their weighted sum.

    The error of a straggler set F is a mean over groups and data points:

        e(F) = 1/(groups K) sum criterion(u_dec(alpha_k), f(x_k)).

    With all sets of a law the result is the expectation over them, with sampled ones its estimate.
    This is a pure function, differentiable in the code's leaves, in x and in the model; jit it. All
    groups meet every set, so the model runs on groups * N coded data points only. Answers are
    decoded as by `decode_groups`: one that is not finite makes its worker a straggler in its group.
    Lost predictions are left out, and so are sets that lose all, whatever is answered.

    Args:
        model: A function of a batch; for a code whose workers run several, a sequence of such, the
            served model first.
        code: The code.
        x: Data points in groups.
        available: Straggler sets, one mask a row.
        weights: Of the straggler sets. Default: equal ones that sum to one.
        criterion: A criterion of one data point: "mse", the mean over outputs of the squared
            difference; "cross_entropy", the Kullback-Leibler divergence between the softmax of
            both, for logits; "disagreement", whether the label is another, which has no slope; or a
            function (decoded, original) -> scalar of predictions as the model gives them.
        originals: f(x), (groups, K, outputs...), where they are known; else the served model runs
            on x.

    Raises:
        ValueError: Shapes do not fit, or the criterion is unknown.

    Source: arXiv 2402.04377, the objective that lambda_enc and lambda_dec are tuned on.
    """
    errors = nested_errors(model, code, x, available, criterion=criterion, originals=originals)
    summary = jnp.any(jax.vmap(code.recovered)(jnp.asarray(available)), axis=1)
    if weights is None:
        weights = 1 / jnp.maximum(jnp.sum(summary), 1)
    return jnp.sum(jnp.where(summary, weights * errors, 0))


def nested_errors(
    model: Model | Sequence[Model],
    code: AbstractCode,
    x: PyTree[Shaped[ArrayLike, "groups num_data ..."]],
    available: Bool[ArrayLike, "sets num_workers"],
    *,
    criterion: Criterion = "mse",
    originals: PyTree[Float[ArrayLike, "groups num_data ..."]] | None = None,
) -> Float[Array, " sets"]:
    """Return the error of each straggler set, NaN where all is lost: see `nested_objective`."""
    available = jnp.asarray(available)
    if available.ndim != 2 or available.shape[1] != code.num_workers or available.dtype != bool:
        raise ValueError(
            f"available must be masks (sets, {code.num_workers}), not "
            f"{available.dtype}{available.shape}"
        )
    return nested_answers(model, code, x, originals).losses(available, criterion)


def nested_answers(
    model: Model | Sequence[Model], code: AbstractCode, x: PyTree, originals: PyTree | None
) -> Answers:
    """Return groups' answers as a function of all that makes them; raise as `nested_objective`."""
    x = to_device(x)
    groups = jax.tree.leaves(x)[0].shape[:1]
    if groups in [(), (0,)]:
        raise ValueError(f"x must be (groups, {code.num_data}, ...), with one group at least")
    check_leading("x", x, (*groups, code.num_data), "groups and their data points")
    answers = run_workers(model, code, encode_groups(code, x))
    if originals is None:
        originals = original_predictions(model, x)
    originals = to_device(originals)
    wanted = jax.tree.map(lambda leaf: (*groups, code.num_data, *leaf.shape[2:]), answers)
    got = jax.tree.map(lambda leaf: leaf.shape, originals)
    if got != wanted:
        raise ValueError(f"originals have shape {got}; the model's answers on x would be {wanted}")
    coded, form = join(answers, 2)
    own, _ = join(originals, 2)
    return Answers(code, coded, own, form)


def original_predictions(
    model: Model | Sequence[Model], x: PyTree[Shaped[Array, "groups num_data ..."]]
) -> PyTree[Float[Array, "groups num_data ..."]]:
    """Return the served model's own predictions of uncoded groups."""
    served = model if callable(model) else model[0]
    return groups_of(call_model(served, points_of(x)), jax.tree.leaves(x)[0].shape[1])
