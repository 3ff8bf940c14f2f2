"""Labelled images from a Hugging Face data set, on the Hub or saved in a folder (extra `datasets`)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from PIL import Image

from vitalloy.data.folders import flip_keeps_class
from vitalloy.data.image_set import ImageSet, Parts
from vitalloy.data.images import decode_image, read_image
from vitalloy.errors import DataError, suggest

_log = logging.getLogger("vitalloy")

_PARTS = {
    "train": ("train", "training"),
    "val": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
_USUAL_IMAGE = ("image", "img", "images")
_USUAL_LABEL = ("label", "labels", "fine_label", "target", "class")


class Table:
    """The image column of one split; images are decoded here, so that odd ones get the same care as files."""

    in_memory = False

    def __init__(self, column: Any, name: str) -> None:
        self.column, self.name = column, name  # rows are {"bytes": ..., "path": ...}

    def __len__(self) -> int:
        return len(self.column)

    def read(self, index: int) -> Image.Image:
        row = self.column[index]["image"]
        if row is None:
            raise DataError(f"{self.describe(index)}: the row has no image. Remove it from the data set.")
        if row.get("bytes") is None:
            return read_image(row["path"])
        return decode_image(row["bytes"], self.describe(index))

    def size(self, index: int) -> tuple[int, int]:
        width, height = self.read(index).size
        return height, width

    def describe(self, index: int) -> str:
        return f"{self.name}[{index}]"


def read_hub(address: str, *, label_column: str | None = None) -> Parts:
    """The data set at "owner/name", "owner/name/configuration" or a local path.

    Args:
        label_column: the column that holds the class, where there are several candidates.

    Raises:
        DataError: the extra is missing, the data set cannot be loaded, or its image or label column cannot be told.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"hf:{address} needs the Hugging Face library, which is not installed: pip install 'vitalloy[datasets]'"
        ) from None
    splits = _load(datasets, address)
    if isinstance(splits, datasets.Dataset):
        splits = {"train": splits}
    chosen = _choose_splits(address, splits)
    features = chosen["train"].features
    image = _image_column(address, features, datasets)
    label = _label_column(address, features, datasets, label_column, image)
    classes = _classes(address, chosen, label, datasets)
    sets = {
        part: made
        for part, table in chosen.items()
        if (made := _image_set(table, f"hf:{address} {part}", image, label, classes, datasets)) is not None
    }
    if "train" not in sets:
        raise DataError(f"hf:{address}: no row of the training split has a label in column {label!r}.")
    return Parts(address.rstrip("/").split("/")[-1], flip=flip_keeps_class(classes), **sets)


def _load(datasets: Any, address: str) -> Any:
    local = Path(address).expanduser()
    try:
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            return datasets.load_from_disk(str(local))
        if local.is_dir():
            return datasets.load_dataset(str(local))
        if address.startswith(("/", ".", "~")):
            raise DataError(f"hf:{address}: the folder does not exist. Check the path.")
        owner_name, configuration = "/".join(address.split("/")[:2]), "/".join(address.split("/")[2:])
        return datasets.load_dataset(owner_name, configuration or None)
    except DataError:
        raise
    except Exception as error:  # the network, the Hub, a missing configuration: many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"hf:{address}: the data set cannot be loaded ({reason[:300]}). "
            "Check the name, the network and, for a gated set, your login."
        ) from error


def _choose_splits(address: str, splits: Any) -> dict[str, Any]:
    chosen = {}
    for part, names in _PARTS.items():
        found = next((splits[name] for name in names if name in splits), None)
        if found is not None and len(found):
            chosen[part] = found
    if "train" not in chosen:
        if len(splits) != 1:
            raise DataError(f"hf:{address} has the splits {', '.join(splits)}, and none of them is called train.")
        chosen = {"train": next(iter(splits.values()))}
    return chosen


def _image_column(address: str, features: Any, datasets: Any) -> str:
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    usual = [name for name in _USUAL_IMAGE if name in found]
    if usual or len(found) == 1:
        return (usual or found)[0]
    if not found:
        raise DataError(f"hf:{address} has no image column; its columns are {', '.join(features)}.")
    raise DataError(f"hf:{address} has several image columns ({', '.join(found)}). Rename the one to use to 'image'.")


def _label_column(address: str, features: Any, datasets: Any, asked: str | None, image: str) -> str:
    if asked is not None:
        if asked not in features or asked == image:
            raise DataError(
                f"hf:{address} has no label column {asked!r}.{suggest(asked, features)} "
                f"Its columns are {', '.join(features)}."
            )
        return asked
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(classes) == 1:
        return classes[0]
    plain = [
        name
        for name, feature in features.items()
        if isinstance(feature, datasets.Value) and ("string" in feature.dtype or "int" in feature.dtype)
    ]
    for name in _USUAL_LABEL:
        if name in (classes or plain):
            return name
    raise DataError(
        f"hf:{address}: which column holds the class cannot be told; its columns are {', '.join(features)}. "
        "Name it: --set label_column=NAME."
    )


def _classes(address: str, tables: dict[str, Any], label: str, datasets: Any) -> list[str]:
    feature = tables["train"].features[label]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    if not isinstance(feature, datasets.Value):
        raise DataError(f"hf:{address}: column {label!r} holds {feature}, not one class a row.")
    values = {value for table in tables.values() for value in table.unique(label) if value is not None}
    return [str(value) for value in sorted(values)]


def _image_set(table: Any, name: str, image: str, label: str, classes: list[str], datasets: Any) -> ImageSet | None:
    """The rows of a split that have a label; None if no row has."""
    feature = table.features[label]
    values = table[label][:]  # a plain list in every version
    if isinstance(feature, datasets.ClassLabel):
        numbers = [-1 if value is None else int(value) for value in values]
    else:
        place = {name: i for i, name in enumerate(classes)}
        numbers = [-1 if value is None else place[str(value)] for value in values]
    kept = [i for i, number in enumerate(numbers) if 0 <= number < len(classes)]
    if len(kept) < len(numbers):
        _log.warning("%s: %d of %d rows have no label and were left out", name, len(numbers) - len(kept), len(numbers))
    if not kept:
        return None
    images = table.select_columns([image])
    if image != "image":
        images = images.rename_column(image, "image")
    images = images.cast_column("image", datasets.Image(decode=False))
    return ImageSet(Table(images, name), [numbers[i] for i in kept], classes, indices=kept)
