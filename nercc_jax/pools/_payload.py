"""Serialisation of values that are sent to workers in other processes, with arrays kept apart.

Ray's object store is memory that all processes of a machine map: arrays read from it are not
copied, and on a CPU JAX uses them in place. So weights exist once on a machine, whether modules,
closures or bound methods hold them. A worker imports code from its own machine. That may have
another version, so a worker whose code differs from the pool's is refused when it starts.
"""

import dataclasses
import hashlib
import inspect
import io
import pickle
import platform
import sys
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class EncodedInputs:
    """A pickled value, with the bytes of its arrays kept apart, so that Ray does not copy them.

    `code` has the checksums of the modules from which workers import its classes and functions.
    """

    pickled: bytes
    arrays: list[np.ndarray]
    code: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def unpack(self) -> Any:
        """Return the value; JAX's arrays are on the default device, at this thread's precision.

        Raises RuntimeError if a module here differs from the one where the value was packed.
        """
        value = pickle.loads(self.pickled, buffers=self.arrays)
        here = code_versions(self.code)
        other = [name for name in here if here[name] != self.code[name]]
        if other:
            raise RuntimeError(
                f"a worker on {platform.node()} has other code than the pool: {', '.join(other)}. "
                "Install the same version there, or send it along: runtime_env={'working_dir': "
                "FOLDER} of RayPool, or `nercc`'s --runtime-env"
            )
        return value


def code_versions(modules: Iterable[str]) -> dict[str, str]:
    """Return a checksum for each module that has a source file, by name."""
    found = {}
    for name in sorted(modules):
        path = Path(getattr(sys.modules.get(name), "__file__", None) or "")
        if path.suffix == ".py" and path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found


def pack(value: Any) -> EncodedInputs:
    """Pickle a value, which may contain functions and classes of a script or a notebook.

    Raises ValueError if it cannot be pickled.
    """
    from ray.cloudpickle import cloudpickle  # Ray's own, which knows its actors and references

    modules: set[str] = set()

    class Pickler(cloudpickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            # Plain arrays only: no random keys, and no weakly typed scalars.
            plain = isinstance(obj, jax.Array) and obj.is_fully_addressable and not obj.weak_type
            if plain and not jnp.issubdtype(obj.dtype, jax.dtypes.extended):
                host = np.ascontiguousarray(obj)
                return _array, (host.reshape(-1).view(np.uint8), host.dtype, host.shape)
            reduced: Any = super().reducer_override(obj)
            if reduced is NotImplemented and isinstance(obj, type | types.FunctionType):
                modules.add(str(obj.__module__))  # workers import it from this module
            if isinstance(obj, type) and issubclass(obj, eqx.Module) and isinstance(reduced, tuple):
                # The arguments that create the class, empty at first: the fourth is its namespace.
                reduced[1][3].update(_fields(obj))
            return reduced

    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    try:
        Pickler(file, protocol=5, buffer_callback=buffers.append).dump(value)
    except (TypeError, pickle.PicklingError) as error:
        raise ValueError(f"what workers run is sent to them by pickle: {error}") from error
    arrays = [np.frombuffer(each.raw(), np.uint8) for each in buffers]
    return EncodedInputs(file.getvalue(), arrays, code_versions(modules))


def _array(numbers: np.ndarray, dtype: DTypeLike, shape: tuple[int, ...]) -> jax.Array:
    # On a CPU this uses the numbers in place: `jnp.asarray` would copy them.
    return jax.device_put(numbers.view(dtype).reshape(shape))


def _fields(module: type[eqx.Module]) -> dict[str, Any]:
    """Return the attributes with which Equinox registers a class as a pytree when it is unpickled.

    A class that cannot be imported is created empty at a worker, and filled later. By then Equinox
    would have registered it as a pytree without leaves.
    """
    annotated = inspect.get_annotations(module)
    own = [field for field in dataclasses.fields(module) if field.name in annotated]
    found: dict[str, Any] = {
        # Keyword-only, so that fields with a default may come first. It is overwritten later.
        field.name: eqx.field(static=field.metadata.get("static", False), kw_only=True)
        for field in own
    }
    found["__annotations__"] = {field.name: Any for field in own}
    if not module.__dataclass_params__.init:  # pyright: ignore[reportAttributeAccessIssue]
        found["__init__"] = lambda self: None
    return found
