"""The contract of codes, as a function that needs no test framework.

Nearly all of the time is compilation. So all straggler sets go through a few programs together, and
tracing finds what it can before anything is compiled. Rules about values name the straggler set in
which they fail.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..arrays import working_dtype
from ..codes import AbstractCode, Decoded

_OUTPUTS = 3
_RANDOM_SETS = 6


def check_code(code: AbstractCode, *, tolerance: float | None = None) -> None:
    """Check that a code keeps the contract of all codes.

    The straggler sets are: no worker available, all, each worker alone, all but each worker, and a
    few at random. The rules, in the order in which they are checked:

    - Sizes are positive integers. The code is a pytree of arrays and numbers that can be an
      argument of `jax.jit`.
    - `encoder_matrix()` is (N, K), `decoder_matrix(available)` (K, N), and `recovered(available)` a
      boolean (K,). Both matrices are float32 or both are float64. Masks may be traced, and anything
      but a mask of N workers raises a ValueError.
    - The decoder is finite, with zeros in the columns of unavailable workers and in the rows of
      data points that are not recovered. `recovered` is honest: every data point with all workers
      available, none without any, and only data points whose row of the decoder is not zero.
    - If a code has its own `decoder_map`, its `matrix` agrees with `decoder_matrix`, and its
      `apply` with the product.
    - `encode` and `try_decode` agree with the products of the matrices in NumPy's float64.
      Predictions are finite where `recovered` is true, even with one worker left, and NaN
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
        tolerance: The largest error, relative to the sum of the magnitudes of a result's terms
          (default: 1e-4 for matrices in float32, 1e-10 in float64).

    Raises:
        AssertionError: A rule is broken. The message names the rule and what was seen.
        ValueError: `code` is not an `AbstractCode`.

    >>> from nercc_jax import Replication
    >>> from nercc_jax.testing import check_code
    >>> check_code(Replication(2, 5))
    """
    if not isinstance(code, AbstractCode):
        raise ValueError(f"code must be an instance of AbstractCode, not {code!r}")
    _check_pytree(code)
    dtype = _check_shapes(code)

    # All straggler sets, with answers that are 0 where no worker is available.
    k, n, random = code.num_data, code.num_workers, np.random.default_rng(0)
    alone = np.eye(n, dtype=bool)
    some = random.uniform(size=(_RANDOM_SETS, n)) < np.linspace(0.2, 0.8, _RANDOM_SETS)[:, None]
    masks = np.concatenate([np.ones((1, n), bool), np.zeros((1, n), bool), alone, ~alone, some])
    x = random.normal(size=(k, _OUTPUTS)).astype(dtype)
    y = random.normal(size=(len(masks), n, _OUTPUTS)).astype(dtype)
    y = np.where(masks[..., None], y, 0)
    if tolerance is None:
        tolerance = 1e-4 if dtype == np.float32 else 1e-10
    found = jax.device_get(_compiled(_forward)(code, x, y, masks))
    encoder, coded, decoders, recovered, map_matrices, applied = found
    encoder, decoders = encoder.astype(np.float64), decoders.astype(np.float64)
    cases = _Cases(masks, y, encoder, decoders, recovered, tolerance)

    everyone = np.where(np.arange(len(masks))[:, None] == 0, ~recovered, False)
    nobody = np.where(masks.any(axis=1, keepdims=True), False, recovered)
    cases.check("recovered(available) must hold for every data point with all workers", everyone)
    cases.check("recovered(available) must hold for no data point with no worker", nobody)
    _require(np.isfinite(encoder).all(), "encoder_matrix() holds values that are not finite")
    cases.check_decoder("decoder_matrix(available)", decoders, recovered)
    cases.check_close("decoder_map(available).matrix", map_matrices, decoders)
    cases.check_close("decoder_map(available).apply(y)", applied, decoders, y, recovered)
    for way, each in (("inside `jax.jit`", coded), ("outside", code.encode(x))):
        cases.check_close(f"encode(x) must be encoder_matrix() @ x; {way} it", each, encoder, x)

    # Whatever stragglers answer, and whichever worker's answer is not finite.
    decode = _compiled(_decode_groups)
    cases.check_decoded("under `jax.vmap`", *decode(code, y, masks))
    for value in (np.nan, np.inf, -np.inf, 1e30):
        broken = np.where(masks[..., None], y, value).astype(dtype)
        name = f"the value of an unavailable worker must not reach a prediction; with {value}"
        cases.check_decoded(name, *decode(code, broken, masks))
        if not np.isfinite(value):
            name = f"an available worker that answers {value} must become a straggler;"
            cases.check_decoded(name, *decode(code, broken, np.ones_like(masks)))
    _check_single_calls(code, cases)
    _check_gradients(code, cases, x)


def _require(holds: Any, message: str) -> None:
    """Raise an AssertionError with this message unless the condition holds."""
    # Not the `assert` statement, which `python -O` leaves out.
    if not holds:
        raise AssertionError(message)


# -- Rules that need no compilation ------------------------------------------------------------


def _check_pytree(code: AbstractCode) -> None:
    """Check sizes and fields."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(code):
        _require(
            eqx.is_array_like(leaf),
            f"the field {jax.tree_util.keystr(path)} is {leaf!r}, which `jax.jit` does not take: "
            "make it an array, or static by `equinox.field(static=True)`",
        )
    for name in ("num_data", "num_workers"):
        size = getattr(code, name)
        _require(
            isinstance(size, int) and not isinstance(size, bool) and size > 0,
            f"{name} must be a positive Python integer in a static field, not {size!r}",
        )
    try:
        same = jax.tree.structure(copy.deepcopy(code)) == jax.tree.structure(code)
    except ValueError:  # of arrays, whose comparison has many results
        same = False
    _require(
        same,
        "static fields must compare equal in a copy of the code, or `jax.jit` compiles each copy "
        "again; make arrays ordinary fields, and give objects an `__eq__`",
    )
    models = np.asarray(code.worker_models)
    numbered = np.array_equal(np.union1d(models, 0), np.arange(models.max() + 1))
    _require(
        models.shape == (code.num_workers,) and models.dtype.kind in "iu" and numbered,
        f"worker_models must be {code.num_workers} integers that number the models 0, 1, ... "
        f"without gaps, not {models}",
    )


def _check_shapes(code: AbstractCode) -> np.dtype:
    """Check shapes and dtypes of all results, and wrong masks; return the dtype of matrices."""
    k, n = code.num_data, code.num_workers
    struct, mask = jax.ShapeDtypeStruct, jax.ShapeDtypeStruct((n,), bool)

    def check(name: str, function: Any, *args: Any, shape: tuple[int, ...], dtypes: Any) -> Any:
        try:
            array = jax.eval_shape(function, code, *args)
        except (  # each of these says that a program asked for the value of a traced array
            jax.errors.ConcretizationTypeError,
            jax.errors.NonConcreteBooleanIndexError,
            jax.errors.TracerArrayConversionError,
            jax.errors.TracerIntegerConversionError,
        ) as error:
            raise AssertionError(
                f"{name} must work with traced arguments: it may not branch on their values, "
                f"convert them to NumPy, or have shapes that depend on them. {error}"
            ) from error
        wanted = " or ".join(str(jnp.dtype(each)) for each in dtypes)
        _require(
            array.shape == shape and array.dtype in dtypes,
            f"{name} must be {wanted}{shape}, not {array.dtype}{array.shape}",
        )
        return array.dtype

    matrix = lambda code, mask: code.decoder_matrix(mask)  # noqa: E731
    floats = (np.dtype(np.float32), np.dtype(np.float64))
    dtype = check(
        "encoder_matrix()", lambda code: code.encoder_matrix(), shape=(n, k), dtypes=floats
    )
    check("decoder_matrix(available)", matrix, mask, shape=(k, n), dtypes=(dtype,))
    recovered = lambda code, mask: code.recovered(mask)  # noqa: E731
    check("recovered(available)", recovered, mask, shape=(k,), dtypes=(np.dtype(bool),))
    for each in (dtype, jnp.dtype(jnp.bfloat16)):
        x, y = (struct((size, _OUTPUTS), each) for size in (k, n))
        encode = lambda code, x: code.encode(x)  # noqa: E731
        check("encode(x)", encode, x, shape=(n, _OUTPUTS), dtypes=(each,))
        decode = lambda code, y, mask: code.try_decode(y, mask).predictions  # noqa: E731
        dtypes = (working_dtype(each),)
        check("predictions", decode, y, mask, shape=(k, _OUTPUTS), dtypes=dtypes)
    for shape, kind in (((n + 1,), bool), ((1, n), bool), ((n,), jnp.float32)):
        try:
            jax.eval_shape(matrix, code, struct(shape, kind))
        except (TypeError, ValueError):  # the former by run-time type checks, where they are on
            continue
        raise AssertionError(
            f"decoder_matrix(available) must raise a ValueError for anything but a boolean mask of "
            f"shape ({n},); it accepts {jnp.dtype(kind)}{shape}. `nercc_jax.codes.as_mask` checks "
            "it"
        )
    return dtype


# -- Programs, shared by all codes of one structure --------------------------------------------


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Small programs that run once need no optimisation: for NeRCC(4, 11) the check took 38 s of CPU
    # time with it, and 25 s without.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    on_cpu = jax.default_backend() == "cpu"
    return jax.jit(function, compiler_options=options if on_cpu else None)


def _forward(code: AbstractCode, x: jax.Array, y: jax.Array, masks: jax.Array) -> tuple:
    """Return the encoder, the coded data points, and for each set decoder, recovered and map."""

    def one(y: jax.Array, mask: jax.Array) -> tuple:
        made = code.decoder_map(mask)
        return code.decoder_matrix(mask), code.recovered(mask), made.matrix, made.apply(y)

    return code.encoder_matrix(), code.encode(x), *jax.vmap(one)(y, masks)


def _decode_groups(code: AbstractCode, y: jax.Array, masks: jax.Array) -> tuple:
    decoded = jax.vmap(code.try_decode)(y, masks)
    return decoded.predictions, decoded.recovered


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


@dataclasses.dataclass(frozen=True)
class _Cases:
    """Straggler sets with answers, and the code's matrices in float64.

    Answers of unavailable workers are 0. The tolerance is relative to 1 plus the sum of the
    magnitudes of a result's terms.
    """

    masks: np.ndarray  # (sets, N)
    y: np.ndarray  # (sets, N, outputs)
    encoder: np.ndarray  # (N, K)
    decoders: np.ndarray  # (sets, K, N)
    recovered: np.ndarray  # (sets, K)
    tolerance: float

    def describe(self, place: int) -> str:
        """Return a straggler set in words."""
        return f"workers {np.flatnonzero(self.masks[place]).tolist()} available"

    def check(self, rule: str, broken: Any) -> None:
        """Check a rule that may be broken (sets, places) at data points or workers."""
        for place, each in enumerate(broken):
            at = np.flatnonzero(each)
            _require(not at.size, f"{rule}; with {self.describe(place)} it is broken at {at}")

    def check_close(
        self,
        name: str,
        found: Any,
        matrices: np.ndarray,
        vectors: np.ndarray | None = None,
        where: np.ndarray | None = None,
    ) -> None:
        """Check arrays (sets, rows, outputs), in all rows or `where` it holds; or one array.

        They must equal the matrices, or with `vectors` the products with these.
        """
        found, expected, scale = np.asarray(found, np.float64), matrices, np.abs(matrices).sum(-1)
        scale = scale[..., None]
        if vectors is not None:
            vectors = np.asarray(vectors, np.float64)
            expected, scale = matrices @ vectors, np.abs(matrices) @ np.abs(vectors)
        with np.errstate(invalid="ignore"):
            error = np.abs(found - expected) / (1 + scale)
        error = np.where(np.isnan(error), np.inf, error)
        error = error if where is None else np.where(where[..., None], error, 0)
        worst = error.max(axis=(-2, -1))
        place, seen = int(worst.argmax()), ""
        if worst.ndim:
            seen = f" with {self.describe(place)}"
        _require(
            worst.max() <= self.tolerance,
            f"{name} differs from what it must be{seen}: the relative error is {worst.max():.3g} "
            f"(infinite where a value is not finite), over {self.tolerance:.3g}",
        )

    def check_decoder(self, name: str, decoders: np.ndarray, recovered: np.ndarray) -> None:
        """Check that decoders are finite, zero where they must be, and honest about `recovered`."""
        rows, zero = decoders.any(axis=2), f"must be zero in {name}"
        of_stragglers = decoders.any(axis=1) & ~self.masks
        self.check(f"{name} must be finite", ~np.isfinite(decoders).all(axis=2))
        self.check(f"columns of unavailable workers {zero}", of_stragglers)
        self.check(f"rows of data points that are not recovered {zero}", rows & ~recovered)
        known = f"recovered(available) may hold only where the row of {name} is not zero"
        self.check(known, recovered & ~rows)

    def check_decoded(self, name: str, predictions: Any, recovered: Any) -> None:
        """Check the predictions from `y`, a row for each straggler set."""
        predictions, recovered = np.asarray(predictions, np.float64), np.asarray(recovered)
        self.check(f"{name} `recovered` must be recovered(available)", recovered != self.recovered)
        lost = ~np.isnan(predictions).all(axis=2) & ~recovered
        self.check(f"{name} predictions must be NaN where recovered(available) is false", lost)
        self.check_close(f"{name} a prediction", predictions, self.decoders, self.y, recovered)


def _check_single_calls(code: AbstractCode, cases: _Cases) -> None:
    """Check one group at a time, a pytree of answers, inside and outside `jax.jit`."""
    traces = []

    def decode(code: AbstractCode, y: PyTree, mask: Any) -> Decoded:
        traces.append(mask)
        return code.try_decode(y, mask)

    chosen = [*range(3), *range(len(cases.masks) - _RANDOM_SETS, len(cases.masks))]
    names = ("masks", "y", "decoders", "recovered")
    part = dataclasses.replace(cases, **{name: getattr(cases, name)[chosen] for name in names})
    jitted = _compiled.__wrapped__(decode)  # not kept for other codes
    for way, run in (("inside `jax.jit`", jitted), ("outside `jax.jit`", decode)):
        predictions, recovered = [], []
        for y, mask in zip(part.y, part.masks, strict=True):
            decoded = run(code, {"first": y[:, :1], "others": y[:, 1:]}, mask)
            predictions.append(np.hstack([*map(np.asarray, decoded.predictions.values())]))
            recovered.append(np.asarray(decoded.recovered))
        given = np.stack(predictions), np.stack(recovered)
        part.check_decoded(f"one group at a time, as a pytree, {way},", *given)
        one = f"one compilation must serve every mask; try_decode was traced {len(traces)} times"
        _require(len(traces) == 1 or run is decode, one)
    try:
        code.decode(part.y[1], part.masks[1])
    except ValueError:
        return
    raise AssertionError("decode(y, available) must raise a ValueError with no worker available")


def _check_gradients(code: AbstractCode, cases: _Cases, x: np.ndarray) -> None:
    numbers, rest = eqx.partition(code, eqx.is_inexact_array_like)
    random, (sets, k, n) = np.random.default_rng(1), cases.decoders.shape
    shapes = ((sets, n, _OUTPUTS), (sets, k, _OUTPUTS))
    cotangents = tuple(random.normal(size=shape).astype(x.dtype) for shape in shapes)
    y = np.where(cases.masks[..., None], cases.y, np.nan)
    pulled = _compiled(_pull_back)(numbers, rest, x, y, cases.masks, cotangents)
    of_numbers, of_x, of_y = jax.device_get(pulled)
    for path, gradient in jax.tree_util.tree_leaves_with_path(of_numbers):
        broken = ~np.isfinite(gradient.reshape(sets, -1))
        rule = f"gradients in the code's numbers must be finite: in {jax.tree_util.keystr(path)}"
        cases.check(rule, broken)
    for name, gradient, matrix, cotangent in (
        ("data points must be encoder_matrix()", of_x, cases.encoder, cotangents[0]),
        ("answers must be decoder_matrix(available)", of_y, cases.decoders, cotangents[1]),
    ):
        name = f"the gradient with respect to the {name}'s transpose; it"
        cases.check_close(name, gradient, np.swapaxes(matrix, -1, -2), cotangent)
