"""The nested objective: how far decoded predictions are from the model's own."""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from ..codes import AbstractCode, encode_groups
from ..inference import Model, run_workers

Loss: TypeAlias = Literal["mse", "cross_entropy"] | Callable[[Array, Array], Float[Array, ""]]


def nested_errors(
    model: Model | Sequence[Model],
    code: AbstractCode,
    x: Float[ArrayLike, "groups num_data ..."],
    available: Bool[ArrayLike, "sets num_workers"],
    *,
    loss: Loss = "mse",
    originals: Float[ArrayLike, "groups num_data ..."] | None = None,
) -> Float[Array, " sets"]:
    """The mean error of decoded predictions for each straggler set, over groups and data points:

        e(F) = 1/(groups K) sum loss(u_dec(alpha_k), f(x_k)).

    A pure function, differentiable in the code's leaves, in x and in the model; jit it. All groups
    meet every set, so the model runs on groups * N coded data points only.

    `loss` is of one data point, (decoded, original) -> scalar: "mse", the mean over outputs of the
    squared difference; "cross_entropy", the Kullback-Leibler divergence between the softmax of
    both, for outputs that are logits, which looks at labels (RelAcc) rather than at values; or a
    function. `originals` are f(x), (groups, K, outputs...), where they are known; else the served
    model runs on x. Predictions that a code loses are left out; a set that loses all has the error
    NaN.

    Raises: ValueError for shapes that do not fit, and for an unknown loss. Source: arXiv
    2402.04377, the objective that lambda_enc and lambda_dec are tuned on.
    """
    x, available = jnp.asarray(x), jnp.asarray(available)
    if x.ndim < 2 or x.shape[0] == 0 or x.shape[1] != code.num_data:
        raise ValueError(f"x must be (groups, {code.num_data}, ...), not of shape {x.shape}")
    if available.ndim != 2 or available.shape[1] != code.num_workers or available.dtype != bool:
        raise ValueError(
            f"available must be masks (sets, {code.num_workers}), not "
            f"{available.dtype}{available.shape}"
        )
    answers = run_workers(model, code, encode_groups(code, x))
    if originals is None:
        originals = original_predictions(model, x)
    originals = jnp.asarray(originals)
    if originals.shape != (*x.shape[:2], *answers.shape[2:]):
        raise ValueError(
            f"originals have shape {originals.shape}; the model's answers on x would be "
            f"{(*x.shape[:2], *answers.shape[2:])}"
        )
    dtype = jnp.promote_types(answers.dtype, jnp.float32)
    flat = answers.reshape(*answers.shape[:2], -1).astype(dtype)
    matrices = jax.vmap(code.decoder_matrix)(available).astype(dtype)
    decoded = jnp.einsum("skn,gnm->sgkm", matrices, flat, precision=jax.lax.Precision.HIGHEST)
    decoded = decoded.reshape(-1, *originals.shape)
    of_group = jax.vmap(jax.vmap(point_loss(loss)))
    losses = jax.vmap(of_group, in_axes=(0, None))(decoded, originals.astype(dtype))
    recovered = jax.vmap(code.recovered)(available)
    total = jnp.sum(jnp.where(recovered[:, None], losses, 0), axis=(1, 2))
    count = x.shape[0] * jnp.sum(recovered, axis=1)
    return jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan)


def nested_objective(
    model: Model | Sequence[Model],
    code: AbstractCode,
    x: Float[ArrayLike, "groups num_data ..."],
    available: Bool[ArrayLike, "sets num_workers"],
    *,
    weights: Float[ArrayLike, " sets"] | None = None,
    loss: Loss = "mse",
    originals: Float[ArrayLike, "groups num_data ..."] | None = None,
) -> Float[Array, ""]:
    """The weighted sum of `nested_errors` over straggler sets; without `weights`, the mean.

    With all sets of a law it is the expectation over them, with sampled ones its estimate. Sets
    that lose all predictions are left out. Arguments, errors and source as there.
    """
    errors = nested_errors(model, code, x, available, loss=loss, originals=originals)
    told = jnp.any(jax.vmap(code.recovered)(jnp.asarray(available)), axis=1)
    if weights is None:
        weights = 1 / jnp.maximum(jnp.sum(told), 1)
    return jnp.sum(jnp.where(told, weights * errors, 0))


def original_predictions(
    model: Model | Sequence[Model], x: Float[Array, "groups num_data ..."]
) -> Float[Array, "groups num_data ..."]:
    """The served model's own predictions of uncoded groups."""
    served = model if callable(model) else model[0]
    y = served(x.reshape(-1, *x.shape[2:]))
    return y.reshape(*x.shape[:2], *y.shape[1:])


def point_loss(loss: Loss) -> Callable[[Array, Array], Float[Array, ""]]:
    """A loss of one data point, by name or as it is. Raises: ValueError for an unknown name."""
    found = _LOSSES.get(loss) if isinstance(loss, str) else loss
    if not callable(found):
        raise ValueError(f"loss must be one of {', '.join(_LOSSES)} or a function, not {loss!r}")
    return found


def _mse(decoded: Array, original: Array) -> Float[Array, ""]:
    return jnp.mean((decoded - original) ** 2)


def _cross_entropy(decoded: Array, original: Array) -> Float[Array, ""]:
    wanted = jax.nn.log_softmax(original, axis=-1)
    return jnp.mean(
        jnp.sum(jnp.exp(wanted) * (wanted - jax.nn.log_softmax(decoded, axis=-1)), axis=-1)
    )


_LOSSES = {"mse": _mse, "cross_entropy": _cross_entropy}
