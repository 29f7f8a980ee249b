"""Rules of codes that need no compilation: what tracing alone can check, and their matrices.

The latter, from programs or from the host, name the straggler set in which a rule fails.
"""

import copy
import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..codes import AbstractCode, Decoded
from ..splines.arrays import working_dtype

_OUTPUTS = 3
# Each of these says that a program asked for the value of a traced array.
_NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def check_structure(code: AbstractCode) -> None:
    """Check sizes, fields, and the shapes and dtypes of all results."""
    _check_sizes(code)
    _check_pytree(code)
    _check_shapes(code)
    _check_masks(code)


def require(holds: Any, message: str) -> None:
    """Raise an AssertionError with this message unless the condition holds."""
    # Not the `assert` statement, which `python -O` leaves out.
    if not holds:
        raise AssertionError(message)


def _decoder_matrix(code: AbstractCode, mask: Any) -> jax.Array:
    return code.decoder_matrix(mask)


def try_decode(code: AbstractCode, y: Any, mask: Any) -> Decoded:
    """Call the method of this name; as a function it can be compiled with the code as argument."""
    return code.try_decode(y, mask)


def _check_sizes(code: AbstractCode) -> None:
    for name in ("num_data", "num_workers"):
        size = getattr(code, name)
        require(
            isinstance(size, int) and not isinstance(size, bool) and size > 0,
            f"{name} must be a positive Python integer in a static field, not {size!r}",
        )
    models = np.asarray(code.worker_models)
    wanted = (code.num_workers,)
    require(
        models.shape == wanted and np.issubdtype(models.dtype, np.integer),
        f"worker_models must be integers of shape {wanted}, not {models.dtype}{models.shape}",
    )
    require(
        np.array_equal(np.union1d(models, 0), np.arange(models.max() + 1)),
        f"worker_models must number the models 0, 1, ... without gaps, not {np.unique(models)}",
    )


def _check_pytree(code: AbstractCode) -> None:
    leaves, structure = jax.tree.flatten(code)
    for path, leaf in jax.tree_util.tree_leaves_with_path(code):
        require(
            eqx.is_array_like(leaf),
            f"the field {jax.tree_util.keystr(path)} is {leaf!r}, which `jax.jit` does not take: "
            "make it an array, or static by `equinox.field(static=True)`",
        )
    again = jax.tree.structure(jax.tree.unflatten(structure, leaves))
    require(again == structure, "flattening and unflattening must keep the pytree's structure")
    try:
        same = jax.tree.structure(copy.deepcopy(code)) == structure
    except ValueError:  # of arrays, whose comparison has many results
        same = False
    require(
        same,
        "static fields must compare equal in a copy of the code, or `jax.jit` compiles each copy "
        "anew; make arrays ordinary fields, and give objects an `__eq__`",
    )
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, code)
    file.seek(0)
    loaded = jax.tree.leaves(eqx.tree_deserialise_leaves(file, code))
    for before, after in zip(leaves, loaded, strict=True):
        require(
            np.array_equal(np.asarray(before), np.asarray(after), equal_nan=True),
            f"`equinox.tree_serialise_leaves` writes {before!r} and reads {after!r}",
        )
    require(isinstance(repr(code), str), "repr(code) must be a string")


def _check_shapes(code: AbstractCode) -> None:
    k, n = code.num_data, code.num_workers
    mask = jax.ShapeDtypeStruct((n,), bool)
    encoder = _trace("encoder_matrix()", lambda code: code.encoder_matrix(), code)
    _check_array("encoder_matrix()", encoder, (n, k), ("float32", "float64"))
    decoder = _trace("decoder_matrix(available)", _decoder_matrix, code, mask)
    _check_array("decoder_matrix(available)", decoder, (k, n), (str(encoder.dtype),))
    recovered = _trace("recovered(available)", lambda code, mask: code.recovered(mask), code, mask)
    _check_array("recovered(available)", recovered, (k,), ("bool",))
    for dtype in (encoder.dtype, jnp.bfloat16):
        x = jax.ShapeDtypeStruct((k, _OUTPUTS), dtype)
        y = jax.ShapeDtypeStruct((n, _OUTPUTS), dtype)
        coded = _trace("encode(x)", lambda code, x: code.encode(x), code, x)
        _check_array("encode(x)", coded, (n, _OUTPUTS), (str(jnp.dtype(dtype)),))
        decoded = _trace("try_decode(y, available)", try_decode, code, y, mask)
        wanted = str(working_dtype(dtype))
        _check_array("predictions", decoded.predictions, (k, _OUTPUTS), (wanted,))
    # In a traced function, too: JAX shows a code's `repr` in error messages.
    _trace("repr", lambda code: jnp.zeros(len(repr(code))), code)


def _check_array(name: str, array: Any, shape: tuple[int, ...], dtypes: Sequence[str]) -> None:
    require(
        getattr(array, "shape", None) == shape,
        f"{name} must have the shape {shape}, not {getattr(array, 'shape', array)}",
    )
    require(str(array.dtype) in dtypes, f"{name} must be {' or '.join(dtypes)}, not {array.dtype}")


def _check_masks(code: AbstractCode) -> None:
    n = code.num_workers
    for shape, dtype in (((n + 1,), bool), ((1, n), bool), ((n,), jnp.float32)):
        bad = jax.ShapeDtypeStruct(shape, dtype)
        try:
            jax.eval_shape(_decoder_matrix, code, bad)
        except (TypeError, ValueError):  # the former by run-time type checks, where they are on
            continue
        raise AssertionError(
            f"decoder_matrix(available) must raise a ValueError for anything but a boolean mask of "
            f"shape ({n},); it accepts {jnp.dtype(dtype)}{shape}. `nercc_jax.codes.as_mask` checks "
            "it"
        )


def _trace(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """Return the shapes of a function's results, without compiling it."""
    try:
        return jax.eval_shape(function, *args)
    except _NEEDS_VALUES as error:
        raise AssertionError(
            f"{name} must work with traced arguments: it may not branch on their values, convert "
            f"them to NumPy, or have shapes that depend on them. {error}"
        ) from error


@dataclasses.dataclass(frozen=True)
class Cases:
    """Straggler sets with data points, answers, and the code's matrices in float64.

    Answers of unavailable workers are 0.
    """

    masks: np.ndarray  # (sets, N)
    x: np.ndarray  # (K, outputs)
    y: np.ndarray  # (sets, N, outputs)
    encoder: np.ndarray  # (N, K)
    decoders: np.ndarray  # (sets, K, N)
    recovered: np.ndarray  # (sets, K)
    tolerance: float


def float64_product(matrix: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a product in float64, and the sum of magnitudes that each entry is made of, plus 1."""
    vectors = np.asarray(vectors, np.float64)
    return matrix @ vectors, 1 + np.abs(matrix) @ np.abs(vectors)


def row_scale(matrices: np.ndarray) -> np.ndarray:
    """Return the sums of magnitudes that products of rows with ones are made of, plus 1."""
    return 1 + np.abs(matrices).sum(axis=-1, keepdims=True)


def check_matrices(name: str, matrices: np.ndarray, cases: Cases) -> None:
    """Check other decoders against those of `decoder_matrix`."""
    found = np.asarray(matrices, np.float64)
    check_close(name, found, cases.decoders, row_scale(cases.decoders), cases)


def check_close(
    name: str,
    found: np.ndarray,
    expected: np.ndarray,
    scale: np.ndarray,
    cases: Cases,
    where: np.ndarray | None = None,
) -> None:
    """Check arrays (sets, rows, outputs), in some rows of each set or in all."""
    with np.errstate(invalid="ignore"):
        error = np.abs(found - expected) / scale
    error = np.where(np.isnan(error), np.inf, error)
    if where is not None:
        error = np.where(where[..., None], error, 0)
    worst = error.reshape(len(error), -1).max(axis=1)
    place = int(worst.argmax())
    require(
        worst[place] <= cases.tolerance,
        f"{name} differs from what it must be with {describe(cases.masks[place])}: the relative "
        f"error is {worst[place]:.3g} (infinite where a value is not finite), over "
        f"{cases.tolerance:.3g}",
    )


def describe(mask: np.ndarray) -> str:
    """Return a straggler set in words."""
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


def check_recovered(cases: Cases) -> None:
    """Check what is recovered with all workers available, and with none."""
    everyone, nobody = cases.recovered[:2]
    require(
        everyone.all(),
        "recovered(available) must hold for every data point with all workers available; it does "
        f"not for data points {np.flatnonzero(~everyone)}",
    )
    require(
        not nobody.any(),
        "recovered(available) must hold for no data point with no worker available; it does for "
        f"data points {np.flatnonzero(nobody)}",
    )


def check_decoder(name: str, decoders: np.ndarray, cases: Cases) -> None:
    """Check that decoders are finite, and are zero just where they must be."""
    for mask, decoder, recovered in zip(cases.masks, decoders, cases.recovered, strict=True):
        where = f"with {describe(mask)}"
        broken = ~np.isfinite(decoder).all(axis=1)
        require(
            not broken.any(),
            f"{name} must be finite; {where} it is not in the rows of data points "
            f"{np.flatnonzero(broken)}, of which recovered(available) holds for "
            f"{np.flatnonzero(broken & recovered)}",
        )
        leaks = np.flatnonzero(decoder.any(axis=0) & ~mask)
        require(
            not leaks.size,
            f"columns of unavailable workers must be zero in {name}; {where} those of workers "
            f"{leaks} are not",
        )
        rows = decoder.any(axis=1)
        require(
            not (rows & ~recovered).any(),
            f"rows of data points that are not recovered must be zero in {name}; {where} those of "
            f"{np.flatnonzero(rows & ~recovered)} are not",
        )
        require(
            not (recovered & ~rows).any(),
            f"recovered(available) may hold only for data points whose row of {name} is not zero; "
            f"{where} it holds for {np.flatnonzero(recovered & ~rows)} as well",
        )


def check_on_host(code: AbstractCode, cases: Cases) -> None:
    """Check the matrices that a code makes by NumPy, if it does."""
    on_host = jax.tree.map(_as_numpy, code)
    with np.errstate(all="ignore"):  # as where they are made for decoding
        encoder = on_host.encoder_on_host()
        made = [on_host.decoder_on_host(mask) for mask in cases.masks]
    if encoder is not None:
        _check_on_host("encoder_on_host()", encoder, cases.encoder.shape, np.floating)
        error = np.abs(encoder - cases.encoder) / row_scale(cases.encoder)
        require(
            error.max() <= cases.tolerance,  # which NaN is not
            f"encoder_on_host() must be encoder_matrix(); the relative error is "
            f"{error.max():.3g}, over {cases.tolerance:.3g}",
        )
    if all(each is None for each in made):
        return
    for mask, each, recovered in zip(cases.masks, made, cases.recovered, strict=True):
        require(
            each is not None,
            "decoder_on_host(available) must return None for every straggler set or for none; it "
            f"does with {describe(mask)}",
        )
        name = "decoder_on_host(available)"
        _check_on_host(f"{name}[0]", each[0], cases.decoders[0].shape, np.floating)
        _check_on_host(f"{name}[1]", each[1], recovered.shape, np.bool_)
        require(
            np.array_equal(each[1], recovered),
            "decoder_on_host(available)[1] must be recovered(available); with "
            f"{describe(mask)} it holds for data points {np.flatnonzero(each[1])}, not "
            f"{np.flatnonzero(recovered)}",
        )
    decoders = np.stack([decoder for decoder, _ in made])
    check_decoder("decoder_on_host(available)[0]", decoders, cases)
    check_matrices("decoder_on_host(available)[0]", decoders, cases)


def _as_numpy(leaf: Any) -> Any:
    """Return a JAX array as a NumPy array, and a random key or a Python number as it is."""
    if not isinstance(leaf, jax.Array) or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    return np.asarray(leaf)


def _check_on_host(name: str, array: Any, shape: tuple[int, ...], kind: type) -> None:
    """Check that a result is a NumPy array of this shape, and of this type of numbers."""
    require(
        isinstance(array, np.ndarray),
        f"{name} must be a NumPy array, made without JAX, not {type(array).__name__}",
    )
    require(
        array.shape == shape and np.issubdtype(array.dtype, kind),
        f"{name} must be of shape {shape} and of type {kind.__name__}, not "
        f"{array.dtype}{array.shape}",
    )
