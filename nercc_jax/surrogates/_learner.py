"""A learner from past answers: a Gaussian process on a window of pairs (input, answer).

With the window's features H and residuals r = y - m(x) of its answers, the prediction at x is

    mean(x) = m(x) + c + k(x, H) A^-1 (r - c),   A = k(H, H) + noise,
    variance(x) = scale^2 spread^2 (k(x, x) + noise - k(x, H) A^-1 k(H, x)),

a Gaussian process's posterior, with m the prior mean and c the mean residual. spread^2 is the
variance of the residuals, and `scale` is what leave-one-out errors ask for (`tune_learner`). The
equations are solved for the points and not for the outputs, of which there may be thousands.

Answers to the same input are one pair, with their mean and the noise divided by their number.

A learner is JAX's arrays, for programs and gradients, or NumPy's (`on_host`). On the host nothing
is compiled: a learner of a hundred pairs is there in milliseconds.

Source: Rasmussen and Williams 2006, "Gaussian Processes for Machine Learning", section 2.2.
"""

from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree, Shaped

from ..codes._checks import check_count
from ..codes._products import multiply
from ..codes._trees import Form, check_floats, join, to_device
from ..evaluation._criteria import root_mean_square, safe_sqrt
from ..splines.arrays import namespace, native
from ._interface import (
    AbstractGroupPrior,
    AbstractLearner,
    SurrogatePredictions,
    outputs_of_groups,
)
from ._kernels import Kernel, Shape, wide_kernel
from ._pairs import (
    Function,
    PairWindow,
    features_of,
    learn_pairs,
    length_of,
    one_row,
    pairs_of,
    prior_of_groups,
)
from ._surrogate import trust
from ._whitening import (
    cholesky_factor,
    condition,
    replace_rows,
    sound_or_anew,
    soundly_whitened,
    whiten_on_host,
)

# Beyond this share of the window a new factor is cheaper than replacing its rows.
_MANY = 0.25
# By how much of its right side a solution may miss it before a factor whose rows were replaced is
# made anew. Its error grows from one replacement to the next, to tenfold at once: near 0.01 two
# labels in three were wrong, near 0.001 one in four (a smooth function of four numbers, noise 1e-4,
# 32 rows at once).
_WORN = 2e-5
# By how much a solution may miss the answers themselves, in units of the noise's deviation. What it
# misses is what predictions are off by: up to 0.6, errors of Lotka-Volterra's equations and of an
# epidemic were at most 1.02 times those of exact solutions, 2.0 times near 9, 6.6 times near 28,
# where the error above was 1.9e-5 (160 replacements of 32 rows).
_MISSED = 0.5
_MIXED = 8  # mixtures of the outputs that this is looked at for
_ROUNDING = 8  # units in the last place of the largest answer: less is no difference of answers

L = TypeVar("L", bound="Learner")


class GaussianGroupPrior(AbstractGroupPrior):
    """A Gaussian process on groups' data points and coded data points, in this order.

    Attributes:
        mean: The means, given the window.
        covariance: The covariances within each group, in units of the process's variance.
        noise: The variance of the noise, in the same units.
        unit: The process's standard deviation in units of the outputs; infinite where it is
            unknown.
        form: The structure of the outputs.
    """

    mean: Float[Array, "groups points m"]
    covariance: Float[Array, "groups points points"]
    noise: Float[Array, " groups"]
    unit: Float[Array, " groups"]
    form: Form = eqx.field(static=True)

    def condition(
        self,
        y: Float[Array, "groups num_workers m"],
        responded: Bool[Array, "groups num_workers"],
    ) -> SurrogatePredictions:
        known, white = jax.vmap(whiten_group)(self.covariance, self.noise, responded)
        return self.condition_whitened(known, white, y, responded)

    def condition_whitened(
        self,
        known: Float[Array, "groups num_workers points"],
        white: Float[Array, "groups num_workers num_workers"],
        y: Float[Array, "groups num_workers m"],
        responded: Bool[Array, "groups num_workers"],
    ) -> SurrogatePredictions:
        """Condition groups that are whitened already (`whiten_group`)."""
        mean, variance = jax.vmap(_posterior)(
            self.mean, self.covariance, self.noise, known, white, y, responded
        )
        num_data = mean.shape[1] - y.shape[1]
        deviation = self.unit[:, None] * safe_sqrt(variance[:, :num_data])
        return SurrogatePredictions(mean[:, :num_data], mean[:, num_data:], deviation)


def whiten_group(
    covariance: Float[Array, "points points"],
    noise: Float[Array, ""],
    responded: Bool[Array, " num_workers"],
) -> tuple[Float[Array, "num_workers points"], Float[Array, "num_workers num_workers"]]:
    """Return L^-1 C and L^-1, with L the factor of the answers' covariances.

    C are the covariances of the answers that came with all points of the group.
    """
    num_workers = len(responded)
    cross = jnp.where(responded[:, None], covariance[-num_workers:], 0)
    own = jnp.where(responded, cross[:, -num_workers:], 0) + jnp.diag(
        jnp.where(responded, noise, 1)
    )
    factor, _ = cholesky_factor(own)
    right = jnp.concatenate([cross, jnp.eye(num_workers, dtype=cross.dtype)], axis=1)
    both = jax.lax.linalg.triangular_solve(factor, right, left_side=True, lower=True)
    return both[:, : len(covariance)], both[:, len(covariance) :]


def _posterior(
    mean: Float[Array, "points m"],
    covariance: Float[Array, "points points"],
    noise: Float[Array, ""],
    known: Float[Array, "num_workers points"],
    white: Float[Array, "num_workers num_workers"],
    y: Float[Array, "num_workers m"],
    responded: Bool[Array, " num_workers"],
) -> tuple[Float[Array, "points m"], Float[Array, " points"]]:
    """Return one group's posterior mean and variance, noise included."""
    residual = jnp.where(responded[:, None], y.astype(mean.dtype) - mean[-len(responded) :], 0)
    variance = jnp.maximum(jnp.diagonal(covariance) - jnp.sum(known**2, axis=0), 0) + noise
    return mean + multiply(known.T, multiply(white, residual)), variance


class Learner(AbstractLearner):
    """A Gaussian process on past answers: a pytree of bounded size that forgets the oldest pairs.

    `update` and `predict` are pure, and may be jitted, vmapped and differentiated.

    >>> import jax.numpy as jnp
    >>> from nercc_jax.surrogates import init_learner
    >>> x = jnp.linspace(-1, 1, 20)[:, None]
    >>> learner = init_learner(x, jnp.sin(3 * x), capacity=64)
    >>> learner = learner.update(x + 0.05, jnp.sin(3 * (x + 0.05)))
    >>> mean, deviation = learner.predict(jnp.array([[0.33]]))
    >>> mean.shape, deviation.shape
    ((1, 1), (1,))

    Attributes:
        features: A function of a batch that returns what inputs are compared by (a projection, a
            student's inner layer); None for the inputs' own floats.
        prior: A function of a batch that returns the mean before any answer (a student); None for
            none. The mean residual is subtracted in addition.
        kernel: The covariance function; `fit_learner` tunes it.
        scale: The factor of deviations; `fit_learner` tunes it.
        theta: See `AbstractSurrogate`.
        kappa: See `AbstractSurrogate`. Default: infinite, the learner alone, which knows the
            group's answers, too.
        window: The pairs (`PairWindow`).
        covariance: The covariances of the window's pairs; on the host none.
        whitening: Their whitening matrix (`_whitening.py`); on the host that of the filled rows,
            in float64.
        jitter: What was added to the noise so that float32 could solve.
        error: By how much of its right side a solution missed it before it was refined, when last
            measured. Above 2e-5 the factor is made again.
        form: The structure of the outputs.
        version: The model version of the answers. Answers of another one are refused.
    """

    features: Function | None
    prior: Function | None
    kernel: Kernel
    scale: Float[Array, ""]
    theta: Float[Array, ""]
    kappa: Float[Array, ""]
    window: PairWindow
    covariance: Float[Array, "capacity capacity"]
    whitening: Float[Array, "capacity capacity"]
    jitter: Float[Array, ""]
    error: Float[Array, ""]
    form: Form = eqx.field(static=True)
    version: str = eqx.field(static=True)

    def __init__(
        self,
        kernel: Kernel,
        form: Form,
        *,
        capacity: int = 1024,
        features: Function | None = None,
        prior: Function | None = None,
        theta: Float[ArrayLike, ""] = 1.0,
        kappa: Float[ArrayLike, ""] = np.inf,
        version: str = "",
    ):
        """Make an empty learner; `init_learner` finds kernel and form from the first pairs.

        Raises:
            ValueError: The capacity is no positive integer.
        """
        capacity = check_count("capacity", capacity)
        self.features, self.prior, self.kernel = features, prior, kernel
        self.form, self.version = form, str(version)
        self.theta, self.kappa = trust(theta, kappa)
        dtype = kernel.centre.dtype
        outputs = jnp.result_type(jnp.float32, *form.dtypes)
        residuals = np.zeros((capacity, form.size), outputs)
        window = PairWindow(
            np.zeros((capacity, len(kernel.centre)), dtype),
            residuals,
            None if prior is None else residuals,
            np.zeros(capacity, np.int32),
            np.zeros(capacity, outputs),
            np.zeros((), np.int32),
        )
        self.window, self.scale = to_device((window, np.ones((), dtype)))
        self.covariance = self.whitening = to_device(np.eye(capacity, dtype=dtype))
        self.jitter = self.error = to_device(np.zeros((), dtype))

    @property
    def capacity(self) -> int:
        """Return the most pairs that the window holds."""
        return len(self.window.counts)

    @property
    def filled(self) -> Bool[Any, " capacity"]:
        """Return which rows of the window hold a pair."""
        return self.window.counts > 0

    @property
    def size(self) -> Int[Any, ""]:
        """Return the number of pairs in the window, answers to the same input counted once."""
        return self.filled.sum()

    @property
    def is_on_host(self) -> bool:
        """Return whether the arrays are NumPy's."""
        return isinstance(self.window.counts, np.ndarray)

    def on_host(self: L) -> L:
        """Return the same learner as NumPy's arrays, whose methods run without a program.

        A program that takes it makes the factor anew in every call (`on_device`).
        """
        return self if self.is_on_host else jax.device_get(self).refactorized()

    def on_device(self: L) -> L:
        """Return the same learner as JAX's arrays."""
        arrays, rest = eqx.partition(self, eqx.is_array)
        return eqx.combine(to_device(arrays), rest).refactorized() if self.is_on_host else self

    def update(
        self: L,
        x: PyTree[Shaped[Any, "pairs ..."]],
        y: PyTree[Float[Any, "pairs ..."]],
        observed: Bool[Any, " pairs"] | None = None,
        *,
        version: str | None = None,
    ) -> L:
        """Return the learner that knows these pairs, too; see `AbstractLearner.update`.

        For answers of another version of the model, `restart` first.
        """
        if version is not None and version != self.version:
            raise ValueError(
                f"these are answers of version {version!r}; the learner knows version "
                f"{self.version!r}: start anew with `learner.restart({version!r})`"
            )
        x, y = self._own_arrays((x, y))
        learned, changed = self._with_pairs(x, y, observed)
        if not len(changed):
            return self
        # On the host, a factor of the filled rows alone takes no longer than replacing some.
        if self.is_on_host or len(changed) > _MANY * self.capacity:
            return learned.refactorized()
        return learned._with_covariances()._replaced(changed)

    def predict(
        self, x: PyTree[Shaped[Any, "points ..."]]
    ) -> tuple[PyTree[Float[Any, "points ..."]], Float[Any, " points"]]:
        """Return the mean, in the structure of the model's outputs, and each point's deviation.

        The deviation is a standard deviation of an answer (noise included) in units of the outputs:
        the root mean square over all of them. Its unit is the spread of the answers. So it is
        infinite before there are two that differ: nothing says yet how far others may be off, and
        of a constant function nothing ever will. With an empty window the mean is the prior's, or
        0.
        """
        x = self._own_arrays(x)
        z = features_of(self.features, x)
        if self.is_on_host:
            z = np.asarray(z)
        mean, covariance = self.window_posterior(z[:, None])
        variance = namespace(covariance).maximum(covariance[:, 0, 0], 0) + self.kernel.noise
        mean = mean[:, 0]
        if self.prior is not None:
            mean = mean + join(self.prior(x), 1)[0]
        return self.form.split(mean), self.deviation_of(variance)

    def group_prior(
        self,
        x: PyTree[Shaped[Array, "groups num_data ..."]],
        coded: PyTree[Shaped[Array, "groups num_workers ..."]],
        own: PyTree[Float[Array, "groups num_data ..."]] | None = None,
    ) -> GaussianGroupPrior:
        # Means by themselves do not do: data points go with their group's answers.
        x, coded = jax.tree.map(jnp.asarray, (x, coded))
        together = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), x, coded)
        z = outputs_of_groups(lambda points: features_of(self.features, points), together)
        mean, covariance = self.window_posterior(z)
        if self.prior is not None:
            mean = mean + prior_of_groups(self.prior, together, self.form)
        groups = len(z)
        noise, unit = self.kernel.noise, self.deviation_of(jnp.ones(()))
        noise, unit = (jnp.broadcast_to(each, (groups,)) for each in (noise, unit))
        return GaussianGroupPrior(
            mean=mean, covariance=covariance, noise=noise, unit=unit, form=self.form
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
        return (_posterior_on_host if self.is_on_host else _window_posterior)(self, z)

    def knows(self, x: PyTree[Shaped[Any, "points ..."]]) -> Bool[Any, " points"]:
        """Return which inputs the window has answers to.

        Predictions of these are nearly the answers themselves, and say nothing of how far others
        may be off.
        """
        z = features_of(self.features, self._own_arrays(x))
        same = self.kernel.same(z, self.window.inputs) & self.filled
        return same.any(axis=1)

    def left_out(self) -> tuple[Float[Any, "capacity m"], Float[Any, " capacity"]]:
        """Return the errors of predicting each pair of the window from the others, and deviations.

        The mean answer to an input is predicted without any of the answers to it, and the deviation
        is that of a single answer. The factor that is there gives all of them at once, as in
        `leave_one_out`.
        """
        return (_left_out if self.is_on_host else _left_out_compiled)(self)

    def mean_weights(self) -> tuple[Float[Any, "capacity m"], Float[Any, " m"]]:
        """Return the weights of covariances with the window's pairs in a mean, and its constant."""
        centred = self._centred()
        if self.is_on_host:
            weights = np.zeros(centred.shape)
            weights[self.filled] = self.whitening.T @ (self.whitening @ centred[self.filled])
            return weights, self._centre()
        whitening = jax.lax.stop_gradient(self.whitening)
        weights, _ = condition(self.covariance, whitening, centred.T, centred.shape[1])
        return weights.T, self._centre()

    def spread(self) -> Float[Any, ""]:
        """Return the residuals' standard deviation over window and outputs; 0 if all are equal."""
        filled, xp = self.filled, namespace(self.window.counts)
        parts = (
            root_mean_square(self._centred(), where=filled[:, None]),
            root_mean_square(self.window.scatter, where=filled),
        )
        spread = np.sqrt(2.0).astype(parts[0].dtype) * root_mean_square(xp.stack(parts))
        size = xp.max(xp.abs(self.window.residuals), initial=0, where=filled[:, None])
        return xp.where(spread > _ROUNDING * xp.finfo(spread.dtype).eps * size, spread, 0)

    def deviation_of(self, variance: Float[Any, "..."]) -> Float[Any, "..."]:
        """Return a standard deviation in units of the outputs, from the process's variance."""
        spread, xp = self.spread(), namespace(self.window.counts)
        return xp.where(spread > 0, self.scale * spread * safe_sqrt(variance), xp.inf)

    def with_kernel(self: L, kernel: Kernel, scale: Float[ArrayLike, ""] = 1.0) -> L:
        """Return the same window with another kernel."""
        xp = namespace(self.window.counts)
        kernel = jax.device_get(kernel) if self.is_on_host else kernel
        numbers = kernel, xp.asarray(scale, self.scale.dtype)
        changed = eqx.tree_at(lambda learner: (learner.kernel, learner.scale), self, numbers)
        return changed.refactorized()

    def restart(self: L, version: str) -> L:
        """Return an empty learner with the same settings, for another version of the model."""
        fresh = type(self)(
            self.kernel,
            self.form,
            capacity=self.capacity,
            features=self.features,
            prior=self.prior,
            theta=self.theta,
            kappa=self.kappa,
            version=version,
        )
        fresh = fresh.on_host() if self.is_on_host else fresh
        return eqx.tree_at(lambda learner: learner.scale, fresh, self.scale)

    def refactorized(self: L) -> L:
        """Return the same learner with its covariances and their factor computed again."""
        factored = _factored_on_host if self.is_on_host else _factored
        return self._with_factor(*factored(self.kernel, self.window.inputs, self.window.counts))

    def _with_covariances(self: L) -> L:
        """Return the same learner, which may come from the host, as programs need it."""
        return self if len(self.covariance) == self.capacity else self.refactorized()

    def _own_arrays(self, tree: PyTree) -> PyTree:
        return jax.tree.map(np.asarray, native(tree)) if self.is_on_host else to_device(tree)

    def _with_pairs(
        self: L, x: PyTree, y: PyTree, observed: Bool[Any, " pairs"] | None = None
    ) -> tuple[L, Int[Any, " b"]]:
        """Return the learner with these pairs but the old factor, and the rows that changed."""
        new = pairs_of(self.features, self.prior, self.form, x, y, observed)
        if self.is_on_host:
            new = jax.tree.map(np.asarray, new)
        if new.features.shape[1:] != self.kernel.centre.shape:
            raise ValueError(
                f"x have {new.features.shape[1]} features; the learner knows "
                f"{len(self.kernel.centre)}"
            )
        window, changed = learn_pairs(self.window, new, self.kernel)
        return eqx.tree_at(lambda learner: learner.window, self, window), changed

    def _replaced(self: L, places: Int[Array, " b"]) -> L:
        """Return the learner with covariances and factor updated for the changed rows."""
        inputs, filled = self.window.inputs, self.filled
        own = jnp.arange(self.capacity)[:, None] == places
        new = inputs[places]
        columns = jnp.where(filled[:, None] & filled[places], self.kernel(inputs, new), 0)
        diagonal = diagonal_of(self.kernel, new, self.window.counts[places])
        diagonal = diagonal + jnp.where(filled[places], self.jitter, 0)
        columns = jnp.where(own, diagonal, columns)
        whitening, more = replace_rows(
            jax.lax.stop_gradient(self.whitening), jax.lax.stop_gradient(columns), places
        )
        covariance = self.covariance.at[:, places].set(columns).at[places].set(columns.T)
        whitening, jitter, error = sound_or_anew(
            *jax.lax.stop_gradient((covariance, whitening, self.jitter)),
            (more == 0) & self._solves(*jax.lax.stop_gradient((covariance, whitening))),
            _WORN,
        )
        own = jnp.arange(self.capacity)
        covariance = covariance.at[own, own].add(jax.lax.stop_gradient(jitter - self.jitter))
        return self._with_factor(covariance, whitening, jitter, error)

    def _solves(
        self,
        covariance: Float[Array, "capacity capacity"],
        whitening: Float[Array, "capacity capacity"],
    ) -> Bool[Array, ""]:
        """Return whether solutions for the answers miss them by less than their noise."""
        answers = jax.lax.stop_gradient(self._centred())
        size = jnp.max(jnp.abs(answers))
        answers = answers / jnp.where(size > 0, size, 1)
        if answers.shape[1] > _MIXED:
            draws = np.random.default_rng(0).normal(size=(answers.shape[1], _MIXED))
            answers = multiply(answers, jnp.asarray(draws, answers.dtype))
        weights, _ = condition(covariance, whitening, answers.T, answers.shape[1])
        missed = jnp.linalg.norm(answers.T - multiply(weights, covariance))
        noise = jax.lax.stop_gradient(self.kernel.noise + self.jitter)
        return missed <= _MISSED * jnp.sqrt(noise) * jnp.linalg.norm(answers)

    def _with_factor(self: L, *numbers: Any) -> L:
        return eqx.tree_at(
            lambda one: (one.covariance, one.whitening, one.jitter, one.error), self, numbers
        )

    def _centred(self) -> Float[Any, "capacity m"]:
        """Return the residuals less their mean; 0 where the window holds no pair."""
        xp = namespace(self.window.counts)
        return xp.where(self.filled[:, None], self.window.residuals - self._centre(), 0)

    def _centre(self) -> Float[Any, " m"]:
        """Return the mean residual; 0 for none."""
        xp = namespace(self.window.counts)
        total = xp.sum(self.window.residuals, axis=0, where=self.filled[:, None])
        return total / xp.maximum(self.size, 1).astype(total.dtype)


@eqx.filter_jit
def _window_posterior(
    learner: Learner, z: Float[Array, "groups points features"]
) -> tuple[Float[Array, "groups points m"], Float[Array, "groups points points"]]:
    learner = learner._with_covariances()
    groups, points, features = z.shape
    window, kernel = learner.window, learner.kernel
    cross = kernel(z.reshape(-1, features), window.inputs) * learner.filled
    weights, known = condition(
        learner.covariance, jax.lax.stop_gradient(learner.whitening), cross, groups
    )
    total = jnp.sum(weights, axis=1)[:, None]  # unfilled rows have none
    mean = multiply(weights, window.residuals) + (1 - total) * learner._centre()
    covariance = jax.vmap(kernel)(z, z) - known
    return mean.reshape(groups, points, -1), covariance


def _posterior_on_host(
    learner: Learner, z: Float[np.ndarray, "groups points features"]
) -> tuple[Float[np.ndarray, "groups points m"], Float[np.ndarray, "groups points points"]]:
    groups, points, features = z.shape
    kernel, filled, whitening = learner.kernel, learner.filled, learner.whitening
    white = kernel(z.reshape(-1, features), learner.window.inputs[filled]) @ whitening.T
    centred = learner._centred()[filled]
    if len(white) < centred.shape[1]:  # in the order that takes less
        mean = white @ whitening @ centred
    else:
        mean = white @ (whitening @ centred)
    mean = (mean + learner._centre()).reshape(groups, points, -1)
    if points == 1:
        own = kernel.variance(z[:, 0]) - np.vecdot(white, white)
        own = own[:, None, None]
    else:
        white = white.reshape(groups, points, -1)
        own = np.stack([kernel(each, each) for each in z]) - white @ white.swapaxes(1, 2)
    return mean.astype(learner.window.residuals.dtype), own


def _left_out(learner: Learner) -> tuple[Float[Any, "capacity m"], Float[Any, " capacity"]]:
    weights, _ = learner.mean_weights()
    counts, noise = learner.window.counts, learner.kernel.noise
    if learner.is_on_host:
        precision = np.ones(len(counts))
        precision[learner.filled] = np.sum(learner.whitening**2, axis=0)
    else:
        precision = jnp.sum(jax.lax.stop_gradient(learner.whitening) ** 2, axis=0)
    xp = namespace(precision)
    single = 1 / precision + noise * (1 - 1 / xp.maximum(counts, 1))
    return -weights / precision[:, None], learner.deviation_of(single)


_left_out_compiled = eqx.filter_jit(lambda learner: _left_out(learner._with_covariances()))


def init_learner(
    x: PyTree[Shaped[ArrayLike, "pairs ..."]],
    y: PyTree[Float[ArrayLike, "pairs ..."]],
    *,
    capacity: int = 1024,
    features: Function | None = None,
    prior: Function | None = None,
    kernel: Kernel | Shape = "matern52",
    version: str = "",
) -> Learner:
    """Make a learner of these pairs, with a kernel that is not tuned; `fit_learner` tunes it, too.

    Args:
        x: Inputs. There may be none (`x[:0]`); then they give the shapes.
        y: Answers. Pairs that are not finite are left out.
        capacity: The most pairs that the learner holds; then the oldest are replaced.
        features: A function of a batch that returns what inputs are compared by. Default: their
            floats.
        prior: A function of a batch that returns the mean before any answer. Default: none.
        kernel: A kernel, or a shape. By shape, it is centred on the pairs, its units are the
            features' spreads, and its one width is the square root of their number.
        version: The model version of the answers.

    Raises:
        ValueError: The capacity is no positive integer, x and y have different lengths, outputs are
            no floats, the prior has other outputs, or the kernel is for other features.
    """
    x, y = to_device((x, y))
    learner = empty_learner(x, y, capacity, features, prior, kernel, version)
    if not length_of("y", y):
        return learner
    return eqx.filter_jit(Learner._with_pairs)(learner, x, y)[0].refactorized()


def init_learner_on_host(
    x: PyTree[Shaped[np.ndarray, "pairs ..."]],
    y: PyTree[Float[np.ndarray, "pairs ..."]],
    *,
    capacity: int = 1024,
    features: Function | None = None,
    kernel: Kernel | Shape = "matern52",
) -> Learner:
    """Make a learner as `init_learner` does, of NumPy's arrays and without a program."""
    x, y = jax.tree.map(lambda a: a.astype(jax.dtypes.canonicalize_dtype(a.dtype)), (x, y))
    learner = empty_learner(x, y, capacity, features, None, kernel, "")
    return learner.on_host().update(x, y)


def empty_learner(
    x: PyTree[Shaped[Any, "pairs ..."]],
    y: PyTree[Float[Any, "pairs ..."]],
    capacity: int,
    features: Function | None,
    prior: Function | None,
    kernel: Kernel | Shape,
    version: str,
) -> Learner:
    """Return a learner for pairs like these, which it does not know yet: see `init_learner`."""
    check_floats("y", y)
    pairs = length_of("y", y)
    if length_of("x", x) != pairs:
        raise ValueError(f"x are {length_of('x', x)} data points, y {pairs} answers")
    form = join(one_row(y), 1)[1]
    z = features_of(features, x if pairs else one_row(x))[:pairs]
    kernel = kernel if isinstance(kernel, Kernel) else first_kernel(kernel, z)
    if kernel.centre.shape != z.shape[1:]:
        raise ValueError(f"the kernel is for {len(kernel.centre)} features, not {z.shape[1]}")
    return Learner(kernel, form, capacity=capacity, features=features, prior=prior, version=version)


def diagonal_of(
    kernel: Kernel, inputs: Float[Any, "rows features"], counts: Int[Any, " rows"]
) -> Float[Any, " rows"]:
    """Return the variances of the mean answers to inputs; 1 where there is none."""
    xp = namespace(inputs, counts)
    own = kernel.variance(inputs) + kernel.noise / xp.maximum(counts, 1)
    return xp.where(counts > 0, own, 1)


@eqx.filter_jit
def _factored(
    kernel: Kernel, inputs: Float[Array, "capacity features"], counts: Int[Array, " capacity"]
) -> tuple[Array, Array, Array, Array]:
    """Return a window's covariances, their whitening matrix, jitter and error."""
    filled = counts > 0
    eye = jnp.eye(len(filled), dtype=bool)
    covariance = jnp.where(filled[:, None] & filled, kernel(inputs, inputs), 0)
    covariance = jnp.where(eye, diagonal_of(kernel, inputs, counts), covariance)
    whitening, jitter, error = soundly_whitened(jax.lax.stop_gradient(covariance))
    return covariance + jitter * eye, whitening, jitter, error


def _factored_on_host(
    kernel: Kernel,
    inputs: Float[np.ndarray, "capacity features"],
    counts: Int[np.ndarray, " capacity"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return what `_factored` does, of the filled rows; the covariances are not kept."""
    filled, nothing = counts > 0, np.zeros((), kernel.noise.dtype)
    covariance = kernel(inputs[filled], inputs[filled])
    np.fill_diagonal(covariance, diagonal_of(kernel, inputs[filled], counts[filled]))
    return np.zeros((0, 0)), whiten_on_host(covariance), nothing, nothing


def same_inputs(z: Float[np.ndarray, "pairs features"]) -> Bool[np.ndarray, "pairs pairs"]:
    """Return which pairs' inputs differ by no more than rounding, by the spreads of features."""
    return jax.device_get(first_kernel("matern52", z)).same(z, z)


def first_kernel(shape: Shape, z: Float[Any, "pairs features"]) -> Kernel:
    """Return a kernel to start from: centred on the features, in units of their spreads."""
    features, xp = z.shape[1], namespace(z)
    finite = xp.all(xp.isfinite(z), axis=1)[:, None]
    centre = xp.sum(z, axis=0, where=finite) / xp.maximum(xp.sum(finite), 1)
    spread = root_mean_square(z - centre, 0, finite)
    typical = root_mean_square(spread) if features else xp.ones(())
    # A feature that hardly varies here may vary later: its unit is not 0.
    unit = xp.where(typical > 0, xp.maximum(spread, 1e-3 * typical), 1)
    return wide_kernel(shape, centre, unit)
