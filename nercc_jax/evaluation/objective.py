"""The nested objective: the mean error of decoded predictions relative to the model's own.

A trial is the objective of codes on the same groups and straggler sets. In it, all laws of
stragglers have similar weight.
"""

from collections.abc import Mapping, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped

from ..codes import AbstractCode, Decoded, encode_groups
from ..codes.trees import groups_of, join, points_of, to_device
from ..codes.workers import call_model, run_workers
from ..inference.coded import as_groups
from ..inference.models import Model, check_model
from ..stragglers import AbstractStragglers, straggler_sets
from .answers import Answers
from .criteria import Criterion


def nested_objective(
    model: Model | Sequence[Model],
    code: AbstractCode,
    x: PyTree[Shaped[ArrayLike, "groups num_data ..."]],
    available: Bool[ArrayLike, "sets num_workers"],
    *,
    criterion: Criterion = "mse",
) -> Float[Array, ""]:
    """Return the mean error of decoded predictions over straggler sets.

    The error of a straggler set F is a mean over groups and data points:

        e(F) = 1/(groups K) sum criterion(u_dec(alpha_k), f(x_k)).

    With all sets of a law the result is the expectation over them; with sampled ones, an estimate.
    This is a pure function, differentiable in the code's leaves, in x and in the model; jit it. All
    groups meet every set, so the model runs on groups * N coded data points only. Answers are
    decoded as by `decode_groups`: a worker whose answer is not finite counts as a straggler in that
    group. Lost predictions are left out, and so are sets under which the code recovers nothing.

    Args:
        model: A function of a batch; for a code whose workers run several models, a sequence of
            functions, the served model first.
        code: The code.
        x: Data points in groups.
        available: Straggler sets, one mask a row.
        criterion: A criterion of one data point: "mse", the mean over outputs of the squared
            difference; "cross_entropy", the Kullback-Leibler divergence between the softmax of
            both, for logits; "disagreement", 1 if the label differs, which has no gradient; or a
            function (decoded, original) -> scalar of predictions in the form of the model's.

    Raises:
        ValueError: Shapes do not fit, or the criterion is unknown.

    Source: arXiv 2402.04377, the objective on which lambda_enc and lambda_dec are tuned.
    """
    available = jnp.asarray(available)
    if available.ndim != 2 or available.shape[1] != code.num_workers or available.dtype != bool:
        raise ValueError(
            f"available must be masks (sets, {code.num_workers}), not "
            f"{available.dtype}{available.shape}"
        )
    errors = nested_answers(model, code, x, None).losses(available, criterion)
    known = jnp.any(jax.vmap(code.recovered)(available), axis=1)
    return jnp.sum(jnp.where(known, errors, 0)) / jnp.maximum(jnp.sum(known), 1)


def nested_answers(
    model: Model | Sequence[Model], code: AbstractCode, x: PyTree, originals: PyTree | None
) -> Answers:
    """Return groups' answers, differentiable in all arguments; raise as `nested_objective`.

    `originals` are the model's own predictions of x, if they are known.
    """
    x = to_device(as_groups(code, x, grouped=True)[0])
    answers = run_workers(model, code, encode_groups(code, x))
    if originals is None:
        originals = _own_predictions(model, x)
    coded, form = join(answers, 2)
    own, _ = join(originals, 2)
    return Answers(code, coded, own, form)


def _own_predictions(
    model: Model | Sequence[Model], x: PyTree[Shaped[Array, "groups num_data ..."]]
) -> PyTree[Float[Array, "groups num_data ..."]]:
    """Return the served model's own predictions of uncoded groups."""
    served = model if callable(model) else model[0]
    return groups_of(call_model(served, points_of(x)), jax.tree.leaves(x)[0].shape[1])


class Trial(eqx.Module):
    """Groups and straggler sets on which codes are compared; `make_trial` makes one.

    `x` are groups of data points, `originals` the model's own predictions of them, `available`
    straggler sets, `law` the number in `laws` of the law that each is from, `scales` the error of a
    starting code under each law (infinite: the law does not count).
    """

    x: PyTree[Shaped[Array, "groups num_data ..."]]
    originals: PyTree[Float[Array, "groups num_data ..."]]
    available: Bool[Array, "sets num_workers"]
    law: Int[Array, " sets"]
    scales: Float[Array, " laws"]
    laws: tuple[str, ...] = eqx.field(static=True)
    criterion: Criterion = eqx.field(static=True)

    @eqx.filter_jit  # one program for errors and objectives: it takes seconds to compile
    def errors(
        self, model: Model, code: AbstractCode
    ) -> tuple[Float[Array, " laws"], Float[Array, ""]]:
        """Return the mean loss under each law, and the objective.

        The objective is the mean over laws of the loss divided by the starting code's: 1 for that
        code, and differentiable in the code. An answer that is not finite makes it NaN. All groups
        are decoded by one product for each straggler set, so a gradient needs a matrix for each
        set, not for each set and group. Sets that recover nothing are left out; a law that has only
        such sets has NaN.
        """
        answers = nested_answers(model, code, self.x, self.originals)
        of_mask = jax.vmap(lambda mask: (code.decoder_matrix(mask), code.recovered(mask)))
        matrices, recovered = of_mask(self.available)
        # As one product of two matrices.
        factors = matrices.astype(answers.coded.dtype), answers.coded
        found = jnp.tensordot(*factors, ((2,), (1,)), precision=jax.lax.Precision.HIGHEST)
        each = jnp.broadcast_to(recovered[:, None], (*found.shape[:3:2], code.num_data))
        decoded = Decoded(jnp.moveaxis(found, 2, 1), self.available, each)
        losses, counts = answers.losses(decoded, self.criterion), jnp.any(recovered, axis=1)
        total, count = (
            jax.ops.segment_sum(values, self.law, len(self.laws), indices_are_sorted=True)
            for values in (jnp.where(counts, losses, 0), counts.astype(losses.dtype))
        )
        errors = jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan)
        counts = (count > 0) & jnp.isfinite(self.scales)
        # A starting code without any error gives no unit.
        relative = errors / jnp.maximum(self.scales, 1e-30)
        return errors, jnp.sum(jnp.where(counts, relative, 0)) / jnp.maximum(jnp.sum(counts), 1)


def make_trial(
    model: Model,
    code: AbstractCode,
    x: PyTree[Shaped[ArrayLike, "groups num_data ..."]],
    stragglers: Mapping[str, AbstractStragglers],
    *,
    key: PRNGKeyArray,
    num_sets: int = 32,
    criterion: Criterion = "mse",
) -> Trial:
    """Draw the straggler sets of a nested objective, and weigh laws by a starting code's errors.

    An error counts relative to that of `code` under the same law: with more stragglers errors are a
    hundred times larger, and would dominate the plain mean. `num_sets` straggler sets are drawn for
    each law, or all of a law's sets if there are fewer.

    Raises:
        ValueError: `stragglers` is not a mapping by name, or an error of `code` is not finite.
    """
    check_model(model)
    available, law = draw_sets(stragglers, key, code.num_workers, num_sets)
    x = to_device(x)
    originals = eqx.filter_jit(_own_predictions)(model, x)
    laws = tuple(stragglers)
    blank = Trial(x, originals, available, law, jnp.ones(len(laws)), laws, criterion)
    scales, _ = blank.errors(model, code)
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
    """Return straggler sets of every law (all, if at most `at_most`), and the law of each set.

    Raises:
        ValueError: `stragglers` is not a mapping by name, or empty.
    """
    if not isinstance(stragglers, Mapping) or not stragglers:
        raise ValueError(f"stragglers are laws by name, {{'name': ...}}, not {stragglers!r}")
    masks = [
        straggler_sets(law, jax.random.fold_in(key, place), num_workers, at_most)
        for place, law in enumerate(stragglers.values())
    ]
    return jnp.concatenate(masks), jnp.repeat(
        jnp.arange(len(masks)), np.array([len(sets) for sets in masks])
    )
