"""`check_code` refuses each code that breaks a rule, and names the rule.

`test_codes.py` calls it for the library's own codes, `test_pages.py` for the documentation's.
"""

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


def changed(base=Means, **methods):
    """Return a function that makes a code with other methods."""
    return lambda: type(base)("Changed", (base,), methods)(K, N)


class Scaled(eqx.Module):
    """A decoder's map whose two forms are off by factors."""

    decoder: jax.Array
    of_matrix: float = eqx.field(static=True, default=1.0)
    of_product: float | tuple[float, ...] = eqx.field(static=True, default=1.0)  # or by row

    @property
    def matrix(self):
        return self.of_matrix * self.decoder

    def apply(self, y):
        return (jnp.array(self.of_product)[..., None] * self.decoder) @ y


def adds_all_answers(self, y, available):
    """Stragglers' answers are multiplied by zero, but 0 * NaN is NaN."""
    decoded = Means.try_decode(self, y, available)
    spilled = 0 * jnp.sum(jax.tree.leaves(y)[0])
    predictions = jax.tree.map(lambda leaf: leaf + spilled, decoded.predictions)
    return eqx.tree_at(lambda decoded: decoded.predictions, decoded, predictions)


def accepts_any_mask(self, available):
    near = jnp.where(jnp.ravel(jnp.asarray(available))[:N], self._near(), 0)
    return near / jnp.maximum(near.sum(axis=1, keepdims=True), 1e-9)


def reads_stragglers(self, available):
    everyone = Means.decoder_matrix(self, np.ones(N, bool))
    return jnp.where(jnp.any(as_mask(available, (N,))), everyone, 0)


def root_of_zero(self):
    """It has the derivative 0 * infinity in `width` where a worker's point is a data point's."""
    data, workers = (jnp.linspace(0, 1, n) for n in (self.num_data, self.num_workers))
    return 1 / (1 + jnp.sqrt(self.width * jnp.abs(data[:, None] - workers)))


def decoder(change):
    return changed(decoder_matrix=lambda self, mask: change(Means.decoder_matrix(self, mask), mask))


def recovers(found):
    return changed(recovered=lambda self, available: found(self, available))


def scaled(**factors):
    return changed(decoder_map=lambda self, mask: Scaled(self.decoder_matrix(mask), **factors))


class Kernel:
    """Compares by identity."""


class StaticObject(Means):
    kernel: Kernel = eqx.field(static=True)

    def __init__(self, num_data, num_workers):
        Means.__init__(self, num_data, num_workers)
        self.kernel = Kernel()


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
        (
            changed(encoder_matrix=lambda self: Means.encoder_matrix(self).T),
            r"encoder_matrix\(\) must be float32 or float64\(5, 3\), not float32\(3, 5",
        ),
        (
            changed(encoder_matrix=lambda self: (self._near().T > 0.5).astype(jnp.int32)),
            r"encoder_matrix\(\) must be float32 or float64\(5, 3\), not int32",
        ),
        (
            decoder(lambda matrix, _: matrix.astype(jnp.bfloat16)),
            r"decoder_matrix.* must be float32\(3, 5\), not bfloat16",
        ),
        (
            recovers(lambda _, mask: jnp.full((K, 1), jnp.any(mask))),
            r"recovered\(.* must be bool\(3,\), not bool\(3, 1",
        ),
        (
            decoder(lambda matrix, mask: matrix if mask.any() else jnp.zeros((K, N))),
            "decoder_matrix.* must work with traced arguments",
        ),
        (
            recovers(lambda self, mask: jnp.full(K, self._near()[:, mask].size > 0)),
            "recovered.* must work with traced arguments",
        ),
        (
            changed(decoder_matrix=accepts_any_mask),
            r"must raise a ValueError.*it accepts bool\(6,\)",
        ),
        (
            recovers(lambda _, mask: jnp.arange(K) < jnp.where(jnp.any(mask), K - 1, 0)),
            r"with all workers; with workers \[0, 1, 2, 3, 4\] available it is broken at \[2\]",
        ),
        (
            recovers(lambda *_: jnp.ones(K, bool)),
            r"with no worker; with workers \[\] available it is broken at \[0 1 2\]",
        ),
        (
            decoder(lambda matrix, mask: jnp.where(jnp.sum(mask) == 1, jnp.nan, matrix)),
            r"must be finite; with workers \[0\] available it is broken",
        ),
        (
            changed(decoder_matrix=reads_stragglers),
            r"columns of unavailable.*with workers \[0\] available it is",
        ),
        (
            recovers(lambda _, mask: jnp.full(K, jnp.sum(mask) > 1)),
            r"not recovered must be zero.*workers \[0\] available",
        ),
        (
            decoder(lambda matrix, mask: jnp.where(jnp.sum(mask) > 1, matrix, 0)),
            r"row of decoder_matrix.* is not zero; with workers \[0\] ",
        ),
        (scaled(of_product=1.01), r"decoder_map\(available\)\.apply\(y\) differs from what it"),
        (
            scaled(of_product=(1.0, 1.0, 1.01)),
            r"decoder_map\(available\)\.apply\(y\) differs from what it",
        ),
        (scaled(of_matrix=1.01), r"decoder_map\(available\)\.matrix differs from what it"),
        (
            changed(encode=lambda self, x: Means.encode(self, x) + 0.01),
            r"encode\(x\) must be encoder_matrix\(\) @ x; inside",
        ),
        (
            changed(try_decode=adds_all_answers),
            "unavailable worker must not reach a prediction; with nan",
        ),
        (changed(_near=root_of_zero), r"code's numbers must be finite: in \.width; with"),
        (
            changed(
                try_decode=lambda self, y, mask: Means.try_decode(
                    self, jax.lax.stop_gradient(y), mask
                )
            ),
            "gradient with respect to the answers must be decoder_matrix",
        ),
    ],
)
def test_a_broken_code_is_refused(build, message, untyped):
    with pytest.raises(AssertionError, match=message):
        check_code(build())


def test_a_class_is_not_a_code(untyped):
    with pytest.raises(ValueError, match="must be an instance of AbstractCode, not <class"):
        check_code(Means)


def test_the_tolerance_is_the_callers(untyped):
    coarse = scaled(of_product=1 + 1e-3)()
    with pytest.raises(AssertionError, match=r"relative error is 0\.0.*, over 0\.0001"):
        check_code(coarse)
    check_code(coarse, tolerance=1e-2)
