"""Codes on one objective: the same groups, the same straggler sets, no law drowned by another."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped

from ..codes import AbstractCode, NeRCC
from ..codes._trees import to_device
from ..inference.models import Model, check_model
from ..stragglers import AbstractStragglers, straggler_sets
from ._criteria import Criterion
from ._objective import nested_answers, nested_errors, original_predictions

# Where the starting code makes no error at all, there is nothing to be relative to.
_LEAST = 1e-30


class Trial(eqx.Module):
    """Groups and straggler sets on which codes are compared; `make_trial` makes one.

    `x` are groups of data points, `originals` the model's own predictions of them (None: not yet
    known), `available` straggler sets, `law` the number in `laws` of the law that each is from,
    `scales` the error of a starting code under each law.
    """

    x: PyTree[Shaped[Array, "groups num_data ..."]]
    originals: PyTree[Float[Array, "groups num_data ..."]] | None
    available: Bool[Array, "sets num_workers"]
    law: Int[Array, " sets"]
    scales: Float[Array, " laws"]
    laws: tuple[str, ...] = eqx.field(static=True)
    criterion: Criterion = eqx.field(static=True)
    power: float = eqx.field(static=True)

    def errors(self, model: Model, code: AbstractCode) -> Float[Array, " laws"]:
        """Return a code's mean error under each law, without sets in which it recovers nothing."""
        return _judged(self, model, code)[0]

    def objective(self, model: Model, code: AbstractCode) -> Float[Array, ""]:
        """Return the power mean over laws of a code's error relative to the starting code's.

        With r_l = errors / scales this is (mean_l r_l^power)^(1/power): 1 for the starting code,
        and differentiable in the code.
        """
        return _relative(self, *_judged(self, model, code))


def _errors_by_law(
    trial: Trial, model: Model, code: AbstractCode
) -> tuple[Float[Array, " laws"], Bool[Array, " laws"]]:
    options: Any = {"criterion": trial.criterion, "originals": trial.originals}
    return _by_law(trial, code, nested_errors(model, code, trial.x, trial.available, **options))


# One program for errors and objectives: seconds to compile.
_judged = eqx.filter_jit(_errors_by_law)


def make_trial(
    model: Model,
    code: AbstractCode,
    x: PyTree[Shaped[ArrayLike, "groups num_data ..."]],
    stragglers: Mapping[str, AbstractStragglers],
    *,
    key: PRNGKeyArray,
    num_sets: int = 32,
    criterion: Criterion = "mse",
    power: float = 1.0,
) -> Trial:
    """Draw what the nested objective averages over, and weigh laws by a starting code's errors.

    An error counts relative to that of `code` under the same law: with more stragglers errors are a
    hundred times larger, and the plain mean would see nothing else. The mean over laws has a power
    of 1 or more: the higher it is, the more the law that gains least counts. `num_sets` straggler
    sets are drawn for each law; all of a law's sets if they are fewer.

    Raises:
        ValueError: There is no law, or an error of `code` is not finite.
    """
    if not stragglers:
        raise ValueError("there are no laws of stragglers")
    if not power >= 1:
        raise ValueError(f"power must be 1 or more, not {power}")
    check_model(model)
    x = to_device(x)
    originals = eqx.filter_jit(original_predictions)(model, x)
    available, law = draw_sets(stragglers, key, code.num_workers, num_sets)
    laws = tuple(stragglers)
    blank = Trial(x, originals, available, law, jnp.ones(len(laws)), laws, criterion, float(power))
    scales = blank.errors(model, code)
    if not jnp.all(jnp.isfinite(scales)):
        broken = {name: float(s) for name, s in zip(laws, scales, strict=True) if not s < jnp.inf}
        raise ValueError(
            f"the starting code's errors are {broken}: leave out laws under which nobody answers; "
            "and the model must give finite answers on coded data points, mixtures of data points"
        )
    return eqx.tree_at(lambda t: t.scales, blank, scales)


def draw_sets(
    stragglers: Mapping[str, AbstractStragglers],
    key: PRNGKeyArray,
    num_workers: int,
    at_most: int,
) -> tuple[Bool[Array, "sets num_workers"], Int[Array, " sets"]]:
    """Straggler sets of every law (all, if no more than `at_most`) and the number of their law."""
    masks = [
        straggler_sets(law, jax.random.fold_in(key, place), num_workers, at_most)
        for place, law in enumerate(stragglers.values())
    ]
    return jnp.concatenate(masks), jnp.repeat(
        jnp.arange(len(masks)), np.array([len(sets) for sets in masks])
    )


def relative_objective(trial: Trial, model: Model, code: AbstractCode) -> Float[Array, ""]:
    """Return `Trial.objective` without its compilation."""
    return _relative(trial, *_errors_by_law(trial, model, code))


@eqx.filter_jit
def _relative(
    trial: Trial, errors: Float[Array, " laws"], counts: Bool[Array, " laws"]
) -> Float[Array, ""]:
    relative = errors / jnp.maximum(trial.scales, _LEAST)
    powers = jnp.where(counts, jnp.where(counts, relative, 1) ** trial.power, 0)
    return (jnp.sum(powers) / jnp.maximum(jnp.sum(counts), 1)) ** (1 / trial.power)


def landscape(
    model: Model,
    code: NeRCC,
    trial: Trial,
    lambda_enc: Float[ArrayLike, " rows"],
    lambda_dec: Float[ArrayLike, " columns"],
) -> Float[Array, "rows columns"]:
    """Return a trial's objective on a grid of the two lambdas, all else as in `code`.

    This is what one would do without gradients, and a picture of what they descend. The decoder
    needs no new answers, so the model runs on the coded data points once for each `lambda_enc`.
    """
    rows = [
        _row(model, _with_lambdas(code, enc, 0.0), trial, jnp.asarray(lambda_dec, float))
        for enc in np.asarray(lambda_enc)
    ]
    return jnp.stack(rows)


@eqx.filter_jit
def _row(
    model: Model, code: NeRCC, trial: Trial, lambda_dec: Float[Array, " columns"]
) -> Float[Array, " columns"]:
    answers = nested_answers(model, code, trial.x, trial.originals)

    def cell(dec: Float[Array, ""]) -> Float[Array, ""]:
        here = _with_lambdas(code, code.lambda_enc, dec)
        decoded_so = eqx.tree_at(lambda known: known.code, answers, here)
        losses = decoded_so.losses(trial.available, trial.criterion)
        return _relative(trial, *_by_law(trial, here, losses))

    return jax.lax.map(cell, lambda_dec)


def _with_lambdas(code: NeRCC, lambda_enc: ArrayLike, lambda_dec: ArrayLike) -> NeRCC:
    dtype = code.lambda_dec.dtype
    values = (jnp.asarray(lambda_enc, dtype), jnp.asarray(lambda_dec, dtype))
    return eqx.tree_at(lambda c: (c.lambda_enc, c.lambda_dec), code, values)


def _by_law(
    trial: Trial, code: AbstractCode, errors: Float[Array, " sets"]
) -> tuple[Float[Array, " laws"], Bool[Array, " laws"]]:
    """Return the mean error under each law; NaN where none of its sets recovers anything."""
    counts = jnp.any(jax.vmap(code.recovered)(trial.available), axis=1)
    total, count = (
        jax.ops.segment_sum(values, trial.law, len(trial.laws), indices_are_sorted=True)
        for values in (jnp.where(counts, errors, 0), counts.astype(errors.dtype))
    )
    return jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan), count > 0
