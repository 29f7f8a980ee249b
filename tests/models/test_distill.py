"""Students: what they cost, how they learn, their files, the command, and what is shipped."""

import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from nercc_models import load_model
from nercc_models.augmentation import Augmentation
from nercc_models.distill import write_student
from nercc_models.distillation import (
    changed_image,
    distill,
    draw_queries,
    make_inputs,
    score_student,
)
from nercc_models.students import (
    SHARE,
    Perceptron,
    as_student,
    list_students,
    load_student,
    load_student_file,
    multiplications,
    plan_cost,
    plan_within,
    student_card,
)

pytest.importorskip("safetensors")


def linear(key, inputs=6, outputs=3):
    """A model that a linear student can be equal to."""
    matrix = jax.random.normal(key, (inputs, outputs)) / np.sqrt(inputs)
    return lambda x: jnp.tanh(0.0 * x[:, :1]) + x @ matrix.astype(x.dtype) + 0.5


class LinearStudent(eqx.Module):
    matrix: jax.Array
    bias: jax.Array

    def __call__(self, x):
        return x @ self.matrix + self.bias


def points(key, count=400, size=6):
    return np.asarray(jax.random.normal(key, (count, size)))


# -- Multiplications -------------------------------------------------------------------------------


def test_multiplications_of_groups_loops_and_branches():
    def grouped(x):
        kernel = jnp.ones((3, 3, 2, 12))  # 8 channels in 4 groups
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4,
        )  # fmt: skip

    def looped(x):
        return jax.lax.scan(lambda c, _: (c @ jnp.ones((5, 5)), None), x, length=7)[0]

    def branched(x):
        wide, narrow = jnp.ones((5, 20)), jnp.ones((5, 9))
        return jax.lax.cond(x.sum() > 0, lambda x: (x @ wide)[:, :9], lambda x: x @ narrow, x)

    def attention(x):
        return jax.jit(lambda x: jnp.einsum("bqh,bkh->bqk", x, x))(x)

    def unbounded(x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ jnp.ones((5, 5)), x)

    assert multiplications(grouped, (6, 6, 8)) == 6 * 6 * 12 * 9 * 2
    assert multiplications(looped, (5,)) == 7 * 25
    assert multiplications(attention, (10, 4)) == 10 * 10 * 4
    assert multiplications(branched, (5,)) == 5 * 20
    with pytest.raises(ValueError, match="a while loop's multiplications cannot be counted"):
        multiplications(unbounded, (5,))


@pytest.mark.parametrize(
    ("shape", "budget", "kind"),
    [
        ((32, 32, 3), 60_000, "convolution"),
        ((28, 20, 1), 8_000, "convolution"),
        ((8, 8, 1), 60_000, "convolution"),
        ((96, 96, 3), 80_000, "convolution"),
        ((50,), 60_000, "perceptron"),
        ((4, 9, 2), 8_000, "perceptron"),
    ],
)
def test_a_plan_uses_its_budget_and_runs(shape, budget, kind):
    plan = plan_within(budget, shape, (2, 5))
    assert plan.kind == kind
    student = as_student(plan, "mine", plan.blank())
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), student.state)
    student = dataclasses.replace(student, state=zeros)
    assert multiplications(student, shape) == plan_cost(plan) <= budget
    factor = plan.widths[0]
    wider = tuple(width // factor * (factor + 1) for width in plan.widths)
    assert plan_cost(dataclasses.replace(plan, widths=wider)) > budget
    batch = jax.ShapeDtypeStruct((3, *shape), jnp.float32)
    assert jax.eval_shape(student, batch).shape == (3, 2, 5)


def test_a_budget_of_next_to_nothing_gives_a_linear_student_or_none():
    assert plan_within(150, (50,), (3,)).widths == ()
    for shape in ((50,), (32, 32, 1)):
        with pytest.raises(ValueError, match=r"may do 100 multiplications, and the smallest does"):
            plan_within(100, shape, (3,))
    with pytest.raises(ValueError, match="or JAX cannot trace it"):
        plan_within(0, (50,), (3,))


# -- What the model is asked -----------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**31),
    num_inputs=st.integers(1, 40),
    count=st.integers(1, 200),
    mixed=st.floats(0, 1),
)
def test_queries_are_affine_sums_over_all_inputs(seed, num_inputs, count, mixed):
    sources, weights = draw_queries(seed, num_inputs, count, mixed)
    assert sources.shape == weights.shape == (count, 4)
    assert sources.min() >= 0
    assert sources.max() < num_inputs
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)
    assert weights.min() >= -0.15 - 1e-6
    times = np.bincount(sources[:, 0], minlength=num_inputs)
    assert times.max() - times.min() <= 1
    single = np.all(weights == [1, 0, 0, 0], axis=1)
    assert single.sum() == count - round(mixed * count)
    for once, again in zip(
        (sources, weights), draw_queries(seed, num_inputs, count, mixed), strict=True
    ):
        np.testing.assert_array_equal(once, again)


def test_a_query_is_the_same_in_every_batch(key):
    """Sums as NumPy makes them; changes belong to the query, not to its place in a batch."""
    images = np.asarray(jax.random.normal(key, (9, 6, 6, 2)))
    sources, weights = draw_queries(3, 9, 12, 0.5)
    number = np.arange(12)
    plain = make_inputs(None, 0, images[sources], weights, number)
    expected = [
        sum(weights[q, i] * images[sources[q, i]] for i in range(4)) for q in range(len(weights))
    ]
    np.testing.assert_allclose(plain, expected, atol=1e-5)

    def change(key, image):
        return changed_image(Augmentation(padding=2, flip=True), key, image)

    changed = make_inputs(change, 0, images[sources], weights, number)
    some = number[[7, 2]]
    again = make_inputs(change, 0, images[sources[some]], weights[some], some)
    np.testing.assert_allclose(again, changed[some], atol=1e-6)
    assert not np.allclose(changed, plain)
    for image in np.asarray(changed)[-6:]:  # singles: each is a shift, or a mirrored one
        assert np.isin(image[2:4, 2:4].round(4), np.append(images.round(4), 0)).all()


# -- Learning --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", ["flax", "equinox"])
def test_a_student_that_can_be_equal_becomes_equal(key, dtype, form):
    model = linear(key)
    x = points(key).astype(dtype)
    student = (
        Perceptron((6,), 3, widths=(), rngs=nnx.Rngs(0))
        if form == "flax"
        else LinearStudent(jnp.zeros((6, 3), dtype), jnp.zeros(3, dtype))
    )
    before = [np.array(leaf) for leaf in jax.tree.leaves(eqx.filter(student, eqx.is_array))]
    found = distill(model, student, x, epochs=12, num_queries=4000, learning_rate=0.02)
    assert found.history[-1]["relative_mse"] < 1e-5 < found.history[0]["relative_mse"]
    assert found.history[-1]["agreement"] > 0.99
    assert (found.train_inputs, found.held_out_inputs) == (380, 20)
    assert found.seconds > 0
    np.testing.assert_allclose(found.student(jnp.asarray(x)), model(jnp.asarray(x)), atol=0.02)
    after = jax.tree.leaves(eqx.filter(student, eqx.is_array))
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new, err_msg="the student that was given has changed")


def test_the_score_is_what_it_says(key):
    x = points(key, 50)
    model, student = linear(key), linear(jax.random.fold_in(key, 1))
    score = score_student(model, student, x, seed=4)
    sources, weights = draw_queries(4, 50, 50, 1.0)
    sums = np.stack([weights[q] @ x[sources[q]] for q in range(50)])
    expected, got = np.asarray(model(x)), np.asarray(student(x))
    variance = np.mean([np.var(column) for column in expected.T])
    np.testing.assert_allclose(
        score.relative_mse, np.mean((expected - got) ** 2) / variance, rtol=1e-4
    )
    assert score.agreement == np.mean(np.argmax(expected, 1) == np.argmax(got, 1))
    mixed, mixed_got = np.asarray(model(sums)), np.asarray(student(sums))
    assert score.mixed_agreement == np.mean(np.argmax(mixed, 1) == np.argmax(mixed_got, 1))
    np.testing.assert_allclose(
        score.mixed_relative_mse, np.mean((mixed - mixed_got) ** 2) / variance, rtol=1e-4
    )
    assert score.total == 50


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, {"num_queries": 50}, "A batch of 128 is more than the 50 queries"),
        (None, {"held_out": 100}, "held_out=100 of 100 inputs"),
        (None, {"mixed": 1.5}, r"mixed=1\.5"),
        (lambda y: y / 0.0, {}, "not all finite"),
        (lambda y: 0 * y, {}, "answers everything alike"),
        (lambda y: y[:, :2], {}, r"has 2 outputs, and the student answers with shape"),
    ],
)
def test_what_cannot_be_learnt_is_refused(key, change, options, message):
    model, x = linear(key), points(key, 100)
    student = Perceptron((6,), 3, widths=(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        distill(lambda x: (change or (lambda y: y))(model(x)), student, x, **options)


# -- Files -----------------------------------------------------------------------------------------


def test_a_student_survives_its_file(key, tmp_path):
    model, x = load_model("lenet5-digits"), np.zeros((60, 32, 32, 1), np.float32)
    x += np.asarray(jax.random.uniform(key, x.shape))
    plan = plan_within(SHARE * multiplications(model, (32, 32, 1)), (32, 32, 1), (10,))
    found = distill(model, plan.build(nnx.Rngs(0)), x, epochs=1, num_queries=64, batch_size=32)
    path = tmp_path / "my-student.safetensors"
    student, card = write_student(path, model, plan, found, x, {"base": "my"})
    assert list_students(tmp_path) == ("my",)
    again = load_student("my", weights_dir=tmp_path)
    np.testing.assert_array_equal(again(x), student(x))
    np.testing.assert_allclose(again(x), found.student(x), rtol=0.02, atol=0.02)
    assert student_card("my", weights_dir=tmp_path) == json.loads(json.dumps(card))
    assert card["score"]["total"] == 60
    with pytest.raises(ValueError, match=r"The student of my takes \(B, 32, 32, 1\); got shape"):
        again(jnp.zeros((2, 28, 28, 1)))
    with pytest.raises(ValueError, match=r"no student of 'other'.*Known: my"):
        load_student("other", weights_dir=tmp_path)
    with pytest.raises(ValueError, match="Known: none"):
        student_card("my", weights_dir=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.safetensors"):
        load_student_file(tmp_path / "none.safetensors")
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(ValueError, match="not the card of a student"):
        load_student_file(path)


# -- `nercc distill` -------------------------------------------------------------------------------

OWN_MODEL = """
import jax.numpy as jnp

def scores(x):
    wide = jnp.tanh(x.reshape(len(x), -1) @ jnp.cos(jnp.arange(12.0 * 400).reshape(12, 400)) / 9)
    return wide @ jnp.sin(jnp.arange(400.0 * 3).reshape(400, 3)) / 10
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command in a folder with a model of one's own, `own_scores:scores`, and its inputs."""
    from commands import invoke

    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_scores.py").write_text(OWN_MODEL)
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.normal(size=(680, 3, 4)).astype(np.float32))
    return lambda *arguments: invoke("distill", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False])
def test_the_command_makes_a_student_of_ones_own_model_or_a_shipped_one(run, tmp_path, own):
    options = "--answers 600 --epochs 2"
    if own:
        options = "--model own_scores:scores --inputs x.npy --epochs 20 --share 0.2"
    result = run(*options.split(), "--output", "s.safetensors")
    assert result.exit_code == 0, result.output
    card = json.loads((tmp_path / "s.json").read_text())
    score = card["score"]
    assert card["multiplications"] <= (0.2 if own else SHARE) * card["base_multiplications"]
    if not own:
        assert "agrees with lenet5-digits" in result.output
        assert (card["data"], score["total"], card["num_queries"]) == ("digits", 450, 600)
        return
    assert "agrees with own_scores:scores on" in result.output
    assert card["base_multiplications"] == 400 * 15
    assert (card["train_inputs"] + card["held_out_inputs"], score["total"]) == (544, 136)
    assert score["agreement"] > 0.5
    assert load_student_file(tmp_path / "s.safetensors")(jnp.ones((2, 3, 4))).shape == (2, 3)
