"""What is over goes by itself: to look for garbage stops all threads of a server."""

import gc

import numpy as np
import pytest
from traffic import SERVICE, SHAPE, Traffic

from nercc_jax import Replication, Uncoded
from nercc_jax.pools import Batch
from nercc_jax.pools.batch import Task
from nercc_jax.serving import BatchingPolicy
from nercc_jax.serving.core._group import Group
from nercc_jax.serving.core._request import Query, Request

KEPT = Request, Query, Group, Batch, Task


def living():
    # By type: `isinstance` asks each object for its class, and some of torch's warn when asked.
    return sum(type(each) in KEPT for each in gc.get_objects())


@pytest.mark.parametrize("code", [Uncoded(1), Replication(1, 2)], ids=("hedged", "twice"))
def test_what_is_over_goes_without_a_look_for_garbage(code, untyped):
    # From Python 3.13 on, the run-time type checks themselves keep what they saw.
    policy = BatchingPolicy(straggler_threshold=1.5, max_disagreement=0.5, deadline_s=1.0)
    traffic = Traffic(None, policy, code)
    gc.collect()
    before = living()
    gc.disable()
    try:
        traffic.send(150)
        future = traffic.batcher.submit(np.zeros((1, *SHAPE), np.float32))
        assert future.cancel()
        traffic.batcher.submit(np.zeros((1, *SHAPE), np.float32), deadline=SERVICE / 2)
        assert living() > before, "two are under way"
        traffic.clock.run(traffic.clock.now() + 60.0)  # the last deadline, too
        assert living() == before
    finally:
        gc.enable()
    traffic.batcher.close()
    traffic.pool.close()
