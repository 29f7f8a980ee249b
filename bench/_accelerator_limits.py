"""Limits of a device: bytes and operations a second."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_COPIED = 1 << 28  # bytes, more than any cache holds
_SIDE = 1536  # of the square matrices whose product is timed
_REPEATS = 7


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bytes and operations a second.

    `float32` is at full precision, as the products of coding are; `default` is what a device may
    make of a float32 model at JAX's default precision (TF32 on a GPU, bfloat16 on a TPU).
    """

    bandwidth: float
    float32: float
    default: float
    bfloat16: float
    source: str

    def flops(self, dtype: str, precise: bool) -> float:
        """Return operations a second of a model in this dtype, or of full products (`precise`)."""
        if precise:
            return self.float32
        return self.bfloat16 if dtype == "bfloat16" else self.default

    def seconds(self, flops: float, moved: float, dtype: str, precise: bool) -> tuple[float, str]:
        """Return the least time for these operations and bytes, and which of the two sets it."""
        times = {"flops": flops / self.flops(dtype, precise), "bytes": moved / self.bandwidth}
        slowest = max(times, key=lambda name: times[name])
        return times[slowest], slowest


_SHEET = "the maker's data sheet, dense"
# By a part of the device's name, the more particular first.
_KNOWN = {
    "H200": Limits(4.8e12, 67e12, 494e12, 989e12, _SHEET),
    "H100 PCIe": Limits(2.0e12, 51e12, 378e12, 756e12, _SHEET),
    "H100": Limits(3.35e12, 67e12, 494e12, 989e12, _SHEET),
    "A100-SXM4-80GB": Limits(2.04e12, 19.5e12, 156e12, 312e12, _SHEET),
    "A100": Limits(1.56e12, 19.5e12, 156e12, 312e12, _SHEET),
    # Full precision takes six bfloat16 passes.
    "TPU v5 lite": Limits(0.819e12, 197e12 / 6, 197e12, 197e12, _SHEET),
    "TPU v5e": Limits(0.819e12, 197e12 / 6, 197e12, 197e12, _SHEET),
}


def limits_of(device: Any) -> Limits:
    """Return the limits of a known device; measure those of another one."""
    known = (limits for name, limits in _KNOWN.items() if name in device.device_kind)
    return next(known, None) or measure_limits()


def measure_limits(copied: int = _COPIED, side: int = _SIDE) -> Limits:
    """Measure the default device by the best of a few large copies and matrix products."""
    words = jnp.ones(copied // 4, jnp.float32)
    # In place: a CPU takes longer to get new memory than to write it.
    bandwidth = 2 * copied / _best(jax.jit(lambda x: x + 1, donate_argnums=0), words, chained=True)

    def product(dtype: Any, precision: jax.lax.Precision) -> float:
        matrix = jnp.asarray(np.random.default_rng(0).standard_normal((side, side)), dtype)
        multiply = jax.jit(lambda x: jnp.matmul(x, x, precision=precision))
        return 2 * side**3 / _best(multiply, matrix)

    full, default = jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT
    return Limits(
        bandwidth,
        product(jnp.float32, full),
        product(jnp.float32, default),
        product(jnp.bfloat16, default),
        f"measured: a copy of {copied >> 20} MiB in place, products of {side} x {side} matrices",
    )


def _best(function: Callable[[jax.Array], jax.Array], x: jax.Array, chained: bool = False) -> float:
    """Return the seconds of the quickest call; `chained` calls take the last one's result."""
    seconds = []
    for _ in range(_REPEATS + 1):  # the first one compiles
        start = time.perf_counter()
        result = jax.block_until_ready(function(x))
        seconds.append(time.perf_counter() - start)
        x = result if chained else x
    return min(seconds[1:])
