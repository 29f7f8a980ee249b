"""Coded serving: a batcher on any pool, and a server around it (extra `serve`).

The path of a request through eight files, and of its reply back:

1. `transport/_rest.py` or `transport/_grpc.py` receives it, counts its bytes, finds the model.
2. `transport/_state.py`: `ServerState.answer` reads and checks it (`protocol/_messages.py`).
3. `_served_model.py`: `ServedModel.infer` preprocesses it, packs tensors into rows, awaits a reply.
4. `_batcher.py`: `CodedBatcher.submit` checks it, and posts it to the deciding thread.
5. `core/_requests.py`: `OpenRequests.accept` accepts it; `enqueue` puts its queries into the queue
   and sets its deadline.
6. `_dispatch.py`: while workers are idle, `Dispatcher.dispatch` sends uncoded queries, as parts of
   a `Group` (`core/_group.py`), and then a full group's coded data points, to the pool, which
   handles calls, copies and overdue times.
7. `_batcher.py` again: `CodedBatcher._receive` takes answers from the pool. The model's own answers
   are returned at once, unless they look wrong (`_answer_screen.py`). `decide` (`core/decide.py`)
   decides on late queries, and `CodedBatcher._decide` carries that out.
8. `OpenRequests.answer` resolves the future once all queries are answered. `response_of` turns the
   reply into a response, which the transport writes.

Approximate answers that were returned to a client are compared with the model's own answers,
however late these come (`_approximate.py`). The scores of decoded answers are calibrated before a
model is ready (`adapt/_decoding.py`). During serving, one thread trains a surrogate and picks
settings (the rest of `adapt/`). `decide` gets their state as `LateEvidence`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for readers and type checkers; `_WHERE` says the same
    from ._batcher import CodedBatcher as CodedBatcher
    from ._policy import BatchingPolicy as BatchingPolicy
    from ._served_model import ServedModel as ServedModel
    from .adapt._decoding import DecodingScores as DecodingScores
    from .adapt._decoding import calibrate_decoding as calibrate_decoding
    from .adapt._predictor import Predictor as Predictor
    from .core._coder import Coder as Coder
    from .core._request import DeadlineExceeded as DeadlineExceeded
    from .core._request import InferenceFailed as InferenceFailed
    from .core._request import QueueFull as QueueFull
    from .core._request import Reply as Reply
    from .core._request import ServerClosing as ServerClosing
    from .core._requests import Health as Health
    from .metrics import Metrics as Metrics
    from .protocol.servable import Servable as Servable
    from .protocol.servable import make_servable as make_servable
    from .settings import ModelSettings as ModelSettings
    from .settings import ServerSettings as ServerSettings
    from .transport._server import Server as Server
    from .transport._server import make_server as make_server

# Imported at first use: reading a server's settings needs no JAX, so errors in them are reported
# at once.
_WHERE = {
    "_batcher": "CodedBatcher",
    "_policy": "BatchingPolicy",
    "_served_model": "ServedModel",
    "settings": "ModelSettings ServerSettings",
    "metrics": "Metrics",
    "adapt._decoding": "DecodingScores calibrate_decoding",
    "adapt._predictor": "Predictor",
    "core._coder": "Coder",
    "core._request": "DeadlineExceeded InferenceFailed QueueFull Reply ServerClosing",
    "core._requests": "Health",
    "protocol.servable": "Servable make_servable",
    "transport._server": "Server make_server",
}
_FILE_OF = {name: file for file, names in _WHERE.items() for name in names.split()}
__all__ = [*_FILE_OF]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{_FILE_OF[name]}", __name__)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{__name__}.{name} needs {error.name}: pip install '.[serve]' in a clone",
            name=error.name,
        ) from error
    globals()[name] = found = getattr(module, name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
