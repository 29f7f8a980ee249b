"""A code with all that goes beyond it: order, encode, run, decode with a surrogate, doubt."""

from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ..codes import AbstractCode, as_mask, encode_groups
from ..inference import Features, Model, in_groups, order_points, run_workers
from ._doubt import Doubt, assess
from ._surrogate import Surrogate


class Scheme(eqx.Module):
    """How queries are answered by coded workers: a code, and what else is wanted.

    - `code`: for K data points on N workers.
    - `order`: what data points are ordered by, over buffers of `buffer_size` (see `order_points`):
      "pixels" for a projection of the data points themselves, "surrogate" for the surrogate's
      outputs, or a function of a batch of them. None: they stay as they come.
    - `surrogate`: see `fit_surrogate`. `doubt`: see `calibrate_doubt`. Both are for one model, and
      for data in the order that the scheme has.

    Raises: ValueError for an order by a surrogate that is not there.
    """

    code: AbstractCode
    surrogate: Surrogate | None = None
    doubt: Doubt | None = None
    order: Literal["pixels", "surrogate"] | Callable[[Array], Array] | None = eqx.field(
        default=None
    )
    buffer_size: int = eqx.field(static=True, default=1024)

    def __check_init__(self):
        named = isinstance(self.order, str)
        if named and self.order not in ("pixels", "surrogate"):
            raise ValueError(f"order must be 'pixels', 'surrogate' or a function: {self.order!r}")
        if self.order == "surrogate" and self.surrogate is None:
            raise ValueError("order by 'surrogate' needs a surrogate")

    def arrange(self, x: Float[ArrayLike, "points ..."]) -> Int[Array, " points"]:
        """The order in which these data points are coded: `x[order]` is cut into groups of K.

        What the surrogate and the doubt are fitted on must come in this order too. Raises:
        ValueError as `order_points` does.
        """
        cheap = None if self.surrogate is None else self.surrogate.model
        return self._arrange(jnp.asarray(x), cheap)

    def _arrange(self, x: Array, surrogate: Features | None) -> Int[Array, " points"]:
        """`surrogate`: its outputs on x, or what makes them."""
        if self.order is None:
            return jnp.arange(len(x))
        features = None if isinstance(self.order, str) else self.order
        if self.order == "surrogate":
            features = surrogate
        return order_points(x, self.code.num_data, features=features, buffer_size=self.buffer_size)


class Assessed(eqx.Module):
    """Predictions of data points in the order in which they came, and how far to trust them.

    `heard` are the workers that were used, a row for each group as it was sent. `deviation` is the
    standard deviation in units of the outputs, infinite where nothing is told. `doubt` is the
    probability that the label is not the model's own, NaN without a calibrated `Doubt`, 1 where
    nothing is recovered (the prediction is NaN there).
    """

    predictions: Float[Array, "points m"]
    heard: Bool[Array, "groups num_workers"]
    recovered: Bool[Array, " points"]
    deviation: Float[Array, " points"]
    doubt: Float[Array, " points"]


def scheme_inference(model: Model, scheme: Scheme) -> Callable[..., Assessed]:
    """One jitted function `(x, available) -> Assessed` for a model behind a scheme.

    x: (points, ...), any number of whole groups of K; available: a mask (N,) for all groups, or one
    per group as they are sent, (groups, N). `model` is any callable from a batch to vectors
    (B, outputs). The surrogate runs on all data points and coded data points: where it is cheap
    because workers are far, on the master; its cost is yours to count.

    One compilation serves every straggler set, and all x of one shape. Raises: ValueError for
    shapes and dtypes that do not fit, and data points that are not finite, before anything runs.
    """

    def infer(x: ArrayLike, available: ArrayLike) -> Assessed:
        x = jnp.asarray(x)
        num_data, num_workers = scheme.code.num_data, scheme.code.num_workers
        if x.ndim < 1 or len(x) == 0 or len(x) % num_data:
            raise ValueError(f"x of shape {x.shape} is no whole groups of {num_data} data points")
        finite = np.asarray(jnp.isfinite(x.reshape(len(x), -1)).all(axis=1))
        if not finite.all():
            broken = np.flatnonzero(~finite)
            raise ValueError(f"data points {broken.tolist()} are not finite: take them out")
        groups = len(in_groups(scheme.code, x.reshape(-1, num_data, *x.shape[1:]), True))
        masks = (groups, num_workers) if jnp.ndim(available) == 2 else (num_workers,)
        masks = jnp.broadcast_to(as_mask(available, masks), (groups, num_workers))
        return _infer(model, scheme, x, masks)

    return infer


@eqx.filter_jit
def _infer(model: Model, scheme: Scheme, x: Array, available: Array) -> Assessed:
    code, surrogate = scheme.code, scheme.surrogate
    own = None if surrogate is None else surrogate.model(x)
    order = scheme._arrange(x, own)
    sent = x[order].reshape(-1, code.num_data, *x.shape[1:])
    coded = encode_groups(code, sent)
    y = _vectors(run_workers(model, code, coded))
    cheap, cheap_coded = None, None
    if surrogate is not None:
        assert own is not None
        cheap = own[order].reshape(*sent.shape[:2], -1)
        cheap_coded = run_workers(surrogate.model, code, coded)
    decoded, deviation = assess(code, surrogate, y, available, cheap, cheap_coded)
    doubt = jnp.full(decoded.recovered.shape, jnp.nan, deviation.dtype)
    if scheme.doubt is not None:
        doubt = scheme.doubt(decoded.predictions, deviation, cheap)

    def home(values: Array) -> Array:
        values = values.reshape(len(x), *values.shape[2:])
        return jnp.zeros_like(values).at[order].set(values)

    return Assessed(
        home(decoded.predictions),
        decoded.heard,
        home(decoded.recovered),
        home(deviation),
        home(doubt),
    )


def _vectors(y: Float[Array, "groups num_workers ..."]) -> Float[Array, "groups num_workers m"]:
    if y.ndim != 3:
        raise ValueError(f"the model must give a vector a data point, not shape {y.shape[2:]}")
    return y


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
    x: Float[ArrayLike, "points ..."],
    assessed: Assessed,
    *,
    limit: float = 0.0,
    share: float = 1.0,
) -> Assessed:
    """Answers what is doubtful by the model itself: no more than that `share` of the data points.

    Which they are: `doubtful`. Their predictions are the model's own, recovered and without a
    doubt. The model runs on powers of two, so that few programs are compiled.

    Raises: ValueError as `doubtful` does, for a share outside [0, 1], and where x is not what was
    assessed.
    """
    x, points = np.asarray(x), len(assessed.doubt)
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], not {share}")
    if x.shape[:1] != (points,):
        raise ValueError(f"x has shape {x.shape}; assessed are {points} data points")
    chosen = doubtful(assessed.doubt, limit=limit, at_most=int(share * points))
    if len(chosen) == 0:
        return assessed
    padded = np.resize(chosen, 1 << (len(chosen) - 1).bit_length())
    own = eqx.filter_jit(model)(jnp.asarray(x[padded]))[: len(chosen)]
    if not np.isfinite(own).all():
        raise ValueError("the model's own outputs are not finite")
    return Assessed(
        assessed.predictions.at[chosen].set(own.astype(assessed.predictions.dtype)),
        assessed.heard,
        assessed.recovered.at[chosen].set(True),
        assessed.deviation.at[chosen].set(0),
        assessed.doubt.at[chosen].set(0),
    )
