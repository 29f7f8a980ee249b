"""Rules of codes that tracing alone can check, before anything is compiled."""

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..codes import AbstractCode, Decoded

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
        wanted = str(jnp.promote_types(dtype, jnp.float32))
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
