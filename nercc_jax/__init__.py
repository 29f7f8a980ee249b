"""Nested-Regression Coded Computing (NeRCC, arXiv 2402.04377) in JAX.

Queries become coded data points by one smoothing-spline regression, workers run the model on
those, and a second regression recovers all predictions from whichever workers answered.
"""

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
from .inference import coded_inference as coded_inference
from .planning import plan as plan
from .pools import DevicePool as DevicePool
from .pools import RayPool as RayPool
from .pools import pool_inference as pool_inference
from .stragglers import ExactStragglers as ExactStragglers
from .stragglers import IndependentStragglers as IndependentStragglers
from .surrogates import Scheme as Scheme
from .surrogates import calibrate_doubt as calibrate_doubt
from .surrogates import fit_surrogate as fit_surrogate
from .surrogates import reexecute as reexecute
from .tuning import parametrize as parametrize
from .tuning import search_layout as search_layout
from .tuning import tune as tune
