"""Codes to files and back: every bit, and every way in which a file is no code."""

import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matrices
import numpy as np
import pytest

import nercc_jax as nj
from nercc_jax.arrays import NO_CHECKSUM, read_checked, write_checked
from nercc_jax.pools import DevicePool
from nercc_jax.rows import run_rows

K, N = 3, 7
# No short decimal says these.
ODD = {
    "lambda_enc": np.pi * 1e-9,
    "lambda_dec": np.exp(-12.3),
    "gap_exponent": -1 / 3,
    "end_penalty": 1e5 / 7,
}
CODES = {
    **{
        layout: lambda layout=layout: nj.NeRCC(K, N, points=layout, **ODD)
        for layout in matrices.LAYOUTS
    },
    "published": lambda: nj.NeRCC(K, N, lambda_enc=0.0, lambda_dec=1e-7),
    "exact": lambda: nj.NeRCC(K, N, lambda_dec=1e-3, points="interleaved", exact=True),
    "untuned": lambda: nj.NeRCC(K, N),
    "own-points": lambda: nj.NeRCC(K, N, points=(np.cbrt([-0.3, 0.01, 0.7]), np.sin(np.arange(N)))),
    "berrut": lambda: nj.Berrut(K, N, points="approxifer"),
    "berrut-spline": lambda: nj.codes.BerrutSpline(K, N, lambda_dec=np.exp(-9.1), ends="natural"),
    "lagrange": lambda: nj.Lagrange(K, N, degree=2),
    "learned": lambda: matrices.learned(K, N),
    "replication": lambda: nj.Replication(K, N),
    "uncoded": lambda: nj.Uncoded(4),
    "parity": lambda: nj.Parity(6, 7),
}


@pytest.mark.parametrize("name", CODES)
def test_a_code_comes_back_to_the_last_bit(name, dtype, tmp_path):
    code, path = CODES[name](), tmp_path / "code.json"
    nj.save_code(path, code)
    loaded = nj.load_code(path)
    assert type(loaded) is type(code)
    assert jax.tree.structure(loaded) == jax.tree.structure(code), "static numbers too"
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(code), strict=True):
        assert ours.dtype == theirs.dtype == dtype
        np.testing.assert_array_equal(ours, theirs)
    # Its matrices are functions of these, compiled for a second or two each.
    np.testing.assert_array_equal(loaded.worker_models, code.worker_models)


def test_the_file_says_what_it_is(tmp_path):
    path = tmp_path / "code.json"
    about = {"model": "lenet", "objective": 0.5, "stragglers": [0, 1, None], "points": True}
    nj.save_code(path, CODES["chebyshev"](), about)
    content = json.loads(path.read_text())
    assert {"code", "numbers", "dtypes", "about"} == content.keys() - {
        "format",
        "version",
        "checksum",
    }
    assert (content["format"], content["version"], content["code"]) == (
        "nercc-jax code",
        1,
        "NeRCC",
    )
    assert (content["numbers"]["num_data"], content["numbers"]["num_workers"]) == (K, N)
    assert np.float32(content["numbers"]["lambda_dec"]) == np.float32(ODD["lambda_dec"])
    assert set(content["dtypes"]) == {"alpha", "beta", *ODD}
    assert nj.codes.code_card(path) == about
    nj.save_code(str(path), CODES["uncoded"]())
    assert nj.codes.code_card(str(path)) == {}
    assert isinstance(nj.load_code(str(path)), nj.Uncoded), "written over"


def test_a_wide_code_is_read_narrow(tmp_path):
    path = tmp_path / "code.json"
    with jax.enable_x64(True):
        wide = CODES["own-points"]()
        nj.save_code(path, wide)
        points = np.asarray(wide.beta)
    narrow = nj.load_code(path)
    assert narrow.beta.dtype == jnp.float32
    np.testing.assert_array_equal(narrow.beta, points.astype("float32"))


def edited(path, **changes):
    """Writes a sound file with entries replaced or (None) left out; "numbers.beta" is inside."""
    nj.save_code(path, CODES["chebyshev"]())
    content = json.loads(path.read_text())
    del content["checksum"]
    for name, value in changes.items():
        *outer, last = name.split(".")
        place = content[outer[0]] if outer else content
        if value is None:
            del place[last]
        else:
            place[last] = value
    path.write_text(json.dumps(content))


def test_a_file_from_before_a_number_was_there(tmp_path):
    path = tmp_path / "code.json"
    edited(path, **{"numbers.exact": None})
    assert nj.load_code(path).exact is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "does not say 'format': 'nercc-jax code'"),
        ({"format": None}, "it is no file of a code"),
        ({"version": 2}, "is of version 2; this nercc-jax reads 1"),
        ({"version": None}, "is of version None"),
        (
            {"code": "Magic"},
            "holds a 'Magic'; known: Berrut, BerrutSpline, Lagrange, LearnedDecoder",
        ),
        ({"code": ["NeRCC"]}, r"holds a \['NeRCC'\]"),
        ({"about": None}, r"entries \['code', 'dtypes', 'numbers'\], and a file of a code has"),
        ({"abouts": {}}, r"entries \['about', 'abouts', 'code'.*and a file of a code has"),
        ({"checksum": "none"}, "has no checksum"),
        ({"numbers": None, "dtypes": None}, r"has the entries \['about', 'code'\]"),
        ({"numbers.lambda_dec": None}, "holds no sound NeRCC: 'lambda_dec'"),
        ({"numbers.num_data": None}, "holds no sound NeRCC: .*num_data"),
        ({"numbers.beta": None, "dtypes.beta": None}, "holds no sound NeRCC: its numbers are"),
        ({"numbers.lambda_enc": -1e-3}, "lambda_enc must be 0 or positive"),
        ({"numbers.lambda_enc": float("nan")}, "lambda_enc must be 0 or positive"),
        ({"numbers.end_penalty": [1.0, 2.0]}, "end_penalty must be a scalar"),
        ({"numbers.beta": [0.1, 0.2]}, r"beta must have shape \(7,\), not \(2,\)"),
        ({"numbers.alpha": [0.1, 0.2, 1.2]}, "alpha must lie in"),
        ({"numbers.alpha": ["a", "b", "c"]}, "holds no sound NeRCC"),
        ({"numbers.exact": "yes"}, "exact must be True or False, not 'yes'"),
        ({"numbers.degree": 2}, "holds no sound NeRCC: .*degree"),
        ({"numbers": 3}, "holds no sound NeRCC"),
        ({"dtypes": []}, "holds no sound NeRCC"),
        ({"dtypes.beta": "float99"}, "holds no sound NeRCC"),
    ],
)
def test_a_file_that_is_no_code(changes, message, tmp_path, untyped):
    path = tmp_path / "code.json"
    edited(path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        nj.load_code(path)
    assert "code.json" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"lambda: 3", "is no JSON, so no file of a code"),
        (b"\xff\xfe\x00", "is no JSON"),
        (b"", "is no JSON"),
        (b"[1, 2]", "does not say 'format'"),
        (b'{"a": 1}', "does not say 'format'"),
        (b"null", "does not say 'format'"),
    ],
)
def test_another_file(content, message, tmp_path):
    path = tmp_path / "thing.json"
    path.write_bytes(content)
    for read in (nj.load_code, nj.codes.code_card):
        with pytest.raises(ValueError, match=rf"thing\.json {message}"):
            read(path)


class Mine(nj.AbstractCode):
    """Someone's own code; `renamed` calls itself as one of ours does."""

    num_data: int = eqx.field(static=True)
    num_workers: int = eqx.field(static=True)

    def encoder_matrix(self):
        return jnp.eye(2)

    def decoder_matrix(self, available):
        return jnp.eye(2)

    def recovered(self, available):
        return available


renamed = type("Uncoded", (Mine,), {"__module__": __name__})


@pytest.mark.parametrize(
    ("code", "about", "error", "message"),
    [
        (lambda: nj.NeRCC(K, N, lambda_dec=np.inf), {}, ValueError, "lambda_dec of this code"),
        (lambda: Mine(2, 2), {}, ValueError, "Mine is none of .* by eqx.tree_serialise"),
        (lambda: renamed(2, 2), {}, ValueError, "Uncoded is none of the codes"),
        (lambda: nj.Uncoded(2), {"x": object()}, TypeError, "not JSON serializable"),
        (lambda: nj.Uncoded(2), {"x": np.nan}, ValueError, "not JSON compliant"),
    ],
)
def test_what_cannot_be_saved_leaves_the_file_alone(code, about, error, message, tmp_path):
    path = tmp_path / "code.json"
    path.write_text("mine")
    with pytest.raises(error, match=message):
        nj.save_code(path, code(), about)
    assert path.read_text() == "mine"


def test_a_file_is_there_whole_or_as_it_was(tmp_path, monkeypatch):
    def fails(file):
        raise OSError("the disk is full")

    path, texts = tmp_path / "numbers", [f"{n} {NO_CHECKSUM}".encode() for n in ("one", "two")]
    write_checked(path, texts[0])
    written = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fails)
        with pytest.raises(OSError, match="full"):
            write_checked(path, texts[1])
    assert path.read_bytes() == written
    write_checked(path, texts[1])
    assert read_checked(path, "").startswith(b"two nercc-sha256:")
    assert list(tmp_path.iterdir()) == [path]


def test_a_checksum_among_others(tmp_path):
    """A caller's data may hold the checksums of other files."""
    path = tmp_path / "code.json"
    nj.save_code(path, CODES["berrut"]())
    about = json.loads(path.read_text())
    nj.save_code(path, CODES["lagrange"](), about)
    assert nj.codes.code_card(path) == about
    assert isinstance(nj.load_code(path), nj.Lagrange)


def test_an_edited_code_is_read_once_its_checksum_is_gone(tmp_path):
    path = tmp_path / "code.json"
    nj.save_code(path, CODES["exact"]())
    path.write_text(path.read_text().replace('"exact": true', '"exact": false'))
    with pytest.raises(ValueError, match="if you edited it, remove its entry 'checksum'"):
        nj.load_code(path)
    lines = [line for line in path.read_text().splitlines() if '"checksum"' not in line]
    path.write_text("\n".join(lines))
    assert nj.load_code(path).exact is False


# Damage.

ROWS = np.random.default_rng(8).uniform(-1, 1, (40, 2))


def a_code(folder):
    path = folder / "code.json"
    nj.save_code(path, CODES["own-points"](), {"of": "a test"})
    return path, lambda: nj.load_code(path)


def a_run(folder, name):
    options = {"num_workers": 2, "tolerance": 0.0, "folder": folder / "run", "resume": True}
    return folder / "run" / name, lambda: run_rows(np.sin, ROWS, DevicePool, **options)


DAMAGED = {
    "code": a_code,
    "manifest": lambda folder: a_run(folder, "manifest.json"),
    "part": lambda folder: a_run(folder, "part-000000.npz"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_refused_by_name(kind, tmp_path):
    """Every fourth is cut, the others have a flipped bit."""
    path, read = DAMAGED[kind](tmp_path)
    read()
    whole, random = path.read_bytes(), np.random.default_rng(0)
    for case in range(120):
        place, bit = int(random.integers(len(whole))), 1 << int(random.integers(8))
        rest = bytes([whole[place] ^ bit]) + whole[place + 1 :] if case % 4 else b""
        path.write_bytes(whole[:place] + rest)
        with pytest.raises(ValueError, match=path.name) as error:
            read()
        assert type(error.value) is ValueError
        assert "restore it from a copy, or" in str(error.value), "says the way out"
    path.write_bytes(whole)
    read()


def test_a_part_that_is_missing_is_named(tmp_path):
    path, read = a_run(tmp_path, "part-000000.npz")
    read()
    path.unlink()
    with pytest.raises(ValueError, match=r"part-000000\.npz is missing; restore it"):
        read()


def test_a_code_that_is_shipped_has_its_checksum():
    folder = Path(nj.__file__).parent / "cli" / "codes"
    paths = list(folder.glob("*.json"))
    assert paths
    for path in paths:
        read_checked(path, "")
        nj.load_code(path)
