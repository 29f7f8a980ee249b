"""The interface of all codes.

A code is two matrices: the encoder E (N, K) and, for the workers that answered, the decoder D
(K, N). What happens to answers that are missing or broken is in `decoding.py`.
"""

import abc
import functools
import warnings
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree, Shaped

from ..arrays import native
from .decoding import Decoded, PlainMap, decode_groups, encode_groups
from .kept import known_matrices
from .trees import (
    check_data,
    check_finite,
    check_floats,
    check_leading,
    finite_points,
    join,
    to_device,
)


class transformable(functools.partial):
    """A method that can be passed to JAX's transformations once it is bound to a code.

    A bound method is a pytree, as Equinox's methods are, and hashable: `jax.jit(code.decode)` looks
    its argument up by hash and equality. Equinox's methods compare arrays with JAX, which fails
    within a trace, and arrays have no hash. Here, two codes are equal if they are the same object.
    """

    def __get__(self, code: Any, _: type | None = None) -> Any:
        if code is None:
            return self.func
        bound = transformable(self.func, code)
        vars(bound).update(__name__=self.func.__name__, __doc__=self.func.__doc__)
        return bound

    def __hash__(self) -> int:
        return hash((self.func, id(self.args[0])))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, transformable):
            return False
        return self.func is other.func and self.args[0] is other.args[0]


jax.tree_util.register_pytree_node(
    transformable,
    lambda bound: (bound.args, bound.func),
    lambda method, codes: transformable(method, *codes),
)


class AbstractCode(eqx.Module):
    """A coded-computing scheme for K data points (`num_data`) on N workers (`num_workers`).

    All methods act on one group of K data points and can be differentiated, and batched with
    `jax.vmap`. Tunable numbers (regression points `alpha` and `beta`, where a code has them, and a
    code's own) are leaves of the pytree: `eqx.tree_at` returns a code with others. To jit, give the
    code as an argument, or jit its methods: then its numbers are constants of the program.

    >>> import jax, jax.numpy as jnp
    >>> from nercc_jax import NeRCC
    >>> code, mask = NeRCC(4, 7), jnp.arange(7) != 2
    >>> y = code.encode(jnp.ones((4, 3)))
    >>> jax.jit(code.decode)(y, mask).shape
    (4, 3)
    >>> jax.jit(lambda code, y, mask: code.decode(y, mask))(code, y, mask).shape
    (4, 3)

    To write a code of your own, define the two sizes and three methods: `encoder_matrix`,
    `decoder_matrix` and `recovered`. The mask is traced, so no shape may depend on it.
    """

    num_data: eqx.AbstractVar[int]
    num_workers: eqx.AbstractVar[int]
    has_host_matrices: ClassVar[bool] = False

    @property
    def worker_models(self) -> Int[np.ndarray, " num_workers"]:
        """Return the number of the model that each worker runs.

        0 is the served model, the default for all workers; 1, 2, ... (without gaps) are further
        models that the code needs. Static: it depends on the code's numbers, never on data.
        """
        return np.zeros(self.num_workers, int)

    @abc.abstractmethod
    def encoder_matrix(self) -> Float[Array, "num_workers num_data"]:
        """Return the matrix E: coded data points are E @ x."""

    @abc.abstractmethod
    def decoder_matrix(
        self, available: Bool[ArrayLike, " num_workers"]
    ) -> Float[Array, "num_data num_workers"]:
        """Return the matrix D for these workers: predictions are D @ y.

        Columns of unavailable workers and rows of data points that are not recovered are zero.

        Raises:
            ValueError: `available` is no mask of N workers.
        """

    @abc.abstractmethod
    def recovered(self, available: Bool[ArrayLike, " num_workers"]) -> Bool[Array, " num_data"]:
        """Return for which data points the available workers' answers determine a prediction."""

    def decoder_map(self, available: Bool[ArrayLike, " num_workers"]) -> Any:
        """Return D and the most accurate way to apply it to finite answers.

        Decoding applies it that way where the product with D might lose digits. A code overrides
        this method if its regression can be solved more accurately than by a product with D.
        """
        return PlainMap(self.decoder_matrix(available))

    def posterior_variance(
        self, available: Bool[ArrayLike, " num_workers"]
    ) -> Float[Array, " num_data"]:
        """Return the variance of each prediction given which workers answered.

        It does not depend on the answers, and its unit is the process's variance
        (`process_variance`): 0 where a prediction is an answer itself, infinite where the answers
        do not determine it. Codes that are regressions have it, and so has `Replication`.

        Raises:
            ValueError: The code has none.
        """
        raise ValueError(f"{type(self).__name__} is no regression: it has no posterior variance")

    def process_variance(
        self, y: Float[Array, "num_workers m"], available: Bool[Array, " num_workers"]
    ) -> Float[Array, ""]:
        """Return the roughness of the curve through finite answers y, over all outputs.

        It is the unit of `posterior_variance`, in squared outputs; infinite if there are too few
        answers.

        Raises:
            ValueError: The code has none.
        """
        raise ValueError(f"{type(self).__name__} is no regression: it has no process variance")

    @transformable
    def encode(
        self, x: PyTree[Shaped[ArrayLike, "num_data ..."]]
    ) -> PyTree[Shaped[Array, "num_workers ..."]]:
        """Return the coded data points E @ x, for x of any trailing shape, in x's dtype.

        Args:
            x: K data points, or a pytree of such arrays, which is coded leaf by leaf.

        Raises:
            ValueError: x is not K data points of floats, or, outside jit, one is not finite (it
                would spoil every coded data point).

        Source: arXiv 2402.04377.
        """
        x = to_device(x, "x")
        check_leading("x", x, (self.num_data,), "data points")
        check_data(x)
        coded, finite = _encode(self, x, known_matrices(self).encoder)
        if not isinstance(finite, Tracer) and not finite:
            check_finite(x, 1)  # says which
        return coded

    @transformable
    def decode(
        self,
        y: PyTree[Float[ArrayLike, "num_workers ..."]],
        available: Bool[ArrayLike, " num_workers"],
        *,
        return_uncertainty: bool = False,
    ) -> Any:
        """Return the predictions of all K data points from the available workers' answers y.

        An unavailable worker's value reaches neither the result nor a gradient. An available
        worker whose answer is not finite counts as a straggler; outside jit a RuntimeWarning names
        it. Predictions that cannot be recovered are NaN. Decoding takes one product with the
        matrix, and a second pass if any value is not finite, even an unavailable worker's.

        Args:
            y: The answers of N workers, or a pytree of arrays (a dict of heads), of which
                predictions have the structure.
            available: Which workers answered; one mask for all leaves.
            return_uncertainty: Whether to return in addition the standard deviation of each
                prediction (K,), in units of the outputs and the same for all of them. The spline is
                the posterior mean of a Gaussian process, whose variance is `posterior_variance`
                times `process_variance`. It is 0 where a prediction is an answer itself, and
                infinite if there are too few answers. It says how far predictions are off on
                average over data; `calibrate_error_probability` turns it into the probability that
                a label is wrong.

        Raises:
            ValueError: Shapes or dtypes do not agree; outside jit, no prediction can be recovered
                (inside jit use `try_decode` for the status); or `return_uncertainty` is set for a
                code without a posterior variance.
        """
        decoded = self.try_decode(y, available)
        if not isinstance(decoded.responded, Tracer):
            available = np.asarray(available)
            broken = np.flatnonzero(available & ~np.asarray(decoded.responded))
            if not np.any(decoded.recovered):
                raise ValueError(
                    f"no prediction can be recovered: of {self.num_workers} workers "
                    f"{available.sum()} were available, {broken.size} of them with values that "
                    "are not finite; wait for more"
                )
            if broken.size:
                warnings.warn(
                    f"workers {broken.tolist()} returned values that are not finite and were "
                    "treated as stragglers",
                    RuntimeWarning,
                    stacklevel=2,
                )
        if not return_uncertainty:
            return decoded.predictions
        vectors, _ = join(to_device(checked_answers(self, y)), 1)
        return decoded.predictions, deviations(self, vectors[None], decoded.responded[None])[0]

    @transformable
    def try_decode(
        self,
        y: PyTree[Float[ArrayLike, "num_workers ..."]],
        available: Bool[ArrayLike, " num_workers"],
    ) -> Decoded:
        """Return the predictions with their status, without an exception for bad answers.

        Arguments are those of `decode`.
        """
        available = check_mask(available, (self.num_workers,))
        return decode_groups(self, checked_answers(self, y), available, one=True)


class AbstractNumpyCode(AbstractCode):
    """A code whose matrices are computed by NumPy where its numbers are known, else in a program.

    One function serves both: it takes its operations from `namespace(...)` of its arguments.
    The data points that are recovered are those whose row of the decoder's matrix is not zero.
    """

    has_host_matrices = True

    @abc.abstractmethod
    def _encoder(self) -> Float[Any, "num_workers num_data"]:
        """Return E."""

    @abc.abstractmethod
    def _decoder(self, available: Bool[Any, " num_workers"]) -> Float[Any, "num_data num_workers"]:
        """Return D."""

    def encoder_matrix(self) -> Float[Array, "num_workers num_data"]:
        known = known_matrices(self).encoder
        return jnp.asarray(self._encoder()) if known is None else jax.device_put(known)

    def decoder_matrix(
        self, available: Bool[ArrayLike, " num_workers"]
    ) -> Float[Array, "num_data num_workers"]:
        available = check_mask(available, (self.num_workers,))
        # Outside a program, each call would compile the regression's loops: 1.4 s for (20, 8).
        known = known_matrices(self, available).decoders
        if known is not None:
            return jax.device_put(np.asarray(known.decoder[0]))
        return jnp.asarray(self._decoder(jnp.asarray(available)))

    def recovered(self, available: Bool[ArrayLike, " num_workers"]) -> Bool[Array, " num_data"]:
        available = as_mask(available, (self.num_workers,))
        return jnp.any(jnp.asarray(self._decoder(available)) != 0, axis=1)

    def encoder_on_host(self) -> Float[np.ndarray, "num_workers num_data"]:
        """Return E by NumPy, in float64 as far as the regression has it."""
        return jax.tree.map(np.asarray, self)._encoder()

    def decoder_on_host(
        self, available: Bool[np.ndarray, " num_workers"]
    ) -> Float[np.ndarray, "num_data num_workers"]:
        """Return D by NumPy, in float64 for full accuracy of the product with it."""
        return jax.tree.map(np.asarray, self)._decoder(available)


@eqx.filter_jit
def _encode(
    code: AbstractCode, x: PyTree, matrix: ArrayLike | None
) -> tuple[PyTree, Bool[Array, ""]]:
    """Return the coded data points of one group, and whether they are finite.

    A value that is not finite shows in every row of the product, so one row is looked at.
    """
    coded = encode_groups(code, jax.tree.map(lambda leaf: leaf[None], x), matrix)
    coded = jax.tree.map(lambda leaf: leaf[0], coded)
    return coded, finite_points(jax.tree.map(lambda leaf: leaf[:1], coded), 1)[0]


def checked_answers(code: AbstractCode, y: PyTree) -> PyTree[Float[Any, "num_workers ..."]]:
    """Return one group's answers as arrays.

    Raises:
        ValueError: There is not one answer for each worker, or answers are not floats.
    """
    y = native(y, "y")
    y = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf), y)
    check_leading("y", y, (code.num_workers,), "workers")
    check_floats("y", y)
    return y


@eqx.filter_jit
def variances(
    code: AbstractCode,
    y: Float[Array, "groups num_workers m"],
    responded: Bool[Array, "groups num_workers"],
) -> tuple[
    Float[Array, "groups num_data"], tuple[Float[Array, "groups 1"], Float[Array, "groups 1"]]
]:
    """Return the posterior variance of groups, and their process variance, for `deviation`.

    The process variance is in units of the square of the group's largest answer, which is returned
    with it: squares of 1e19 are infinite in float32, and those of 1e-23 are zero. Answers of
    workers that did not respond are ignored.
    """
    y = jnp.where(responded[..., None], y, 0)
    largest = jnp.max(jnp.abs(y), axis=(1, 2), keepdims=True, initial=0)
    unit = jax.lax.stop_gradient(jnp.where(largest > 0, largest, 1))
    posterior = jax.vmap(code.posterior_variance)(responded)
    process = jax.vmap(code.process_variance)(y / unit, responded)
    return posterior, (process[:, None], unit[..., 0])


@jax.jit
def deviation(
    share: Float[Array, "..."], process: tuple[Float[Array, "..."], Float[Array, "..."]]
) -> Float[Array, "..."]:
    """Return the standard deviation of predictions from what `variances` returns.

    Where the share is 0 the deviation is 0, also if the process variance is unknown (infinite).
    """
    known, (variance, unit) = share == 0, process
    return jnp.where(known, 0, unit * jnp.sqrt(jnp.where(known, 1, share) * variance))


def deviations(
    code: AbstractCode,
    y: Float[Array, "groups num_workers m"],
    responded: Bool[Array, "groups num_workers"],
) -> Float[Array, "groups num_data"]:
    """Return the standard deviation of each group's predictions from these answers."""
    return deviation(*variances(code, y, responded))


def as_mask(available: ArrayLike, shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """Return the mask as an array; raise as `check_mask`."""
    return jnp.asarray(check_mask(available, shape))


def check_mask(available: ArrayLike, shape: tuple[int, ...]) -> Bool[Array | np.ndarray, "..."]:
    """Return the mask as an array: JAX's if it was one, else NumPy's.

    Raises:
        ValueError: It is not a boolean mask of this shape.
    """
    mask = available if isinstance(available, jax.Array) else np.asarray(available)
    if mask.dtype != bool or mask.shape != shape:
        raise ValueError(
            f"available must be a boolean mask of shape {shape}, not {mask.dtype}{mask.shape}"
        )
    return mask
