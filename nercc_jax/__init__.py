"""Nested-Regression Coded Computing (NeRCC, arXiv 2402.04377) in JAX.

Queries become coded data points by one smoothing-spline regression, workers run the model on
those, and a second regression recovers all predictions from whichever workers answered.

This package holds the names that people start with. All other public names are in its rooms:

- `nercc_jax.splines`: smoothing splines as linear operators, and their posterior variances.
- `nercc_jax.codes`: codes (two matrices each), regression points, and files.
- `nercc_jax.stragglers`: laws of stragglers and latencies, and a simulator of rules of waiting.
- `nercc_jax.hedging`: a second call of any async function where it shortens the tail.
- `nercc_jax.inference`: coded inference, on a mesh and with adversaries; orders of data points.
- `nercc_jax.evaluation`: recorded answers, the comparison of codes, the nested objective.
- `nercc_jax.tuning`: gradient descent through the nested objective, and learned decoders.
- `nercc_jax.surrogates`: cheap predictors: fixed students, and learners from past answers.
- `nercc_jax.risk`: the probability that a prediction is wrong, and error bars.
- `nercc_jax.schemes`: a code with an order, a surrogate, and calibrated risk.
- `nercc_jax.planning`: which code and how many workers to use, or none.
- `nercc_jax.pools`: pools of workers, some of which may straggle, die or hang.
- `nercc_jax.rows`: a function over many rows, each computed or predicted.
- `nercc_jax.serving`: a server by REST and gRPC.
- `nercc_jax.testing`: a check of your own code, and simulated pools and clocks.
- `nercc_jax.compilation`: a cache of compiled programs on disk.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # all names, for readers and type checkers; the same as in `_WHERE`
    from .codes import AbstractCode as AbstractCode
    from .codes import Berrut as Berrut
    from .codes import Lagrange as Lagrange
    from .codes import NeRCC as NeRCC
    from .codes import Parity as Parity
    from .codes import Replication as Replication
    from .codes import Uncoded as Uncoded
    from .codes import load_code as load_code
    from .codes import save_code as save_code
    from .evaluation import evaluate as evaluate
    from .evaluation import nested_objective as nested_objective
    from .hedging import hedge as hedge
    from .inference import coded_inference as coded_inference
    from .planning import plan as plan
    from .pools import DevicePool as DevicePool
    from .pools import RayPool as RayPool
    from .pools import pool_inference as pool_inference
    from .schemes import Scheme as Scheme
    from .schemes import calibrate_error_probability as calibrate_error_probability
    from .schemes import reexecute as reexecute
    from .stragglers import ExactStragglers as ExactStragglers
    from .stragglers import IndependentStragglers as IndependentStragglers
    from .surrogates import fit_surrogate as fit_surrogate
    from .tuning import parametrize as parametrize
    from .tuning import tune as tune

__version__ = "0.1.0"

# Imported late: JAX takes a second or two, and `nercc --help` needs none of it.
_WHERE = {
    "codes": ("AbstractCode Berrut Lagrange NeRCC Parity Replication Uncoded load_code save_code"),
    "evaluation": "evaluate nested_objective",
    "hedging": "hedge",
    "inference": "coded_inference",
    "planning": "plan",
    "pools": "DevicePool RayPool pool_inference",
    "stragglers": "ExactStragglers IndependentStragglers",
    "schemes": "Scheme calibrate_error_probability reexecute",
    "surrogates": "fit_surrogate",
    "tuning": "parametrize tune",
}
# Rooms without a name at the top.
_ROOMS = ("compilation", "risk", "rows", "serving", "splines", "testing")
__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    name for names in _WHERE.values() for name in names.split()
]


def __getattr__(name: str) -> Any:
    """Return a public name or a room, imported when it is first asked for."""
    for place, names in _WHERE.items():
        if name == place or name in names.split():
            module = importlib.import_module(f".{place}", __name__)
            globals()[name] = found = module if name == place else getattr(module, name)
            return found
    if name in _ROOMS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_WHERE, *_ROOMS})
