"""Codes inside users' own programs: their jit, `shard_map`, meshes, exports, scans, donation.

Each program decodes the answers of one group or of several. The oracle is plain: the matrices in
NumPy, the model by hand.
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

from nercc_jax import Berrut, Lagrange, NeRCC, Parity, Replication, Uncoded, coded_inference
from nercc_jax.codes import decode_groups
from nercc_jax.codes._decoding import decode_sets

GROUPS, FEATURES, OUTPUTS = 8, 3, 4
CODES = {
    "nercc": lambda: NeRCC(4, 8),
    "berrut": lambda: Berrut(4, 8),
    "lagrange": lambda: Lagrange(4, 8),
    "replication": lambda: Replication(4, 8),
    "parity": lambda: Parity(4, 8),
    "uncoded": lambda: Uncoded(4),
    "learned": lambda: matrices.learned(4, 8),
    "own": lambda: extending.MovingAverages(4, 8),
}
WEIGHTS = np.linspace(-1, 1, FEATURES * OUTPUTS).reshape(FEATURES, OUTPUTS).astype("float32")
X = np.random.default_rng(1).normal(size=(GROUPS, 4, FEATURES)).astype("float32")
# What a loss weighs predictions by.
SLOPE = np.random.default_rng(2).normal(size=(GROUPS, 4, OUTPUTS)).astype("float32")


def model(x):
    return jnp.tanh(x @ WEIGHTS)


@functools.cache
def case(name):
    """A code, its mask, and for each group: answers, predictions, the loss's slope in answers."""
    code = CODES[name]()
    mask = np.ones(code.num_workers, bool)
    mask[1] = name == "uncoded"
    encoder, decoder = np.asarray(code.encoder_matrix()), np.asarray(code.decoder_matrix(mask))
    answers = np.tanh(np.einsum("nk,gkd->gnd", encoder, X) @ WEIGHTS)
    predictions = np.einsum("kn,gnm->gkm", decoder, answers)
    slopes = np.einsum("kn,gkm->gnm", decoder, SLOPE)
    answers[:, ~mask] = np.nan  # what no worker sent must show nowhere
    return code, mask, answers.astype("float32"), predictions, slopes


def mesh_of(kind):
    return jax.make_mesh((4,), ("w",), axis_types=(kind,), devices=jax.devices()[:4])


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=1e-5)


def check(run, name, *, group=None):
    """`run(y)` decodes all groups (or this one): its values, and its gradient in the answers."""
    _, _, y, wanted, slopes = (
        each if i < 2 else np.asarray(each) for i, each in enumerate(case(name))
    )
    if group is not None:
        y, wanted, slopes = y[group], wanted[group], slopes[group]
    weigh = SLOPE if group is None else SLOPE[group]
    close(run(jnp.asarray(y)), wanted)
    got = jax.jit(jax.grad(lambda y: jnp.sum(run(y) * weigh)))(jnp.asarray(y))
    close(got, slopes)


def check_in_the_code(run, name):
    """`run(code, y)` decodes all groups: its gradient in the code's numbers is the plain one."""
    code, mask, y, _, _ = case(name)
    numbers = [leaf for leaf in jax.tree.leaves(code) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    if not numbers:
        return

    def slope(decode):
        return jax.jit(jax.grad(lambda code: jnp.sum(decode(code, jnp.asarray(y)) * SLOPE)))(code)

    plain = slope(lambda code, y: jax.vmap(lambda y: code.decode(y, mask))(y))
    for a, b in zip(jax.tree.leaves(slope(run)), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.max(np.abs(b), initial=1e-2))


@pytest.mark.parametrize("name", CODES)
def test_groups_spread_by_shard_map(name):
    """With the check of what varies, which JAX recommends, and is the default."""
    code, mask, *_ = case(name)
    spread = functools.partial(
        jax.shard_map, mesh=mesh_of(AxisType.Auto), check_vma=True, out_specs=P("w")
    )

    def decode(code, y):
        body = jax.vmap(lambda y: code.decode(y, mask))
        return spread(body, in_specs=P("w"))(y)

    check(jax.jit(lambda y: decode(code, y)), name)
    check_in_the_code(decode, name)
    masks = jnp.broadcast_to(mask, (GROUPS, len(mask)))
    whole = spread(
        jax.vmap(lambda x, mask: code.try_decode(model(code.encode(x)), mask)),
        in_specs=(P("w"), P("w")),
    )
    made = jax.jit(whole)(X, masks)
    close(made.predictions, case(name)[3])
    assert np.all(made.recovered)


@pytest.mark.parametrize("name", CODES)
def test_workers_spread_by_shard_map(name):
    """Each device runs the model for its own workers; all devices decode."""
    code, mask, *_ = case(name)

    def body(coded):
        y = jax.lax.all_gather(model(coded), "w", tiled=True)
        return code.decode(y, mask)[None]

    run = jax.shard_map(body, mesh=mesh_of(AxisType.Auto), in_specs=P("w"), out_specs=P("w"))
    found = jax.jit(lambda x: run(code.encode(x)))(X[0])
    for device in range(4):
        close(found[device], case(name)[3][0])


@pytest.mark.parametrize(
    ("within", "name"),
    [(True, name) for name in CODES]
    + [(False, name) for name in ("nercc", "parity", "replication")],
)
def test_explicit_axes(name, within):
    """The default of `jax.make_mesh`: answers lie by worker, or groups by device."""
    code, mask, y, wanted, _ = case(name)
    mesh = mesh_of(AxisType.Explicit)

    def on_mesh(array, *spec):
        return jax.device_put(array, NamedSharding(mesh, P(*spec)))

    code = jax.tree.map(on_mesh, code)
    with jax.set_mesh(mesh) if within else jax.set_mesh(None):
        by_worker = on_mesh(y[0], "w")
        close(jax.jit(lambda y: code.decode(y, mask))(by_worker), wanted[0])
        close(code.decode(by_worker, on_mesh(mask, "w")), wanted[0])
        close(jax.jit(code.decode)(on_mesh(y[0], None, "w"), mask), wanted[0])
        by_group = on_mesh(y, "w")
        groups = jax.jit(lambda y: jax.vmap(lambda y: code.decode(y, mask))(y))
        made = groups(by_group)
        close(made, wanted)
        assert made.sharding.spec[0] == "w"
        coded = jax.jit(lambda x: jax.vmap(code.encode)(x))(on_mesh(X, "w"))
        close(np.tanh(np.asarray(coded) @ WEIGHTS)[:, mask], y[:, mask])
        masks = on_mesh(np.broadcast_to(mask, (GROUPS, len(mask))), "w")
        each = jax.jit(lambda y, masks: jax.vmap(code.try_decode)(y, masks).predictions)
        close(each(by_group, masks), wanted)
        slopes = jax.jit(jax.grad(lambda y: jnp.sum(groups(y) * SLOPE)))(by_group)
        close(slopes, case(name)[4])


@pytest.mark.parametrize("name", CODES)
def test_methods_are_jitted_as_functions_are(name):
    code, mask, y, wanted, _ = case(name)
    close(jax.jit(code.decode)(y[0], mask), wanted[0])
    close(jax.jit(code.try_decode)(y[0], mask).predictions, wanted[0])
    assert jax.jit(code.encode)(X[0]).shape == (code.num_workers, FEATURES)
    same, other = CODES[name](), CODES["berrut" if name == "nercc" else "nercc"]()
    assert hash(code.decode) == hash(same.decode)
    assert code.decode == same.decode
    assert code.decode != other.decode
    assert code.decode != code.encode
    # Within a trace, of known numbers and of traced ones.
    twice = jax.jit(
        lambda y: jax.checkpoint(code.decode)(y, mask) + jax.checkpoint(code.decode)(y, mask)
    )
    close(twice(y[0]), 2 * wanted[0])


def test_programs_close_over_answers():
    """What is known while something else is traced is part of the program."""
    code, mask, y, wanted, _ = case("nercc")
    masks = np.broadcast_to(mask, (GROUPS, len(mask)))
    different = masks & ~np.eye(GROUPS, len(mask), dtype=bool)
    each = decode_groups(code, y, different).predictions
    programs = [
        lambda: (decode_groups(code, y, different).predictions, each),
        lambda: (code.decode(y[0], mask), wanted[0]),
        lambda: (decode_groups(code, y, masks).predictions, wanted),
        lambda: (decode_sets(code, jnp.asarray(y), mask[None]).predictions[0], wanted),
    ]
    for program in programs:
        close(*jax.jit(program)())


@pytest.mark.parametrize("name", CODES)
def test_loops_checkpoints_and_donation(name):
    code, mask, y, wanted, _ = case(name)

    def scanned(y):
        step = jax.checkpoint(lambda count, y: (count + 1, code.decode(y, mask)))
        return jax.lax.scan(step, 0, y)[1]

    check(jax.jit(scanned), name)
    donating = jax.jit(code.decode, donate_argnums=0)
    given = jnp.asarray(np.tile(y[0], (1, 2)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # of what cannot be reused
        close(donating(given, mask)[:, :OUTPUTS], wanted[0])


def test_second_derivatives_are_those_of_the_matrix():
    """Of squares: what is differentiated twice is the prediction, and its derivative."""
    with jax.enable_x64(True):
        code, mask = NeRCC(4, 8), np.arange(8) != 2
        y = jnp.sin(jnp.arange(8.0))[:, None]

        def squares(predictions):
            return jnp.sum(predictions**2)

        def by_decoding(lambda_):
            return squares(code.replace(lambda_dec=lambda_).decode(y, mask))

        def by_matrix(lambda_):
            return squares(code.replace(lambda_dec=lambda_).decoder_matrix(mask) @ y)

        got, wanted = (jax.jit(jax.hessian(each))(1e-4) for each in (by_decoding, by_matrix))
        np.testing.assert_allclose(got, wanted, rtol=1e-8)
        slope = jax.jit(jax.grad(by_matrix))
        np.testing.assert_allclose(wanted, (slope(1.0001e-4) - slope(0.9999e-4)) / 2e-8, rtol=1e-4)


@pytest.mark.parametrize("name", CODES)
def test_exports(name, untyped):
    """For platforms that are not there, and any number of groups."""
    code, mask, _, wanted, _ = case(name)
    infer = coded_inference([model, model] if name == "parity" else model, code)
    (groups,) = jax.export.symbolic_shape("groups")
    shapes = (
        jax.ShapeDtypeStruct((groups, 4, FEATURES), jnp.float32),
        jax.ShapeDtypeStruct((groups, code.num_workers), bool),
    )
    exported = jax.export.export(jax.jit(infer), platforms=("cpu", "tpu", "cuda"))(*shapes)
    assert exported.platforms == ("cpu", "tpu", "cuda")
    masks = np.broadcast_to(mask, (GROUPS, len(mask)))
    if name != "parity":  # whose second model would be one of sums
        close(exported.call(X, masks), wanted)
        close(exported.call(X[:1], masks[:1]), wanted[:1])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["nercc", "replication", "own"])
def test_inference_on_a_mesh_whose_axis_has_any_name(name, kind):
    code, mask, _, wanted, _ = case(name)
    mesh = mesh_of(kind)
    close(coded_inference(model, code, mesh=mesh)(X, mask), wanted)
    close(coded_inference(model, code, mesh=mesh, axis="w")(X[0], mask), wanted[0])
    two = jax.make_mesh((2, 2), ("rows", "columns"), axis_types=(kind, kind))
    close(coded_inference(model, code, mesh=two, axis="columns")(X[0], mask), wanted[0])
    with pytest.raises(ValueError, match=r"axes \('rows', 'columns'\), and none named 'workers'"):
        coded_inference(model, code, mesh=two)
    # Data points that lie on a mesh of the user's own.
    lying = jax.device_put(X, NamedSharding(mesh, P("w")))
    infer = coded_inference(model, code, mesh=mesh)
    close(infer(lying, mask), wanted)
    close(coded_inference(model, code)(lying, mask), wanted)
    close(jax.jit(lambda x: infer(x, mask))(lying), wanted)
    with jax.set_mesh(mesh):
        close(jax.jit(lambda x: coded_inference(model, code)(x, mask))(jnp.asarray(X)), wanted)


@pytest.mark.parametrize("on_mesh", [False, True])
def test_ahead_of_time(on_mesh):
    code, mask, _, wanted, _ = case("nercc")
    scale = jax.tree_util.Partial(lambda w, x: jnp.tanh(x @ w), jnp.asarray(WEIGHTS))
    infer = coded_inference(scale, code, mesh=mesh_of(AxisType.Auto) if on_mesh else None)
    shapes = jax.ShapeDtypeStruct(X.shape, X.dtype), jax.ShapeDtypeStruct(mask.shape, bool)
    lowered = infer.lower(*shapes)
    assert "stablehlo" in lowered.as_text()
    compiled = lowered.compile()
    close(compiled(X, mask), wanted)
    other = ~np.eye(8, dtype=bool)[4]
    close(compiled(X, other), infer(X, other))
    with pytest.raises(TypeError):
        compiled(X[:2], mask)


def test_a_profile_names_the_steps():
    code, mask, *_ = case("nercc")
    infer = coded_inference(model, code)
    text = jax.jit(lambda x, mask: infer(x, mask)).lower(X[0], mask).as_text(debug_info=True)
    for step in ("nercc.encode", "nercc.model", "nercc.decode", "nercc.fit"):
        assert step in text


def test_programs_are_small():
    """Compiling takes as long as they have lines: 1,429 and 2,500 by JAX 0.10.2."""
    code, y, mask = NeRCC(8, 20), np.ones((20, 64), np.float32), np.arange(20) != 2
    decode = jax.jit(lambda y, mask: code.decode(y, mask)).lower(y, mask)
    loss = jax.grad(lambda code, y: code.decode(y, mask).sum(), argnums=(0, 1), allow_int=True)
    assert decode.as_text().count("\n") <= 1500
    assert jax.jit(loss).lower(code, y).as_text().count("\n") <= 2530


def test_forward_mode_where_all_else_is_constant():
    """A program that holds answers and mask as constants gave NaN, by a product with zeros."""
    code, mask = NeRCC(9, 30, lambda_dec=1e-4), np.arange(30) % 7 != 3
    y = np.random.default_rng(0).normal(size=(30, 1000)).astype("float32")

    def loss(lambda_dec):
        moved = eqx.tree_at(lambda code: code.lambda_dec, code, lambda_dec)
        return jnp.sum(moved.decode(y, mask) ** 2)

    forward = jax.jit(lambda v: jax.jvp(loss, (v,), (jnp.ones_like(v),))[1])(code.lambda_dec)
    np.testing.assert_allclose(forward, jax.grad(loss)(code.lambda_dec), rtol=1e-4)
