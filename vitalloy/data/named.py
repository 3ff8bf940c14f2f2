"""Published data sets by name: the digits inside scikit-learn, and what torchvision can fetch."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torchvision.datasets

from vitalloy.data.image_set import Arrays, Files, ImageSet, Parts, Wrapped
from vitalloy.errors import DataError, suggest


class _Published(NamedTuple):
    """How torchvision wants to be asked for a data set: the arguments of each part."""

    train: dict[str, Any]
    val: dict[str, Any] | None = None
    test: dict[str, Any] | None = None
    flip: bool = True


_BY_FLAG = {"train": {"train": True}, "test": {"train": False}}
_BY_SPLIT = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE = {**_BY_SPLIT, "val": {"split": "val"}}
_PUBLISHED = {
    "CIFAR10": _Published(**_BY_FLAG),
    "CIFAR100": _Published(**_BY_FLAG),
    "MNIST": _Published(**_BY_FLAG, flip=False),
    "FashionMNIST": _Published(**_BY_FLAG),
    "SVHN": _Published(**_BY_SPLIT, flip=False),
    "STL10": _Published(**_BY_SPLIT),
    "EuroSAT": _Published(train={}),  # published as a whole
    "Flowers102": _Published(**_THREE),
    "OxfordIIITPet": _Published(train={"split": "trainval"}, test={"split": "test"}),
    "Food101": _Published(**_BY_SPLIT),
    "DTD": _Published(**_THREE),
    "GTSRB": _Published(**_BY_SPLIT, flip=False),
    # its "val" is what is reported on, so it is the test part here; 320 pixels are enough for crops of 224
    "Imagenette": _Published(train={"split": "train", "size": "320px"}, test={"split": "val", "size": "320px"}),
}
TORCHVISION_NAMES = tuple(_PUBLISHED)
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it
_FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def read_digits() -> Parts:
    """The 1797 handwritten digits of scikit-learn, 8 x 8 grey, values 0..16 scaled to 0..255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255.0 / 16.0)).astype(np.uint8)
    classes = [str(name) for name in digits.target_names]
    return Parts("digits", ImageSet(Arrays(images, "digits"), digits.target, classes), flip=False)


def data_root() -> Path:
    """Where published data sets are kept: `VITALLOY_DATA`, or `~/.cache/vitalloy`."""
    return Path(os.environ.get("VITALLOY_DATA") or Path("~/.cache/vitalloy").expanduser())


def published_name(name: str) -> str | None:
    """The proper spelling of a torchvision data set that can be read here, or None."""
    return next((known for known in _PUBLISHED if known.lower() == name.lower()), None)


def read_published(name: str, *, download: bool = False) -> Parts:
    """A torchvision data set from `data_root()`, fetched there first if it is missing and `download` is set."""
    known = published_name(name)
    if known is None:
        raise DataError(
            f"torchvision:{name} is not a data set that can be used here.{suggest(name, _PUBLISHED)} "
            f"Known: {', '.join(_PUBLISHED)}."
        )
    published = _PUBLISHED[known]
    if known == "FashionMNIST" and DEBIAN.is_dir() and not (data_root() / known).is_dir():
        return Parts(known, **{part: _debian(known, part) for part in ("train", "test")})
    parts = {}
    for part in ("train", "val", "test"):
        arguments = getattr(published, part)
        if arguments is not None:
            parts[part] = _image_set(_open(known, arguments, download), known, part)
    return Parts(known, flip=published.flip, **parts)


def _debian(name: str, part: str) -> ImageSet:
    """A part of Fashion-MNIST from Debian's package: gzipped IDX files."""
    prefix = DEBIAN / ("train" if part == "train" else "t10k")
    try:
        with (
            gzip.open(f"{prefix}-images-idx3-ubyte.gz") as images,
            gzip.open(f"{prefix}-labels-idx1-ubyte.gz") as labels,
        ):
            pixels = np.frombuffer(images.read(), np.uint8, offset=16).reshape(-1, 28, 28)
            return ImageSet(
                Arrays(pixels, f"{name} {part}"), np.frombuffer(labels.read(), np.uint8, offset=8), _FASHION
            )
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{DEBIAN}: the files of {name} are damaged or missing ({_line(error)}).") from error


def _open(name: str, arguments: dict[str, Any], download: bool) -> Any:
    root = data_root()
    make = getattr(torchvision.datasets, name)
    try:
        return make(root, **arguments)
    except Exception as error:  # each data set raises its own kinds for missing and damaged files
        if not download:
            raise DataError(
                f"torchvision data set {name}: it is not in {root}, or damaged there ({_line(error)}). "
                "Add --download (download=True) to fetch it, or set VITALLOY_DATA to the folder that holds it."
            ) from error
    try:
        root.mkdir(parents=True, exist_ok=True)
        return make(root, **arguments, download=True)
    except Exception as error:
        raise DataError(
            f"torchvision data set {name}: the download to {root} failed ({_line(error)}). "
            f"Check the network, remove what is left of {name} in that folder and try again."
        ) from error


def _line(error: Exception) -> str:
    text = str(error).split("You can use download=True")[0]  # an advice for those who call torchvision themselves
    text = " ".join(text.split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _image_set(dataset: Any, name: str, part: str) -> ImageSet:
    """Ours around torchvision's: the files themselves where it keeps files, so that odd ones get a clear message."""
    labels = [int(label) for label in _labels(dataset)]
    classes = getattr(dataset, "classes", None) or _numbered(max(labels) + 1)
    # Imagenette names a class by a tuple of synonyms
    classes = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in classes]
    paths = _paths(dataset)
    source = Wrapped(dataset, f"{name} {part}", in_memory=True) if paths is None else Files(paths)
    return ImageSet(source, labels, classes)


def _numbered(count: int) -> list[str]:
    return [str(i).zfill(len(str(count - 1))) for i in range(count)]


def _labels(dataset: Any) -> Any:
    for attribute in ("targets", "labels", "_labels"):
        if getattr(dataset, attribute, None) is not None:
            return getattr(dataset, attribute)
    if hasattr(dataset, "_samples"):
        return [label for _, label in dataset._samples]
    return [dataset[i][1] for i in range(len(dataset))]  # slow, but holds for any


def _paths(dataset: Any) -> list[str] | None:
    for attribute in ("samples", "_samples"):
        if hasattr(dataset, attribute):
            return [path for path, _ in getattr(dataset, attribute)]
    for attribute in ("_image_files", "_images"):
        if hasattr(dataset, attribute):
            return getattr(dataset, attribute)
    return None
