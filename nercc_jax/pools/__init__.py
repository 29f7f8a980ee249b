"""Pools of independent workers: who answers first is decoded."""

from ._batch import Batch as Batch
from ._batch import BatchAnswers as BatchAnswers
from ._batch import Failure as Failure
from ._batch import Refuse as Refuse
from ._batch import refuse_odd as refuse_odd
from ._clock import AbstractClock as AbstractClock
from ._devices import DevicePool as DevicePool
from ._faults import Episodes as Episodes
from ._faults import Fault as Fault
from ._faults import Faults as Faults
from ._faults import InjectedError as InjectedError
from ._inference import PoolResult as PoolResult
from ._inference import Timing as Timing
from ._inference import pool_inference as pool_inference
from ._overdue import AnswerTimes as AnswerTimes
from ._overdue import Overdue as Overdue
from ._pool import AbstractPool as AbstractPool
from ._ray import RayPool as RayPool
from ._ray_cluster import join_ray as join_ray
from ._ray_cluster import leave_ray as leave_ray
from ._ray_cluster import ray_is_lost as ray_is_lost
from ._report import PoolReport as PoolReport
from ._report import WorkerReport as WorkerReport
from ._report import WorkerState as WorkerState
from ._run import BatchOutcome as BatchOutcome
from ._run import run_batches as run_batches
