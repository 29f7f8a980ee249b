"""Batchers before workers on paper: a stream of queries some of which straggle, and single ones."""

import collections
import contextlib
import time

import jax.numpy as jnp
import numpy as np

from nercc_jax import DevicePool, NeRCC, Uncoded
from nercc_jax.codes import Decoded
from nercc_jax.pools import Fault, Faults
from nercc_jax.risk import Accuracy, ErrorProbability, Risk
from nercc_jax.serving import BatchingPolicy, CodedBatcher, Coder, DecodingScores, Predictor
from nercc_jax.stragglers import TraceLatency
from nercc_jax.testing import SimulatedClock, SimulatedPool

SHAPE, OUT = (4,), (3,)
WEIGHTS = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
SERVICE = 0.05


LONG = 30.0  # seconds that nothing here takes, unless it hangs
THRESHOLD = 4.0  # times the median, after which calls of `Simulated` are late
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


def model(x):
    """Smooth, so that past answers tell much of others; each row's to the bit in any batch."""
    return np.tanh(sum(x[..., i, None] * row for i, row in enumerate(WEIGHTS)))


class KnowsAll(Predictor):
    """A surrogate that knows every answer from the first, to `off`, and is sure of some.

    Attributes:
        sure: tells which of a batch it is sure of.
    """

    state = "answering"

    def __init__(self, sure=lambda x: x[:, 0] <= 0, off=0.0, model=model):
        super().__init__()
        self.sure, self.off, self.model = sure, off, model

    def predict(self, x):
        sure = np.array(self.sure(x), bool)
        values = self.model(x) + self.off
        bars, probability = np.zeros(len(x)), np.where(sure, 0.01, 0.9)
        return Decoded(values, np.zeros(0, bool), sure, bars, probability)

    def add_answer(self, x, own):
        pass

    @property
    def risk(self):
        return Risk(Accuracy(), needs_evidence=False)


class Traffic:
    """A stream of queries before simulated workers, of which some straggle by ten times.

    Attributes:
        faultless: whether an internal error of the batcher fails the test.
    """

    faultless = True

    def __init__(
        self,
        predictor,
        policy,
        code=None,
        share=0.1,
        rate=150,
        decoding=None,
        shape=SHAPE,
        out=OUT,
        stated=True,
        **options,
    ):
        """`decoding(coder)` makes the scores of decoded answers beforehand.

        `options` are the pool's, its model and its number of workers among them. Outputs are scores
        unless the policy says what they are or they are not to be stated.
        """
        if stated and policy.outputs is None and policy.tolerance is None:
            policy = policy.model_copy(update={"outputs": "logits"})
        self.random, self.clock = np.random.default_rng(1), SimulatedClock()
        self.model, self.share, self.rate = model, share, rate
        self.pool_seconds, self.settle = self.seconds, 20 * SERVICE
        self.observed = collections.Counter()
        options = {"model": lambda x: self.model(x), "num_workers": 24} | options
        self.pool = SimulatedPool(
            **options, seconds=lambda size: self.pool_seconds(size), clock=self.clock
        )
        self.coder = Coder(code or Uncoded(1))
        self.batcher = CodedBatcher(
            self.pool,
            self.coder,
            shape,
            out,
            policy=policy,
            decoding=decoding and decoding(self.coder),
            predictor=predictor,
            observe=self.observe,
        )
        # Errors of predictions that were given out; NaN where the own answer will never come.
        self.audited, learned = [], self.batcher._approximations
        audit = learned.audit

        def audited(given, own):
            if given.given and given.source == "predicted":
                error = np.nan if own is None else np.abs(given.value - own).max()
                self.audited.append(error)
            return audit(given, own)

        learned.audit = audited

    def seconds(self, size):
        straggles = self.random.random() < self.share
        return SERVICE * (self.random.uniform(0.95, 1.05) + 10 * straggles)

    def observe(self, what, number):
        self.observed[what] += 1
        assert not self.faultless or what != "internal_error"

    def send(self, number, **options):
        """So many queries, one by one: each with its latency, its reply, and the label it had."""
        replies, begin = [], self.clock.now()

        def come(x):
            arrived, own = self.clock.now(), self.model(x)
            future = self.batcher.submit(x, **options)
            future.add_done_callback(
                lambda future: replies.append((self.clock.now() - arrived, future.result(), own))
            )

        for place in range(number):
            x = self.random.normal(size=(1, *SHAPE)).astype(np.float32)
            self.clock.at(begin + place / self.rate, lambda x=x: come(x))
        self.clock.run(begin + number / self.rate + self.settle)
        assert len(replies) == number
        return replies

    def calls(self):
        report = self.pool.report()
        return report.answered + report.late


def labels_right(replies):
    return np.mean([reply.values[0].argmax() == own.argmax() for _, reply, own in replies])


def by_margin(coder):
    """The scores of a code whose decoded queries are judged by their margin alone."""
    return DecodingScores(Accuracy(), {few: BY_MARGIN for few in range(1, coder.num_data + 1)})


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
