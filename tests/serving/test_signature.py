"""Models of several tensors, and of such that cannot be coded: rows of them, names, what fits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from nercc_jax import NeRCC
from nercc_jax.serving import Coder, make_servable
from nercc_jax.serving.adapt._error_estimator import ErrorEstimator
from nercc_jax.serving.protocol._servable import DTYPES, Tensor, Tensors

RNG = np.random.default_rng(0)


def numbers(word, *shape):
    """Of a dtype, its largest and smallest ones too."""
    dtype = jax.dtypes.canonicalize_dtype(DTYPES[word])
    if dtype.kind == "f":
        return RNG.normal(size=shape).astype(dtype)
    if dtype.kind == "b":
        return RNG.integers(0, 2, shape) > 0
    limits = np.iinfo(dtype)
    drawn = RNG.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)
    drawn.flat[:2] = limits.min, limits.max
    return drawn


def heads(x):
    return {"sum": x["a"].sum(axis=(1, 2)), "all": x["a"].reshape(len(x["a"]), -1) + x["b"]}


# Rows.


@pytest.mark.parametrize("words", [("FP32", "FP32"), ("FP32", "INT32"), tuple(DTYPES)], ids=len)
def test_tensors_come_out_of_rows_as_they_went_in(words):
    shapes = [(), (3,), (2, 2)]
    parts = [Tensor(f"t{i}", word, shapes[i % 3]) for i, word in enumerate(words)]
    tensors = Tensors(tuple(parts))
    given = {part.name: numbers(part.datatype, 5, *part.shape) for part in parts}
    rows = tensors.pack(given)
    assert rows.shape == (5, *tensors.shape)
    assert rows.dtype == tensors.dtype == (np.float32 if set(words) == {"FP32"} else np.uint8)
    for found in (tensors.named(rows), jax.jit(tensors.split)(rows)):
        assert list(found) == list(given)
        for name, each in given.items():
            assert found[name].dtype == each.dtype
            np.testing.assert_array_equal(found[name], each)
    again = jax.jit(lambda rows: tensors.join([*tensors.split(rows).values()]))(rows)
    np.testing.assert_array_equal(again, rows)


def test_one_array_is_its_own_row():
    (given,) = numbers("FP32", 1, 5, 3)
    tensors = Tensors((Tensor("input", "FP32", (3,)),), alone=True)
    assert np.shares_memory(tensors.pack(given), given)
    assert tensors.named(given)["input"] is given
    model = heads

    def plain(x):
        return 2 * x

    assert make_servable("plain", plain, (3,)).model is plain
    assert make_servable("heads", model, {"a": (2, 2), "b": (4,)}).model is not model


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": np.zeros((2, 2, 2))}, "['b'] missing"),
        ({"a": np.zeros((2, 2, 2)), "b": np.zeros((2, 4)), "c": 0}, "['c'] unknown"),
        ({"a": np.zeros((2, 2, 2)), "b": np.zeros((3, 4))}, "but 'a' has 2, 'b' has 3"),
        (
            {"a": np.zeros((2, 4)), "b": np.zeros((2, 4))},
            "of shape [-1, 2, 2], not of shape [2, 4]",
        ),
        ({"a": np.zeros((0, 2, 2)), "b": np.zeros((0, 4))}, "not of shape [0, 2, 2]"),
        (
            {"a": np.zeros((2, 2, 2)), "b": np.zeros((2, 4), int)},
            "'b', FP32, of shape [-1, 4], not",
        ),
        ({"a": np.zeros((2, 2, 2)), "b": np.full((2, 4), 1e39)}, "'b': queries [0, 1] are not fin"),
        (np.zeros((2, 2, 2)), "of shape [-1, 4], not a ndarray"),
    ],
)
def test_queries_that_do_not_fit_are_refused(given, message):
    servable = make_servable("heads", heads, {"a": (2, 2), "b": (4,)})
    with pytest.raises(ValueError, match=re.escape(message)):
        servable.inputs.pack(given)


@pytest.mark.parametrize(
    ("word", "given", "message"),
    [
        ("INT8", [[1, 128]], "queries [0] have numbers beyond int8"),
        ("UINT16", [[1, 2], [-1, 0]], "queries [1] have numbers beyond uint16"),
        ("INT64", [[2**31, 0]], "beyond int32, in which JAX computes unless JAX_ENABLE_X64"),
        ("UINT64", [[2**32, 0]], "beyond uint32, in which JAX computes unless JAX_ENABLE_X64"),
        ("INT32", [[1.0, 2.0]], "INT32, of shape [-1, 2], not float64"),
        ("INT32", [[True, False]], "not bool"),
        ("BOOL", [[1, 0]], "BOOL, of shape [-1, 2], not int64"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(word, given, message):
    tensors = Tensors((Tensor("input", word, (2,)),), alone=True)
    with pytest.raises(ValueError, match=re.escape(message)):
        tensors.pack(np.array(given))


def test_integers_that_fit_may_come_in_another_dtype():
    tensors = Tensors((Tensor("input", "INT64", (2,)),), alone=True)
    rows = tensors.pack(np.array([[1, -(2**31)]]))
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
    both = named(lambda x: (x, [x > 0, x.argmax(1)]), output_name="part")
    assert both == [("part_0", "FP32", (3,)), ("part_1.0", "BOOL", (3,)), ("part_1.1", "INT32", ())]
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
        (lambda x: x, {"datatype": "BYTES"}, "'input' cannot be BYTES: JAX, which runs models he"),
        (lambda x: x, {"datatype": "FP16"}, "'input' cannot be FP16: floats come and go as FP32"),
        (lambda x: x, {"datatype": "int32"}, "'input' cannot be int32: there are BOOL, INT8"),
        (lambda x: x, {"datatype": {"ids": "INT8"}}, "but ['ids'] have none"),
        (lambda x: x["a"], {}, "does not run on a batch of one input 'input', FP32, of"),
        (lambda x: x, {"calibration": np.zeros((5, 4))}, "calibration data do not fit: the model"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_served_get_the_reason(model, reported, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_servable("model", model, (3,), **reported)


def test_a_model_of_rows_is_the_model():
    def model(x):
        return {
            "mean": x["image"].mean((1, 2)),
            "word": x["table"][:, 0] + x["ids"],
            "odd": x["ids"] % 2 > 0,
        }

    shapes = {"image": (2, 2), "ids": (), "table": (3,)}
    servable = make_servable("model", model, shapes, datatype={"ids": "INT64", "table": "UINT8"})
    given = {
        "image": numbers("FP32", 4, 2, 2),
        "ids": np.array([1, 2, 3, 2**31 - 1]),
        "table": np.array([[255, 0, 0]] * 4, np.uint8),
    }
    rows = jax.jit(servable.model)(servable.inputs.pack(given))
    found = servable.outputs.named(np.asarray(rows))
    expected = jax.jit(model)({**given, "ids": given["ids"].astype(np.int32)})
    assert set(found) == set(expected)
    for name, each in expected.items():
        assert found[name].dtype == each.dtype
        np.testing.assert_array_equal(found[name], each)
    assert servable.uncodable == "input 'ids' is INT64, and codes mix floats (FP32) only"
    assert make_servable("model", heads, {"a": (2, 2), "b": (4,)}).uncodable is None
    labels = make_servable("model", lambda x: lax.top_k(x, 2), (3,))
    assert labels.uncodable == "output 'output_1' is INT32, and codes mix floats (FP32) only"


# Labels: one for each output.


def test_a_label_of_any_output_that_differs_is_a_disagreement():
    """The first output is large and always the same; what is decoded of the second is not."""

    def model(x):
        sure = jnp.ones((len(x["a"]), 3)) * jnp.array([1e3, 0, 0])
        return {"sure": sure, "unsure": jnp.sin(3 * x["a"]) + x["b"]}

    servable = make_servable("model", model, {"a": (4,), "b": (4,)})
    x = {name: numbers("FP32", 400, 4) for name in ("a", "b")}
    missing = np.array([False, True, True, True])
    wrong = []
    for form in (servable.outputs.form, None):
        estimator = ErrorEstimator(coder := Coder(NeRCC(2, 4, points="interleaved"), form=form))
        estimator.calibrate(servable.model, servable.inputs.pack(x))
        list(estimator.update_expected(2, missing))  # all steps
        own = [1e3, 0, 0, 1, 2, 3, 4]
        assert estimator.agrees(np.array(own), np.array([1e3, 0, 0, 1, 2, 4, 3])) == (form is None)
        assert estimator.agrees(np.array(own), np.array([1e3, 5, 0, 0, 1, 2, 3]))
        wrong.append(
            (
                estimator.expected_error(2, missing).disagreement.max(),
                estimator.error_probability(2).wrong_from.size,
            )
        )
        assert coder.has_error_probability
    (expected, seen), (without, none) = wrong
    assert expected > 0.1 > without
    assert seen > 0 == none
