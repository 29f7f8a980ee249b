"""A batcher whose workers answer when the test says so."""

import contextlib
import time

import jax.numpy as jnp
import numpy as np
from traffic import Traffic

from nercc_jax import DevicePool, NeRCC, Uncoded
from nercc_jax.pools import Fault, Faults
from nercc_jax.risk import Accuracy, ErrorProbability
from nercc_jax.serving import BatchingPolicy, CodedBatcher, Coder, DecodingScores
from nercc_jax.stragglers import TraceLatency

SHAPE, OUT = (6,), (3,)
WEIGHTS = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
LONG = 30.0  # seconds that nothing here takes, unless it hangs
# Of calls where it matters who straggles: longer than threads of a busy machine wait for a turn.
SERVICE, THRESHOLD = 0.03, 4.0
HELD = 100.0  # seconds more that a simulated call takes which is held back
INTERLEAVED = NeRCC(4, 8, points="interleaved", lambda_dec=0.0)
# By hand, of that code: which coded data point each query of a group is, and which are sent when
# the group is complete, one for each query: the nearest to its alpha. On the half circle, whose
# angles are even, alphas are at 22.5, 67.5, ... degrees, the others of the betas at 45, 82.5, ...
OWN, EXTRAS = (1, 3, 0, 2), (5, 7, 4, 6)

# A margin of 0.1 or less is uncertain, whatever else is known.
BY_MARGIN = ErrorProbability(
    weights=np.array([2 * np.log(0.1), -2, 0, 0, 0], np.float32),
    knots=np.zeros(1, np.float32),
    shifts=np.zeros(1, np.float32),
    levels=np.array([0, 0.4999], np.float32),
    bounds=np.zeros(2, np.float32),
    shares=np.array([1, 0.5], np.float32),
)


def by_margin(coder):
    """The scores of a code whose decoded queries are judged by their margin alone."""
    return DecodingScores(Accuracy(), {few: BY_MARGIN for few in range(1, coder.num_data + 1)})


def model(x):
    return np.tanh(x @ WEIGHTS)


def queries(number, seed=1):
    """Different ones; the first coordinate tells which."""
    x = np.random.default_rng(seed).normal(size=(number, *SHAPE)).astype(np.float32)
    x[:, 0] = np.linspace(-1, 1, number) if number > 1 else 0.5
    return x


class Simulated(Traffic):
    """A batcher before simulated workers: each call takes `SERVICE` seconds, or longer where told.

    Attributes:
        answered: the batches that workers answered, in turn.
    """

    def __init__(
        self, code, *, workers=12, run=model, faults=(), warm=True, decoding=None, **policy
    ):
        usual = {"max_batch_size": 1, "batch_wait_timeout_s": SERVICE / 2, "deadline_s": 1000.0}
        usual |= {"outputs": "logits"}
        latency, self.answered, self._held = TraceLatency(jnp.array([HELD])), [], []
        slow = Fault("delay", latency=latency, score=self._score, least_score=1.0)

        def answer(batch):
            self.answered.append(batch)
            return run(batch)

        options = {"model": answer, "num_workers": workers, "faults": Faults([*faults, slow])}
        policy = BatchingPolicy(**usual | policy)
        options |= {"decoding": decoding, "shape": SHAPE, "hang_timeout": 1e6}
        Traffic.__init__(self, None, policy, code, **options)
        self.pool_seconds = lambda size: SERVICE
        if warm:  # medians, by which stragglers are known
            for each in queries(24, seed=99):
                self.answer(each[None])
            self.run(2 * HELD)
        self.answered.clear()
        self.observed.clear()

    def _score(self, batch):
        found = 0.0
        for held in self._held:
            if held[1] and (np.abs(batch - held[0]) < 1e-6).all(axis=1).any():
                held[1] -= 1
                found = 1.0
        return np.full(len(batch), found)

    def hold(self, x, calls=10**6):
        """The first calls with this very data point in them take `HELD` seconds more."""
        self._held.append([x, calls])

    def submit(self, x, **options):
        return self.batcher.submit(x, **options)

    def run(self, seconds=SERVICE / 10):
        self.clock.run(self.clock.now() + seconds)

    def answer(self, x, **options):
        """The reply to a request, when it comes."""
        return self.result(self.submit(x, **options))

    def result(self, future):
        while not future.done():
            self.clock.step()
        return future.result()

    def order(self, x):
        """Which of these queries workers were called with, in turn; other calls are left out."""
        found = [np.flatnonzero((np.abs(x - call[0]) < 1e-6).all(axis=1)) for call in self.answered]
        return [int(each[0]) for each in found if len(each)]


@contextlib.contextmanager
def serving(predictor=None, observe=None, **policy):
    """A batcher of threads, before threads."""
    usual = {"max_batch_size": 1, "deadline_s": LONG, "outputs": "logits"}
    policy = BatchingPolicy(**usual | policy)
    options = {"policy": policy, "predictor": predictor, "observe": observe}
    with (
        DevicePool(model, 12, compiled=False) as pool,
        CodedBatcher(pool, Coder(Uncoded(1)), SHAPE, OUT, **options) as batcher,
    ):
        yield batcher


def until(true, seconds=LONG):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came to be so"
        time.sleep(0.01)
