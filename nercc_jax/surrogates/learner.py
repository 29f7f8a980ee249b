"""A learner from past answers: a Gaussian process on a window of pairs (input, answer).

With the window's features H and residuals r = y - m(x) of its answers, the prediction at x is

    mean(x) = m(x) + c + k(x, H) A^-1 (r - c),   A = k(H, H) + noise,
    variance(x) = k(x, x) + noise - k(x, H) A^-1 k(H, x),

the posterior of a Gaussian process, with prior mean m and mean residual c. `DeviationScale` turns
the variance into the units of the outputs. The equations are solved once for each point, not once
for each output: a model may have thousands of outputs.

Answers to the same input are one pair, with their mean, and the noise divided by their number.

The factor is W = L^-1, the inverse of the Cholesky factor, since W' W = A^-1 needs only products,
which are faster than solving. Learning uses NumPy in float64: nothing is compiled, and a learner of
a hundred pairs is fitted in milliseconds. New pairs are appended to the factor, and old ones are
removed by a reflection; after as many new pairs as the window holds, the factor is recomputed.
Predictions use NumPy, or JAX inside a transformation (`jax.jit`, `jax.grad`), in its precision. The
factor is then rounded: with the least noise of a tuned kernel, errors stay within 1 % of those in
float64, and deviations within 1 % for 1,024 pairs, 10 % for 64.

Source: Rasmussen and Williams 2006, "Gaussian Processes for Machine Learning", section 2.2.
"""

from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from ..arrays import check_count, namespace, native, product, root_mean_square, safe_sqrt
from ..codes.trees import Form, any_tracer, finite_points, is_float, join
from ._factor import replace_rows, whiten
from .interface import (
    AbstractGroupPrior,
    AbstractSurrogate,
    SurrogatePredictions,
    check_like,
    outputs_of_groups,
)
from .kernel import (
    Function,
    Kernel,
    called,
    features_of,
    length_of,
)

L = TypeVar("L", bound="Learner")


class PairWindow(eqx.Module):
    """The latest pairs, the oldest first. Answers to the same input are one pair.

    Otherwise leaving a pair out would leave its copy in, and errors would be underestimated. Inputs
    that differ only by rounding count as the same (`Kernel.same`): the earliest one is kept.

    Attributes:
        inputs: Features of the pairs.
        residuals: Mean answers of the pairs minus the prior.
        counts: The number of answers of each pair; 0 for an empty row.
        scatter: The root mean square distance of answers to the same input from their mean.
    """

    inputs: Float[Any, "capacity features"]
    residuals: Float[Any, "capacity m"]
    counts: Int[Any, " capacity"]
    scatter: Float[Any, " capacity"]


class Factor(eqx.Module):
    """Numbers derived from window and kernel that predictions need.

    Attributes:
        whitening: A matrix W for which W' W is the inverse of the pairs' covariances.
        jitter: The number added to the covariances' diagonal so that a factor exists.
        centre: The mean residual; 0 without pairs.
        spread: The residuals' standard deviation over window and outputs; 0 if all are equal.
        replaced: The number of pairs added since the factor was computed anew.
    """

    whitening: Float[Any, "capacity capacity"]
    jitter: Float[Any, ""]
    centre: Float[Any, " m"]
    spread: Float[Any, ""]
    replaced: Int[Any, ""]


class DeviationScale(eqx.Module):
    """The scale of deviations, calibrated on the errors of leaving each pair out.

    With v the process's variance at a point, its deviation in units of the outputs' spread is

        scale sqrt(v) min(v / typical, 1)^(exponent / 2),    typical = mean k(x, x) + noise.

    Far from all pairs, v is about `typical`, and the error is about the outputs' spread. A factor
    without the exponent, fitted near pairs, is too small far from them. Measured for 11 functions
    of 5 features, bars of 1.64 deviations covered 50 % three times as far out as the pairs, and
    67 % with an exponent; among the pairs 89 and 88 %.

    Attributes:
        scale: The factor.
        typical: The prior variance of a point, in the mean over the pairs.
        exponent: How much faster than the variance the squared error falls near pairs; 0 or more.
    """

    scale: Float[Any, "*groups"]
    typical: Float[Any, "*groups"]
    exponent: Float[Any, "*groups"]

    def deviation(
        self, spread: Float[Any, "*groups"], variance: Float[Any, "*groups points"]
    ) -> Float[Any, "*groups points"]:
        """Return deviations in units of the outputs; infinite where the spread is unknown (0)."""
        xp = namespace(spread, variance)
        spread, scale, typical, exponent = (
            xp.asarray(each)[..., None]
            for each in (spread, self.scale, self.typical, self.exponent)
        )
        known = variance > 0
        rest = xp.where(known, xp.minimum(xp.where(known, variance, 1) / typical, 1), 0)
        deviation = scale * spread * safe_sqrt(variance) * rest ** (exponent / 2)
        return xp.where(spread > 0, deviation, xp.inf)


class GaussianGroupPrior(AbstractGroupPrior):
    """A Gaussian process on groups' data points and coded data points, in this order.

    Attributes:
        mean: The means, given the window.
        covariance: The covariances within each group, in units of the process's variance.
        noise: The variance of the noise, in the same units.
        spread: The spread of the outputs; 0 if it is unknown.
        scale: The scale of deviations.
        form: The structure of the outputs.
    """

    mean: Float[Array, "groups points m"]
    covariance: Float[Array, "groups points points"]
    noise: Float[Array, " groups"]
    spread: Float[Array, " groups"]
    scale: DeviationScale
    form: Form = eqx.field(static=True)

    def condition(
        self,
        y: Float[Array, "groups num_workers m"],
        available: Bool[Array, "groups num_workers"],
    ) -> SurrogatePredictions:
        num_workers = available.shape[1]
        responded = available & jnp.all(jnp.isfinite(y), axis=-1)

        def of_group(mean, covariance, noise, y, responded):
            # The covariances of the available answers with all points of the group.
            cross = jnp.where(responded[:, None], covariance[-num_workers:], 0)
            own = jnp.where(responded, cross[:, -num_workers:], 0)
            own = own + jnp.diag(jnp.where(responded, noise, 1))
            whitening, _ = whiten(own, noise)
            known = product(whitening, cross)
            residual = jnp.where(responded[:, None], y.astype(mean.dtype) - mean[-num_workers:], 0)
            variance = jnp.maximum(jnp.diagonal(covariance) - jnp.sum(known**2, axis=0), 0) + noise
            return mean + product(known.T, product(whitening, residual)), variance

        mean, variance = jax.vmap(of_group)(self.mean, self.covariance, self.noise, y, responded)
        num_data = mean.shape[1] - num_workers
        deviation = self.scale.deviation(self.spread, variance[:, :num_data])
        parts = {"own": mean[:, :num_data], "coded": mean[:, num_data:]}
        return SurrogatePredictions(**parts, form=self.form, deviation=deviation)


class Learner(AbstractSurrogate):
    """A Gaussian process on past answers: a pytree of bounded size that forgets the oldest pairs.

    `update` and `predict` are pure, and return NumPy arrays. `predict`, and a scheme with a
    learner, may also be transformed by `jax.jit`, `jax.vmap` and `jax.grad`.

    >>> import numpy as np
    >>> from nercc_jax.surrogates import fit_learner
    >>> x = np.linspace(-1, 1, 20)[:, None]
    >>> learner = fit_learner(x, np.sin(3 * x), capacity=64)
    >>> learner = learner.update(x + 0.05, np.sin(3 * (x + 0.05)))
    >>> mean, deviation = learner.predict(np.array([[0.33]]))
    >>> mean.shape, deviation.shape
    ((1, 1), (1,))

    Attributes:
        features: A function of a batch, which JAX can trace, that returns the features by which
            inputs are compared (a projection, a student's inner layer); None for the inputs' own
            floats.
        prior: A function of a batch, which JAX can trace, that returns the prior mean (a student);
            None for 0. The mean residual is also subtracted.
        kernel: The covariance function; `fit_learner` tunes it.
        scale: The scale of deviations; `fit_learner` tunes it.
        theta: See `AbstractSurrogate`.
        kappa: See `AbstractSurrogate`. Default: infinite, the learner alone, which is conditioned
            on the group's answers, too.
        window: The pairs (`PairWindow`).
        factor: Numbers derived from the window and the kernel (`Factor`).
        form: The structure of the outputs.
    """

    features: Function | None
    prior: Function | None
    kernel: Kernel
    scale: DeviationScale
    theta: Float[Any, ""]
    kappa: Float[Any, ""]
    window: PairWindow
    factor: Factor
    form: Form = eqx.field(static=True)

    def __init__(
        self,
        kernel: Kernel,
        form: Form,
        *,
        capacity: int = 1024,
        features: Function | None = None,
        prior: Function | None = None,
    ):
        """Create an empty learner; `fit_learner` finds kernel and form from the first pairs.

        Raises:
            ValueError: The capacity is not a positive integer.
        """
        capacity = check_count("capacity", capacity)
        self.features, self.prior, self.kernel, self.form = features, prior, kernel, form
        own = jax.dtypes.canonicalize_dtype(float)
        self.theta, self.kappa = np.ones((), own), np.full((), np.inf, own)
        dtype = kernel.centre.dtype
        outputs = jnp.result_type(jnp.float32, *form.dtypes)
        residuals = np.zeros((capacity, form.size), outputs)
        self.window = PairWindow(
            inputs=np.zeros((capacity, len(kernel.centre)), dtype),
            residuals=residuals,
            counts=np.zeros(capacity, np.int32),
            scatter=np.zeros(capacity, outputs),
        )
        self.scale = DeviationScale(np.ones((), dtype), np.ones((), dtype), np.zeros((), dtype))
        self.factor = Factor(
            whitening=np.zeros((capacity, capacity)),
            jitter=np.zeros(()),
            centre=residuals[0],
            spread=np.zeros((), outputs),
            replaced=np.zeros((), np.int32),
        )

    @property
    def capacity(self) -> int:
        """Return the most pairs that the window holds."""
        return len(self.window.counts)

    @property
    def filled(self) -> Bool[Any, " capacity"]:
        """Return the mask of the window's rows that hold a pair."""
        return self.window.counts > 0

    @property
    def size(self) -> Int[Any, ""]:
        """Return the number of pairs in the window, answers to the same input counted once."""
        return self.filled.sum()

    def update(
        self: L,
        x: PyTree[Shaped[Any, "pairs ..."]],
        y: PyTree[Float[Any, "pairs ..."]],
    ) -> L:
        """Return the learner with these pairs added; if its window is full, the oldest are dropped.

        Coded data points with their answers may be pairs, too. Pairs that are not finite are left
        out.

        Args:
            x: Inputs.
            y: Answers.

        Raises:
            ValueError: x or y differ in form from its pairs, or it is called inside `jax.jit`.
        """
        if any_tracer(self, x, y):
            raise ValueError("a learner learns outside of programs: call update outside of jax.jit")
        one, (x, y) = self._in_place((x, y))
        window, source, fresh = learn_pairs(one.window, one.kernel, *one._pairs(x, y))
        learned = eqx.tree_at(lambda learner: learner.window, one, window)
        if not fresh.any():
            return self
        factor, kept = one.factor, source[learned.filled & ~fresh]
        replaced = int(factor.replaced) + int(fresh.sum())
        # A factor that was rounded on a device cannot be updated, and for many new rows a new one
        # is cheaper. Rounding errors of reflections accumulate slowly.
        exact = factor.whitening.dtype == np.float64
        if not exact or fresh.sum() > 0.25 * len(kept) or replaced > one.capacity:
            return learned.refactorized()
        rows, old = learned._rows, one._rows
        held, new = slice(0, len(kept)), slice(len(kept), rows.stop)
        cross = one.kernel(window.inputs[held], window.inputs[new])
        own = learned._covariance(new) + factor.jitter * np.eye(cross.shape[1])
        whole = np.zeros((one.capacity, one.capacity))
        try:
            replace_rows(factor.whitening[old, old], kept, cross, own, whole[rows, rows])
        except np.linalg.LinAlgError:  # the new rows are dependent on old ones, up to rounding
            return learned.refactorized()
        return learned._with_factor(whole, factor.jitter, replaced)

    def predict(
        self, x: PyTree[Shaped[Any, "points ..."]]
    ) -> tuple[PyTree[Float[Any, "points ..."]], Float[Any, " points"]]:
        """Return the mean, in the structure of the model's outputs, and each point's deviation.

        The deviation is the standard deviation of an answer, noise included, as the root mean
        square over its outputs and in their units. It is proportional to the spread of the answers,
        so it is infinite until two answers differ, and always for a constant function. With an
        empty window the mean is the prior's, or 0.
        """
        one, x = self._in_place(x)
        mean, covariance = one.window_posterior(one._features(x)[:, None])
        mean, xp = mean[:, 0], namespace(covariance)
        if one.prior is not None:
            mean = mean + xp.asarray(join(called(one.prior, x), 1)[0])
        variance = xp.maximum(covariance[:, 0, 0], 0) + one.kernel.noise
        return self.form.split(mean), one.deviation_of(variance)

    @property
    def has_deviation(self) -> bool:
        return True

    def prior_deviation(
        self, x: PyTree[Shaped[Array, "groups num_data ..."]]
    ) -> Float[Array, "groups num_data"]:
        return jnp.asarray(outputs_of_groups(lambda points: self.predict(points)[1], x))

    def outputs(self, x: PyTree[Shaped[Array, "points ..."]]) -> PyTree[Float[Array, "points ..."]]:
        return jax.tree.map(jnp.asarray, self.predict(x)[0])

    def group_prior(
        self,
        x: PyTree[Shaped[Array, "groups num_data ..."]],
        coded: PyTree[Shaped[Array, "groups num_workers ..."]],
        own: PyTree[Float[Array, "groups num_data ..."]] | None = None,
    ) -> GaussianGroupPrior:
        # `own` alone is not enough: covariances with the group's answers are needed.
        one, (x, coded) = self._in_place((x, coded))
        xp = namespace(one.window.counts)
        together = jax.tree.map(lambda *leaves: xp.concatenate(leaves, axis=1), x, coded)
        mean, covariance = one.window_posterior(outputs_of_groups(one._features, together))
        if (prior := one.prior) is not None:
            priors, found = join(outputs_of_groups(lambda x: called(prior, x), together), 2)
            check_like(found, self.form)
            mean = mean + priors
        groups, dtype = len(mean), mean.dtype
        numbers = one.kernel.noise, one.factor.spread, one.scale
        of_groups = lambda each: jnp.broadcast_to(jnp.asarray(each, dtype), (groups,))  # noqa: E731
        noise, spread, scale = jax.tree.map(of_groups, numbers)
        return GaussianGroupPrior(
            mean=jnp.asarray(mean),
            covariance=jnp.asarray(covariance, dtype),
            noise=noise,
            spread=spread,
            scale=scale,
            form=self.form,
        )

    def window_posterior(
        self, z: Float[Any, "groups points features"]
    ) -> tuple[Float[Any, "groups points m"], Float[Any, "groups points points"]]:
        """Return the posterior of points in groups, given the window.

        Args:
            z: The points' features.

        Returns:
            The residuals' means, and their covariances within each group, without noise and in
                units of the process's variance.
        """
        one, z = self._in_place(z)
        groups, points, features = z.shape
        rows, kernel, xp = one._rows, one.kernel, namespace(z)
        whitening, centred = one.factor.whitening[rows, rows], one._centred(rows)
        cross = kernel(z.reshape(-1, features), one.window.inputs[rows]) * one.filled[rows]
        white = product(cross, whitening.T)
        if len(white) < centred.shape[1]:  # in the cheaper order
            mean = product(product(white, whitening), centred)
        else:
            mean = product(white, product(whitening, centred))
        white = white.reshape(groups, points, -1)
        known = product(white, xp.swapaxes(white, 1, 2))
        mean = mean.reshape(groups, points, -1) + one.factor.centre
        return mean.astype(one.window.residuals.dtype), kernel(z, z) - known

    def knows(self, x: PyTree[Shaped[Any, "points ..."]]) -> Bool[Any, " points"]:
        """Return the mask of inputs to which the window has answers.

        Predictions of these are nearly the answers themselves, so their errors say nothing about
        those of other inputs.
        """
        one, x = self._in_place(x)
        return (one.kernel.same(one._features(x), one.window.inputs) & one.filled).any(axis=1)

    def left_out(self) -> tuple[Float[Any, "capacity m"], Float[Any, " capacity"]]:
        """Return the errors of predicting each pair of the window from the others, and deviations.

        Each input's mean answer is predicted without any of its answers, and the deviation is that
        of a single answer. All follow from the present factor (Rasmussen and Williams 2006,
        equations 5.12).
        """
        one, _ = self._in_place(())
        xp, rows, filled = namespace(one.window.counts), one._rows, one.filled
        precision = xp.sum(one.factor.whitening[:, rows] ** 2, axis=0)
        precision = xp.pad(precision, (0, one.capacity - len(precision)))
        precision = xp.where(filled, precision, 1)
        single = 1 / precision + one.kernel.noise * (1 - 1 / xp.maximum(one.window.counts, 1))
        return -one.mean_weights() / precision[:, None], one.deviation_of(single)

    def mean_weights(self) -> Float[Any, "capacity m"]:
        """Return the weights of the window's pairs: the mean is covariances times weights."""
        one, _ = self._in_place(())
        rows, whitening = one._rows, one.factor.whitening[one._rows, one._rows]
        weights = product(whitening.T, product(whitening, one._centred(rows)))
        return namespace(weights).pad(weights, ((0, one.capacity - len(weights)), (0, 0)))

    def deviation_of(self, variance: Float[Any, " points"]) -> Float[Any, " points"]:
        """Return deviations in units of the outputs, from the process's variance."""
        return self.scale.deviation(self.factor.spread, variance)

    def with_kernel(self: L, kernel: Kernel, scale: DeviationScale | None = None) -> L:
        """Return the learner with another kernel and scale of deviations, and the same window."""
        numbers = kernel, self.scale if scale is None else scale
        return eqx.tree_at(lambda one: (one.kernel, one.scale), self, numbers).refactorized()

    def refactorized(self: L) -> L:
        """Return the same learner with its factor recomputed."""
        one, _ = self._in_place(())
        rows, whole = one._rows, np.zeros((one.capacity, one.capacity))
        noise = one.kernel.noise / np.maximum(one.window.counts.max(initial=1), 1)
        whole[rows, rows], jitter = whiten(one._covariance(rows), noise)
        return one._with_factor(whole, jitter, 0)

    def _with_factor(self: L, whitening: Any, jitter: Any, replaced: int) -> L:
        """Return the learner with this whitening matrix, and the moments of its residuals."""
        window, filled = self.window, self.filled
        total = np.sum(window.residuals, axis=0, where=filled[:, None])
        centre = total / np.maximum(self.size, 1).astype(total.dtype)
        deviation = root_mean_square(window.residuals - centre, where=filled[:, None])
        parts = np.stack([deviation, root_mean_square(window.scatter, where=filled)])
        spread = np.sqrt(2.0).astype(parts.dtype) * root_mean_square(parts)
        # A spread below eight units in the last place of the largest answer is rounding.
        size = np.max(np.abs(window.residuals), initial=0, where=filled[:, None])
        spread = np.where(spread > 8 * np.finfo(spread.dtype).eps * size, spread, 0)
        factor = Factor(whitening, jitter, centre, spread, np.asarray(replaced, np.int32))
        return eqx.tree_at(lambda one: one.factor, self, factor)

    def _in_place(self: L, tree: PyTree) -> tuple[L, PyTree]:
        """Return learner and arguments as JAX arrays inside a transformation, else as NumPy's."""
        tree = native(tree)
        leaves = jax.tree.leaves((self, tree))
        if namespace(*leaves) is np:
            return self, jax.tree.map(np.asarray, tree)
        if not any_tracer(leaves):
            one, tree = jax.device_get((self, tree))
            return one, jax.tree.map(np.asarray, tree)
        arrays, rest = eqx.partition(self, eqx.is_array)
        one = eqx.combine(jax.tree.map(jnp.asarray, arrays), rest)
        whitening = one.factor.whitening.astype(one.window.inputs.dtype)
        one = eqx.tree_at(lambda learner: learner.factor.whitening, one, whitening)
        return one, jax.tree.map(jnp.asarray, tree)

    def _features(self, x: PyTree[Shaped[Any, "points ..."]]) -> Float[Any, "points features"]:
        return namespace(self.window.counts).asarray(features_of(self.features, x))

    @property
    def _rows(self) -> slice:
        """Return the window's rows up to the last pair; all rows inside a transformation."""
        if namespace(self.window.counts) is jnp:
            return slice(None)
        return slice(0, int(np.max(np.flatnonzero(self.filled), initial=-1)) + 1)

    def _centred(self, rows: slice) -> Float[Any, "rows m"]:
        """Return the residuals minus their mean; 0 for empty rows."""
        xp, filled = namespace(self.window.counts), self.filled[rows, None]
        return xp.where(filled, self.window.residuals[rows] - self.factor.centre, 0)

    def _covariance(self, rows: slice) -> Float[Any, "rows rows"]:
        """Return the covariances of the pairs' mean answers, without jitter.

        Empty rows have covariances of 0 and a variance of 1.
        """
        inputs, counts = self.window.inputs[rows], self.window.counts[rows]
        own = 1 + self.kernel.linear * np.sum(self.kernel.scaled(inputs) ** 2, axis=1)
        covariance = self.kernel(inputs, inputs) * ((counts[:, None] > 0) & (counts > 0))
        own = np.where(counts > 0, own + self.kernel.noise / np.maximum(counts, 1), 1)
        return np.where(np.eye(len(counts), dtype=bool), own, covariance)

    def _pairs(
        self, x: PyTree, y: PyTree
    ) -> tuple[Float[Any, "pairs features"], Float[Any, "pairs m"], Bool[Any, " pairs"]]:
        """Return features, residuals, and the mask of finite pairs; the others hold zeros."""
        check_like(self.form, join(y, 1)[1])
        pairs = length_of("y", y)
        if length_of("x", x) != pairs:
            raise ValueError(f"x are {length_of('x', x)} data points, y {pairs} answers")
        known = finite_points(x, 1) & finite_points(y, 1)

        def clean(leaf: Any) -> Any:
            mask = known.reshape(-1, *[1] * (leaf.ndim - 1))
            return np.where(mask, leaf, np.zeros_like(leaf)) if is_float(leaf) else leaf

        x, y = jax.tree.map(clean, (x, y))
        z, r = self._features(x), join(y, 1)[0]
        if z.shape[1:] != self.kernel.centre.shape:
            raise ValueError(
                f"x have {z.shape[1]} features; the learner knows {len(self.kernel.centre)}"
            )
        if self.prior is not None:
            priors, found = join(called(self.prior, x), 1)
            check_like(found, self.form)
            r = r - np.asarray(priors)
        known = known & np.isfinite(z).all(axis=1) & np.isfinite(r).all(axis=1)
        return np.where(known[:, None], z, 0), np.where(known[:, None], r, 0), known


def learn_pairs(
    window: PairWindow,
    kernel: Kernel,
    z: Float[Any, "pairs features"],
    r: Float[Any, "pairs m"],
    known: Bool[Any, " pairs"],
) -> tuple[PairWindow, Int[Any, " capacity"], Bool[Any, " capacity"]]:
    """Return the window with new pairs added and, beyond its size, the oldest dropped.

    A pair whose input occurs again counts as new.

    Returns:
        The window; each row's index in the earlier window followed by the new pairs; and the mask
            of rows that are new or have new answers.
    """
    size, number = len(window.counts), len(known)

    # For each new pair, the row with its input, of the window followed by the new pairs.
    old = kernel.same(z, window.inputs) & known[:, None] & (window.counts > 0)
    first = np.argmax(kernel.same(z, z) & known, axis=1) if number else np.zeros(0, int)
    for _ in range(number.bit_length()):  # makes `same` transitive
        first = first[first]
    merged = np.any(old, axis=1)[first]
    lead = np.where(merged, np.argmax(old, axis=1)[first], size + first)
    lead = np.where(known, lead, size + number)

    def summed(values: Any) -> Any:
        """Return for each row the sum over the new pairs that it represents."""
        rows = np.zeros((size + number + 1, *values.shape[1:]), values.dtype)
        np.add.at(rows, lead, values)
        return rows[:-1]

    def after(rows: Any, new: Any) -> Any:
        return np.concatenate([rows, new.astype(rows.dtype)])

    # Means are the earlier means plus changes, so that equal answers change nothing.
    place = np.minimum(lead, size + number - 1)
    before = after(window.counts, np.zeros(number, int))
    added = summed(known.astype(before.dtype))
    counts = before + added
    each, base = np.maximum(counts, 1), after(window.residuals, r)
    r = r.astype(base.dtype)
    change = summed(np.where(known[:, None], r - base[place], 0)) / each[:, None].astype(base.dtype)
    mean = base + change
    scatter = after(window.scatter, np.zeros(number))
    apart = root_mean_square(np.where(known[:, None], r - mean[place], 0), axis=1)
    moved = root_mean_square(change, axis=1)
    unit = max(np.max(apart, initial=0), np.max(scatter)) or 1
    square = before * ((scatter / unit) ** 2 + (moved / unit) ** 2) + summed((apart / unit) ** 2)
    scatter = np.where(added > 0, unit * safe_sqrt(square / each), scatter)

    # First the unchanged rows, then those that are new or have new answers, then empty ones.
    order = np.argsort(np.where(counts == 0, 2, np.where(added > 0, 1, 0)), stable=True)
    source = order[np.maximum(np.sum(counts > 0) - size, 0) + np.arange(size)]
    learned = PairWindow(
        inputs=after(window.inputs, z)[source],
        residuals=mean[source],
        counts=counts[source].astype(window.counts.dtype),
        scatter=scatter[source].astype(window.scatter.dtype),
    )
    return learned, source, (added > 0)[source]
