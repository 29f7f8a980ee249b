"""Coded serving: the batcher needs nothing but a pool; the server needs `nercc-jax[serve]`."""

from ._batcher import CodedBatcher as CodedBatcher
from ._coder import Coder as Coder
from ._fidelity import Audit as Audit
from ._fidelity import Fidelity as Fidelity
from ._policy import BatchingPolicy as BatchingPolicy
from ._policy import Measure as Measure
from ._request import DeadlineExceeded as DeadlineExceeded
from ._request import InferenceFailed as InferenceFailed
from ._request import QueueFull as QueueFull
from ._request import Reply as Reply
from ._request import ServerClosing as ServerClosing
from ._servable import Servable as Servable
from ._servable import make_servable as make_servable
