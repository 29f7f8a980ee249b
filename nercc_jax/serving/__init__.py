"""Coded serving: the batcher needs nothing but a pool; the server needs `nercc-jax[serve]`."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what there is, for readers and type checkers; `_WHERE` says it again
    from ._batcher import CodedBatcher as CodedBatcher
    from ._coder import Coder as Coder
    from ._fidelity import Audit as Audit
    from ._fidelity import Fidelity as Fidelity
    from ._policy import BatchingPolicy as BatchingPolicy
    from ._policy import Measure as Measure
    from ._predictor import Predictor as Predictor
    from ._request import DeadlineExceeded as DeadlineExceeded
    from ._request import InferenceFailed as InferenceFailed
    from ._request import QueueFull as QueueFull
    from ._request import Reply as Reply
    from ._request import ServerClosing as ServerClosing
    from ._servable import Servable as Servable
    from ._servable import make_servable as make_servable

# Imported late: a server's settings need no JAX, and what is wrong with them is told at once.
_WHERE = {
    "_batcher": "CodedBatcher",
    "_coder": "Coder",
    "_fidelity": "Audit Fidelity",
    "_policy": "BatchingPolicy Measure",
    "_predictor": "Predictor",
    "_request": "DeadlineExceeded InferenceFailed QueueFull Reply ServerClosing",
    "_servable": "Servable make_servable",
}
__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    name for names in _WHERE.values() for name in names.split()
]


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for."""
    for place, names in _WHERE.items():
        if name in names.split():
            module = importlib.import_module(f".{place}", __name__)
            globals()[name] = found = getattr(module, name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
