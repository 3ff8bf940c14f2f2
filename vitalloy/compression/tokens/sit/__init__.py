"""SiT: the patch tokens of a transformer become fewer mixtures of themselves, taught by the full model.

"Self-slimmed Vision Transformer", Zong et al., ECCV 2022, arXiv 2111.12624. For people who need more images a second
from a trained transformer at a small loss. Behind a few blocks a slimming module maps N tokens to M learned convex
combinations. In training, reverse modules spread the mixtures over all N places again, to be compared with the full
model's tokens (feature recalibration distillation); they are dropped afterwards. The published models are the
backbones `sit_tiny` ... `sit_large`; `compress` makes such a model of any plain or stage-wise one.

Departures of `compress`, each for models and training sets of other kinds than the published:
- mixtures start as local pooling, by a learned term of position, and lie on a smaller grid, so that convolutions,
  windows and downsampling behind them go on; the published modules start as M nearly equal means of all tokens;
- where tokens are slimmed follows from the work done rather than from the number of blocks, and can be fitted to a
  budget (`placing`); stage-wise models are slimmed once;
- token distances are relative to the variance of the full model's tokens, which differs between backbones;
- the term of the labels is left out where there are none, and there is no stronger augmentation than in the batches.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitalloy.compression.tokens.sit.maps import origins, to_patches
from vitalloy.compression.tokens.sit.placing import blocks_and_stages, candidates, place
from vitalloy.compression.tokens.sit.recalibration import (
    Recalibration,
    ReverseSlimming,
    logit_distance,
    tapped,
    token_distance,
)
from vitalloy.compression.tokens.sit.slimmed import Slim, insert
from vitalloy.compression.tokens.sit.teaching import teach
from vitalloy.compression.trunk import Point, macs as count_macs
from vitalloy.errors import CompressionError

__all__ = [
    "Recalibration",
    "ReverseSlimming",
    "compress",
    "logit_distance",
    "origins",
    "rebuild",
    "tapped",
    "to_patches",
    "token_distance",
]
log = logging.getLogger("vitalloy")
_BATCH = 16  # calibration images in a batch
_COMPARED = 256  # tokens up to which they are compared; reverse modules grow with their square


def compress(
    model: nn.Module,
    images: Tensor,
    *,
    macs: float | None = None,
    keep: float = 0.5,
    after: Sequence[str] | None = None,
    token_weight: float = 2.0,
    logit_weight: float = 2.0,
    temperature: float = 1.0,
    train: Iterable[tuple[Tensor, Tensor]] | None = None,
    epochs: int = 3,
    lr: float = 1e-3,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Slim the tokens of a classifier and train it with the full one as its teacher.

    Args:
        model: a classifier in evaluation mode, changed in place.
        images: (N, C, H, W); what is learned from where there is no `train`.
        macs: the share of the multiply-accumulates that may stay; where and how much is slimmed follows from it.
        keep: the share of the tokens that each slimming keeps; with `macs` where the search starts.
        after: names of the modules to slim behind; chosen when None.
        token_weight, logit_weight: of the two distances from the full model in the loss. Without the first there are
            no reverse modules, and training takes less time.
        temperature: of the distance of logits.
        train: batches (images, labels), iterated once an epoch.
        epochs, lr: of the training; reverse modules learn five times as fast.
        seed: of the reverse modules' start and the order of `images`.
        progress: is told (epochs done, epochs).

    Returns:
        The model. `settings` hold where it is slimmed, the share of the multiply-accumulates that is left, and how many
        parameters the reverse modules had; `lesson` the mean of each term of the loss in each epoch.

    Raises:
        CompressionError: no place to slim at, a budget out of reach, or an option out of its range.
    """
    for name, value in (("macs", macs), ("keep", keep)):
        if value is not None and not 0 < value < 1:
            raise CompressionError(f"{name}={value:g} must be between 0 and 1.")
    if epochs < 0 or lr <= 0:
        raise CompressionError(f"epochs={epochs} must not be negative, and lr={lr:g} must be above 0.")
    full, image = copy.deepcopy(model), images[:1]
    places = blocks_and_stages(model, image)
    usable = candidates(model, image, places)
    if not usable:
        raise CompressionError(
            f"{type(model).__name__} has no place to slim tokens at: nowhere does everything flow through one set of "
            "tokens that may become fewer."
        )
    chosen = usable if after is None else _named(usable, after)
    slims = place(model, image, chosen, macs, keep, fixed=after is not None)
    if not slims:
        raise CompressionError("there are too few tokens behind " + ", ".join(p.name for p in chosen) + " to slim.")
    before = count_macs(model, image)
    insert(model, slims)
    left = count_macs(model, image) / before
    log.info("Slimmed behind %s: %.3g of the work is left.", ", ".join(s.point.name for s in slims), left)
    lesson = teach(
        model,
        full,
        _Shuffled(images, seed) if train is None else train,
        [point for point in places if point.grid and math.prod(point.grid) <= _COMPARED],
        epochs=epochs,
        lr=lr,
        token_weight=token_weight,
        logit_weight=logit_weight,
        temperature=temperature,
        labelled=train is not None,
        seed=seed,
        progress=progress,
    )
    model.lesson = lesson
    model.settings = _settings([slim.as_dict() for slim in slims], left, lesson.reverse_parameters)
    return model


def rebuild(
    model: nn.Module, *, slims: Sequence[Mapping[str, Any]], macs: float | None = None, reverse_parameters: int = 0
) -> nn.Module:
    """The structure that `compress` made, in place, for weights to be loaded into; the arguments are its `settings`."""
    insert(model, [Slim.from_dict(row) for row in slims])
    model.settings = _settings(list(slims), macs, reverse_parameters)
    return model


def _settings(slims: Sequence[Mapping[str, Any]], macs: float | None, reverse_parameters: int) -> dict[str, Any]:
    return {"slims": slims, "macs": macs, "reverse_parameters": reverse_parameters}


def _named(usable: Sequence[Point], names: Sequence[str]) -> list[Point]:
    known = [point.name for point in usable]
    if isinstance(names, str) or not names or not set(names) <= set(known):
        raise CompressionError(f"after={names!r} must list some of the places to slim at: {', '.join(known)}.")
    return [point for point in usable if point.name in names]


class _Shuffled:
    """Batches of images without labels, in another order each time they are iterated."""

    def __init__(self, images: Tensor, seed: int) -> None:
        self.images, self.generator = images, torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images), generator=self.generator)
        for chosen in order.split(_BATCH):
            yield self.images[chosen], chosen
