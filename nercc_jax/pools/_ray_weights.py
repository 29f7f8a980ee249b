"""Models on their way to Ray's workers: arrays beside the rest, which workers of a node share.

Ray's object store is memory that all processes of a machine map: what is read from it is not
copied, and on a CPU JAX takes it as it is. So weights exist once a machine, in whatever a model
keeps them: modules, closures, bound methods.
"""

import dataclasses
import inspect
import io
import pickle
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Packed:
    """Something as bytes, and its arrays' bytes beside it, which Ray does not copy."""

    pickled: bytes
    arrays: list[np.ndarray]

    def unpack(self) -> Any:
        """What was packed; JAX's arrays are on the default device, at this thread's precision."""
        return pickle.loads(self.pickled, buffers=self.arrays)


def pack(value: Any) -> Packed:
    """Takes something apart, which may hold functions and classes of a script or a notebook.

    Raises: ValueError for what pickle cannot take.
    """
    from ray.cloudpickle import cloudpickle  # Ray's own, which knows its actors and references

    class Pickler(cloudpickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, jax.Array) and _plain(obj):
                host = np.ascontiguousarray(obj)
                return _array, (host.reshape(-1).view(np.uint8), host.dtype, host.shape)
            reduced: Any = super().reducer_override(obj)
            if isinstance(obj, type) and issubclass(obj, eqx.Module) and isinstance(reduced, tuple):
                # The arguments of a class without content, of which the fourth is its namespace.
                reduced[1][3].update(_fields(obj))
            return reduced

    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    try:
        Pickler(file, protocol=5, buffer_callback=buffers.append).dump(value)
    except (TypeError, pickle.PicklingError) as error:
        raise ValueError(f"what workers run is sent to them by pickle: {error}") from error
    return Packed(file.getvalue(), [np.frombuffer(each.raw(), np.uint8) for each in buffers])


def _plain(array: jax.Array) -> bool:
    """Whether it is no more than its numbers: no random key, no weakly typed scalar."""
    extended = jnp.issubdtype(array.dtype, jax.dtypes.extended)
    return array.is_fully_addressable and not extended and not array.weak_type


def _array(numbers: np.ndarray, dtype: DTypeLike, shape: tuple[int, ...]) -> jax.Array:
    # Where that is a CPU's memory, the numbers stay where they are: `jnp.asarray` would copy them.
    return jax.device_put(numbers.view(dtype).reshape(shape))


def _fields(module: type[eqx.Module]) -> dict[str, Any]:
    """What Equinox must find in a class when it is made again, to know it for a pytree.

    A class that cannot be imported comes to a worker without content, which follows: Equinox would
    have registered a pytree without leaves by then.
    """
    annotated = inspect.get_annotations(module)
    own = [field for field in dataclasses.fields(module) if field.name in annotated]
    found: dict[str, Any] = {
        # By keyword, so that those with a default may come first; it all is overwritten.
        field.name: eqx.field(static=field.metadata.get("static", False), kw_only=True)
        for field in own
    }
    found["__annotations__"] = {field.name: Any for field in own}
    if not module.__dataclass_params__.init:  # pyright: ignore[reportAttributeAccessIssue]
        found["__init__"] = _no_init
    return found


def _no_init(self: Any) -> None:
    """Stands where a class has an `__init__` of its own."""
