"""From what a user typed (`digits`, a folder, the name of a data set) to images divided into train, val and test."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitalloy.data.folders import read_folder
from vitalloy.data.hub import read_hub
from vitalloy.data.image_set import ImageSet, Parts
from vitalloy.data.named import TORCHVISION_NAMES, published_name, read_digits, read_published
from vitalloy.errors import DataError, suggest

_log = logging.getLogger("vitalloy")

__all__ = ["ImageSet", "Splits", "load_data", "load_labelled", "split_labels"]


@dataclass(frozen=True)
class Splits:
    """A data set ready to train on.

    Attributes:
        name: "digits", the folder's name, the data set's name.
        classes: class names; the labels of the three sets index it.
        native_size: median (height, width) of the training images, in pixels.
        flip: a mirrored image is still of the same class (False for digits and letters).
    """

    name: str
    classes: list[str]
    train: ImageSet
    val: ImageSet
    test: ImageSet
    native_size: tuple[int, int]
    flip: bool


def load_data(
    spec: str | os.PathLike[str],
    *,
    val_fraction: float = 0.15,
    test_fraction: float = 0.15,
    seed: int = 0,
    download: bool = False,
    label_column: str | None = None,
) -> Splits:
    """Training, validation and test images of a data set.

    Parts that the owner made are kept; a missing one is split from the training images, class by class, the same
    way for the same seed.

    Args:
        spec: "digits"; a folder of class folders, or of train/, val/ and test/ with class folders; a torchvision
            data set ("CIFAR10", "torchvision:CIFAR10"); or a Hugging Face one ("hf:owner/name", "hf:/saved/set").
        val_fraction, test_fraction: the share of each class to split off where a part is missing.
        download: fetch a torchvision data set that is not there yet.
        label_column: of a Hugging Face data set, where it cannot be told.

    Raises:
        DataError: with what is wrong and how to mend it.
    """
    if not (0 < val_fraction < 1 and 0 < test_fraction < 1 and val_fraction + test_fraction < 1):
        raise DataError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} must lie between 0 and 1 and leave "
            "something to train on. Use the likes of 0.15 each."
        )
    parts = _read(spec, download=download, label_column=label_column, for_training=True)
    classes, counts = parts.train.classes, parts.train.counts()
    few = [f"{name!r} ({count})" for name, count in zip(classes, counts, strict=True) if count == 1]
    if few:
        raise DataError(f"{parts.name}: classes with a single image: {', '.join(few[:8])}. Each needs two or more.")
    if sum(count > 0 for count in counts) < 2:
        raise DataError(f"{parts.name} has images of one class only; training needs two or more.")
    fractions = (0.0 if parts.val else val_fraction, 0.0 if parts.test else test_fraction)
    train, val, test = split_labels(parts.train.labels, *fractions, seed=seed)
    train_set = parts.train.subset(train)
    val_set = parts.val or parts.train.subset(val)
    test_set = parts.test or parts.train.subset(test)
    if not len(val_set):
        raise DataError(
            f"{parts.name}: no class has three images, so nothing is left for validation. Add images to at least one."
        )
    native = train_set.native_size()
    return Splits(parts.name, list(classes), train_set, val_set, test_set, native, parts.flip)


def load_labelled(
    spec: str | os.PathLike[str],
    classes: Sequence[str] | None = None,
    *,
    download: bool = False,
    label_column: str | None = None,
) -> ImageSet:
    """One labelled set to evaluate on: the test part where the data set has one (else val), or all its images.

    Args:
        spec: as for `load_data`; a folder of only some of the classes, or of one, will do.
        classes: the model's classes. Labels then index these, matched by name.

    Raises:
        DataError: the data cannot be read, or has a class that the model does not know.
    """
    parts = _read(spec, download=download, label_column=label_column, for_training=False)
    images = parts.test or parts.val or parts.train
    if images is not parts.train:
        _log.info("%s: its %s images are used", parts.name, "test" if parts.test else "val")
    if classes is None:
        return images
    place = {name: i for i, name in enumerate(classes)}
    used = sorted({images.classes[label] for label in images.labels})
    unknown = [name for name in used if name not in place]
    if unknown:
        raise DataError(
            f"{parts.name}: the model has no class {', '.join(map(repr, unknown[:8]))}.{suggest(unknown[0], place)} "
            f"Its classes are {', '.join(map(repr, list(classes)[:20]))}{' ...' if len(classes) > 20 else ''}. "
            "Rename the class folders to these."
        )
    return images.relabelled([place[images.classes[label]] for label in images.labels], classes)


def split_labels(
    labels: Iterable[int], val_fraction: float, test_fraction: float, *, seed: int = 0
) -> tuple[list[int], list[int], list[int]]:
    """Indices of train, val and test, each class divided alike; a pure function of the arguments.

    A class of three images or more gets at least one into each part whose fraction is above zero; one of two goes to
    train and test (to train and val if test is not asked for).
    """
    labels = np.asarray(list(labels), np.int64)
    train, val, test = [], [], []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = np.random.default_rng([seed % 2**32, int(label)]).permutation(members)
        count = len(members)
        spare = count - 1  # one stays to train on
        for_val = int(bool(val_fraction) and count >= 3)
        take_test = min(spare - for_val, max(1, round(count * test_fraction))) if test_fraction else 0
        take_val = min(spare - take_test, max(1, round(count * val_fraction))) if val_fraction else 0
        test += members[:take_test].tolist()
        val += members[take_test : take_test + take_val].tolist()
        train += members[take_test + take_val :].tolist()
    return sorted(train), sorted(val), sorted(test)


def _read(spec: str | os.PathLike[str], *, download: bool, label_column: str | None, for_training: bool) -> Parts:
    text = os.fspath(spec).strip()
    if not text:
        raise DataError("No data set was named. Give a folder of class folders, or 'digits' to try things out.")
    kind, _, rest = text.partition(":")
    if text == "digits":
        return read_digits()
    if kind == "torchvision":
        return read_published(rest, download=download)
    if kind == "hf":
        if not rest.strip("/"):
            raise DataError("hf: names no data set. Write it as hf:owner/name.")
        return read_hub(rest, label_column=label_column)
    folder = Path(text).expanduser()
    if folder.exists():
        return read_folder(folder, for_training=for_training)
    if published_name(text):
        return read_published(text, download=download)
    raise DataError(_unknown(text, folder))


def _unknown(text: str, folder: Path) -> str:
    beside = (
        [p.name for p in folder.parent.iterdir() if p.is_dir() and not p.name.startswith(".")]
        if folder.parent.is_dir()
        else []
    )
    if os.sep in text or "/" in text or text.startswith(("~", ".")):
        missing = f" (nor does {folder.parent})" if not folder.parent.exists() else ""
        return f"The folder {text} does not exist{missing}.{suggest(folder.name, beside)} Check the path."
    known = ["digits", *TORCHVISION_NAMES]
    close = {name.lower(): name for name in [*beside, *known]}
    hint = suggest(text.lower(), close)
    for lower, name in close.items():
        hint = hint.replace(repr(lower), repr(name))
    return (
        f"{text!r} is neither a folder here nor a known data set.{hint} Give a folder of class folders, "
        f"hf:owner/name, or one of {', '.join(known)}."
    )
