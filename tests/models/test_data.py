"""Loading data: what comes back, the same order for the same seed, and what a failure says."""

import builtins

import numpy as np
import pytest
from PIL import Image

from nercc_models import Data, list_data, load_data


def tiny(count: int = 7) -> Data:
    images = np.arange(count * 4, dtype=np.uint8).reshape(count, 2, 2, 1)
    return Data(images, np.arange(count, dtype=np.int32), ("a", "b"), "tiny")


@pytest.mark.parametrize(("split", "count"), [("train", 1347), ("test", 450)])
def test_digits_are_what_scikit_learn_has(split, count):
    data = load_data("digits", split)
    assert data.images.shape == (count, 8, 8, 1)
    assert data.images.dtype == np.uint8
    assert data.images.max() == 16
    assert data.labels.dtype == np.int32
    assert data.classes == tuple("0123456789")
    # Stratified: each of the ten classes has its share, to within one image in fifty.
    shares = np.bincount(data.labels) / count
    whole = np.bincount(np.concatenate([load_data("digits", s).labels for s in ("train", "test")]))
    np.testing.assert_allclose(shares, whole / whole.sum(), atol=0.02)


def test_digits_splits_are_disjoint_complete_and_depend_on_the_seed():
    from sklearn.datasets import load_digits

    def rows(data):
        return {image.tobytes() for image in data.images}

    train, test = load_data("digits", "train"), load_data("digits", "test")
    everything = load_digits().images.astype(np.uint8)[..., None]
    assert rows(train) | rows(test) == {image.tobytes() for image in everything}
    assert not rows(train) & rows(test)
    np.testing.assert_array_equal(test.images, load_data("digits", "test").images)
    assert not np.array_equal(test.labels, load_data("digits", "test", seed=1).labels)


def test_size_and_limit():
    data = load_data("digits", size=(16, 12), limit=5)
    assert data.images.shape == (5, 16, 12, 1)
    assert data.images.dtype == np.uint8
    assert data.images.max() <= 16


def test_shuffling_depends_on_the_seed_alone_and_keeps_images_with_labels():
    once, again, other = (tiny().shuffled(seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(once.labels, again.labels)
    assert not np.array_equal(once.labels, other.labels)
    np.testing.assert_array_equal(once.images[:, 0, 0, 0] // 4, once.labels)


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [3, 3, 1]), (True, [3, 3])])
def test_batches_cover_the_data_in_order(drop_last, sizes):
    batches = list(tiny().batches(3, drop_last=drop_last))
    assert [len(batch) for batch in batches] == sizes
    labels = np.concatenate([batch.labels for batch in batches])
    np.testing.assert_array_equal(labels, np.arange(sum(sizes)))
    with pytest.raises(ValueError, match="size=0 was given"):
        list(tiny().batches(0))


@pytest.mark.parametrize(
    ("name", "split", "options", "message"),
    [
        ("cifar", "test", {}, "Unknown data set 'cifar'.*" + ".*".join(list_data())),
        *(
            (name, "dev", {}, r"no split 'dev'; it has: .*test")
            for name in ("digits", "mnist", "imagenet1k-sample")
        ),
        ("digits", "test", {"limit": 0}, "`limit` must be at least 1; 0 was given"),
        ("imagefolder", "test", {"data_dir": None}, "give data_dir"),
    ],
)
def test_what_there_is_not_is_refused(name, split, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_data(name, split, **{"data_dir": tmp_path} | options)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "imagenet1k-sample"])
def test_a_missing_folder_names_every_place_searched(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"No data set '{name}' was found") as caught:
        load_data(name, data_dir=tmp_path / name)
    message = str(caught.value)
    stem = "validation" if name == "imagenet1k-sample" else "test"
    for folder in (tmp_path / name / name, tmp_path / name / name / "data", tmp_path / name):
        assert f"{folder}/{stem}*.parquet" in message
    assert ("hf download" in message) == (name != "imagenet1k-sample")
    if name == "imagenet1k-sample":
        with pytest.raises(FileNotFoundError, match=r"give data_dir=.*validation\*\.parquet"):
            load_data(name)


def test_an_unreachable_hub_is_reported_with_its_name(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(FileNotFoundError, match=r"'ylecun/mnist'.*no network.*data_dir"):
        load_data("mnist")


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("digits", "sklearn", "demo"), ("mnist", "datasets", "data"), ("mnist", "PIL", "data")],
)
def test_a_missing_package_names_the_extra(monkeypatch, name, module, extra):
    real_import = builtins.__import__

    def without(wanted, *args, **options):
        if wanted.split(".")[0] == module:
            raise ImportError(f"No module named {module!r}")
        return real_import(wanted, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf"pip install '\.\[{extra}\]'"):
        load_data(name)


def write_images(folder, sizes):
    for label, size in enumerate(sizes):
        (folder / f"class{label}").mkdir(parents=True)
        pixels = np.full((*size, 3), 50 * label, np.uint8)
        Image.fromarray(pixels).save(folder / f"class{label}" / "image.png")


def test_an_image_folder(tmp_path):
    """Without splits and with them, with images of several sizes, not there, and empty."""
    pytest.importorskip("datasets")
    with pytest.raises(FileNotFoundError, match="no image folder"):
        load_data("imagefolder", data_dir=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="No labelled images were found"):
        load_data("imagefolder", data_dir=tmp_path)
    plain, split = tmp_path / "plain", tmp_path / "split"
    write_images(plain, [(8, 8), (8, 8)])
    data = load_data("imagefolder", data_dir=plain)
    assert data.images.shape == (2, 8, 8, 3)
    assert data.classes == ("class0", "class1")
    np.testing.assert_array_equal(data.images[:, 0, 0, 0], 50 * data.labels)
    write_images(split / "train", [(8, 8), (8, 8), (8, 8)])
    write_images(split / "test", [(8, 8), (16, 12), (20, 10)])
    assert len(load_data("imagefolder", "train", data_dir=split)) == 3
    with pytest.raises(ValueError, match=r"differ in size.*give size=\(height, width\)"):
        load_data("imagefolder", "test", data_dir=split)
    data = load_data("imagefolder", "test", data_dir=split, size=(6, 4))
    assert data.images.shape == (3, 6, 4, 3)


def test_the_hubs_parquet_layout_is_read_from_a_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [Image.fromarray(np.full((28, 28), value, np.uint8)) for value in (0, 200)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"image": images, "label": [3, 5]}, features=features)
    (tmp_path / "mnist" / "data").mkdir(parents=True)
    table.to_parquet(tmp_path / "mnist" / "data" / "test-00000-of-00001.parquet")
    data = load_data("mnist", data_dir=tmp_path)
    np.testing.assert_array_equal(data.images[:, 0, 0, 0], [0, 200])
    np.testing.assert_array_equal(data.labels, [3, 5])
