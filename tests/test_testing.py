"""`check_code` refuses each code that breaks a rule, and names the rule.

`test_codes.py` calls it for the library's own codes, `test_extending.py` for the documentation's.
"""

import subprocess
import sys

import equinox as eqx
import extending
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nercc_jax import AbstractCode
from nercc_jax.codes import as_mask
from nercc_jax.testing import check_code

Means = extending.MovingAverages
K, N = 3, 5


def subclass(base=Means, **methods):
    """Return a class of codes that has these methods."""
    return type(base)("Broken", (base,), {"__module__": __name__, **methods})


def decoding(change):
    """Return a class whose decoder is `change(code, mask)`."""
    return subclass(decoder_matrix=change)


Transposed = subclass(encoder_matrix=lambda code: Means.encoder_matrix(code).T)
Integers = subclass(encoder_matrix=lambda code: (code._near().T > 0.5).astype(jnp.int32))
AddsAnOffset = subclass(encode=lambda code, x: Means.encode(code, x) + 0.01)
MixedPrecision = decoding(lambda *both: Means.decoder_matrix(*both).astype(jnp.bfloat16))
ColumnOfBooleans = subclass(recovered=lambda code, mask: jnp.full((K, 1), jnp.any(mask)))
SelectsByTheMask = subclass(recovered=lambda code, m: jnp.full(K, code._near()[:, m].size > 0))
AlwaysRecovers = subclass(recovered=lambda code, mask: jnp.ones(K, bool))
DeniesWhatItRecovers = subclass(recovered=lambda code, mask: jnp.full(K, jnp.sum(mask) > 1))
NeverRecoversTheLast = subclass(
    recovered=lambda code, mask: jnp.arange(K) < jnp.where(jnp.any(mask), K - 1, 0)
)


class BranchesOnTheMask(Means):
    def decoder_matrix(self, available):
        available = as_mask(available, (self.num_workers,))
        return Means.decoder_matrix(self, available) if available.any() else jnp.zeros((K, N))


class AcceptsAnyMask(Means):
    def decoder_matrix(self, available):
        near = jnp.where(jnp.ravel(jnp.asarray(available))[:N], self._near(), 0)
        return near / jnp.maximum(near.sum(axis=1, keepdims=True), 1e-9)


class ReadsStragglers(Means):
    def decoder_matrix(self, available):
        everyone = Means.decoder_matrix(self, np.ones(N, bool))
        return jnp.where(jnp.any(as_mask(available, (N,))), everyone, 0)


def of_one_worker(value):
    """Return a class that decodes to this value from a single answer, and reports no loss."""
    return decoding(
        lambda code, mask: jnp.where(
            jnp.sum(as_mask(mask, (N,))) == 1, value, Means.decoder_matrix(code, mask)
        )
    )


FailsForOneWorker, ClaimsZeros = of_one_worker(jnp.nan), of_one_worker(0.0)


class Scaled(eqx.Module):
    """A decoder's map whose two forms are off by factors."""

    decoder: jax.Array
    of_matrix: float = eqx.field(static=True, default=1.0)
    of_product: float = eqx.field(static=True, default=1.0)

    @property
    def matrix(self):
        return self.of_matrix * self.decoder

    def apply(self, y):
        return self.of_product * self.decoder @ y


def scaling(**factors):
    """Return a class whose decoder's map is off by these factors."""
    return subclass(decoder_map=lambda code, mask: Scaled(code.decoder_matrix(mask), **factors))


OtherMap, OtherMapsMatrix = scaling(of_product=1.01), scaling(of_matrix=1.01)


class OnHost(Means):
    """Has both matrices by NumPy, too."""

    def _near_on_host(self):
        data, workers = (np.linspace(0, 1, n) for n in (self.num_data, self.num_workers))
        return 1 / (1 + ((data[:, None] - workers) / self.width) ** 2)

    def encoder_on_host(self):
        near = self._near_on_host().T
        return near / near.sum(axis=1, keepdims=True)

    def decoder_on_host(self, available):
        near = np.where(available, self._near_on_host(), 0)
        matrix = near / np.maximum(near.sum(axis=1, keepdims=True), 1e-9)
        return matrix, np.full(self.num_data, available.any())


def host_decoder(change):
    """Return a class whose decoder on the host is `change(mask, matrix, recovered)`."""
    return subclass(
        OnHost, decoder_on_host=lambda code, mask: change(mask, *OnHost.decoder_on_host(code, mask))
    )


OtherEncoderOnHost = subclass(
    OnHost, encoder_on_host=lambda code: 1.01 * OnHost.encoder_on_host(code)
)
OnHostByJax = subclass(
    OnHost, encoder_on_host=lambda code: jnp.asarray(OnHost.encoder_on_host(code))
)
OtherDecoderOnHost = host_decoder(
    lambda m, matrix, kept: ((1 + (m.sum() == 2) / 99) * matrix, kept)
)
OtherRecoveredOnHost = host_decoder(lambda m, matrix, kept: (matrix, kept & (m.sum() > 1)))
# A weight for stragglers that no comparison with a tolerance can see.
LeaksOnHost = host_decoder(
    lambda mask, matrix, kept: (np.where(kept[:, None] & ~mask, 1e-9, matrix), kept)
)
SometimesOnHost = host_decoder(lambda mask, *both: both if mask.all() else None)
CountsOnHost = host_decoder(lambda mask, matrix, kept: (matrix, kept.astype(int)))


class DecodesByHand(Means):
    """Multiplies stragglers' answers by zero, but 0 * NaN is NaN."""

    def try_decode(self, y, available):
        decoded = Means.try_decode(self, y, available)
        flat = jax.tree.leaves(y)[0]
        spilled = 0 * jnp.sum(flat)
        return eqx.tree_at(
            lambda decoded: decoded.predictions,
            decoded,
            jax.tree.map(lambda leaf: leaf + spilled, decoded.predictions),
        )


class RootOfZero(Means):
    """Has the derivative 0 * infinity in `width` where a worker's point is a data point's."""

    def _near(self):
        data, workers = (jnp.linspace(0, 1, n) for n in (self.num_data, self.num_workers))
        return 1 / (1 + jnp.sqrt(self.width * jnp.abs(data[:, None] - workers)))


class NoDerivative(Means):
    """Hides the answers from differentiation."""

    def try_decode(self, y, available):
        return Means.try_decode(self, jax.tree.map(jax.lax.stop_gradient, y), available)


class StaticObject(Means):
    kernel: object = eqx.field(static=True)

    def __init__(self, num_data, num_workers):
        Means.__init__(self, num_data, num_workers)
        self.kernel = object()  # compares by identity


class TextInALeaf(Means):
    kernel: str

    def __init__(self, num_data, num_workers):
        Means.__init__(self, num_data, num_workers)
        self.kernel = "cauchy"


class SizeAsAnArray(AbstractCode):
    num_data: jax.Array
    num_workers: int = eqx.field(static=True)

    encoder_matrix = Means.encoder_matrix
    decoder_matrix = Means.decoder_matrix
    recovered = Means.recovered


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SizeAsAnArray(jnp.array(K), N), "num_data must be a positive Python integer"),
        (lambda: StaticObject(K, N), "static fields must compare equal in a copy of the code"),
        (lambda: TextInALeaf(K, N), r"the field \.kernel is 'cauchy', which `jax.jit` does not"),
        (lambda: Transposed(K, N), r"encoder_matrix\(\) must have the shape \(5, 3\), not \(3, 5"),
        (lambda: Integers(K, N), r"encoder_matrix\(\) must be float32 or float64, not int32"),
        (lambda: MixedPrecision(K, N), r"decoder_matrix.* must be float32, not bfloat16"),
        (lambda: ColumnOfBooleans(K, N), r"recovered\(.* must have the shape \(3,\), not \(3, 1"),
        (lambda: BranchesOnTheMask(K, N), "decoder_matrix.* must work with traced arguments"),
        (lambda: SelectsByTheMask(K, N), "recovered.* must work with traced arguments"),
        (lambda: AcceptsAnyMask(K, N), r"must raise a ValueError.*it accepts bool\(6,\)"),
        (lambda: NeverRecoversTheLast(K, N), r"all workers available; .* data points \[2\]"),
        (lambda: AlwaysRecovers(K, N), r"no worker available; it does for data points \[0 1 2\]"),
        (lambda: FailsForOneWorker(K, N), "must be finite; with only worker 0 available it is not"),
        (lambda: ReadsStragglers(K, N), "columns of unavailable.*only worker 0 available those of"),
        (lambda: DeniesWhatItRecovers(K, N), "not recovered must be zero.*only worker 0 available"),
        (lambda: ClaimsZeros(K, N), "row of decoder_matrix.* is not zero; with only worker 0"),
        (lambda: OtherMap(K, N), r"decoder_map\(available\)\.apply\(y\) differs from what it must"),
        (lambda: OtherMapsMatrix(K, N), r"decoder_map\(available\)\.matrix differs from what it"),
        (lambda: OtherEncoderOnHost(K, N), r"encoder_on_host\(\) must be encoder_matrix\(\); the"),
        (lambda: OnHostByJax(K, N), r"encoder_on_host\(\) must be a NumPy array, made without JAX"),
        (lambda: OtherDecoderOnHost(K, N), r"decoder_on_host.*\[0\] differs from what it must be"),
        (lambda: OtherRecoveredOnHost(K, N), r"must be recovered\(available\); with only worker 0"),
        (lambda: LeaksOnHost(K, N), r"columns of unavailable workers must be zero in .*_on_host"),
        (lambda: SometimesOnHost(K, N), "every straggler set or for none; it does with no worker"),
        (lambda: CountsOnHost(K, N), r"of shape \(3,\) and of type bool, not int64\(3,\)"),
        (lambda: AddsAnOffset(K, N), r"encode\(x\) must be encoder_matrix\(\) @ x; inside"),
        (lambda: DecodesByHand(K, N), "unavailable worker must not reach a prediction; with nan"),
        (lambda: RootOfZero(K, N), r"code's numbers must be finite; .* that in \.width is not"),
        (lambda: NoDerivative(K, N), "gradient with respect to the answers must be decoder_matrix"),
    ],
)  # fmt: skip
def test_a_broken_code_is_refused(build, message, untyped):
    with pytest.raises(AssertionError, match=message):
        check_code(build())


def test_matrices_on_the_host_are_accepted(untyped):
    check_code(OnHost(K, N))


def test_a_class_is_not_a_code(untyped):
    with pytest.raises(ValueError, match="must be an instance of AbstractCode, not <class"):
        check_code(Means)


def test_the_tolerance_is_the_callers(untyped):
    coarse = scaling(of_product=1 + 1e-3)(K, N)
    with pytest.raises(AssertionError, match=r"relative error is 0\.0.*, over 0\.0001"):
        check_code(coarse)
    check_code(coarse, tolerance=1e-2)


def test_it_needs_no_test_framework():
    code = "import sys, nercc_jax; nercc_jax.testing.check_code; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"pytest", "hypothesis"} & {*done.stdout.split()}
