"""The contract of codes, as a function that needs no test framework.

Compilation is nearly all of the time. All straggler sets therefore go through a handful of programs
together, and what tracing alone can find is found before anything is compiled.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..codes import AbstractCode, Decoded
from ._matrices import (
    Cases,
    check_close,
    check_decoder,
    check_matrices,
    check_on_host,
    check_recovered,
    check_structure,
    describe,
    float64_product,
    require,
    try_decode,
)

_OUTPUTS = 3
_RANDOM_SETS = 6
# Relative to the sum of magnitudes that a result is made of.
_TOLERANCES = {"float32": 1e-4, "float64": 1e-10}


def check_code(code: AbstractCode, *, tolerance: float | None = None) -> None:
    """Check that a code keeps the contract of all codes.

    The straggler sets are: no worker available, all, each worker alone, all but each worker, and a
    few at random. The rules, in the order in which they are checked:

    - Sizes are positive integers. The code is a pytree of arrays and numbers that survives
      flattening and `equinox.tree_serialise_leaves`, has a `repr`, and can be an argument of
      `jax.jit`.
    - `encoder_matrix()` is (N, K), `decoder_matrix(available)` (K, N), and `recovered(available)` a
      boolean (K,). Both matrices are float32 or both are float64. Masks may be traced, and what is
      no mask of N workers raises a ValueError.
    - The decoder is finite, with zeros in the columns of unavailable workers and in the rows of
      data points that are not recovered. `recovered` is honest: every data point with all workers
      available, none without any, and only data points whose row of the decoder is not zero.
    - Where a code has its own `decoder_map`, its `matrix` agrees with `decoder_matrix`, and its
      `apply` with the product.
    - Where a code has `encoder_on_host` or `decoder_on_host`, they return NumPy arrays when all the
      code's arrays are NumPy's, for every straggler set or for none. The matrices agree with those
      of `encoder_matrix` and `decoder_matrix`, have zeros in the same places, and `recovered` is
      the same.
    - `encode` and `try_decode` agree with the products of the matrices in NumPy's float64.
      Predictions are finite where `recovered` is true, with one worker left, too, and NaN
      elsewhere.
    - A straggler's value (NaN, infinity, 1e30) reaches neither a prediction nor a gradient. An
      available worker whose answer is not finite becomes a straggler.
    - One compilation serves every mask. `jax.vmap` over groups agrees with a loop, pytrees of
      answers agree with arrays, and calls outside `jax.jit` agree with calls inside.
    - The gradient with respect to the answers is the decoder's transpose, the gradient with respect
      to the data points the encoder's, and gradients in the code's own numbers are finite.

    The check runs in JAX's current precision. It takes some seconds for a code of a few matrix
    products, half a minute for one of the splines, nearly all of it compilation.

    Args:
        code: The code to check.
        tolerance: Largest error, relative to the sum of the magnitudes that a result is made of
          (default: 1e-4 for matrices in float32, 1e-10 in float64).

    Raises:
        AssertionError: If a rule is broken. The message names the rule and what was seen.
        ValueError: If `code` is no `AbstractCode`.

    >>> from nercc_jax import Replication
    >>> from nercc_jax.testing import check_code
    >>> check_code(Replication(2, 5))
    """
    if not isinstance(code, AbstractCode):
        raise ValueError(f"code must be an instance of AbstractCode, not {code!r}")
    check_structure(code)
    cases = _make_cases(code, tolerance)
    check_recovered(cases)
    require(np.isfinite(cases.encoder).all(), "encoder_matrix() holds values that are not finite")
    check_decoder("decoder_matrix(available)", cases.decoders, cases)
    _check_decoder_map(code, cases)
    check_on_host(code, cases)
    _check_encode(code, cases)
    clean = _check_decode(code, cases)
    _check_stragglers(code, cases, clean)
    _check_single_calls(code, cases, clean)
    _check_gradients(code, cases)


class _Result(NamedTuple):
    """Results of `try_decode` for the straggler sets, on the host."""

    predictions: np.ndarray  # (sets, K, outputs)
    recovered: np.ndarray  # (sets, K)


# -- Programs, shared by all codes of one structure --------------------------------------------


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(function, compiler_options=_options())


def _options() -> dict[str, int | bool] | None:
    # Small programs that run once need no optimisation: for NeRCC(4, 11) the check took 38 s of CPU
    # time with it, and 25 s without.
    if jax.default_backend() != "cpu":
        return None
    return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _encode(code: AbstractCode, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return code.encoder_matrix(), code.encode(x)


def _matrices(code: AbstractCode, masks: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.vmap(lambda mask: (code.decoder_matrix(mask), code.recovered(mask)))(masks)


def _map(code: AbstractCode, y: jax.Array, masks: jax.Array) -> tuple[jax.Array, jax.Array]:
    def one(y: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        made = code.decoder_map(mask)
        return made.matrix, made.apply(y)

    return jax.vmap(one)(y, masks)


def _decode_groups(code: AbstractCode, y: jax.Array, masks: jax.Array) -> Decoded:
    return jax.vmap(code.try_decode)(y, masks)


def _pull_back(
    numbers: PyTree, rest: PyTree, x: jax.Array, y: jax.Array, masks: jax.Array, cotangents: Any
) -> tuple[PyTree, jax.Array, jax.Array]:
    """Return the gradients in a code's numbers, data points and answers, for each straggler set."""

    def one(y: jax.Array, mask: jax.Array, cotangents: Any) -> Any:
        def run(numbers: PyTree, x: jax.Array, y: jax.Array) -> Any:
            code = eqx.combine(numbers, rest)
            decoded = code.try_decode(y, mask)
            known = jnp.where(decoded.recovered[:, None], decoded.predictions, 0)
            return code.encode(x), known

        return jax.vjp(run, numbers, x, y)[1](cotangents)

    return jax.vmap(one)(y, masks, cotangents)


# -- Rules about values ------------------------------------------------------------------------


def _make_cases(code: AbstractCode, tolerance: float | None) -> Cases:
    k, n = code.num_data, code.num_workers
    random = np.random.default_rng(0)
    alone = np.eye(n, dtype=bool)
    shares = np.linspace(0.2, 0.8, _RANDOM_SETS)[:, None]
    some = random.uniform(size=(_RANDOM_SETS, n)) < shares
    masks = np.concatenate([np.ones((1, n), bool), np.zeros((1, n), bool), alone, ~alone, some])
    dtype = jax.eval_shape(lambda code: code.encoder_matrix(), code).dtype
    x = random.normal(size=(k, _OUTPUTS)).astype(dtype)
    y = random.normal(size=(len(masks), n, _OUTPUTS)).astype(dtype)
    decoders, recovered = _compiled(_matrices)(code, masks)
    encoder, _ = _compiled(_encode)(code, x)
    return Cases(
        masks,
        x,
        np.where(masks[..., None], y, 0),
        np.asarray(encoder, np.float64),
        np.asarray(decoders, np.float64),
        np.asarray(recovered),
        _TOLERANCES[str(dtype)] if tolerance is None else tolerance,
    )


def _check_decoder_map(code: AbstractCode, cases: Cases) -> None:
    if type(code).decoder_map is AbstractCode.decoder_map:
        return  # the product itself
    matrices, applied = jax.device_get(_compiled(_map)(code, cases.y, cases.masks))
    name = "decoder_map(available)"
    check_matrices(f"{name}.matrix", matrices, cases)
    expected, scale = float64_product(cases.decoders, cases.y)
    found = np.asarray(applied, np.float64)
    check_close(f"{name}.apply(y)", found, expected, scale, cases, cases.recovered)


def _check_encode(code: AbstractCode, cases: Cases) -> None:
    expected, scale = float64_product(cases.encoder, cases.x)
    ways = {
        "inside `jax.jit`": _compiled(_encode)(code, cases.x)[1],
        "outside": code.encode(cases.x),
    }
    for way, coded in ways.items():
        error = np.abs(np.asarray(coded, np.float64) - expected) / scale
        require(
            error.max() <= cases.tolerance,  # which NaN is not
            f"encode(x) must be encoder_matrix() @ x; {way} the relative error is "
            f"{error.max():.3g}, over {cases.tolerance:.3g}",
        )


def _check_decode(code: AbstractCode, cases: Cases) -> _Result:
    """Return what is decoded from each straggler set, once it is known to be right."""
    decoded = _decode(code, cases.y, cases.masks)
    _check_decoded("try_decode(y, available), under `jax.vmap`,", decoded, cases)
    return decoded


def _check_decoded(name: str, decoded: _Result, cases: Cases) -> None:
    for mask, found, wanted in zip(cases.masks, decoded.recovered, cases.recovered, strict=True):
        require(
            np.array_equal(found, wanted),
            f"{name} must recover what recovered(available) says; with {describe(mask)} it "
            f"recovers data points {np.flatnonzero(found)}, not {np.flatnonzero(wanted)}",
        )
    lost = ~np.isnan(decoded.predictions).all(axis=2) & ~decoded.recovered
    require(
        not lost.any(),
        f"{name} must predict NaN where recovered(available) does not hold; with "
        f"{describe(cases.masks[lost.any(axis=1).argmax()])} it does not",
    )
    expected, scale = float64_product(cases.decoders, cases.y)
    check_close(name, decoded.predictions, expected, scale, cases, decoded.recovered)


def _decode(code: AbstractCode, y: np.ndarray, masks: np.ndarray) -> _Result:
    decoded = _compiled(_decode_groups)(code, y, masks)
    return _Result(np.asarray(decoded.predictions, np.float64), np.asarray(decoded.recovered))


def _check_stragglers(code: AbstractCode, cases: Cases, clean: _Result) -> None:
    available, everyone = cases.masks[..., None], np.ones_like(cases.masks)
    for value in (np.nan, np.inf, -np.inf, 1e30):
        y = np.where(available, cases.y, value).astype(cases.y.dtype)
        _check_same(
            f"the value of an unavailable worker must not reach a prediction; with {value}",
            _decode(code, y, cases.masks),
            clean,
            cases,
        )
        if not np.isfinite(value):
            _check_same(
                f"an available worker that answers {value} must become a straggler;",
                _decode(code, y, everyone),
                clean,
                cases,
            )


def _check_single_calls(code: AbstractCode, cases: Cases, clean: _Result) -> None:
    """Check one group at a time, a pytree of answers, inside and outside `jax.jit`."""
    traces = []

    @functools.partial(jax.jit, compiler_options=_options())
    def traced(code: AbstractCode, y: PyTree, mask: jax.Array) -> Decoded:
        traces.append(mask)
        return code.try_decode(y, mask)

    chosen = [*range(3), *range(len(cases.masks) - _RANDOM_SETS, len(cases.masks))]
    part = dataclasses.replace(
        cases,
        **{name: getattr(cases, name)[chosen] for name in ("masks", "y", "decoders", "recovered")},
    )
    wanted = _Result(*(each[chosen] for each in clean))
    for way, decode in (("inside `jax.jit`", traced), ("outside `jax.jit`", try_decode)):
        calls = []
        for y, mask in zip(part.y, part.masks, strict=True):
            answers = {"first": y[:, 0], "others": y[:, 1:, None]}
            decoded = decode(code, answers, mask)
            first, others = (decoded.predictions[name] for name in ("first", "others"))
            calls.append((np.column_stack([first, others[..., 0]]), decoded.recovered))
        found = _Result(*(np.stack(each) for each in zip(*calls, strict=True)))
        name = f"one group at a time, as a pytree, {way} must be decoded as `jax.vmap` does it;"
        _check_same(name, found, wanted, part)
    require(
        len(traces) == 1,
        f"one compilation must serve every mask; try_decode was traced {len(traces)} times",
    )
    try:
        code.decode(part.y[1], part.masks[1])
    except ValueError:
        return
    raise AssertionError("decode(y, available) must raise a ValueError with no worker available")


def _check_gradients(code: AbstractCode, cases: Cases) -> None:
    numbers, rest = eqx.partition(code, eqx.is_inexact_array_like)
    random = np.random.default_rng(1)
    sets, (n, k) = len(cases.masks), cases.encoder.shape
    shapes = ((sets, n, _OUTPUTS), (sets, k, _OUTPUTS))
    cotangents = tuple(random.normal(size=shape).astype(cases.x.dtype) for shape in shapes)
    y = np.where(cases.masks[..., None], cases.y, np.nan)
    found = jax.device_get(
        _compiled(_pull_back)(numbers, rest, cases.x, y, cases.masks, cotangents)
    )
    for path, gradient in jax.tree_util.tree_leaves_with_path(found[0]):
        broken = ~np.isfinite(gradient.reshape(sets, -1)).all(axis=1)
        require(
            not broken.any(),
            f"gradients in the code's numbers must be finite; with "
            f"{describe(cases.masks[broken.argmax()])} that in {jax.tree_util.keystr(path)} is "
            "not",
        )
    transposes = (
        ("data points must be encoder_matrix()", found[1], cases.encoder, cotangents[0]),
        ("answers must be decoder_matrix(available)", found[2], cases.decoders, cotangents[1]),
    )
    for name, gradient, matrix, cotangent in transposes:
        expected, scale = float64_product(np.swapaxes(matrix, -1, -2), cotangent)
        name = f"the gradient with respect to the {name}'s transpose; it"
        check_close(name, np.asarray(gradient, np.float64), expected, scale, cases)


def _check_same(name: str, found: _Result, wanted: _Result, cases: Cases) -> None:
    for mask, got, expected in zip(cases.masks, found.recovered, wanted.recovered, strict=True):
        require(
            np.array_equal(got, expected),
            f"{name} with {describe(mask)} data points {np.flatnonzero(got)} are recovered, not "
            f"{np.flatnonzero(expected)}",
        )
    _, scale = float64_product(cases.decoders, cases.y)
    check_close(name, found.predictions, wanted.predictions, scale, cases, wanted.recovered)
