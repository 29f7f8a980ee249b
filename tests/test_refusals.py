"""What is refused, door by door, and in which words: what came, and what would do.

A row is what differs from a call that would do, or a call of its own, and a part of the message.
What needs a program, a file or a server to go wrong is beside the tests of that.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nercc_jax import (
    Berrut,
    DevicePool,
    ExactStragglers,
    IndependentStragglers,
    Lagrange,
    NeRCC,
    Parity,
    Replication,
    Scheme,
    Uncoded,
    calibrate_error_probability,
    coded_inference,
    evaluate,
    fit_surrogate,
    hedge,
    nested_objective,
    plan,
    pool_inference,
    reexecute,
    tune,
)
from nercc_jax.codes import BerrutSpline, LearnedDecoder, regression_points
from nercc_jax.evaluation import record_answers
from nercc_jax.inference import order_points, robust_decode
from nercc_jax.pools import Fault, Faults, Overdue
from nercc_jax.rows import run_rows
from nercc_jax.splines import smoothing_spline
from nercc_jax.stragglers import (
    ContiguousStragglers,
    ExponentialLatency,
    LogNormalLatency,
    ParetoLatency,
    TraceLatency,
    WaitFor,
)
from nercc_jax.surrogates import Kernel, LearnerTuning, Surrogate, fit_learner
from nercc_jax.tuning import Descent, Sampling, learn_decoder, parametrize

K, N, OUTPUTS = 4, 6, 3
KEY, CODE, LAWS = jax.random.key(0), NeRCC(K, N), {"two": ExactStragglers(2)}
WEIGHTS = np.random.default_rng(0).normal(size=(5, OUTPUTS)).astype("float32")
X = np.random.default_rng(1).normal(size=(60, 5)).astype("float32")
NOT_FINITE = np.where(np.arange(60)[:, None] == 5, np.float32(np.nan), X)
GROUPS, SETS = X[:8].reshape(2, K, 5), np.arange(N) < np.array([[6], [4], [3]])
EVERYONE = np.ones(N, bool)


def model(x):
    return jnp.tanh(x @ WEIGHTS)


def infinite(x):
    return model(x) * jnp.inf


def broken_in_between(x):
    """Finite on the data points, and not on most of their mixtures."""
    return jnp.where(jnp.abs(x[:, :1]) > 0.5, jnp.nan, model(x))


def infer(x=X[:4], mask=EVERYONE, model=model, code=CODE):
    return coded_inference(model, code)(x, mask)


def executed_again(x=X[:4], model=model, probability=1.0, **options):
    found = coded_inference(model, Scheme(CODE), with_status=True)(X[:4], EVERYONE)
    if probability is not None:
        found = dataclasses.replace(found, error_probability=jnp.full(4, probability))
    return reexecute(model, x, found, **options)


def learner(x=X[:4], y=X[:4, :2], tuning=None, **options):
    return fit_learner(x, y, tuning=tuning, **options)


def tuned(code=CODE, **change):
    given = {"model": model, "x": X, "stragglers": LAWS, "key": KEY} | change
    return tune(code=code, **given)


def of_pool(use):
    with DevicePool(np.negative, 1, compiled=False) as pool:
        return use(pool)


def rows(rows=X, **options):
    return run_rows(np.negative, rows, lambda *_, **__: pytest.fail("opened"), **options)


def dispatched(count, **options):
    return lambda pool: pool.dispatch(np.ones((count, 1, 3)), **options)


T, Y = jnp.array([-1.0, 0.0, 1.0]), jnp.zeros(3)
# Of a door: the call, which has an argument of each name, and rows.
DOORS = {
    "NeRCC": (partial(NeRCC, num_data=4, num_workers=8), [
        ({"num_data": 0}, "num_data must be a positive integer"),
        ({"lambda_enc": -1.0}, "lambda_enc must be 0 or positive, not -1"),
        ({"lambda_dec": np.nan}, "lambda_dec must be 0 or positive, not nan"),
        ({"lambda_dec": np.ones(2)}, r"lambda_dec must be a scalar.*\(2,\)"),
        ({"gap_exponent": np.inf}, "gap_exponent must be a number.*finite.*inf"),
        ({"gap_exponent": np.nan}, "gap_exponent must be a number"),
        ({"gap_exponent": np.ones(2)}, "gap_exponent must be a scalar"),
        ({"end_penalty": -1.0}, "end_penalty must be 0 or positive and finite"),
        ({"end_penalty": np.inf}, "end_penalty must be 0 or positive and finite"),
        ({"end_penalty": np.nan}, "end_penalty must be 0 or positive and finite"),
        ({"end_penalty": np.ones(1)}, r"end_penalty must be a scalar.*\(1,\)"),
        ({"exact": 1}, "exact must be True or False, not 1"),
    ]),
    "BerrutSpline": (partial(BerrutSpline, 4, 8), [
        ({"lambda_dec": -1.0}, "lambda_dec must be 0 or positive, not -1"),
        ({"ends": "free"}, "ends must be one of natural, not-a-knot"),
    ]),
    "Lagrange": (partial(Lagrange, 4, 8), [
        ({"degree": 3}, "degree 3 does not fit.* 8 workers"),
        ({"degree": 0}, "degree must be a positive integer, not 0"),
    ]),
    "codes": (None, [
        (lambda: Replication(4, 3), "need at least 4 workers, not 3"),
        (lambda: Parity(4, 4), "4 workers for 4 data points leave 0 for parities"),
        (lambda: Parity(5, 7), "leave 2 for parities.* num_data a multiple of them"),
        (lambda: Parity(0, 2), "num_data must be a positive integer"),
        (lambda: Uncoded(4, 5), "4 data points take 4 workers, not 5"),
        (lambda: LearnedDecoder(np.ones(3), np.eye(3)), r"encoder must be \(num_workers"),
        (lambda: LearnedDecoder(np.ones((3, 2)), np.eye(4)), r"root must be of shape \(5, 5\), no"),
        (lambda: LearnedDecoder(np.ones((3, 2)), np.full((5, 5), np.nan)), "root must be finite"),
        (lambda: LearnedDecoder(np.ones((3, 2), int), np.eye(5)), "encoder is int"),
    ]),
    "regression_points": (partial(regression_points, num_data=2, num_workers=3), [
        ({"num_data": 0}, "num_data must be a positive integer, not 0"),
        ({"num_data": 2.0}, "num_data must be a positive integer"),
        ({"num_workers": True}, "num_workers must be a positive integer"),
        ({"points": "chebychev"}, "points must be one of chebyshev, .*not 'chebychev'"),
        ({"points": 7}, "a pair"),
        ({"points": "mixed"}, r"mixed:SHARE.*\(as in 'mixed:0.5'\), not 'mixed'"),
        ({"points": "mixed:much"}, "not 'mixed:much'"),
        ({"points": "uniform:0.5"}, "not 'uniform:0.5'"),
        ({"points": "mixed:1.5"}, "the share in 'mixed:1.5' must be between 0 and 1"),
        ({"points": "mixed:nan"}, "must be between 0 and 1"),
        ({"num_data": 4, "points": "mixed:0.5"}, "4 data points need at least 4 workers, not 3"),
        ({"num_data": 4, "points": "interleaved"}, "4 data points need at least 4 workers, not 3"),
        ({"num_data": 4, "points": "repeated"}, "a worker of its own"),
        ({"points": ([0.1], [0, 0, 1])}, r"alpha must have shape \(2,\), not \(1,\)"),
        ({"points": ([0.1, 0.1], [0, 0, 1])}, "alphas must be distinct"),
        ({"points": ([0.1, 1.5], [0, 0, 1])}, r"alpha must lie in \[-1, 1\]"),
        ({"points": ([0.1, 0.2], [0, np.nan, 1])}, r"beta must lie in \[-1, 1\]"),
    ]),
    "smoothing_spline": (partial(smoothing_spline, t=T, y=Y, lambda_=0.1), [
        ({"lambda_": None, "ends": "not-a-knot"}, "chooses one for natural ends: give a lambda_"),
        ({"ends": "clamped"}, "ends must be one of natural, not-a-knot, not 'clamped'"),
        ({"t": jnp.zeros((2, 2))}, "points must be a float vector"),
        ({"t": jnp.zeros(0)}, "points must be a float vector"),
        ({"t": jnp.arange(3)}, "points must be a float vector"),
        ({"y": jnp.zeros(4)}, "first axis must be the 3 points"),
        ({"weights": jnp.ones(2)}, "weights has shape"),
        ({"available": jnp.ones(2, bool)}, "available has shape"),
        ({"available": jnp.ones(3)}, "boolean mask"),
        ({"end_weights": jnp.ones(3)}, r"end_weights must be two, first and last, .*\(3,\)"),
        ({"end_weights": jnp.ones(())}, "end_weights must be two"),
    ]),
    "robust_decode": (
        partial(
            robust_decode, code=CODE, y=np.zeros((6, 2)), available=EVERYONE, max_adversaries=1
        ),
        [
            ({"max_adversaries": 3}, "from 0 to 2, a minority of the workers, not 3"),
            ({"max_adversaries": -1}, "not -1"),
            ({"max_adversaries": 1.5}, r"integer from 0 to 2.*not 1\.5"),
            ({"max_adversaries": True}, "not True"),
            ({"y": np.zeros((5, 2))}, "its first axis must be the 6 workers"),
            ({"available": np.ones(5, bool)}, r"boolean mask of shape \(6,\)"),
            *(
                ({"code": code}, rf"{type(code).__name__} .*use NeRCC")
                for code in (Berrut(4, 6), Lagrange(4, 6), Replication(4, 6), Uncoded(6))
            ),
        ],
    ),
    "order_points": (partial(order_points, x=X[:8], num_data=4), [
        ({"num_data": 0}, "num_data must be a positive integer, not 0"),
        ({"buffer_size": 3}, "a buffer of 3 .* must be 4 or more"),
        ({"buffer_size": 8.0}, "buffer_size must be a positive integer"),
        ({"x": X[:0]}, r"x has shape \(0, 5\): there are no data points"),
        ({"x": NOT_FINITE}, r"data points are not finite: 5; take them out"),
        ({"features": X[:5]}, r"they must be \(8, \.\.\.\)"),
        ({"features": jnp.sum}, r"features have shape \(\)"),
    ]),
    "coded_inference": (infer, [
        ({"code": Parity(4, 6)}, "run 2 models, but 1 came: give the served model and 1 further"),
        ({"code": Parity(4, 6), "model": [model] * 3}, "run 2 models, but 3 came"),
        ({"model": (model, model)}, "run 1 model, but 2 came: give the served model alone"),
        ({"code": Parity(4, 6), "model": (model, lambda b: b)},
         r"differ in shape, served model first: \[\(3,\)"),
        ({"x": X[:3]}, r"\(K, \.\.\.\) or \(groups, K, \.\.\.\), K = 4"),
        ({"x": np.ones((8, 5))}, r"x\.reshape\(-1, K, .* has whole groups"),
        ({"mask": SETS}, r"must be \(groups, K, \.\.\.\), K = 4"),
        ({"x": np.ones((4, 4, 5))}, "may be one group of 4 or 4 groups"),
        ({"x": GROUPS, "mask": SETS}, r"boolean mask of shape \(2, 6\)"),
        ({"x": GROUPS, "mask": np.ones((2, 6))}, "boolean mask"),
        ({"x": GROUPS[:0]}, "no whole groups of 4 data points"),
        ({"x": GROUPS.astype(np.uint8)}, "x is uint8: codes work on floats"),
        ({"model": lambda b: b.sum()}, r"for input \(6, 5\), the model's answer was \(\)"),
        ({"model": lambda b: b[:5]}, r"a batch of 6 to arrays of as many answers"),
        ({"model": lambda b: {"logits": b[:5]}}, r"answer\['logits'\] was \(5, 5\)"),
        ({"model": lambda b: b.argmax(axis=1)}, "answer is int32: codes work on floats"),
        ({"code": Scheme(Berrut(4, 6))}, "Berrut is no regression"),
        ({"code": "NeRCC"}, "must be a code or a scheme, not str"),
    ]),
    "Scheme": (partial(Scheme, CODE), [
        ({"redundancy": "uncertain"}, "need a surrogate: a learner or a student"),
        ({"order": "surrogate"}, "order by 'surrogate' needs a surrogate"),
        ({"order": "labels"}, "order must be 'pixels', 'surrogate' or a function"),
        ({"surrogate": 3}, "a scheme has a code and a surrogate"),
        (lambda: Scheme(None), "a scheme has a code and a surrogate"),
        ({"surrogate": Surrogate(model), "redundancy": "uncertain", "straggler_share": 1.0},
         "straggler_share must be a share between 0 and 1, not 1"),
        (
            lambda: Scheme(
                CODE, Surrogate(lambda x: model(x)[:, :1]), redundancy="uncertain"
            ).prepare(X[:4]),
            "copies of uncertain values need a learner",
        ),
    ]),
    "a scheme's inference": (partial(infer, code=Scheme(CODE)), [
        ({"x": X[:5]}, r"x of shape \(5, 5\) is no whole groups of 4"),
        ({"x": X[:0]}, "is no whole groups"),
        ({"x": X[:4].astype(int)}, "codes work on floats"),
        ({"x": X[:8], "mask": SETS}, r"available must be a boolean mask of shape \(2, 6\)"),
        ({"mask": np.ones(6)}, "available must be a boolean mask"),
        ({"x": NOT_FINITE}, r"points \[5\]"),
        ({"code": Scheme(CODE, Surrogate(lambda x: x))},
         r"the surrogate gives outputs \(5,\), the model \(3,\)"),
    ]),
    "reexecute": (executed_again, [
        ({"probability": None}, "there is no error probability: calibrate"),
        ({"limit": float("nan")}, "must be 0 or positive"),
        ({"x": X[:3]}, r"x has shape \(3, 5\); assessed are data points \(4,\)"),
        ({"model": infinite}, "own outputs are not finite"),
    ]),
    "evaluate": (partial(evaluate, model, {"a": CODE}, stragglers=LAWS, key=KEY, x=X), [
        ({"x": X[:3]}, "3 data points fill no group of 4"),
        ({"x": NOT_FINITE}, "are not finite: take them out"),
        ({"stragglers": {}}, "stragglers are one or more by name"),
        ({"num_sets": 0}, "num_sets must be a positive integer, not 0"),
        ({"labels": np.zeros(7)}, r"labels have shape \(7,\)"),
        ({"workers": {"a": [model, model]}}, "run 1 model, but 2 came"),
        ({"workers": {"ParM": [model]}}, r"workers names \['ParM'\]; the codes are"),
        ({"workers": {"a": lambda x: model(x)[:, :1]}}, "the workers' answers"),
    ]),
    "evaluate's codes": (partial(evaluate, model, x=X, stragglers=LAWS, key=KEY), [
        ({"codes": {"a": CODE, "b": NeRCC(5, 6)}}, r"same \(num_data, num_workers\)"),
        ({"codes": {}}, "codes are one or more by name"),
        ({"codes": CODE}, "codes are one or more by name.*not NeRCC"),
        ({"codes": {"p": Parity(4, 6)}}, "run 2 models, but 1 came"),
    ]),
    "record_answers": (partial(record_answers, model=model, code=CODE, x=X), [
        ({"x": X[:3]}, "3 data points fill no group of 4"),
        ({"x": NOT_FINITE}, "are not finite: take them out"),
        ({"x": X.astype(np.uint8)}, "x is uint8: codes work on floats"),
        ({"code": Parity(4, 6)}, "run 2 models, but 1 came"),
        ({"model": (model, model)}, "run 1 model, but 2 came"),
        ({"model": ()}, "run 1 model, but 0 came"),
        ({"model": infinite}, "own outputs must be finite"),
    ]),
    "nested_objective": (
        partial(nested_objective, model=model, code=CODE, x=GROUPS, available=SETS),
        [
            ({"x": np.zeros((2, 5, 5))}, r"x of shape \(2, 5, 5\): .* must be \(groups, K"),
            ({"x": GROUPS[:0]}, "is no whole groups of 4"),
            ({"x": np.zeros(4)}, r"must be \(groups, K"),
            ({"available": SETS[0]}, r"available must be masks \(sets, 6\), not bool\(6,\)"),
            ({"available": SETS[:, :-1]}, r"not bool\(3, 5\)"),
            ({"available": SETS.astype(float)}, r"not float\d\d"),
            ({"criterion": "mae"}, "mse, cross_entropy, disagreement or a function, not 'mae'"),
            ({"criterion": None}, "criterion must be one of .* or a function, not None"),
            ({"code": Parity(4, 6)}, "the workers of this code run 2 models, but 1 came"),
        ],
    ),
    "tune": (tuned, [
        ({"stragglers": {}}, "stragglers are laws by name"),
        ({"stragglers": [ExactStragglers(1)]}, "stragglers are laws by name"),
        ({"x": X[:7]}, "x has 7 data points: tuning needs two groups of 4"),
        ({"x": NOT_FINITE}, r"data points \[5\] are not finite"),
        ({"x": X.astype(int)}, "x is int.*: codes work on floats"),
        ({"model": nnx.Dropout(0.5, rngs=nnx.Rngs(0))}, "mode: its Dropout"),
        ({"model": broken_in_between}, "finite answers on coded data points"),
        ({"stragglers": LAWS | {"nobody": ExactStragglers(N)}},
         "'nobody'.*leave out laws under which nobody answers"),
        (
            {
                "code": NeRCC(K, N, points="repeated", lambda_dec=0.0, exact=True),
                "stragglers": {"0": ExactStragglers(0)},
            },
            "nothing to gain: the starting code makes no error",
        ),
        ({"code": (CODE, NeRCC(K, N + 1))}, "several starts must be codes of one kind, with the s"),
        ({"code": ()}, "there is no code to start from"),
        ({"optimizer": "newton"}, "must be 'adam', 'lbfgs' or an optax transf"),
    ]),
    "Descent": (Descent, [
        ({"steps": 0}, "steps must be a positive integer, not 0"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"learning_rate": np.nan}, "positive and finite, not nan"),
        ({"tolerance": -0.1}, "tolerance must be 0 or positive, and finite, not -0.1"),
        ({"check_every": 0}, "check_every must be a positive integer"),
    ]),
    "Sampling": (Sampling, [
        ({"groups_per_step": 1.5}, "groups_per_step must be a positive integer"),
        ({"sets_per_step": 0}, "sets_per_step must be a positive integer"),
        ({"held_out_sets": True}, "held_out_sets must be a positive integer"),
        ({"held_out_share": 1.0}, "held_out_share must be between 0 and 1"),
    ]),
    "parametrize": (partial(parametrize, points=True), [
        *(({"code": code}, "has nothing to tune$") for code in (Uncoded(4), Parity(4, 6))),
        ({"code": Replication(4, 6)}, "has nothing to tune$"),
        ({"code": Berrut(4, 6), "points": False}, "Berrut has nothing to tune except its points"),
        ({"code": Lagrange(4, 6), "points": False}, "Lagrange has nothing to tune except its poin"),
        ({"code": LearnedDecoder(np.ones((3, 2)), np.eye(5))},
         "nothing to tune: tune the code before"),
    ]),
    "learn_decoder": (partial(learn_decoder, model=model, code=CODE, x=X, key=KEY), [
        ({"code": Uncoded(3)}, "Uncoded has no regression points"),
        ({"order": lambda x: np.zeros(len(x))},
         "order must return a permutation of 60 data points"),
        ({"x": X[:3]}, "3 data points fill no group"),
        ({"num_groups": 0}, "num_groups must be"),
        ({"model": infinite}, "own outputs must be finite"),
        ({"model": jnp.log, "x": np.abs(X) + 1e-3},
         r"answers to coded data points must be finite; they are not for workers \["),
    ]),
    "fit_surrogate": (
        partial(
            fit_surrogate, model, cheap_model=model, code=CODE, x=X, stragglers=LAWS, key=KEY
        ),
        [
            ({"criterion": "labels"}, "criterion must be 'disagreement' or 'mse', not 'labels'"),
            ({"stragglers": {}}, "stragglers are laws by name"),
            ({"code": Berrut(4, 6)}, "Berrut is no regression"),
            ({"cheap_model": lambda x: model(x)[:, :2]},
             r"the surrogate gives outputs \(2,\), the model \(3,\)"),
            ({"x": NOT_FINITE}, "are not finite: take them out"),
            ({"x": X[:3]}, "3 data points fill no group of 4"),
        ],
    ),
    "Surrogate": (partial(Surrogate, model), [
        ({"theta": -0.1}, "theta must be 0 or positive, not -0.1"),
        ({"kappa": np.nan}, "kappa must be 0 or positive, not nan"),
        ({"kappa": np.ones(2)}, r"kappa must be a scalar, not an array of shape \(2,\)"),
        (lambda: Surrogate(3), "a surrogate is a callable on a batch, not int"),
    ]),
    "calibrate_error_probability": (
        partial(
            calibrate_error_probability, model=model, scheme=CODE, x=X, stragglers=LAWS, key=KEY
        ),
        [
            ({"stragglers": {}}, "stragglers are laws by name"),
            ({"scheme": Berrut(4, 6)}, "Berrut is no regression"),
            ({"x": NOT_FINITE}, "are not finite: take them out"),
            ({"x": X[:3]}, "3 data points fill no group of 4"),
            ({"model": lambda x: model(x)[:, :1], "num_sets": 1}, "which is no label"),
            ({"model": lambda x: model(x)[:, :1], "scheme": Scheme(CODE), "num_sets": 1},
             "which is no label"),
        ],
    ),
    "fit_learner": (learner, [
        ({"tuning": LearnerTuning(rows=3, widths=(0, 1))}, "widths must group 5 features"),
        ({"capacity": 0}, "capacity must be a positive integer"),
        ({"y": np.ones((3, 2))}, "x are 4 data points, y 3 answers"),
        ({"y": np.ones((4, 2), int)}, "y is int"),
        ({"x": np.ones((4, 3), int)}, "no float among the data points"),
        ({"kernel": "linear"}, "shape must be one of squared_exponential, matern52"),
        ({"kernel": Kernel(centre=np.zeros(2))}, "x have 5 features; the learner knows 2"),
        ({"prior": lambda x: x}, "the surrogate gives outputs"),
    ]),
    "LearnerTuning": (LearnerTuning, [
        ({"shapes": ("cubic",)}, "a kernel's shape must be one of"),
        ({"widths": "all"}, "must be 'auto', 'one', 'each' or groups, not 'all'"),
        ({"rows": 2}, "rows must be an integer from 3 on"),
    ]),
    "Kernel": (partial(Kernel, centre=np.zeros(2), widths=[1.0, 1.0]), [
        ({"widths": [1.0, -1.0]}, "widths must be positive and finite"),
        ({"widths": [1.0, np.inf]}, "widths must be positive and finite"),
        ({"noise": 0.0}, "noise must be positive and finite"),
        ({"linear": -1.0}, "linear must be 0 or positive and finite"),
        ({"linear": np.nan}, "linear must be 0 or positive and finite"),
    ]),
    "plan": (
        partial(
            plan, model, x=X, latency=ExponentialLatency(1.0), key=KEY, num_queries=4,
            num_data=(4,), max_workers=6,
        ),
        [
            ({"max_workers": 3}, "need 4 workers at least, not 3"),
            ({"max_workers": 6.5}, "max_workers must be a positive integer, not 6.5"),
            ({"max_extra_work": -0.1}, "max_extra_work must be 0 or positive, and finite, not -0."),
            ({"max_extra_work": float("nan")}, "max_extra_work must be 0 or positive, and finite"),
            ({"max_disagreement": 1.5}, r"max_disagreement must be in \[0, 1\], not 1.5"),
            ({"overhead": -1.0}, "overhead must be 0 or positive, and finite, not -1.0"),
            ({"buffer_size": 0}, "buffer_size must be a positive integer, not 0"),
            ({"x": X[:7]}, "fills no group of 4 in both halves"),
            ({"num_data": (3,)}, r"num_data must be divisors of the 4 queries, not \[3\]"),
            ({"layouts": ("none",)}, "points must be one of"),
        ],
    ),
    "hedge": (partial(hedge, print), [
        ({"budget": 0.5}, r"1 or more, not 0\.5"),
        ({"targets": []}, "there is no target"),
        (lambda: hedge(["a", "b"]), r"call is an async callable.*, not \['a', 'b'\]"),
    ]),
    "laws": (None, [
        (lambda: ExactStragglers(-1), "an integer from 0 on, not -1"),
        (lambda: ExactStragglers(1.5), "an integer from 0 on, not 1.5"),
        (lambda: ExactStragglers(5).available(KEY, 4), "5 of 4 workers"),
        (lambda: ContiguousStragglers(5).available(KEY, 4), "5 of 4 workers"),
        (lambda: ExactStragglers(5).every_set(4, 100), "5 of 4 workers"),
        (lambda: ContiguousStragglers(5).every_set(4, 100), "5 of 4 workers"),
        (lambda: WaitFor(ExponentialLatency(1.0), 5).available(KEY, 4), "5 of 4 workers"),
        (lambda: IndependentStragglers(1.5), r"probability must be in \[0, 1\]"),
        (lambda: ExponentialLatency(0.0), "scale must be positive"),
        (lambda: ExponentialLatency(1.0, shift=-1.0), "shift must be 0 or positive"),
        (lambda: LogNormalLatency(1.0, np.nan), "sigma must be positive"),
        (lambda: ParetoLatency(1.0, -2.0), "shape must be positive"),
        *(
            (lambda bad=bad: TraceLatency(np.array(bad)), "finite, non-negative seconds")
            for bad in ([], [[0.1]], [-1.0], [np.nan])
        ),
    ]),
    "a pool": (partial(DevicePool, np.negative, num_workers=1, compiled=False), [
        ({"num_workers": 0}, "num_workers must be a positive integer, not 0"),
        ({"num_workers": 2.5}, "num_workers must be a positive integer, not 2.5"),
        ({"num_workers": True}, "num_workers must be a positive integer, not True"),
        ({"hang_timeout": 0.0}, "must be positive"),
        (lambda: DevicePool([], 1), "a model is a callable on a batch"),
        (lambda: Overdue(1.5), "a quantile in"),
        *(
            (lambda floor=floor: Overdue(floor=floor), "floor is a number of seconds from 0 on")
            for floor in (-0.001, np.nan, np.inf)
        ),
    ]),
    "a pool in use": (of_pool, [
        ({"use": lambda pool: pool.dispatch(np.ones(3))}, r"\(num_points, batch, ...\), not of sh"),
        ({"use": lambda pool: pool.dispatch(np.ones((0, 1)))}, "not of shape"),
        ({"use": dispatched(2, needed=3)}, "a batch of 2 needs 1 to as many"),
        ({"use": dispatched(2, copies=0)}, "1 copy or more, not 0"),
        ({"use": dispatched(2, kinds=[0, 1])}, r"run 1 model\(s\), but 2 are asked"),
        ({"use": lambda pool: dispatched(2)(pool).wait(3)}, "wait for 1 to 2 answers, not 3"),
        *(
            (
                {"use": lambda pool, end=end: dispatched(2)(pool).wait(deadline=end)},
                f"a positive number of seconds, not {end}",
            )
            for end in (0.0, np.nan, -np.inf)
        ),
        ({"use": lambda pool: pool.send(pool.open(2), [2], np.ones((1, 1, 3)))},
         "point 2 of 2 is not there"),
        ({"use": lambda pool: pool.send(pool.open(2), [1, 1], np.ones((2, 1, 3)))},
         "has been sent already"),
        ({"use": lambda pool: pool_inference(pool, CODE)(X[:4], deadline=np.nan)},
         "a positive number of seconds, not nan"),
        ({"use": lambda pool: pool_inference(pool, CODE)(X[:3])}, r"x of shape \(3, 5\)"),
        ({"use": lambda pool: pool_inference(pool, CODE)(X[:4].astype(int))}, "x is int64"),
        ({"use": lambda pool: pool_inference(pool, CODE)(NOT_FINITE[4:8])},
         r"data points \[1\] are not finite"),
    ]),
    "Fault": (partial(Fault, "nan"), [
        ({"probability": 1.5}, r"in \[0, 1\]"),
        ({"latency": ExponentialLatency(1.0)}, "nothing else takes one"),
        (lambda: Fault("late"), "a fault is one of .*'swap'.*, not 'late'"),
        (lambda: Fault("delay"), "needs a latency law"),
    ]),
    "Faults": (Faults.from_rates, [
        ({"wrong_workers": {"death": [0]}}, "whole numbers, .* not .'death'"),
        ({"wrong_workers": [1.5]}, "whole numbers"),
        ({"wrong_workers": [True]}, "whole numbers"),
        ({"death_rate": 1.5}, r"probability must be in \[0, 1\], not 1.5"),
    ]),
    "run_rows": (rows, [
        ({}, "tolerance is needed"),
        ({"tolerance": 1.0, "max_disagreement": 0.1}, "not both"),
        ({"tolerance": -1.0}, "tolerance must be 0 or positive"),
        ({"tolerance": 1.0, "compute": "some"}, "compute must be 'needed' or 'all', not 'some'"),
        ({"tolerance": 1.0, "job_deadline": -1.0}, "job_deadline must be a positive number"),
        ({"tolerance": 1.0, "grace": -1.0}, "grace must be a number of seconds from 0 on"),
        ({"tolerance": 1.0, "max_calls": 0}, "max_calls must be positive"),
        ({"tolerance": 1.0, "check_answers": 1.0}, "check_answers must be between 0 and 1, not 1"),
        ({"tolerance": 1.0, "max_fenced": 1.0}, r"max_fenced must be in \[0, 1\), not 1"),
        ({"tolerance": 1.0, "rows_per_call": 0}, "rows_per_call must be positive"),
        ({"tolerance": 1.0, "deadline": 0.0}, "deadline must be a positive number"),
        ({"tolerance": 1.0, "deadline": None}, "deadline must be a positive number.*not None"),
        ({"tolerance": "1.0"}, "tolerance must be 0 or positive, not '1.0'"),
        ({"accuracy": 0.1}, "accuracy is an Accuracy.*, not 0.1"),
        ({"tolerance": 1.0, "stop_when": bool}, "stop_when needs the statistic"),
        *(
            ({"tolerance": 1.0, "rows": bad}, r"rows are finite numbers \(rows, ...\), not")
            for bad in (np.array(["a"]), 1.0, np.zeros((0, 2)))
        ),
        ({"tolerance": 1.0, "rows": np.array([[1.0], [np.nan]])},
         r"float64 of shape \(2, 1\), with nan in row 1"),
    ]),
    **{
        f"worker_dtype, {name}": (use, [
            ({"worker_dtype": kind}, "worker_dtype must be a floating dtype of at most 32")
            for kind in ("int8", "float64", "complex64", "bf16", bool, float)
        ])
        for name, use in (
            ("inference", partial(coded_inference, model, CODE)),
            ("pool", partial(DevicePool, model, 1)),
        )
    },
}  # fmt: skip


def refusals():
    for door, (call, rows) in DOORS.items():
        for number, (change, message) in enumerate(rows):
            run = change if callable(change) else partial(call, **change)
            yield pytest.param(run, message, id=f"{door}-{number}")


@pytest.mark.parametrize(("call", "message"), [*refusals()])
def test_it_is_refused(call, message, untyped):
    with pytest.raises(ValueError, match=message):
        call()
