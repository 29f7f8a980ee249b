"""A code with all that goes beyond it: order, encode, run, decode with a surrogate, doubt."""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree, Shaped

from ..codes import (
    AbstractCode,
    Decoded,
    Form,
    GroupPoints,
    Known,
    alike_only,
    check_has_points,
    copies_of_doubtful,
    encode_groups,
    following_points,
    groups_of,
    has_points,
    join,
)
from ..inference import AbstractScheme, Features, Work, order_points
from ..risk import Doubt, ErrorBars
from ..surrogates import AbstractExpectation, AbstractSurrogate, assess
from ..surrogates._interface import check_like, outputs_of_groups
from ..surrogates._pairs import features_of
from ._reexecute import Assessed


class Prepared(eqx.Module):
    """What a scheme decides before anything is sent.

    `order` is that of the data points in their groups, and `own` the surrogate's outputs on them
    as they came, where they are ordered by those. `points` are the regression points of each group,
    None where all have the code's. `busy` are the workers that have something to do, None for all
    of them.
    """

    order: Int[Array | np.ndarray, " points"]
    own: PyTree[Float[Array | np.ndarray, "points ..."]] | None = None
    points: GroupPoints | None = None
    busy: Bool[Array | np.ndarray, "groups num_workers"] | None = None


class Judged(eqx.Module):
    """Predictions of groups as they were sent, as vectors, with their deviations.

    `cheap` is what the surrogate makes of them after the answers, `form` that of the outputs."""

    decoded: Decoded
    deviation: Float[Array, "groups num_data"]
    cheap: Float[Array, "groups num_data m"] | None
    form: Form = eqx.field(static=True)


class Scheme(AbstractScheme):
    """How queries are answered by coded workers: a code, and what else is wanted.

    - `code`: for K data points on N workers.
    - `order`: what data points are ordered by, over buffers of `buffer_size` (see `order_points`):
      "pixels" for a projection of the data points themselves, "surrogate" for the surrogate's
      outputs, or a function of a batch of them. None: they stay as they come.
    - `surrogate`: a cheap model (`fit_surrogate`), or a learner from past answers (`fit_learner`).
    - `doubt`: see `calibrate_doubt`; `bars`: see `calibrate_bars`. They are for one model, and for
      data in the order that the scheme has.
    - `follow`: regression points as far apart as the data points are, group by group: in "inputs",
      or in a function of a batch of them (features, or the one parameter that they differ by).
      None: the code's.
    - `redundancy`: "code" leaves the redundant workers to the code; "doubtful" gives them copies of
      those data points that the surrogate could tell least of, group by group. None: "doubtful"
      where the surrogate says how far it may be off (a learner does) and the code is NeRCC.
    - `budget`: with "doubtful", the mean number of workers of a group: more where there is more
      doubt, up to N. None: always N.

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
    surrogate that is not there, a redundancy that it cannot place, points that the code has not.
    """

    code: AbstractCode
    surrogate: AbstractSurrogate | None = None
    doubt: Doubt | None = None
    order: Literal["pixels", "surrogate"] | Callable[[PyTree], PyTree] | None = eqx.field(
        default=None
    )
    buffer_size: int = eqx.field(static=True, default=1024)
    bars: ErrorBars | None = None
    follow: Literal["inputs"] | Callable[[PyTree], PyTree] | None = eqx.field(default=None)
    redundancy: Literal["code", "doubtful"] | None = eqx.field(static=True, default=None)
    budget: float | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        named = isinstance(self.order, str)
        if named and self.order not in ("pixels", "surrogate"):
            raise ValueError(f"order must be 'pixels', 'surrogate' or a function: {self.order!r}")
        if self.order == "surrogate" and self.surrogate is None:
            raise ValueError("order by 'surrogate' needs a surrogate")
        if isinstance(self.follow, str) and self.follow != "inputs":
            raise ValueError(f"follow must be 'inputs' or a function, not {self.follow!r}")
        if self.redundancy not in (None, "code", "doubtful"):
            raise ValueError(f"redundancy must be 'code' or 'doubtful', not {self.redundancy!r}")
        told = self.surrogate is not None and self.surrogate.tells_deviation
        if self.redundancy == "doubtful" and not told:
            raise ValueError("copies of what is doubtful need a surrogate that tells it: a learner")
        if self.budget is not None and not self.places_copies:
            raise ValueError("a budget is for redundancy='doubtful'")
        if self.follow is not None or self.places_copies:
            check_has_points(self.code)

    @property
    def places_copies(self) -> bool:
        """Whether the redundant workers get copies of doubtful data points."""
        if self.redundancy is not None:
            return self.redundancy == "doubtful"
        told = self.surrogate is not None and self.surrogate.tells_deviation
        return told and has_points(self.code) and self.code.num_workers > self.code.num_data

    def arrange(self, x: PyTree[Shaped[ArrayLike, "points ..."]]) -> Int[Array, " points"]:
        """The order in which these data points are coded: `x[order]` is cut into groups of K.

        What the surrogate and the doubt are fitted on must come in this order too. Raises:
        ValueError as `order_points` does.
        """
        cheap = None if self.surrogate is None else self.surrogate.outputs
        return self._arrange(jax.tree.map(jnp.asarray, x), cheap)

    def _arrange(self, x: PyTree, surrogate: Features | None) -> Int[Array, " points"]:
        """`surrogate`: its outputs on x, or what makes them."""
        if self.order is None:
            return jnp.arange(len(jax.tree.leaves(x)[0]))
        features = None if isinstance(self.order, str) else self.order
        if self.order == "surrogate":
            features = surrogate
        return order_points(x, self.code.num_data, features=features, buffer_size=self.buffer_size)

    def prepare(self, x: PyTree[Shaped[Array, "points ..."]]) -> Prepared:
        """What is decided of data points (whole groups of K) before they are sent; pure."""
        code, surrogate = self.code, self.surrogate
        own = None
        if surrogate is not None and self.order == "surrogate":
            own = surrogate.outputs(x)  # once, for the order and for the decoding
        arranged = Prepared(self._arrange(x, own), own)
        if self.follow is None and not self.places_copies:
            return arranged
        groups = self.groups(x, arranged)
        shape = (len(jax.tree.leaves(groups)[0]), code.num_data)
        points: Any = code
        alpha, beta = (
            jnp.broadcast_to(each, (shape[0], len(each))) for each in (points.alpha, points.beta)
        )
        if self.follow is not None:
            where = None if isinstance(self.follow, str) else self.follow
            places = outputs_of_groups(lambda batch: features_of(where, batch), groups)
            alpha, beta = jax.vmap(lambda each: following_points(code, each))(places)
        busy = None
        if self.places_copies:
            assert surrogate is not None
            deviation = surrogate.deviation_before(groups)
            holds, busy = copies_of_doubtful(deviation, code.num_workers, budget=self.budget)
            beta = jnp.take_along_axis(alpha, holds, axis=1)
        placed = GroupPoints(alpha, beta, exact=self.places_copies)
        return Prepared(arranged.order, own, placed, busy)

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
        prepared = self.prepare(x)
        y = work(self.groups(x, prepared), self.encoders(prepared))
        return self.conclude(x, prepared, y, available, known)

    def send(
        self, x: PyTree[Shaped[Array, "points ..."]], encoder: ArrayLike | None
    ) -> tuple[Prepared, PyTree[Float[Array, "groups num_workers ..."]]]:
        """What is decided, and the coded data points; pure. `encoder` is the code's, as
        `known_encoder` has it."""
        prepared = self.prepare(x)
        return prepared, self._coded(self.groups(x, prepared), prepared, encoder)

    def _coded(self, groups: PyTree, prepared: Prepared, encoder: ArrayLike | None) -> PyTree:
        own = self.encoders(prepared)
        return encode_groups(self.code, groups, encoder if own is None else own)

    def encoders(self, prepared: Prepared) -> Float[Array, "groups num_workers num_data"] | None:
        """Each group's encoder, None where all have the code's."""
        return None if prepared.points is None else prepared.points.encoders(self.code)

    def conclude(
        self,
        x: PyTree[Shaped[Array, "points ..."]],
        prepared: Prepared,
        y: PyTree[Float[Array, "groups num_workers ..."]],
        available: Bool[Array, "groups num_workers"],
        known: Known,
    ) -> Assessed:
        """What these answers tell of the data points, back in the order in which they came; pure.

        Raises: ValueError where the surrogate's outputs are not like the model's.
        """
        judged = self.judge(x, prepared, y, available, known)
        decoded, deviation = judged.decoded, judged.deviation
        doubt = jnp.full(decoded.recovered.shape, jnp.nan, deviation.dtype)
        if self.doubt is not None:
            doubt = self.doubt(decoded.predictions, deviation, judged.cheap)
        points = len(prepared.order)

        def home(values: Array) -> Array:
            values = values.reshape(points, *values.shape[2:])
            return jnp.zeros_like(values).at[prepared.order].set(values)

        predictions = judged.form.split(home(decoded.predictions))
        status = Decoded(predictions, decoded.heard, home(decoded.recovered))
        return Assessed(status, home(deviation), home(doubt))

    def judge(
        self,
        x: PyTree[Shaped[Array, "points ..."]],
        prepared: Prepared,
        y: PyTree[Float[Array, "groups num_workers ..."]],
        available: Bool[Array, "groups num_workers"],
        known: Known,
    ) -> Judged:
        """What these answers tell of the groups as they were sent; pure. Raises as `conclude`."""
        code, surrogate = self.code, self.surrogate
        sent = self.groups(x, prepared)
        vectors, form = join(y, 2)
        available = available if prepared.busy is None else available & prepared.busy
        available, given = alike_only(sent, available, known.decoders)
        expectation = None
        if surrogate is not None:
            coded = self._coded(sent, prepared, known.encoder)
            own = None if prepared.own is None else self.groups(prepared.own, prepared)
            expectation = surrogate.expect(sent, coded, own)
            check_like(expectation.form, form)
        if prepared.points is None:
            decoded, deviation = assess(code, surrogate, vectors, available, expectation, given)
        else:
            decoded, deviation = assess_each(
                code, prepared.points, surrogate, vectors, available, expectation
            )
        cheap = None if expectation is None else expectation.after(vectors, available).own
        return Judged(decoded, deviation, cheap, form)

    def groups(
        self, x: PyTree[Shaped[Array | np.ndarray, "points ..."]], prepared: Prepared
    ) -> PyTree[Shaped[Array | np.ndarray, "groups num_data ..."]]:
        """The data points, or what belongs to each, in their groups, as they are coded."""
        return groups_of(jax.tree.map(lambda leaf: leaf[prepared.order], x), self.code.num_data)


def assess_each(
    code: AbstractCode,
    points: GroupPoints,
    surrogate: AbstractSurrogate | None,
    y: Float[Array, "groups num_workers m"],
    available: Bool[Array, "groups num_workers"],
    expectation: AbstractExpectation | None,
) -> tuple[Decoded, Float[Array, "groups num_data"]]:
    """As `assess`, where each group has regression points of its own."""

    def of_group(own, y, available, expectation):
        one = jax.tree.map(lambda leaf: leaf[None], (y, available, expectation))
        found = assess(own.of(code), surrogate, *one)
        return jax.tree.map(lambda leaf: leaf[0], found)

    return jax.vmap(of_group)(points, y, available, expectation)
