"""Models of several tensors, and of such that cannot be coded: rows of them, names, what fits."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from nercc_jax import NeRCC
from nercc_jax.risk import Accuracy
from nercc_jax.serving import Coder, calibrate_decoding, make_servable


def heads(x):
    return {"sum": x["a"].sum(axis=(1, 2)), "all": x["a"].reshape(len(x["a"]), -1) + x["b"]}


# Queries, in Python: `test_requests.py` asks for the same by the protocol.


def test_one_array_is_its_own_row():
    """A model of one array costs nothing more."""

    def plain(x):
        return 2 * x

    servable = make_servable("plain", plain, (3,))
    x = np.ones((5, 3), np.float32)
    assert servable.model is plain
    assert np.shares_memory(servable.inputs.pack(x), x)


def pack(datatype, given):
    several = {"a": (2, 2), "b": (4,)}
    if datatype == "several":
        return make_servable("heads", heads, several).inputs.pack(given)
    return make_servable("same", lambda x: x, (2,), datatype=datatype).inputs.pack(np.array(given))


A, B = np.zeros((2, 2, 2)), np.zeros((2, 4))


@pytest.mark.parametrize(
    ("datatype", "given", "message"),
    [
        ("several", {"a": A, "b": B, "c": 0}, "['c'] unknown"),
        ("several", {"a": A[:0], "b": B[:0]}, "not of shape [0, 2, 2]"),
        ("several", {"a": A, "b": B.astype(int)}, "'b', FP32, of shape [-1, 4], not"),
        ("several", {"a": A, "b": B + 1e39}, "'b': queries [0, 1] are not finite"),
        ("several", A, "of shape [-1, 4], not a ndarray"),
        ("INT8", [[1, 128]], "queries [0] have numbers beyond int8"),
        ("UINT16", [[1, 2], [-1, 0]], "queries [1] have numbers beyond uint16"),
        ("INT64", [[2**31, 0]], "numbers beyond int32"),
        ("UINT64", [[2**32, 0]], "numbers beyond uint32"),
        ("INT32", [[1.0, 2.0]], "INT32, of shape [-1, 2], not float64"),
        ("INT32", [[True, False]], "not bool"),
        ("BOOL", [[1, 0]], "BOOL, of shape [-1, 2], not int64"),
    ],
)
def test_queries_that_do_not_fit_are_refused(datatype, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pack(datatype, given)


def test_integers_that_fit_may_come_in_another_dtype():
    rows = pack("INT64", [[1, -(2**31)]])
    assert (rows.dtype, rows.tolist()) == (np.int32, [[1, -(2**31)]])


# Models.


def test_outputs_are_called_as_the_model_calls_them():
    from typing import NamedTuple

    class Both(NamedTuple):
        left: jax.Array
        right: jax.Array

    def named(answer, **options):
        servable = make_servable("model", lambda x: answer(x), (3,), **options)
        return [(part.name, part.datatype, part.shape) for part in servable.outputs.parts]

    assert named(lambda x: x) == [("output", "FP32", (3,))]
    assert named(lambda x: x, output_name="scores") == [("scores", "FP32", (3,))]
    assert named(lambda x: {"b": x, "a": x.sum(1)}) == [("a", "FP32", ()), ("b", "FP32", (3,))]
    assert named(lambda x: Both(x, x)) == [("left", "FP32", (3,)), ("right", "FP32", (3,))]
    both = named(lambda x: (x, [x, x.sum(1)]), output_name="part")
    assert both == [("part_0", "FP32", (3,)), ("part_1.0", "FP32", (3,)), ("part_1.1", "FP32", ())]
    deep = named(lambda x: {"heads": {"a": x, "b": x}})
    assert [name for name, *_ in deep] == ["heads.a", "heads.b"]


@pytest.mark.parametrize(
    ("model", "reported", "message"),
    [
        (lambda x: x.astype(jnp.float16), {}, "float32, integers or booleans; for B = 1, 'output'"),
        (lambda x: {"a": x, "b": x.sum()}, {}, "'b' was ShapeDtypeStruct(shape=(), dtype=float32)"),
        (lambda x: {"exact": x, "a": x}, {}, "an output cannot be called 'exact'"),
        (lambda x: {"a.b": x, "a": {"b": x}}, {}, "outputs must have different names"),
        (lambda x: (), {}, "must map a batch to arrays; it returned ()"),
        (lambda x: x, {"datatype": "BYTES"}, "'input' cannot be BYTES: there are BOOL, INT8"),
        (lambda x: lax.top_k(x, 2), {}, "have several datatypes: cast them to one"),
        (lambda x: x, {"datatype": {"ids": "INT8"}}, "but ['ids'] have none"),
        (lambda x: x["a"], {}, "does not run on a batch of one input 'input', FP32, of"),
        (lambda x: x, {"calibration": np.zeros((5, 4))}, "calibration data do not fit: the model"),
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_models_that_cannot_be_served_get_the_reason(model, reported, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_servable("model", model, (3,), **reported)


def test_what_cannot_be_coded_says_why():
    ids = make_servable("model", lambda x: x["ids"] * 1.0, {"ids": (2,)}, datatype="INT64")
    assert ids.uncodable == "input 'ids' is INT64, and codes mix floats (FP32) only"
    labels = make_servable("model", lambda x: x.argmax(1), (3,))
    assert labels.uncodable == "output 'output' is INT32, and codes mix floats (FP32) only"
    assert make_servable("model", heads, {"a": (2, 2), "b": (4,)}).uncodable is None


def test_a_label_of_any_output_that_differs_is_a_disagreement():
    """The first output is large and always the same; what is decoded of the second is not."""

    def model(x):
        sure = jnp.ones((len(x["a"]), 3)) * jnp.array([1e3, 0, 0])
        return {"sure": sure, "unsure": jnp.sin(3 * x["a"]) + x["b"]}

    servable = make_servable("model", model, {"a": (4,), "b": (4,)})
    rng, expected = np.random.default_rng(0), []
    x = servable.inputs.pack({name: rng.normal(size=(400, 4)).astype("f4") for name in "ab"})
    for form in (servable.outputs.form, None):
        coder = Coder(NeRCC(2, 4, points="interleaved"), form=form)
        accuracy = Accuracy(max_disagreement=0.05)
        decoding = calibrate_decoding(coder, servable.model, x, accuracy)
        expected.append(decoding.calibrated[2].share(max(decoding.limit(2), 0.0)))
    assert expected[0] > 0.5 > 0.1 > expected[1]
