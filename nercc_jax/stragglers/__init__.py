"""Stragglers: straggler sets, latency laws, and rules for when to stop waiting."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for readers and type checkers; `_WHERE` says the same
    from ._laws import AbstractLatency as AbstractLatency
    from ._laws import AbstractStragglers as AbstractStragglers
    from ._laws import ContiguousStragglers as ContiguousStragglers
    from ._laws import ExactStragglers as ExactStragglers
    from ._laws import ExponentialLatency as ExponentialLatency
    from ._laws import IndependentStragglers as IndependentStragglers
    from ._laws import LogNormalLatency as LogNormalLatency
    from ._laws import ParetoLatency as ParetoLatency
    from ._laws import TraceLatency as TraceLatency
    from ._laws import WaitFor as WaitFor
    from ._laws import latency_law as latency_law
    from ._laws import straggler_sets as straggler_sets
    from .simulate import Hedge as Hedge

# Imported at first use: the simulator of hedging runs without JAX.
_WHERE = {
    "_laws": "AbstractLatency AbstractStragglers ContiguousStragglers ExactStragglers "
    "ExponentialLatency IndependentStragglers LogNormalLatency ParetoLatency "
    "TraceLatency WaitFor latency_law straggler_sets",
    "simulate": "Hedge",
}
_PLACES = {name: place for place, names in _WHERE.items() for name in names.split()}
__all__ = [*_PLACES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
