"""Codes inside users' own programs: every way to run them, and any value of a straggler.

`check_code` holds each code to its own matrices; here the oracle is the textbook's (`matrices.py`).
"""

import functools

import equinox as eqx
import extending
import jax
import jax.numpy as jnp
import matrices
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from nercc_jax import (
    AbstractCode,
    Berrut,
    Lagrange,
    NeRCC,
    Parity,
    Replication,
    Scheme,
    Uncoded,
    coded_inference,
)
from nercc_jax.codes import BerrutSpline, decode_groups
from nercc_jax.evaluation import Answers

GROUPS, FEATURES, OUTPUTS = 8, 3, 4
CODES = {
    "nercc": lambda: NeRCC(4, 8),
    "nercc-exact": lambda: NeRCC(4, 8, lambda_dec=1e-3, points="interleaved", exact=True),
    "berrut": lambda: Berrut(4, 8),
    "berrut-spline": lambda: BerrutSpline(4, 8, lambda_dec=1e-4, ends="natural"),
    "lagrange": lambda: Lagrange(4, 8),
    "replication": lambda: Replication(4, 8),
    "parity": lambda: Parity(4, 8),
    "uncoded": lambda: Uncoded(4),
    "learned": lambda: matrices.learned(4, 8),
    "own": lambda: extending.MovingAverages(4, 8),
}
# Programs of the others differ in the matrix only, which `check_code` looks at: CI runs them.
FEW = ("nercc", "berrut", "parity")
every_code = pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in CODES]
)
random = np.random.default_rng(1)
WEIGHTS = np.linspace(-1, 1, FEATURES * OUTPUTS).reshape(FEATURES, OUTPUTS).astype("float32")
X = random.normal(size=(GROUPS, 4, FEATURES)).astype("float32")
# What a loss weighs predictions by.
SLOPE = random.normal(size=(GROUPS, 4, OUTPUTS)).astype("float32")
BAD = (np.nan, np.inf, -np.inf, 1e30)


def model(x):
    return jnp.tanh(x @ WEIGHTS)


@functools.cache
def case(name):
    """A code, answers, and masks of groups; what is decoded, and its slope in the answers.

    One group has an answer that is not finite, which makes a straggler; some data points are lost.
    """
    code, drawn = CODES[name](), np.random.default_rng(2)
    y = drawn.normal(size=(GROUPS, code.num_workers, OUTPUTS)).astype("float32")
    masks = drawn.random(y.shape[:2]) < 0.7
    masks[0], masks[:, -1] = True, True
    y[0, 2, 1] = np.inf
    responded = masks & np.isfinite(y).all(axis=2)
    clean = np.where(responded[..., None], y, 0)
    decoders = np.stack([matrices.decoder_matrix(code, mask) for mask in responded])
    kept = decoders.any(axis=2)
    predictions = np.where(kept[..., None], decoders @ clean.astype(float), np.nan)
    slope = np.swapaxes(decoders, 1, 2) @ np.where(kept[..., None], SLOPE, 0)
    return code, y, masks, predictions, slope


def mesh_of(kind=AxisType.Auto, devices=4):
    return jax.make_mesh((devices,), ("w",), axis_types=(kind,), devices=jax.devices()[:devices])


def close(got, wanted, tolerance=1e-5):
    np.testing.assert_allclose(
        got, wanted, rtol=0, atol=tolerance * max(1, np.nanmax(np.abs(wanted)))
    )


def alone(code, y, mask):
    decoded = code.try_decode(y, mask)
    return decoded.predictions, decoded.recovered


def scanned(code, y, masks):
    step = jax.checkpoint(lambda count, row: (count + 1, alone(code, *row)))
    return jax.lax.scan(step, 0, (y, masks))[1]


def spread(code, y, masks):
    """By group, with the check of what varies, which JAX recommends, and is the default."""
    body = jax.vmap(functools.partial(alone, code))
    return jax.shard_map(
        body, mesh=mesh_of(), check_vma=True, in_specs=(P("w"), P("w")), out_specs=P("w")
    )(y, masks)


def nested(code, y, masks):
    halves = (jnp.reshape(each, (2, -1, *each.shape[1:])) for each in (y, masks))
    found = jax.vmap(jax.vmap(functools.partial(alone, code)))(*halves)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), found)


def by_sets(code, y, masks):
    decoded = decode_groups(code, y, masks)
    return decoded.predictions, decoded.recovered


WAYS = {
    "vmap": lambda code, y, masks: jax.vmap(functools.partial(alone, code))(y, masks),
    "vmap of vmap": nested,
    "groups": by_sets,
    "scan of checkpoint": scanned,
    "shard_map": spread,
}


@functools.cache
def program(way):
    """Predictions, who is recovered, and the gradients in a code and in answers: one program."""

    def total(parts, masks):
        predictions, recovered = WAYS[way](*parts, masks)
        known = jnp.where(recovered[..., None], predictions, 0)
        return jnp.sum(known * SLOPE), (predictions, recovered)

    return eqx.filter_jit(eqx.filter_value_and_grad(total, has_aux=True))


@pytest.mark.parametrize("way", WAYS)
@every_code
def test_every_way_is_the_textbooks_whatever_stragglers_say(name, way):
    code, y, masks, wanted, slope = case(name)
    run = program(way)
    clean = run((code, jnp.asarray(y)), masks)
    (_, (found, recovered)), (in_code, in_answers) = clean
    close(found, wanted)
    np.testing.assert_array_equal(recovered, ~np.isnan(wanted).all(axis=2))
    close(in_answers, slope)
    np.testing.assert_array_equal(np.asarray(in_answers)[~masks], 0)
    _, (plain, _) = program("vmap")((code, jnp.asarray(y)), masks)
    for mine, theirs in zip(jax.tree.leaves(in_code), jax.tree.leaves(plain), strict=True):
        assert np.isfinite(mine).all()
        close(mine, theirs, 2e-4)  # other programs round otherwise
    for bad in BAD:
        spoilt = jnp.where(masks[..., None], y, jnp.asarray(bad, y.dtype))
        again = jax.tree.leaves(run((code, spoilt), masks))
        for mine, theirs in zip(again, jax.tree.leaves(clean), strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("sets", [1, 3, GROUPS])
def test_groups_may_share_their_sets(sets, traced):
    """Few sets are looked up, one counts for all groups, many are made at once in a program."""
    code, y, masks, *_ = case("nercc")
    masks = np.resize(masks[1 : 1 + sets], (GROUPS, code.num_workers))
    run = eqx.filter_jit(decode_groups) if traced else decode_groups
    found = run(code, y, masks[:1] if sets == 1 else masks)
    responded = masks & np.isfinite(y).all(axis=2)
    np.testing.assert_array_equal(found.responded, responded)
    for group, mask in enumerate(responded):
        exact = matrices.decoder_matrix(code, mask)[:, mask] @ y[group, mask]
        close(found.predictions[group], exact)
    infer = coded_inference(model, code)
    coded = np.tanh(np.einsum("nk,gkd->gnd", matrices.encoder_matrix(code), X) @ WEIGHTS)
    exact = [matrices.decoder_matrix(code, m) @ each for m, each in zip(masks, coded, strict=True)]
    close((jax.jit(infer) if traced else infer)(X, masks), np.stack(exact))


def test_vmap_makes_more_groups_of_one_program():
    """Not conditions and loops over groups, of which each does what any of them needs."""
    code, y, masks, *_ = case("nercc")
    groups, each = (
        jax.jit(way).lower(code, y, masks).compile().memory_analysis().temp_size_in_bytes
        for way in (by_sets, WAYS["vmap"])
    )
    assert each <= groups


def test_codes_of_which_each_has_a_group():
    codes = [NeRCC(4, 8, lambda_dec=each) for each in (1e-3, 1e-1)]
    leaves = [eqx.filter(code, eqx.is_array) for code in codes]
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *leaves)
    rest = eqx.filter(codes[0], eqx.is_array, inverse=True)
    y, mask = X[0, :, :1].repeat(2, axis=0), jnp.arange(8) != 2
    found = jax.jit(jax.vmap(lambda own: eqx.combine(own, rest).decode(y, mask)))(stacked)
    close(found, np.stack([matrices.decoder_matrix(code, mask) @ y for code in codes]))


@pytest.mark.parametrize(
    "name", [n if n in ("nercc", "berrut") else pytest.param(n, marks=pytest.mark.slow)
             for n in CODES if n != "nercc-exact"]  # which jumps where a beta leaves its alpha
)  # fmt: skip
def test_derivatives_along_any_direction_are_central_differences(name):
    """Of first and second order, moving all of a code's numbers and the answers at once."""
    with jax.enable_x64(True):
        code, y, masks, *_ = case(name)
        code = CODES[name]()
        if hasattr(code, "beta"):  # at the ends of the range there is one side only
            inner = 0.9 * code.alpha, 0.9 * code.beta
            code = eqx.tree_at(lambda c: (c.alpha, c.beta), code, inner)
        leaves, rest = eqx.partition(code, eqx.is_inexact_array)
        drawn = np.random.default_rng(3)
        along = jax.tree.map(lambda leaf: drawn.normal(size=leaf.shape) * leaf, leaves)
        turn = drawn.normal(size=y.shape)

        def total(step, y):
            moved = jax.tree.map(lambda leaf, way: leaf + 0.01 * step * way, leaves, along)
            found, kept = WAYS["vmap"](eqx.combine(moved, rest), y + step * turn, masks)
            return jnp.sum(
                jnp.where(kept[..., None], jnp.sin(jnp.where(kept[..., None], found, 0)), 0)
            )

        slope = jax.grad(total)
        both = jax.jit(lambda s, y: (total(s, y), *jax.jvp(lambda s: slope(s, y), (s,), (1.0,))))
        step = 1e-5
        clean = jnp.asarray(np.where(masks[..., None], y, 0), float)
        found, above, below = (both(each, clean) for each in (0.0, step, -step))
        for order in (0, 1):
            wanted = (above[order] - below[order]) / (2 * step)
            np.testing.assert_allclose(found[order + 1], wanted, rtol=1e-4, atol=1e-5)
        for bad in BAD:
            assert both(0.0, jnp.where(masks[..., None], clean, bad)) == found


def test_forward_mode_where_all_else_is_constant():
    """A program that holds answers and mask as constants gave NaN, by a product with zeros."""
    code, mask = NeRCC(9, 30, lambda_dec=1e-4), np.arange(30) % 7 != 3
    y = np.random.default_rng(0).normal(size=(30, 1000)).astype("float32")

    def loss(lambda_dec):
        moved = eqx.tree_at(lambda code: code.lambda_dec, code, lambda_dec)
        return jnp.sum(moved.decode(y, mask) ** 2)

    forward = jax.jit(lambda v: jax.jvp(loss, (v,), (jnp.ones_like(v),))[1])(code.lambda_dec)
    np.testing.assert_allclose(forward, jax.grad(loss)(code.lambda_dec), rtol=1e-4)


# -- Calls ----------------------------------------------------------------------------------------


@functools.cache
def whole(name):
    """A code, a mask under which nothing is lost; answers of the model, and predictions."""
    code = CODES[name]()
    mask = np.arange(code.num_workers) != (-1 if name == "uncoded" else 1)
    answers = np.tanh(np.einsum("nk,gkd->gnd", matrices.encoder_matrix(code), X) @ WEIGHTS)
    predictions = matrices.decoder_matrix(code, mask) @ answers
    answers[:, ~mask] = np.nan  # what no worker sent must show nowhere
    return code, mask, answers.astype("float32"), predictions


@every_code
def test_methods_are_jitted_as_functions_are(name):
    code, mask, y, wanted = whole(name)
    close(jax.jit(code.decode)(y[0], mask), wanted[0])
    assert jax.jit(code.encode)(X[0]).shape == (code.num_workers, FEATURES)
    assert hash(code.decode) == hash(code.decode)
    assert code.decode == code.decode
    assert code.decode not in (CODES[name]().decode, code.encode)
    # Within a trace, of known numbers and of traced ones.
    decode = jax.checkpoint(code.decode)
    close(jax.jit(lambda y: decode(y, mask) + decode(y, mask))(y[0]), 2 * wanted[0])
    donating = jax.jit(code.decode, donate_argnums=0)
    given = jnp.asarray(np.tile(y[0], (1, 2)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # of what cannot be reused
        close(donating(given, mask)[:, :OUTPUTS], wanted[0])


def test_programs_close_over_answers():
    """What is known while something else is traced is part of the program."""
    code, mask, y, wanted = whole("nercc")
    masks = np.broadcast_to(mask, (GROUPS, len(mask)))
    different = masks & ~np.eye(GROUPS, len(mask), dtype=bool)
    each = decode_groups(code, y, different).predictions
    answers = Answers(code, jnp.asarray(y), jnp.asarray(wanted, "float32"))
    programs = [
        lambda: (decode_groups(code, y, different).predictions, each),
        lambda: (code.decode(y[0], mask), wanted[0]),
        lambda: (decode_groups(code, y, masks).predictions, wanted),
        lambda: (answers.decode_sets(jnp.asarray(mask[None])).predictions[0], wanted),
    ]
    for program in programs:
        close(*jax.jit(program)())


@pytest.mark.parametrize("way", ["eager", "jit", "vmap", "grad", "scan", "checkpoint", "code"])
def test_inference_in_whatever_is_traced(way):
    code, mask, _, wanted = whole("berrut")
    run, x = coded_inference(model, code), X[0]
    if way == "grad":
        encoder, decoder = matrices.encoder_matrix(code), matrices.decoder_matrix(code, mask)
        slope = decoder.sum(0)[:, None] / np.cosh(encoder @ x @ WEIGHTS) ** 2
        close(
            jax.grad(lambda x: jnp.sum(run(x, mask)))(jnp.asarray(x)), encoder.T @ slope @ WEIGHTS.T
        )
        return
    ways = {
        "eager": lambda: run(x, mask),
        "jit": lambda: jax.jit(lambda x: run(x, mask))(x),
        "vmap": lambda: jax.vmap(lambda x: run(x, mask))(x[None])[0],
        "scan": lambda: jax.lax.scan(lambda _, x: (None, run(x, mask)), None, x[None])[1][0],
        "checkpoint": lambda: jax.checkpoint(lambda x: run(x, mask))(x),
        "code": lambda: eqx.filter_jit(lambda code: coded_inference(model, code)(x, mask))(code),
    }
    close(ways[way](), wanted[0])


def test_matrices_that_are_kept_belong_to_a_codes_numbers_and_to_who_responded():
    code, mask = NeRCC(4, 8, lambda_dec=1e-3), np.arange(8) != 2
    y = X[0, :, :2].repeat(2, axis=0)
    for each in (code, NeRCC(4, 8, lambda_dec=1.0), Berrut(4, 8)):
        close(each.decode(y, mask), matrices.decoder_matrix(each, mask) @ y)
    for _ in range(2):
        decoded = coded_inference(jnp.sin, Uncoded(4), with_status=True)(X[0], np.arange(4) != 1)
        np.testing.assert_array_equal(decoded.recovered, np.arange(4) != 1)
        np.testing.assert_array_equal(np.isnan(decoded.predictions).all(1), ~decoded.recovered)


class Drawn(AbstractCode):
    """Random combinations, drawn from a key that is a leaf."""

    num_data: int = eqx.field(static=True)
    num_workers: int = eqx.field(static=True)
    key: Array

    def encoder_matrix(self):
        return jax.random.normal(self.key, (self.num_workers, self.num_data))

    def decoder_matrix(self, available):
        return jnp.linalg.pinv(jnp.where(jnp.asarray(available)[:, None], self.encoder_matrix(), 0))

    def recovered(self, available):
        return jnp.broadcast_to(jnp.sum(available) >= self.num_data, (self.num_data,))


def test_a_users_code_with_a_key_and_what_one_raises(untyped):
    code, mask = Drawn(3, 6, jax.random.key(0)), np.arange(6) != 2
    np.testing.assert_allclose(code.decode(code.encode(X[0, :3]), mask), X[0, :3], atol=1e-4)
    assert repr(code).startswith("Drawn(num_data=3, num_workers=6, key=")

    class Broken(Drawn):
        def decoder_matrix(self, available):
            raise ArithmeticError("no such matrix")

    with pytest.raises(ArithmeticError, match="no such matrix"):
        Broken(3, 6, jax.random.key(0)).decode(np.ones((6, 1), "float32"), mask)


@pytest.mark.parametrize("make", [NeRCC, BerrutSpline, Berrut], ids=lambda make: make.__name__)
def test_matrices_of_what_is_known_are_the_hosts(make):
    """Each call outside a program compiled the regression anew: 1.4 s for (20, 8)."""
    code, masks = make(5, 11), np.random.default_rng(0).random((3, 11)) < 0.8
    names = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: names.append(name))
    try:
        _ = [code.encoder_matrix(), *map(code.decoder_matrix, masks)]
    finally:
        jax.monitoring.clear_event_listeners()
    assert not any(name.endswith("backend_compile_duration") for name in names)


# -- Devices --------------------------------------------------------------------------------------


@every_code
def test_workers_spread_by_shard_map(name):
    """Each device runs the model for its own workers; all devices decode."""
    code, mask, _, wanted = whole(name)

    def body(coded):
        y = jax.lax.all_gather(model(coded), "w", tiled=True)
        return code.decode(y, mask)[None]

    run = jax.shard_map(body, mesh=mesh_of(), in_specs=P("w"), out_specs=P("w"))
    found = jax.jit(lambda x: run(code.encode(x)))(X[0])
    for device in range(4):
        close(found[device], wanted[0])
    # Or each device does all for its own groups.
    groups = jax.shard_map(
        jax.vmap(lambda x: code.decode(model(code.encode(x)), mask)),
        mesh=mesh_of(), check_vma=True, in_specs=P("w"), out_specs=P("w"),
    )  # fmt: skip
    close(jax.jit(groups)(X), wanted)


@pytest.mark.parametrize("within", [True, False])
@every_code
def test_explicit_axes(name, within):
    """The default of `jax.make_mesh`: answers lie by worker, or groups by device."""
    code, mask, y, wanted = whole(name)
    mesh = mesh_of(AxisType.Explicit)

    def on_mesh(array, *spec):
        return jax.device_put(array, NamedSharding(mesh, P(*spec)))

    code = jax.tree.map(on_mesh, code)
    with jax.set_mesh(mesh) if within else jax.set_mesh(None):
        by_worker = on_mesh(y[0], "w")
        close(jax.jit(lambda y: code.decode(y, mask))(by_worker), wanted[0])
        close(code.decode(by_worker, on_mesh(mask, "w")), wanted[0])
        close(jax.jit(code.decode)(on_mesh(y[0], None, "w"), mask), wanted[0])
        groups = jax.jit(lambda y: jax.vmap(lambda y: code.decode(y, mask))(y))
        made = groups(by_group := on_mesh(y, "w"))
        close(made, wanted)
        assert made.sharding.spec[0] == "w"
        coded = jax.jit(lambda x: jax.vmap(code.encode)(x))(on_mesh(X, "w"))
        close(np.tanh(np.asarray(coded) @ WEIGHTS)[:, mask], y[:, mask])
        masks = on_mesh(np.broadcast_to(mask, (GROUPS, len(mask))), "w")
        each = jax.jit(lambda y, masks: jax.vmap(code.try_decode)(y, masks).predictions)
        close(each(by_group, masks), wanted)
        slopes = jax.jit(jax.grad(lambda y: jnp.sum(groups(y) * wanted)))(by_group)
        close(slopes, matrices.decoder_matrix(CODES[name](), mask).T @ wanted)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["nercc", "replication", "own"])
def test_inference_on_a_mesh_whose_axis_has_any_name(name, kind):
    code, mask, _, wanted = whole(name)
    mesh = mesh_of(kind)
    close(coded_inference(model, code, mesh=mesh)(X, mask), wanted)
    close(coded_inference(model, code, mesh=mesh, axis="w")(X[0], mask), wanted[0])
    two = jax.make_mesh((2, 2), ("rows", "columns"), axis_types=(kind, kind))
    close(coded_inference(model, code, mesh=two, axis="columns")(X[0], mask), wanted[0])
    message = (
        r"axes \('rows', 'columns'\), and none named 'workers': say by axis= over which of them"
    )
    with pytest.raises(ValueError, match=message):
        coded_inference(model, code, mesh=two)
    # Data points that lie on a mesh of the user's own; few groups are decoded by coordinate.
    lying = jax.device_put(X, NamedSharding(mesh, P("w")))
    infer = coded_inference(model, code, mesh=mesh)
    close(infer(lying, mask), wanted)
    close(coded_inference(model, code)(lying, mask), wanted)
    close(jax.jit(lambda x: infer(x, mask))(lying), wanted)
    close(infer(X[:1], mask[None]), wanted[:1])
    with jax.set_mesh(mesh):
        close(jax.jit(lambda x: coded_inference(model, code)(x, mask))(jnp.asarray(X)), wanted)
        close(coded_inference(model, code)(X, mask), wanted)


@every_code
def test_exports(name, untyped):
    """For platforms that are not there, and any number of groups."""
    code, mask, _, wanted = whole(name)
    infer = coded_inference([model, model] if name == "parity" else model, code)
    (groups,) = jax.export.symbolic_shape("groups")
    shapes = (
        jax.ShapeDtypeStruct((groups, 4, FEATURES), jnp.float32),
        jax.ShapeDtypeStruct((groups, code.num_workers), bool),
    )
    exported = jax.export.export(jax.jit(infer), platforms=("cpu", "tpu", "cuda"))(*shapes)
    assert exported.platforms == ("cpu", "tpu", "cuda")
    masks = np.broadcast_to(mask, (GROUPS, len(mask)))
    close(exported.call(X, masks), wanted)
    close(exported.call(X[:1], masks[:1]), wanted[:1])


def test_programs_are_small_and_a_profile_names_their_steps():
    """Compiling takes as long as they have lines: 1,429 and 2,500 by JAX 0.10.2."""
    code, mask, *_ = whole("nercc")
    infer = coded_inference(model, code)
    text = jax.jit(lambda x, mask: infer(x, mask)).lower(X[0], mask).as_text(debug_info=True)
    for step in ("nercc.encode", "nercc.model", "nercc.decode", "nercc.fit"):
        assert step in text
    code, y, mask = NeRCC(8, 20), np.ones((20, 64), np.float32), np.arange(20) != 2
    decode = jax.jit(lambda y, mask: code.decode(y, mask)).lower(y, mask)
    loss = jax.grad(lambda code, y: code.decode(y, mask).sum(), argnums=(0, 1), allow_int=True)
    assert decode.as_text().count("\n") <= 1500
    assert jax.jit(loss).lower(code, y).as_text().count("\n") <= 2530


# -- Gradients of inference -----------------------------------------------------------------------


def net(x, w):
    return jnp.tanh(x @ w)


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_worker_that_breaks_is_as_one_that_straggles(sharded):
    """In its group's predictions, in who responded, and in gradients; other groups lose nothing.

    The matrix is not the one that was looked up for those who were waited for.
    """
    code, x, w = NeRCC(4, 8, lambda_dec=1e-3), jnp.asarray(X[:2]), jnp.asarray(WEIGHTS)
    largest = jnp.max(jnp.abs(code.encode(x[0])[3]))

    def fragile(batch, w, bad):
        broken = jnp.abs(jnp.abs(batch).max(axis=1) - largest) < 1e-6
        return jnp.where(broken[:, None] & bad, jnp.nan, net(batch, w))

    infer = coded_inference(fragile, code, mesh=mesh_of() if sharded else None, with_status=True)

    def loss(w, mask, bad):
        found = infer(x, mask, w, bad)
        return jnp.sum(jnp.sin(found.predictions)), found

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    everyone, others = np.ones((2, 8), bool), np.array([np.arange(8) != 3, np.arange(8) >= 0])
    got, found = gradient(w, everyone, jnp.asarray(True))
    wanted, alike = gradient(w, others, jnp.asarray(False))
    assert np.isfinite(got).all()
    close(got, wanted)
    close(found.predictions, alike.predictions)
    np.testing.assert_array_equal(found.responded, others)
    eager = infer(x, everyone, w, jnp.asarray(True))
    np.testing.assert_array_equal(eager.responded, others)
    close(eager.predictions, alike.predictions)


def test_a_scheme_is_jitted_as_it_is():
    infer = coded_inference(lambda x: jnp.sin(x), Scheme(NeRCC(4, 8), order="pixels"))
    x, mask = jnp.linspace(0, 1, 12)[:, None], np.arange(8) != 1
    close(jax.jit(infer)(x, mask), infer(x, mask), 1e-6)
