"""Batches whose order and random changes depend on the seed and the epoch alone.

A training run that was killed goes on to the same weights only if epoch 7 looks the same after a restart, with any
number of worker processes. So the sampler hands out a seed with each index, and the images are transformed under it.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from vitalloy.data.image_set import ImageSet
from vitalloy.errors import DataError

_PIXELS_WORTH_WORKERS = 16 * 2**20  # an epoch of fewer is read sooner than workers start
_MAX_WORKERS = 4


class SeededSampler(Sampler):
    """Yields (index, sample_seed): a pure function of the seed, the epoch and the index.

    Every one of the `world` ranks gets the same number: the order is filled up from its start, or with `drop_last` cut.
    """

    def __init__(
        self,
        length: int,
        *,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} must be one of the {world} ranks 0..{world - 1}")
        self.length, self.seed, self.shuffle = length, seed, shuffle
        self.rank, self.world, self.drop_last = rank, world, drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length // self.world if self.drop_last else -(-self.length // self.world)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        key = [self.seed % 2**32, self.epoch]
        seeds = np.random.default_rng([*key, 0]).integers(2**62, size=self.length)
        order = np.arange(self.length)
        if self.shuffle:
            order = np.random.default_rng([*key, 1]).permutation(self.length)
        order = np.resize(order, len(self) * self.world)[self.rank :: self.world]
        for index in order.tolist():
            yield index, int(seeds[index])


class SeededImages(Dataset):
    """An `ImageSet` whose items are (tensor, label, index).

    Asked for (index, sample_seed) it transforms under that seed and puts the random states back; asked for an index it
    leaves them alone.
    """

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Any, int, int]:
        if not isinstance(key, tuple):
            image, label = self.images[key]
            return image, label, key
        index, sample_seed = key
        with seeded(sample_seed):
            image, label = self.images[index]
        return image, label, index

    def __getitems__(self, keys: list) -> list:
        """A batch at once (PyTorch asks so where it can); an image that cannot be read becomes a message."""
        try:
            return [self[key] for key in keys]
        except DataError as error:
            return [_Unreadable(str(error))]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and PyTorch's random numbers (on the CPU) from `seed` within, and as they were after."""
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would seed accelerators too
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(pytorch)


@dataclass(frozen=True)
class _Unreadable:
    """Stands for a batch: an exception raised in a worker would reach the user wrapped in the worker's traceback."""

    message: str


def _collate(samples: list) -> Any:
    return samples[0] if isinstance(samples[0], _Unreadable) else default_collate(samples)


class ImageLoader(DataLoader):
    """PyTorch's loader, where an unreadable image is a `DataError` that names it, from any process."""

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            if isinstance(batch, _Unreadable):
                raise DataError(batch.message)
            yield batch


def make_loader(
    images: ImageSet,
    batch_size: int,
    *,
    train: bool,
    seed: int = 0,
    workers: int | str = "auto",
    rank: int = 0,
    world: int = 1,
    drop_last: bool | None = None,
    pin_memory: bool = False,
) -> ImageLoader:
    """Batches of (tensors (B, C, H, W), labels (B,), indices (B,)).

    Args:
        images: with a transform that makes tensors.
        train: shuffle and transform by seed; call `loader.sampler.set_epoch(epoch)` before each epoch (Lightning does).
        workers: processes that read ahead; "auto" takes none for a small set.
        rank, world: which share of the images, of how many.
        drop_last: leave out a last batch that is not full; by default in training, if there is a full one.
    """
    sampler = SeededSampler(len(images), seed=seed, shuffle=train, rank=rank, world=world)
    if drop_last is None:
        drop_last = train and len(sampler) >= batch_size
    count = _auto_workers(images) if workers == "auto" else int(workers)
    return ImageLoader(
        SeededImages(images),
        batch_size,
        sampler=sampler if train or world > 1 else None,
        num_workers=count,
        collate_fn=_collate,
        pin_memory=pin_memory,
        drop_last=drop_last,
        persistent_workers=count > 0,
        generator=torch.Generator().manual_seed(seed),  # its own, so that the loader draws none of the model's numbers
    )


def _auto_workers(images: ImageSet) -> int:
    if not len(images):
        return 0
    height, width = images.native_size()
    if len(images) * height * width < _PIXELS_WORTH_WORKERS:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MAX_WORKERS, max(1, cores - 1))
