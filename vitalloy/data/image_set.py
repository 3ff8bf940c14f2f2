"""Labelled images that are read when they are asked for, wherever they are kept.

An `ImageSet` is a view (some indices, a transform) of a source: files, arrays in memory, or another library's data set.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vitalloy.data.images import image_size, quiet, read_image, to_rgb
from vitalloy.errors import DataError

CACHE_BYTES = 256 * 2**20
_SIZE_SAMPLE = 256  # headers read to find the usual size of a set


class Source(Protocol):
    """Where images are kept. `in_memory`: reading is instant and cannot fail."""

    in_memory: bool

    def __len__(self) -> int: ...
    def read(self, index: int) -> Image.Image: ...
    def size(self, index: int) -> tuple[int, int]: ...
    def describe(self, index: int) -> str: ...


class Files:
    """Image files, read by `read_image`."""

    in_memory = False

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        self.paths = [os.fspath(p) for p in paths]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Image.Image:
        return read_image(self.paths[index])

    def size(self, index: int) -> tuple[int, int]:
        return image_size(self.paths[index])

    def describe(self, index: int) -> str:
        return self.paths[index]


class Arrays:
    """8-bit images in memory: each (H, W) grey or (H, W, 3) RGB."""

    in_memory = True

    def __init__(self, images: Sequence[np.ndarray], name: str, names: Sequence[str] | None = None) -> None:
        self.images, self.name, self.names = images, name, names

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index]).convert("RGB")

    def size(self, index: int) -> tuple[int, int]:
        return self.images[index].shape[:2]

    def describe(self, index: int) -> str:
        return self.names[index] if self.names is not None else f"{self.name}[{index}]"


class Wrapped:
    """Another library's data set whose items are (Pillow image, label)."""

    def __init__(self, dataset: Any, name: str, in_memory: bool = False) -> None:
        self.dataset, self.name, self.in_memory = dataset, name, in_memory

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> Image.Image:
        try:
            return to_rgb(self.dataset[index][0])
        except DataError:
            raise
        except Exception as error:  # the other library's own kinds
            raise DataError(f"{self.describe(index)}: the image cannot be read ({error}).") from error

    def size(self, index: int) -> tuple[int, int]:
        width, height = self.read(index).size
        return height, width

    def describe(self, index: int) -> str:
        return f"{self.name}[{index}]"


class ImageSet(Dataset):
    """Items are (image, label): a Pillow RGB image, or what `transform` makes of it, and the index of its class.

    Args:
        source: where the images are kept.
        labels: the class index of each image of this set.
        classes: class names; `labels` index it.
        indices: which images of the source are in the set; all by default.
        transform: called with the Pillow image.
    """

    def __init__(
        self,
        source: Source,
        labels: Iterable[int],
        classes: Iterable[str],
        *,
        indices: Iterable[int] | None = None,
        transform: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        self.source = source
        self.labels = [int(label) for label in labels]
        self.classes = [str(name) for name in classes]
        self.indices = list(range(len(source))) if indices is None else [int(i) for i in indices]
        self.transform = transform
        if len(self.labels) != len(self.indices):
            raise DataError(f"{len(self.indices)} images but {len(self.labels)} labels: each image needs one.")

    @classmethod
    def from_arrays(
        cls, images: Sequence[np.ndarray], labels: Iterable[int], classes: Iterable[str], name: str = "images"
    ) -> ImageSet:
        """A set of 8-bit images in memory, each (H, W) grey or (H, W, 3) RGB."""
        return cls(Arrays(images, name), labels, classes)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.image(index)
        return (image if self.transform is None else self.transform(image)), self.labels[index]

    def image(self, index: int) -> Image.Image:
        """The image without the transform."""
        return self.source.read(self.indices[index])

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of an image; of a file only the header is read."""
        return self.source.size(self.indices[index])

    def describe(self, index: int) -> str:
        """What to call a sample in a message: its file, or the like of "digits[17]"."""
        return self.source.describe(self.indices[index])

    @property
    def in_memory(self) -> bool:
        return self.source.in_memory

    def counts(self) -> list[int]:
        """Images of each class."""
        return np.bincount(np.asarray(self.labels, np.int64), minlength=len(self.classes)).tolist()

    def with_transform(self, transform: Callable[[Image.Image], Any] | None) -> ImageSet:
        """The same images through another transform."""
        return ImageSet(self.source, self.labels, self.classes, indices=self.indices, transform=transform)

    def subset(self, indices: Iterable[int]) -> ImageSet:
        """The images at these positions of this set, in this order."""
        chosen = list(indices)
        return ImageSet(
            self.source,
            [self.labels[i] for i in chosen],
            self.classes,
            indices=[self.indices[i] for i in chosen],
            transform=self.transform,
        )

    def relabelled(self, labels: Iterable[int], classes: Iterable[str]) -> ImageSet:
        """The same images with other labels."""
        return ImageSet(self.source, labels, classes, indices=self.indices, transform=self.transform)

    def check(self, progress: Callable[[int, int], None] | None = None) -> list[tuple[int, str]]:
        """Decode every image and return (index, reason) of those that cannot be read.

        Args:
            progress: called with (images done, images in all) after each.
        """
        if self.in_memory:
            return []
        broken = []
        # `quiet` here as well: within threads the one of `read_image` may put the filters back in any order
        with quiet(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for index, reason in enumerate(pool.map(self._problem, range(len(self)))):
                if reason is not None:
                    broken.append((index, reason))
                if progress is not None:
                    progress(index + 1, len(self))
        return broken

    def _problem(self, index: int) -> str | None:
        try:
            self.image(index)
        except DataError as error:
            return str(error).removeprefix(f"{self.describe(index)}: ")
        return None

    def native_size(self) -> tuple[int, int]:
        """The median (height, width), from evenly spaced samples; images that cannot be read are left out."""
        step = max(1, len(self) // _SIZE_SAMPLE)
        sizes, problem = [], None
        for index in range(0, len(self), step):
            try:
                sizes.append(self.size(index))
            except DataError as error:
                problem = error
        if not sizes:
            raise problem or DataError("The set holds no image.")
        height, width = np.median(np.asarray(sizes), axis=0)
        return round(float(height)), round(float(width))

    def cached(self, limit: int = CACHE_BYTES) -> ImageSet:
        """The set with its images decoded in memory if they take less than `limit` bytes, else the set as it is."""
        if self.in_memory or not len(self):
            return self
        height, width = self.native_size()
        if len(self) * height * width * 3 > limit:
            return self
        images: list[np.ndarray] = []
        left = limit
        for index in range(len(self)):
            images.append(np.asarray(self.image(index)))
            left -= images[-1].nbytes
            if left < 0:  # the sizes vary more than the median told
                return self
        names = [self.describe(i) for i in range(len(self))]
        return ImageSet(Arrays(images, "cache", names), self.labels, self.classes, transform=self.transform)


@dataclass(frozen=True)
class Parts:
    """What a reader found: the images as their owner divided them; `val` and `test` are None where there are none.

    `flip`: a mirrored image is still of the same class.
    """

    name: str
    train: ImageSet
    val: ImageSet | None = None
    test: ImageSet | None = None
    flip: bool = True
