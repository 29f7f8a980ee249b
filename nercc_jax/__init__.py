"""Nested-Regression Coded Computing (NeRCC, arXiv 2402.04377) in JAX.

Queries become coded data points by one smoothing-spline regression, workers run the model on
those, and a second regression recovers all predictions from whichever workers answered.
"""

from ._codes import AbstractCode as AbstractCode
from ._codes import Berrut as Berrut
from ._codes import Decoded as Decoded
from ._codes import Lagrange as Lagrange
from ._codes import NeRCC as NeRCC
from ._codes import Parity as Parity
from ._codes import Replication as Replication
from ._codes import Uncoded as Uncoded
from ._evaluation import Estimate as Estimate
from ._evaluation import Evaluation as Evaluation
from ._evaluation import evaluate as evaluate
from ._files import code_card as code_card
from ._files import load_code as load_code
from ._files import save_code as save_code
from ._forecast import Forecast as Forecast
from ._forecast import make_forecast as make_forecast
from ._inference import coded_inference as coded_inference
from ._inference import coded_predictions as coded_predictions
from ._objective import nested_errors as nested_errors
from ._objective import nested_objective as nested_objective
from ._partial import partial_inference as partial_inference
from ._points import regression_points as regression_points
from ._splines import SmoothingSpline as SmoothingSpline
from ._splines import smoothing_matrix as smoothing_matrix
from ._splines import smoothing_spline as smoothing_spline
from ._stragglers import AbstractLatency as AbstractLatency
from ._stragglers import AbstractStragglers as AbstractStragglers
from ._stragglers import ContiguousStragglers as ContiguousStragglers
from ._stragglers import ExactStragglers as ExactStragglers
from ._stragglers import ExponentialLatency as ExponentialLatency
from ._stragglers import IndependentStragglers as IndependentStragglers
from ._stragglers import LogNormalLatency as LogNormalLatency
from ._stragglers import ParetoLatency as ParetoLatency
from ._stragglers import TraceLatency as TraceLatency
from ._stragglers import WaitFor as WaitFor
from ._stragglers import WaitUntil as WaitUntil
from ._stragglers import straggler_sets as straggler_sets
from ._trial import Trial as Trial
from ._trial import landscape as landscape
from ._trial import make_trial as make_trial
from ._tuning import Tuned as Tuned
from ._tuning import TuningStep as TuningStep
from ._tuning import tune as tune
from .pools import AbstractPool as AbstractPool
from .pools import Answers as Answers
from .pools import Batch as Batch
from .pools import BatchOutcome as BatchOutcome
from .pools import DevicePool as DevicePool
from .pools import Episodes as Episodes
from .pools import Failure as Failure
from .pools import Fault as Fault
from .pools import Faults as Faults
from .pools import InjectedError as InjectedError
from .pools import Overdue as Overdue
from .pools import PoolReport as PoolReport
from .pools import PoolResult as PoolResult
from .pools import RayPool as RayPool
from .pools import Timing as Timing
from .pools import WorkerReport as WorkerReport
from .pools import pool_inference as pool_inference
from .pools import run_batches as run_batches
