"""The interface of all codes, and the one way in which a code decodes.

A code is two matrices: the encoder E (N, K) and, for the workers that answered, the decoder D
(K, N). What this module adds is what happens to answers that are missing or broken.
"""

import abc
import warnings
from typing import Literal, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Int

# Above this sum of a decoder row's magnitudes the product with the matrix loses digits that the
# regression itself keeps. Two close workers then carry the spline over a wide gap: their entries
# are large and of opposite sign. 32 roundings of a unit are 2e-6 in float32.
_AMPLIFICATION = 32.0

# TPUs and GPUs would round the factors of a float32 product.
_FULL = jax.lax.Precision.HIGHEST


class Decoded(eqx.Module):
    """Predictions, and what they rest on. With groups, every field has a leading axis.

    `predictions` are NaN where `recovered` is false. `heard` are the workers whose answers were
    used: available, and finite in every coordinate.
    """

    predictions: Float[Array, "..."]
    heard: Bool[Array, "*groups num_workers"]
    recovered: Bool[Array, "*groups num_data"]


class AbstractCode(eqx.Module):
    """A coded-computing scheme for K data points (`num_data`) on N workers (`num_workers`).

    All methods act on one group of K data points and can be jitted (`equinox.filter_jit` takes a
    method as it is), differentiated and batched with `jax.vmap`. Tunable numbers (regression
    points `alpha` and `beta`, where a code has them, and a code's own) are leaves of the pytree.
    """

    num_data: eqx.AbstractVar[int]
    num_workers: eqx.AbstractVar[int]

    @property
    def worker_models(self) -> Int[np.ndarray, " num_workers"]:
        """Which model each worker runs; unless a code overrides it, all run the served one.

        0 is the served model, and 1, 2, ... (without gaps) are further ones that the code needs
        beside it. Static: it depends on the code's numbers, never on data.
        """
        return np.zeros(self.num_workers, int)

    @abc.abstractmethod
    def encoder_matrix(self) -> Float[Array, "num_workers num_data"]:
        """The matrix E: coded data points are E @ x."""

    @abc.abstractmethod
    def decoder_matrix(
        self, available: Bool[ArrayLike, " num_workers"]
    ) -> Float[Array, "num_data num_workers"]:
        """The matrix D for these workers: predictions are D @ y.

        Columns of unavailable workers and rows of data points that are not recovered are zero.
        """

    @abc.abstractmethod
    def recovered(self, available: Bool[ArrayLike, " num_workers"]) -> Bool[Array, " num_data"]:
        """Which data points' predictions these workers' answers determine."""

    def regress(
        self, y: Float[Array, "num_workers m"], available: Bool[Array, " num_workers"]
    ) -> Float[Array, "num_data m"]:
        """D @ y by the most accurate way there is, for finite y.

        Decoding calls it where the product might lose digits. A code whose regression has a better
        way than its matrix overrides it.
        """
        return multiply(self.decoder_matrix(available), y)

    def posterior_variance(
        self, available: Bool[ArrayLike, " num_workers"]
    ) -> Float[Array, " num_data"]:
        """How uncertain these workers' answers leave each prediction, whatever they are.

        The variance of the data points' predictions given the answers, in units of the process's
        (`process_variance`): a code that is a regression has it. 0 where a prediction is an answer
        itself; infinite where the answers tell nothing. Raises: ValueError for a code
        that has none.
        """
        raise ValueError(f"{type(self).__name__} is no regression: it has no posterior variance")

    def process_variance(
        self, y: Float[Array, "num_workers m"], available: Bool[Array, " num_workers"]
    ) -> Float[Array, ""]:
        """How much finite answers y vary along the path, over all outputs: the unit of
        `posterior_variance`, squared outputs. Infinite where they are too few to tell. Raises: as
        there."""
        raise ValueError(f"{type(self).__name__} is no regression: it has no process variance")

    def encode(self, x: Float[ArrayLike, "num_data ..."]) -> Float[Array, "num_workers ..."]:
        """The coded data points E @ x, for x of any trailing shape, in x's dtype.

        Raises: ValueError where x is not K data points of a float dtype, or, outside jit, where
        one is not finite: it would spoil every coded data point. Source: arXiv 2402.04377.
        """
        x = self._batch("x", x, self.num_data, "data points")
        coded, finite = _encode(self, x)
        if not isinstance(finite, Tracer) and not finite:
            finite = jnp.isfinite(x.reshape(self.num_data, -1)).all(axis=1)
            broken = np.flatnonzero(~np.asarray(finite))
            raise ValueError(f"data points {broken.tolist()} are not finite: take them out")
        return coded

    @overload
    def decode(
        self,
        y: Float[ArrayLike, "num_workers ..."],
        available: Bool[ArrayLike, " num_workers"],
        *,
        return_uncertainty: Literal[False] = False,
    ) -> Float[Array, "num_data ..."]: ...

    @overload
    def decode(
        self,
        y: Float[ArrayLike, "num_workers ..."],
        available: Bool[ArrayLike, " num_workers"],
        *,
        return_uncertainty: Literal[True],
    ) -> tuple[Float[Array, "num_data ..."], Float[Array, " num_data"]]: ...

    def decode(
        self,
        y: Float[ArrayLike, "num_workers ..."],
        available: Bool[ArrayLike, " num_workers"],
        *,
        return_uncertainty: bool = False,
    ) -> Array | tuple[Array, Array]:
        """The predictions of all K data points from the available workers' answers y.

        An unavailable worker's value never reaches the result. An available one that is not finite
        makes its worker a straggler; outside jit a RuntimeWarning says which. Predictions that
        cannot be recovered are NaN. Decoding takes one product with the matrix; a value that is not
        finite, in an unavailable worker's place too, costs a second pass.

        With `return_uncertainty` also the standard deviation of each prediction (K,), in units of
        the outputs and alike for all of them: the spline is the posterior mean of a Gaussian
        process, whose variance is `posterior_variance` times `process_variance`. It is 0 where a
        prediction is an answer itself, and infinite where the answers are too few to tell. It says
        how far the path may be off, in the mean over data; `calibrate_doubt` makes of it how likely
        a label is wrong.

        Raises: ValueError where shapes or dtypes do not agree, and, outside jit, where no
        prediction can be recovered, and with `return_uncertainty` for a code that is no regression.
        Inside jit use `try_decode` for the status.
        """
        decoded = _try_decode(self, y, available)
        if not isinstance(decoded.predictions, Tracer):
            available, heard = np.asarray(available), np.asarray(decoded.heard)
            broken = np.flatnonzero(available & ~heard)
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
                    stacklevel=3,
                )
        if return_uncertainty:
            flat = jnp.asarray(y).reshape(1, self.num_workers, -1)
            return decoded.predictions, deviation(*variances(self, flat, decoded.heard[None]))[0]
        return decoded.predictions

    def try_decode(
        self, y: Float[ArrayLike, "num_workers ..."], available: Bool[ArrayLike, " num_workers"]
    ) -> Decoded:
        """As `decode`, with the status beside the predictions and no exception for bad answers."""
        return _try_decode(self, y, available)

    def _batch(self, name: str, value: ArrayLike, count: int, what: str) -> Array:
        value = jnp.asarray(value)
        if value.ndim < 1 or value.shape[0] != count:
            raise ValueError(
                f"{name} has shape {value.shape}; its first axis must be the {count} {what}"
            )
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"{name} is {value.dtype}: codes work on floats, so convert it first")
        return value


def multiply(
    matrix: Float[Array, "... a b"], x: Float[Array, "... b m"]
) -> Float[Array, "... a m"]:
    """matrix @ x in x's precision, float32 at least."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    matrix, x = matrix.astype(dtype), x.astype(dtype)
    if matrix.ndim == 3 and matrix.shape[0] == 1:
        # One group: XLA's CPU product is 30 % faster from a matrix that lies in memory by columns,
        # and the barrier keeps it so (8 x 20 by 20 x 150,528; for 64 groups it is slower).
        columns = jax.lax.optimization_barrier(matrix[0].T)
        product = jax.lax.dot_general(columns, x[0], (((0,), (0,)), ((), ())), precision=_FULL)
        return product[None]
    return jnp.matmul(matrix, x, precision=_FULL)


def encode_groups(
    code: AbstractCode, x: Float[Array, "groups num_data ..."]
) -> Float[Array, "groups num_workers ..."]:
    """The coded data points of many groups, in x's dtype."""
    coded = multiply(code.encoder_matrix(), x.reshape(*x.shape[:2], -1))
    return coded.astype(x.dtype).reshape(x.shape[0], code.num_workers, *x.shape[2:])


def decode_groups(
    code: AbstractCode,
    y: Float[Array, "groups num_workers ..."],
    available: Bool[Array, "groups num_workers"],
) -> Decoded:
    """Decodes many groups, each with its own workers.

    Nearly always every value that came back is finite, the decoder well conditioned and everything
    recovered; then decoding is one product. So that is tried, and what it shows decides: a broken
    value leaves its mark in every row of the product (0 * NaN is NaN), so one row tells all.
    """
    flat = y.reshape(*y.shape[:2], -1)
    matrices = jax.vmap(code.decoder_matrix)(available)
    product = multiply(matrices, flat)
    recovered = jax.vmap(code.recovered)(available)
    sound = jnp.all(jnp.isfinite(product[:, 0])) & jnp.all(recovered) & _well_conditioned(matrices)
    result = Decoded(product, available, recovered)
    decoded = _unless_sound(code, flat, available, result, sound)
    predictions = decoded.predictions.reshape(*recovered.shape, *y.shape[2:])
    return Decoded(predictions, decoded.heard, decoded.recovered)


def _well_conditioned(matrices: Float[Array, "groups num_data num_workers"]) -> Bool[Array, ""]:
    return jnp.max(jnp.sum(jnp.abs(matrices), axis=-1), initial=0) <= _AMPLIFICATION


def _decode_carefully(code: AbstractCode, flat: Array, available: Array) -> Decoded:
    """Decodes answers of which some may be broken, or whose matrix would lose digits."""
    heard = available & jnp.all(jnp.isfinite(flat), axis=-1)
    clean = jnp.where(heard[..., None], flat, 0)
    matrices = jax.vmap(code.decoder_matrix)(heard)
    recovered = jax.vmap(code.recovered)(heard)

    def regress():
        return jax.vmap(code.regress)(clean, heard).astype(
            jnp.promote_types(flat.dtype, jnp.float32)
        )

    predictions = jax.lax.cond(
        _well_conditioned(matrices), lambda: multiply(matrices, clean), regress
    )
    return Decoded(jnp.where(recovered[..., None], predictions, jnp.nan), heard, recovered)


@jax.custom_jvp
def _unless_sound(
    code: AbstractCode, flat: Array, available: Array, result: Decoded, sound: Array
) -> Decoded:
    """The result where it is sound, else that of `_decode_carefully`.

    A loop of no or one turn, not a `cond`: XLA passes a loop's buffers on, but copies a branch's
    (150,528 coordinates from 20 workers on two CPU cores: 1.2 ms against 2.9 ms, of which the
    product is 0.7 ms). Loops have no reverse derivative, hence the rule below.
    """

    def careful(state):
        return _decode_carefully(code, flat, available), True

    return jax.lax.while_loop(lambda state: ~state[1], careful, (result, sound))[0]


@_unless_sound.defjvp
def _unless_sound_jvp(primals, tangents):
    def with_cond(code, flat, available, result, sound):
        return jax.lax.cond(sound, lambda: result, lambda: _decode_carefully(code, flat, available))

    return jax.jvp(with_cond, primals, tangents)


@eqx.filter_jit
def _encode(code: AbstractCode, x: Array) -> tuple[Array, Bool[Array, ""]]:
    """The coded data points of one group, and whether they are finite: again, one row tells."""
    coded = encode_groups(code, x[None])[0]
    return coded, jnp.all(jnp.isfinite(coded[0]))


@eqx.filter_jit
def _try_decode(code: AbstractCode, y: ArrayLike, available: ArrayLike) -> Decoded:
    y = code._batch("y", y, code.num_workers, "workers")
    available = as_mask(available, (code.num_workers,))
    decoded = decode_groups(code, y[None], available[None])
    return jax.tree.map(lambda leaf: leaf[0], decoded)


@eqx.filter_jit
def variances(
    code: AbstractCode,
    y: Float[Array, "groups num_workers m"],
    heard: Bool[Array, "groups num_workers"],
) -> tuple[Float[Array, "groups num_data"], Float[Array, "groups 1"]]:
    """Posterior and process variance of groups, whatever workers that are not heard say."""
    posterior = jax.vmap(code.posterior_variance)(heard)
    process = jax.vmap(code.process_variance)(jnp.where(heard[..., None], y, 0), heard)
    return posterior, process[:, None]


@jax.jit
def deviation(share: Float[Array, "..."], process: Float[Array, "..."]) -> Float[Array, "..."]:
    """The standard deviation of predictions from posterior and process variance.

    What is known (0) is so however much the process varies, which may not be known (infinite).
    """
    known = share == 0
    return jnp.where(known, 0, jnp.sqrt(jnp.where(known, 1, share) * process))


def as_mask(available: ArrayLike, shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """The mask as an array, or a ValueError that says what it should have been."""
    available = jnp.asarray(available)
    if available.dtype != bool or available.shape != shape:
        raise ValueError(
            f"available must be a boolean mask of shape {shape}, "
            f"not {available.dtype}{available.shape}"
        )
    return available


def encoder_rows(code: AbstractCode) -> Float[np.ndarray, "num_workers num_data"]:
    """The encoder's matrix, compiled once for all codes of one size."""
    return np.asarray(_encoder_matrix(code))


@eqx.filter_jit
def _encoder_matrix(code: AbstractCode) -> Float[Array, "num_workers num_data"]:
    return code.encoder_matrix()
