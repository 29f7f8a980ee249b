"""Labelled images as plain arrays: scikit-learn's digits, Hugging Face data sets, image folders.

Nothing is cached here: decoding CIFAR-10's 50,000 images takes about three seconds, and Hugging
Face `datasets` keeps its own copy of what it read from the hub.
"""

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Real

from .hub_files import hub_answers

_CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
_DIGIT_CLASSES = tuple(str(digit) for digit in range(10))


@dataclasses.dataclass(frozen=True)
class Data:
    """Images and labels in memory, in a fixed order.

    `images` are as they were stored, (B, H, W, C): uint8 0 to 255, except the digits of
    scikit-learn, whose grey levels are 0 to 16. `labels` are (B,) int32 indices into `classes`.
    """

    images: Real[np.ndarray, "batch height width channels"]
    labels: Int32[np.ndarray, " batch"]
    classes: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Any) -> "Data":
        """Return the images at `indices`: an integer array, a boolean mask, or a slice."""
        return dataclasses.replace(self, images=self.images[indices], labels=self.labels[indices])

    def shuffled(self, seed: int) -> "Data":
        """Return the same images in an order that depends on `seed` alone."""
        return self.take(np.random.default_rng(seed).permutation(len(self)))

    def batches(self, size: int, *, drop_last: bool = False) -> Iterator["Data"]:
        """Consecutive batches of `size` images; the last may be smaller unless `drop_last`."""
        if size < 1:
            raise ValueError(f"A batch holds at least one image; size={size} was given.")
        stop = len(self) - len(self) % size if drop_last else len(self)
        for start in range(0, stop, size):
            yield self.take(slice(start, start + size))


@dataclasses.dataclass(frozen=True)
class _Source:
    """The location of a data set on Hugging Face: `files` maps a split to the stem of its files."""

    hub: str | None
    files: dict[str, str]
    classes: tuple[str, ...]


_TRAIN_TEST = {"train": "train", "test": "test"}
_SOURCES = {
    "mnist": _Source("ylecun/mnist", _TRAIN_TEST, _DIGIT_CLASSES),
    "cifar10": _Source("uoft-cs/cifar10", _TRAIN_TEST, _CIFAR10_CLASSES),
    # The hub's ImageNet is behind a licence form, so this sample comes from a folder only.
    # Its labels are the standard indices, and its one split serves as the test split too.
    "imagenet1k-sample": _Source(
        None,
        {"validation": "validation", "test": "validation"},
        tuple(str(index) for index in range(1000)),
    ),
}


def list_data() -> tuple[str, ...]:
    """Return the names that `load_data` knows."""
    return ("digits", *_SOURCES, "imagefolder")


def load_data(
    name: str,
    split: str = "test",
    *,
    data_dir: str | Path | None = None,
    size: tuple[int, int] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Data:
    """Load one split of a data set into memory.

    **Arguments:**

    - `name`: `"digits"` (scikit-learn's, 8x8, no download), `"mnist"`, `"cifar10"`,
      `"imagenet1k-sample"`, or `"imagefolder"` (your own: `split/class/image.png`, or
      `class/image.png` without splits).
    - `split`: `"train"` or `"test"` (`"validation"` for ImageNet).
    - `data_dir`: the folder that holds `<name>/<split>*.parquet`; the image folder itself for
      `"imagefolder"`. Without it, MNIST and CIFAR-10 come from the Hugging Face hub.
    - `size`: (height, width) that every image is resized to, shorter edge first and then cut from
      the centre; needed where the images of a folder differ in size.
    - `limit`: keep only the first so many images.
    - `seed`: which train/test split of the digits, 1,347 and 450 images with equal shares of each
      class. The other data sets bring their own splits.

    **Returns:** a `Data`.

    **Raises:** `ValueError` for an unknown name or split, `ImportError` naming the extra to
    install, `FileNotFoundError` naming every place that was searched.
    """
    if name not in list_data():
        raise ValueError(f"Unknown data set {name!r}. Known: {', '.join(list_data())}.")
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` must be at least 1; {limit} was given.")
    if name == "digits":
        data = _load_digits(split, seed)
        data = data if limit is None else data.take(slice(limit))
        return data if size is None else _resized(data, size)
    if name == "imagefolder":
        table, classes = _open_image_folder(data_dir, split)
    else:
        table, classes = _open_parquet(name, split, data_dir)
    return _decode(name, table, classes, size, limit)


def _load_digits(split: str, seed: int) -> Data:
    _check_split("digits", split, ("train", "test"))
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "The data set 'digits' comes with scikit-learn: pip install '.[demo]' in a clone."
        ) from error
    raw: Any = load_digits()
    labels = raw["target"].astype(np.int32)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=450, stratify=labels, random_state=seed
    )
    chosen = train if split == "train" else test
    images = raw["images"][chosen, :, :, None].astype(np.uint8)
    return Data(images, labels[chosen], _DIGIT_CLASSES, "digits")


def _check_split(name: str, split: str, splits: tuple[str, ...]) -> None:
    if split not in splits:
        raise ValueError(
            f"The data set {name!r} has no split {split!r}; it has: {', '.join(splits)}."
        )


def _import_datasets() -> Any:
    try:
        import datasets
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "This data set is read by Hugging Face datasets and Pillow: "
            "pip install '.[data]' in a clone. (The data set 'digits' needs neither.)"
        ) from error
    return datasets


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without progress bars: what lies on disk is read in a second or two."""
    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _open_parquet(name: str, split: str, data_dir: str | Path | None) -> tuple[Any, Any]:
    """Return the rows of a known data set, from a folder or from the hub, and its class names."""
    source = _SOURCES[name]
    _check_split(name, split, tuple(source.files))
    if data_dir is not None:
        files = _find_parquet(name, source.files[split], Path(data_dir))
        datasets = _import_datasets()
        with _quiet(datasets):
            table = datasets.Dataset.from_parquet([str(path) for path in files])
        return table, source.classes
    if source.hub is None:
        raise FileNotFoundError(
            f"The data set {name!r} is not on the hub: give data_dir=... (--data-dir), a folder "
            f"that holds {name}/{source.files[split]}*.parquet (columns: image bytes, label)."
        )
    if not hub_answers():
        # Before it is imported: it would try for half a minute, and then look in its cache.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    datasets = _import_datasets()
    try:
        return datasets.load_dataset(source.hub, split=source.files[split]), source.classes
    except Exception as error:  # the hub client raises anything from OSError to its own kinds
        raise FileNotFoundError(
            f"The data set {name!r} was looked for on the Hugging Face hub as {source.hub!r} "
            f"(and in the cache of `datasets`), without success: {type(error).__name__}: {error} "
            f"Without network, give data_dir=... (--data-dir), a folder that holds "
            f"{name}/{source.files[split]}*.parquet."
        ) from error


def _find_parquet(name: str, stem: str, data_dir: Path) -> list[Path]:
    """Return the files `<stem>*.parquet` below `data_dir`.

    They are in `<name>/`, in the hub's `<name>/data/`, or in `data_dir` itself when that is the
    data set's own folder.
    """
    folders = [data_dir / name, data_dir / name / "data"]
    if data_dir.resolve().name == name:
        folders.append(data_dir)
    for folder in folders:
        files = sorted(folder.glob(f"{stem}*.parquet"))
        if files:
            return files
    places = "\n".join(f"  {folder.resolve()}/{stem}*.parquet" for folder in folders)
    hub = _SOURCES[name].hub
    message = f"No data set {name!r} was found. Looked for:\n{places}"
    if hub is not None:
        message += (
            f"\nLeave data_dir (--data-dir) out to get {hub!r} from Hugging Face's hub, or store "
            f"its files there: hf download --repo-type dataset {hub} --local-dir {data_dir / name}"
        )
    raise FileNotFoundError(message)


def _open_image_folder(data_dir: str | Path | None, split: str) -> tuple[Any, Any]:
    if data_dir is None:
        raise ValueError("'imagefolder' reads your own images: give data_dir=..., their folder.")
    if not Path(data_dir).is_dir():
        raise FileNotFoundError(f"There is no image folder {Path(data_dir).resolve()}.")
    datasets = _import_datasets()
    try:
        with _quiet(datasets):
            splits = datasets.load_dataset("imagefolder", data_dir=str(data_dir))
    except (datasets.exceptions.DatasetGenerationError, FileNotFoundError, ValueError) as error:
        raise FileNotFoundError(
            f"No labelled images were found in {Path(data_dir).resolve()}. "
            "Looked for: <split>/<class>/<image> and <class>/<image>."
        ) from error
    # A folder without splits is one data set, whichever split is asked for.
    if list(splits) == ["train"] and not (Path(data_dir) / "train").is_dir():
        split = "train"
    _check_split("imagefolder", split, tuple(splits))
    table = splits[split]
    if "label" not in table.features:
        raise FileNotFoundError(
            f"The images in {Path(data_dir).resolve()} have no labels: put each class in a folder "
            "of its own, <class>/<image>."
        )
    return table, tuple(table.features["label"].names)


def _decode(
    name: str, table: Any, classes: Any, size: tuple[int, int] | None, limit: int | None
) -> Data:
    """Decode a table's images; `datasets` would do it one row at a time, ten times slower."""
    from datasets import Image

    column = next(c for c, feature in table.features.items() if isinstance(feature, Image))
    if limit is not None:
        table = table.select(range(min(limit, len(table))))
    rows = table.cast_column(column, Image(decode=False))
    images = [_decode_image(row, size) for row in rows[column]]
    shapes = {image.shape[:2] for image in images}
    if len(shapes) != 1:
        raise ValueError(
            f"The images of {name!r} differ in size ({', '.join(map(str, sorted(shapes)[:3]))}, "
            "...): give size=(height, width)."
        )
    channels = max(image.shape[2] for image in images)
    images = [np.broadcast_to(image, (*image.shape[:2], channels)) for image in images]
    labels = np.asarray(rows["label"], dtype=np.int32)
    return Data(np.stack(images), labels, tuple(classes), name)


def _decode_image(row: dict[str, Any], size: tuple[int, int] | None) -> np.ndarray:
    """Return one image, (H, W, 1) if it is grey and (H, W, 3) otherwise, uint8."""
    from PIL import Image

    source = row["path"] if row["bytes"] is None else io.BytesIO(row["bytes"])
    with Image.open(source) as image:
        image = image.convert("L" if image.mode in ("L", "1", "LA", "I", "I;16") else "RGB")
        array = np.asarray(image if size is None else _fit(image, size))
    return array[:, :, None] if array.ndim == 2 else array


def _fit(image: Any, size: tuple[int, int]) -> Any:
    """Resize (bicubic, shorter edge first) and cut (height, width) from the centre."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)


def _resized(data: Data, size: tuple[int, int]) -> Data:
    """Return the digits in another size; bicubic would leave the range of grey levels."""
    import jax

    shape = (len(data), *size, data.images.shape[-1])
    images = jax.image.resize(data.images.astype(np.float32), shape, "bilinear")
    return dataclasses.replace(data, images=np.round(np.asarray(images)).astype(np.uint8))
