"""A code with all that goes beyond it: order, encode, run, decode with a surrogate, doubt."""

from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree, Shaped

from ..codes import AbstractCode, Decoded, Known, alike_only, encode_groups, groups_of, join
from ..inference import (
    AbstractScheme,
    Features,
    Model,
    Work,
    check_model,
    order_points,
    run_workers,
)
from ._doubt import Doubt, assess
from ._surrogate import Surrogate, check_like


class Assessed(eqx.Module):
    """Predictions of data points in the order in which they came, and how far to trust them.

    Of `decoded`, `heard` are the workers that were used, a row for each group as it was sent;
    predictions and `recovered` have a row for each data point. `deviation` is the standard
    deviation in units of the outputs, infinite where nothing is told. `doubt` is the probability
    that the label is not the model's own, NaN without a calibrated `Doubt`, 1 where nothing is
    recovered (the prediction is NaN there). Of data points in groups, all have an axis of groups.
    """

    decoded: Decoded
    deviation: Float[Array, "*points"]
    doubt: Float[Array, "*points"]


class Scheme(AbstractScheme):
    """How queries are answered by coded workers: a code, and what else is wanted.

    - `code`: for K data points on N workers.
    - `order`: what data points are ordered by, over buffers of `buffer_size` (see `order_points`):
      "pixels" for a projection of the data points themselves, "surrogate" for the surrogate's
      outputs, or a function of a batch of them. None: they stay as they come.
    - `surrogate`: see `fit_surrogate`. `doubt`: see `calibrate_doubt`. Both are for one model, and
      for data in the order that the scheme has.

    `coded_inference(model, scheme)` carries it out:

    >>> import jax.numpy as jnp
    >>> from nercc_jax import NeRCC, Scheme, coded_inference
    >>> scheme = Scheme(NeRCC(4, 8, points="interleaved"), order="pixels")
    >>> infer = coded_inference(lambda x: jnp.sin(x), scheme, with_status=True)
    >>> assessed = infer(jnp.linspace(0, 1, 12)[:, None], jnp.arange(8) != 3)
    >>> assessed.decoded.predictions.shape, assessed.deviation.shape
    ((12, 1), (12,))

    What cannot be mixed (integers beside what is coded) must be the same for all data points that
    are ordered together; a group in which it differs is not recovered.

    The surrogate runs on all data points and coded data points: where it is cheap because workers
    are far, on the master; its cost is yours to count. Raises: ValueError for an order by a
    surrogate that is not there.
    """

    code: AbstractCode
    surrogate: Surrogate | None = None
    doubt: Doubt | None = None
    order: Literal["pixels", "surrogate"] | Callable[[PyTree], PyTree] | None = eqx.field(
        default=None
    )
    buffer_size: int = eqx.field(static=True, default=1024)

    def __check_init__(self):
        named = isinstance(self.order, str)
        if named and self.order not in ("pixels", "surrogate"):
            raise ValueError(f"order must be 'pixels', 'surrogate' or a function: {self.order!r}")
        if self.order == "surrogate" and self.surrogate is None:
            raise ValueError("order by 'surrogate' needs a surrogate")

    def arrange(self, x: PyTree[Shaped[ArrayLike, "points ..."]]) -> Int[Array, " points"]:
        """The order in which these data points are coded: `x[order]` is cut into groups of K.

        What the surrogate and the doubt are fitted on must come in this order too. Raises:
        ValueError as `order_points` does.
        """
        cheap = None if self.surrogate is None else self.surrogate.model
        return self._arrange(jax.tree.map(jnp.asarray, x), cheap)

    def _arrange(self, x: PyTree, surrogate: Features | None) -> Int[Array, " points"]:
        """`surrogate`: its outputs on x, or what makes them."""
        if self.order is None:
            return jnp.arange(len(jax.tree.leaves(x)[0]))
        features = None if isinstance(self.order, str) else self.order
        if self.order == "surrogate":
            features = surrogate
        return order_points(x, self.code.num_data, features=features, buffer_size=self.buffer_size)

    def infer(
        self,
        work: Work,
        x: PyTree[Shaped[Array, "points ..."]],
        available: Bool[Array, "groups num_workers"],
        known: Known,
    ) -> Assessed:
        """What `coded_inference` does with a scheme: a pure function of data points.

        Raises: ValueError where the surrogate's outputs are not like the model's.
        """
        code, surrogate = self.code, self.surrogate
        points = len(jax.tree.leaves(x)[0])
        own = None if surrogate is None else surrogate.model(x)
        order = self._arrange(x, own)
        sent = groups_of(jax.tree.map(lambda leaf: leaf[order], x), code.num_data)
        y, form = join(work(sent), 2)
        available, given = alike_only(sent, available, known.decoders)
        cheap, cheap_coded = None, None
        if surrogate is not None:
            cheap, theirs = join(own, 1)
            check_like(theirs, form)
            cheap = cheap[order].reshape(*available.shape[:1], code.num_data, -1)
            coded = encode_groups(code, sent, known.encoder)
            cheap_coded, _ = join(run_workers(surrogate.model, code, coded), 2)
        decoded, deviation = assess(code, surrogate, y, available, cheap, cheap_coded, given)
        doubt = jnp.full(decoded.recovered.shape, jnp.nan, deviation.dtype)
        if self.doubt is not None:
            doubt = self.doubt(decoded.predictions, deviation, cheap)

        def home(values: Array) -> Array:
            values = values.reshape(points, *values.shape[2:])
            return jnp.zeros_like(values).at[order].set(values)

        predictions = form.split(home(decoded.predictions))
        status = Decoded(predictions, decoded.heard, home(decoded.recovered))
        return Assessed(status, home(deviation), home(doubt))


def doubtful(
    doubt: Float[ArrayLike, " points"], *, limit: float = 0.0, at_most: int | None = None
) -> Int[np.ndarray, " _"]:
    """The data points to answer by the model itself: those with more doubt than `limit`.

    The most doubtful first, and no more than `at_most` of them. `limit` is `Doubt.limit`'s for a
    wanted disagreement; 0 takes all that are not certain.

    Raises: ValueError for a doubt that is NaN, a negative limit or number.
    """
    doubt = np.asarray(doubt)
    if np.isnan(doubt).any():
        raise ValueError("doubt is NaN: calibrate the scheme's doubt with `calibrate_doubt`")
    if not limit >= 0 or (at_most is not None and at_most < 0):
        raise ValueError(f"limit {limit} and at_most {at_most} must be 0 or positive")
    order = np.argsort(-doubt, kind="stable")
    return order[: int(np.sum(doubt > limit))][:at_most]


def reexecute(
    model: Model,
    x: PyTree[Shaped[ArrayLike, "..."]],
    assessed: Assessed,
    *,
    limit: float = 0.0,
    share: float = 1.0,
) -> Assessed:
    """Answers what is doubtful by the model itself: no more than that `share` of the data points.

    Which they are: `doubtful`. Their predictions are the model's own, recovered and without a
    doubt. The model runs on powers of two, so that few programs are compiled.

    Raises: ValueError as `doubtful` does, for a share outside [0, 1], a model in training mode, and
    where x is not what was assessed.
    """
    check_model(model)
    lead = assessed.doubt.shape
    x = jax.tree.map(np.asarray, x)
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], not {share}")
    for leaf in jax.tree.leaves(x):
        if leaf.shape[: len(lead)] != lead:
            raise ValueError(f"x has shape {leaf.shape}; assessed are data points {lead}")
    points = assessed.doubt.size
    chosen = doubtful(assessed.doubt.ravel(), limit=limit, at_most=int(share * points))
    if len(chosen) == 0:
        return assessed
    padded = np.resize(chosen, 1 << (len(chosen) - 1).bit_length())

    def few(leaf: np.ndarray) -> Array:
        return jnp.asarray(leaf.reshape(points, *leaf.shape[len(lead) :])[padded])

    own = eqx.filter_jit(model)(jax.tree.map(few, x))
    own = jax.tree.map(lambda leaf: leaf[: len(chosen)], own)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(own)):
        raise ValueError("the model's own outputs are not finite")
    places = np.unravel_index(chosen, lead)

    def fill(values: Array, new: ArrayLike) -> Array:
        return values.at[places].set(jnp.asarray(new).astype(values.dtype))

    decoded = assessed.decoded
    status = Decoded(
        jax.tree.map(fill, decoded.predictions, own),
        decoded.heard,
        fill(decoded.recovered, True),
    )
    return Assessed(status, fill(assessed.deviation, 0), fill(assessed.doubt, 0))
