"""The contract of codes, as a function that needs no test framework.

Compilation is nearly all of the time. All straggler sets therefore go through a handful of programs
together, and what tracing alone can find is found before anything is compiled. Rules about values
name the straggler set in which they fail.
"""

import copy
import dataclasses
import functools
import io
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..codes import AbstractCode, Decoded
from ..splines.arrays import working_dtype

_OUTPUTS = 3
_RANDOM_SETS = 6


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
    _check_pytree(code)
    _check_shapes(code)
    cases = _make_cases(code, tolerance)
    _check_matrices(code, cases)
    _check_on_host(code, cases)
    _check_encode(code, cases)
    _check_decode(code, cases)
    _check_single_calls(code, cases)
    _check_gradients(code, cases)


def _require(holds: Any, message: str) -> None:
    """Raise an AssertionError with this message unless the condition holds."""
    # Not the `assert` statement, which `python -O` leaves out.
    if not holds:
        raise AssertionError(message)


# -- Rules that need no compilation ------------------------------------------------------------


def _check_pytree(code: AbstractCode) -> None:
    """Check sizes and fields."""
    for name in ("num_data", "num_workers"):
        size = getattr(code, name)
        _require(
            isinstance(size, int) and not isinstance(size, bool) and size > 0,
            f"{name} must be a positive Python integer in a static field, not {size!r}",
        )
    models = np.asarray(code.worker_models)
    wanted = (code.num_workers,)
    _require(
        models.shape == wanted and np.issubdtype(models.dtype, np.integer),
        f"worker_models must be integers of shape {wanted}, not {models.dtype}{models.shape}",
    )
    _require(
        np.array_equal(np.union1d(models, 0), np.arange(models.max() + 1)),
        f"worker_models must number the models 0, 1, ... without gaps, not {np.unique(models)}",
    )
    leaves, structure = jax.tree.flatten(code)
    for path, leaf in jax.tree_util.tree_leaves_with_path(code):
        _require(
            eqx.is_array_like(leaf),
            f"the field {jax.tree_util.keystr(path)} is {leaf!r}, which `jax.jit` does not take: "
            "make it an array, or static by `equinox.field(static=True)`",
        )
    again = jax.tree.structure(jax.tree.unflatten(structure, leaves))
    _require(again == structure, "flattening and unflattening must keep the pytree's structure")
    try:
        same = jax.tree.structure(copy.deepcopy(code)) == structure
    except ValueError:  # of arrays, whose comparison has many results
        same = False
    _require(
        same,
        "static fields must compare equal in a copy of the code, or `jax.jit` compiles each copy "
        "anew; make arrays ordinary fields, and give objects an `__eq__`",
    )
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, code)
    file.seek(0)
    loaded = jax.tree.leaves(eqx.tree_deserialise_leaves(file, code))
    for before, after in zip(leaves, loaded, strict=True):
        _require(
            np.array_equal(np.asarray(before), np.asarray(after), equal_nan=True),
            f"`equinox.tree_serialise_leaves` writes {before!r} and reads {after!r}",
        )
    _require(isinstance(repr(code), str), "repr(code) must be a string")


def _check_shapes(code: AbstractCode) -> None:
    """Check the shapes and dtypes of all results, and that wrong masks are refused."""
    k, n = code.num_data, code.num_workers

    def trace(name: str, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return jax.eval_shape(function, code, *args)
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

    def check(name: str, array: Any, shape: tuple[int, ...], *dtypes: Any) -> None:
        _require(
            getattr(array, "shape", None) == shape,
            f"{name} must have the shape {shape}, not {getattr(array, 'shape', array)}",
        )
        names = [str(jnp.dtype(dtype)) for dtype in dtypes]
        _require(
            str(array.dtype) in names, f"{name} must be {' or '.join(names)}, not {array.dtype}"
        )

    mask = jax.ShapeDtypeStruct((n,), bool)
    encoder = trace("encoder_matrix()", lambda code: code.encoder_matrix())
    check("encoder_matrix()", encoder, (n, k), np.float32, np.float64)
    decoder = trace("decoder_matrix(available)", _decoder_matrix, mask)
    check("decoder_matrix(available)", decoder, (k, n), encoder.dtype)
    recovered = trace("recovered(available)", lambda code, mask: code.recovered(mask), mask)
    check("recovered(available)", recovered, (k,), bool)
    for dtype in (encoder.dtype, jnp.bfloat16):
        x, y = (jax.ShapeDtypeStruct((size, _OUTPUTS), dtype) for size in (k, n))
        coded = trace("encode(x)", lambda code, x: code.encode(x), x)
        check("encode(x)", coded, (n, _OUTPUTS), dtype)
        decoded = trace("try_decode(y, available)", _try_decode, y, mask)
        check("predictions", decoded.predictions, (k, _OUTPUTS), working_dtype(dtype))
    # In a traced function, too: JAX shows a code's `repr` in error messages.
    trace("repr", lambda code: jnp.zeros(len(repr(code))))
    for shape, dtype in (((n + 1,), bool), ((1, n), bool), ((n,), jnp.float32)):
        try:
            jax.eval_shape(_decoder_matrix, code, jax.ShapeDtypeStruct(shape, dtype))
        except (TypeError, ValueError):  # the former by run-time type checks, where they are on
            continue
        raise AssertionError(
            f"decoder_matrix(available) must raise a ValueError for anything but a boolean mask of "
            f"shape ({n},); it accepts {jnp.dtype(dtype)}{shape}. `nercc_jax.codes.as_mask` checks "
            "it"
        )


def _decoder_matrix(code: AbstractCode, mask: Any) -> jax.Array:
    return code.decoder_matrix(mask)


def _try_decode(code: AbstractCode, y: Any, mask: Any) -> Decoded:
    return code.try_decode(y, mask)


# -- Programs, shared by all codes of one structure --------------------------------------------


def _options() -> dict[str, int | bool] | None:
    # Small programs that run once need no optimisation: for NeRCC(4, 11) the check took 38 s of CPU
    # time with it, and 25 s without.
    if jax.default_backend() != "cpu":
        return None
    return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(function, compiler_options=_options())


def _encode(code: AbstractCode, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return code.encoder_matrix(), code.encode(x)


def _matrices(code: AbstractCode, masks: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.vmap(lambda mask: (code.decoder_matrix(mask), code.recovered(mask)))(masks)


def _map(code: AbstractCode, y: jax.Array, masks: jax.Array) -> tuple[jax.Array, jax.Array]:
    def one(y: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        made = code.decoder_map(mask)
        return made.matrix, made.apply(y)

    return jax.vmap(one)(y, masks)


def _decode_groups(
    code: AbstractCode, y: jax.Array, masks: jax.Array
) -> tuple[jax.Array, jax.Array]:
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
    """Straggler sets with data points, answers, and the code's matrices in float64.

    Answers of unavailable workers are 0. The tolerance is relative to the sum of magnitudes that a
    result is made of, plus 1.
    """

    masks: np.ndarray  # (sets, N)
    x: np.ndarray  # (K, outputs)
    y: np.ndarray  # (sets, N, outputs)
    encoder: np.ndarray  # (N, K)
    decoders: np.ndarray  # (sets, K, N)
    recovered: np.ndarray  # (sets, K)
    tolerance: float

    def describe(self, place: int) -> str:
        """Return a straggler set in words."""
        mask = self.masks[place]
        available, missing = np.flatnonzero(mask), np.flatnonzero(~mask)
        if not missing.size:
            return "all workers available"
        if not available.size:
            return "no worker available"
        if available.size == 1:
            return f"only worker {available[0]} available"
        if missing.size == 1:
            return f"all workers but {missing[0]} available"
        return f"only workers {available.tolist()} available"

    def check_close(
        self,
        name: str,
        found: Any,
        matrices: np.ndarray,
        vectors: np.ndarray | None = None,
        where: np.ndarray | None = None,
    ) -> None:
        """Check arrays (sets, rows, outputs), in some rows of each set or in all.

        They must be the matrices, or the products with vectors if there are some.
        """
        error = _relative_error(found, matrices, vectors)
        error = error if where is None else np.where(where[..., None], error, 0)
        worst = error.reshape(len(error), -1).max(axis=1)
        place = int(worst.argmax())
        _require(
            worst[place] <= self.tolerance,
            f"{name} differs from what it must be with {self.describe(place)}: the relative error "
            f"is {worst[place]:.3g} (infinite where a value is not finite), over "
            f"{self.tolerance:.3g}",
        )

    def check_recovered(self, name: str, found: np.ndarray) -> None:
        """Check which data points are recovered under each set."""
        for place, (got, wanted) in enumerate(zip(found, self.recovered, strict=True)):
            _require(
                np.array_equal(got, wanted),
                f"{name} must be recovered(available); with {self.describe(place)} it holds for "
                f"data points {np.flatnonzero(got)}, not {np.flatnonzero(wanted)}",
            )

    def check_decoder(self, name: str, decoders: np.ndarray) -> None:
        """Check that decoders are finite, and are zero just where they must be."""
        cases = zip(self.masks, decoders, self.recovered, strict=True)
        for place, (mask, decoder, recovered) in enumerate(cases):
            where = f"with {self.describe(place)}"
            broken = ~np.isfinite(decoder).all(axis=1)
            _require(
                not broken.any(),
                f"{name} must be finite; {where} it is not in the rows of data points "
                f"{np.flatnonzero(broken)}, of which recovered(available) holds for "
                f"{np.flatnonzero(broken & recovered)}",
            )
            leaks = np.flatnonzero(decoder.any(axis=0) & ~mask)
            _require(
                not leaks.size,
                f"columns of unavailable workers must be zero in {name}; {where} those of workers "
                f"{leaks} are not",
            )
            rows = decoder.any(axis=1)
            _require(
                not (rows & ~recovered).any(),
                f"rows of data points that are not recovered must be zero in {name}; {where} those "
                f"of {np.flatnonzero(rows & ~recovered)} are not",
            )
            _require(
                not (recovered & ~rows).any(),
                f"recovered(available) may hold only for data points whose row of {name} is not "
                f"zero; {where} it holds for {np.flatnonzero(recovered & ~rows)} as well",
            )

    def check_decoded(self, name: str, predictions: Any, recovered: Any) -> None:
        """Check what is decoded from `y`, a row for each straggler set."""
        predictions, recovered = np.asarray(predictions, np.float64), np.asarray(recovered)
        self.check_recovered(f"{name} `recovered`", recovered)
        lost = ~np.isnan(predictions).all(axis=2) & ~recovered
        _require(
            not lost.any(),
            f"{name} try_decode must predict NaN where recovered(available) does not hold; with "
            f"{self.describe(int(lost.any(axis=1).argmax()))} it does not",
        )
        self.check_close(f"{name} a prediction", predictions, self.decoders, self.y, recovered)


def _relative_error(
    found: Any, matrices: np.ndarray, vectors: np.ndarray | None = None
) -> np.ndarray:
    """Return errors relative to the sum of magnitudes, plus 1; infinite for NaN."""
    if vectors is None:
        expected, scale = matrices, np.abs(matrices).sum(axis=-1, keepdims=True)
    else:
        vectors = np.asarray(vectors, np.float64)
        expected, scale = matrices @ vectors, np.abs(matrices) @ np.abs(vectors)
    with np.errstate(invalid="ignore"):
        error = np.abs(np.asarray(found, np.float64) - expected) / (1 + scale)
    return np.where(np.isnan(error), np.inf, error)


def _make_cases(code: AbstractCode, tolerance: float | None) -> _Cases:
    k, n = code.num_data, code.num_workers
    random = np.random.default_rng(0)
    alone = np.eye(n, dtype=bool)
    shares = np.linspace(0.2, 0.8, _RANDOM_SETS)[:, None]
    some = random.uniform(size=(_RANDOM_SETS, n)) < shares
    masks = np.concatenate([np.ones((1, n), bool), np.zeros((1, n), bool), alone, ~alone, some])
    dtype = jax.eval_shape(lambda code: code.encoder_matrix(), code).dtype
    if tolerance is None:
        tolerance = 1e-4 if dtype == np.float32 else 1e-10
    x = random.normal(size=(k, _OUTPUTS)).astype(dtype)
    y = random.normal(size=(len(masks), n, _OUTPUTS)).astype(dtype)
    decoders, recovered = _compiled(_matrices)(code, masks)
    encoder, _ = _compiled(_encode)(code, x)
    encoder, decoders = (np.asarray(each, np.float64) for each in (encoder, decoders))
    y = np.where(masks[..., None], y, 0)
    return _Cases(masks, x, y, encoder, decoders, np.asarray(recovered), tolerance)


def _check_matrices(code: AbstractCode, cases: _Cases) -> None:
    """Check the matrices, what is recovered, and the code's own map of its decoder."""
    everyone, nobody = cases.recovered[:2]
    _require(
        everyone.all(),
        "recovered(available) must hold for every data point with all workers available; it does "
        f"not for data points {np.flatnonzero(~everyone)}",
    )
    _require(
        not nobody.any(),
        "recovered(available) must hold for no data point with no worker available; it does for "
        f"data points {np.flatnonzero(nobody)}",
    )
    finite = np.isfinite(cases.encoder).all()
    _require(finite, "encoder_matrix() holds values that are not finite")
    cases.check_decoder("decoder_matrix(available)", cases.decoders)
    if type(code).decoder_map is not AbstractCode.decoder_map:  # which is the product itself
        matrices, applied = jax.device_get(_compiled(_map)(code, cases.y, cases.masks))
        name = "decoder_map(available)"
        cases.check_close(f"{name}.matrix", matrices, cases.decoders)
        cases.check_close(f"{name}.apply(y)", applied, cases.decoders, cases.y, cases.recovered)


def _check_on_host(code: AbstractCode, cases: _Cases) -> None:
    """Check the matrices that a code makes by NumPy, if it does."""

    def as_numpy(leaf: Any) -> Any:  # but for random keys and Python numbers
        key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(leaf) if isinstance(leaf, jax.Array) and not key else leaf

    def check(name: str, array: Any, shape: tuple[int, ...], kind: type) -> None:
        _require(
            isinstance(array, np.ndarray),
            f"{name} must be a NumPy array, made without JAX, not {type(array).__name__}",
        )
        _require(
            array.shape == shape and np.issubdtype(array.dtype, kind),
            f"{name} must be of shape {shape} and of type {kind.__name__}, not "
            f"{array.dtype}{array.shape}",
        )

    on_host = jax.tree.map(as_numpy, code)
    with np.errstate(all="ignore"):  # as where they are made for decoding
        encoder = on_host.encoder_on_host()
        made = [on_host.decoder_on_host(mask) for mask in cases.masks]
    if encoder is not None:
        check("encoder_on_host()", encoder, cases.encoder.shape, np.floating)
        error = _relative_error(encoder, cases.encoder).max()
        _require(
            error <= cases.tolerance,
            f"encoder_on_host() must be encoder_matrix(); the relative error is {error:.3g}, over "
            f"{cases.tolerance:.3g}",
        )
    if all(each is None for each in made):
        return
    name = "decoder_on_host(available)"
    for place, each in enumerate(made):
        _require(
            each is not None,
            f"{name} must return None for every straggler set or for none; it does with "
            f"{cases.describe(place)}",
        )
        check(f"{name}[0]", each[0], cases.decoders[0].shape, np.floating)
        check(f"{name}[1]", each[1], cases.recovered[0].shape, np.bool_)
    decoders, recovered = (np.stack(each) for each in zip(*made, strict=True))
    cases.check_recovered(f"{name}[1]", recovered)
    cases.check_decoder(f"{name}[0]", decoders)
    cases.check_close(f"{name}[0]", decoders, cases.decoders)


def _check_encode(code: AbstractCode, cases: _Cases) -> None:
    ways = {
        "inside `jax.jit`": _compiled(_encode)(code, cases.x)[1],
        "outside": code.encode(cases.x),
    }
    for way, coded in ways.items():
        error = _relative_error(coded, cases.encoder, cases.x).max()
        _require(
            error <= cases.tolerance,
            f"encode(x) must be encoder_matrix() @ x; {way} the relative error is {error:.3g}, "
            f"over {cases.tolerance:.3g}",
        )


def _check_decode(code: AbstractCode, cases: _Cases) -> None:
    """Check predictions from each straggler set, whatever the stragglers answer."""
    decode = _compiled(_decode_groups)
    cases.check_decoded("under `jax.vmap`", *decode(code, cases.y, cases.masks))
    for value in (np.nan, np.inf, -np.inf, 1e30):
        y = np.where(cases.masks[..., None], cases.y, value).astype(cases.y.dtype)
        cases.check_decoded(
            f"the value of an unavailable worker must not reach a prediction; with {value}",
            *decode(code, y, cases.masks),
        )
        if not np.isfinite(value):
            cases.check_decoded(
                f"an available worker that answers {value} must become a straggler;",
                *decode(code, y, np.ones_like(cases.masks)),
            )


def _check_single_calls(code: AbstractCode, cases: _Cases) -> None:
    """Check one group at a time, a pytree of answers, inside and outside `jax.jit`."""
    traces = []

    @functools.partial(jax.jit, compiler_options=_options())
    def traced(code: AbstractCode, y: PyTree, mask: jax.Array) -> Decoded:
        traces.append(mask)
        return code.try_decode(y, mask)

    chosen = [*range(3), *range(len(cases.masks) - _RANDOM_SETS, len(cases.masks))]
    names = ("masks", "y", "decoders", "recovered")
    part = dataclasses.replace(cases, **{name: getattr(cases, name)[chosen] for name in names})
    for way, decode in (("inside `jax.jit`", traced), ("outside `jax.jit`", _try_decode)):
        calls = []
        for y, mask in zip(part.y, part.masks, strict=True):
            decoded = decode(code, {"first": y[:, 0], "others": y[:, 1:, None]}, mask)
            first, others = (decoded.predictions[name] for name in ("first", "others"))
            calls.append((np.column_stack([first, others[..., 0]]), decoded.recovered))
        found = (np.stack(each) for each in zip(*calls, strict=True))
        part.check_decoded(f"one group at a time, as a pytree, {way},", *found)
    _require(
        len(traces) == 1,
        f"one compilation must serve every mask; try_decode was traced {len(traces)} times",
    )
    try:
        code.decode(part.y[1], part.masks[1])
    except ValueError:
        return
    raise AssertionError("decode(y, available) must raise a ValueError with no worker available")


def _check_gradients(code: AbstractCode, cases: _Cases) -> None:
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
        _require(
            not broken.any(),
            f"gradients in the code's numbers must be finite; with "
            f"{cases.describe(int(broken.argmax()))} that in {jax.tree_util.keystr(path)} is not",
        )
    transposes = (
        ("data points must be encoder_matrix()", found[1], cases.encoder, cotangents[0]),
        ("answers must be decoder_matrix(available)", found[2], cases.decoders, cotangents[1]),
    )
    for name, gradient, matrix, cotangent in transposes:
        name = f"the gradient with respect to the {name}'s transpose; it"
        cases.check_close(name, gradient, np.swapaxes(matrix, -1, -2), cotangent)
