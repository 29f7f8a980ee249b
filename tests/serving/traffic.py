"""A stream of queries before workers on paper, some of which straggle."""

import collections

import numpy as np

from nercc_jax import Uncoded
from nercc_jax.codes import Decoded
from nercc_jax.risk import Accuracy, Risk
from nercc_jax.serving import CodedBatcher, Coder, Predictor
from nercc_jax.testing import SimulatedClock, SimulatedPool

SHAPE, OUT = (4,), (3,)
WEIGHTS = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
SERVICE = 0.05


def model(x):
    """Smooth, so that past answers tell much of others."""
    return np.tanh(x @ WEIGHTS)


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
