"""Shifts: how much a model's answer depends on where the picture starts, and models whose answer does not.

"Reviving Shift Equivariance in Vision Transformers", Ding et al., 2023, arXiv 2306.07470: polyphase anchoring, for
ViT and Twins. `make_shift_equivariant` converts these, and by the same rule (ours, not the paper's) Swin, PVT and
PVT v2. What is guaranteed, and what is not, stands in `layers/polyphase.py`; `unprotected` tells for an input size.

The measures take a function from images to logits, so that any model, compressed or exported, can be compared.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from vitalloy.errors import DataError, ModelError
from vitalloy.layers.polyphase import PolyphaseAnchor

log = logging.getLogger("vitalloy")

Predict = Callable[[Tensor], Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]

# what the authors do to the images before they shift them; each is made for a side in pixels
PERTURBATIONS: dict[str, Callable[[int], nn.Module]] = {
    "crop": lambda side: v2.RandomCrop(side, padding=10),
    "flip": lambda side: v2.RandomHorizontalFlip(),
    "affine": lambda side: v2.RandomAffine(30, translate=(0.1, 0.1), scale=(0.8, 1.2), shear=10),
    "perspective": lambda side: v2.RandomPerspective(0.5),
    "erasing": lambda side: v2.RandomErasing(),
}


def make_shift_equivariant(model: nn.Module) -> nn.Module:
    """Convert a model in place, so that circular shifts of its input leave its logits as they are.

    ViT, PVT: position tables give way to circular position convolutions that start at zero, and a ViT's patches are
    normalised; Swin: shifted windows lose their masks; PVT v2, Twins: convolutions wrap around where they padded. All
    else keeps its weights. A trained model needs fine-tuning afterwards. Feature maps come out rolled: for dense
    prediction the conversion is of no use.

    Args:
        model: a ViT or DeiT, Twins, Swin, PVT or PVT v2 of this library, from `create_model`. The same form can be
            built with `create_model(name, anchored=True)`.

    Returns:
        The model. A warning names the parts that its own input size leaves unprotected.

    Raises:
        ModelError: there is no such form of this model.
    """
    if not callable(getattr(model, "anchor_phases", None)):
        raise ModelError(
            f"{type(model).__name__} has no shift-equivariant form; "
            "Vitalloy's own ViT, DeiT, Twins, Swin, PVT and PVT v2 models have one."
        )
    if not model.anchored:
        model.anchor_phases()
        model.train(model.training)  # the new parts too
        if hasattr(model, "build_args"):
            model.build_args["anchored"] = True  # a saved bundle is built in this form
    parts = unprotected(model) if hasattr(model, "default_cfg") else []
    if parts:
        log.warning("shifts can still change the answer at this input size: %s", "; ".join(parts))
    return model


@torch.no_grad()
def unprotected(model: nn.Module, img_size: tuple[int, int] | None = None) -> list[str]:
    """Parts of a converted model whose grid does not divide their map, so that shifts can change the answer.

    Args:
        img_size: (height, width) of the input; the model's own when not given.

    Returns:
        One line a part; none where the guarantee holds.
    """
    found: list[str] = []

    def look(name: str) -> Callable[[PolyphaseAnchor, tuple[Tensor]], None]:
        def hook(anchor: PolyphaseAnchor, args: tuple[Tensor]) -> None:
            height, width = args[0].shape[-2:]
            if anchor.stride_on((height, width)) is None:
                found.append(f"{name.removesuffix('.anchor')}: {height}x{width} map, {anchor.extra_repr()}")

        return hook

    anchors = [(name, part) for name, part in model.named_modules() if isinstance(part, PolyphaseAnchor)]
    hooks = [part.register_forward_pre_hook(look(name)) for name, part in anchors]
    first = model.get_submodule(model.default_cfg["first_conv"]).weight
    size = img_size or model.default_cfg["input_size"][-2:]
    training = model.training
    try:
        model.eval()(first.new_zeros(1, first.shape[1], *size))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return found


def shift(images: Tensor, down: int, right: int, wrap: bool = True) -> Tensor:
    """Images (..., H, W) moved by whole pixels; what leaves comes back on the other side, or zeros do."""
    if wrap:
        return images.roll((down, right), (-2, -1))
    moved = F.pad(images, (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0)))
    height, width = images.shape[-2:]
    return moved[..., max(-down, 0) :, max(-right, 0) :][..., :height, :width]


@dataclass(frozen=True)
class Consistency:
    """Shares between 0 and 1.

    Attributes:
        consistency: images that get the same class under two shifts.
        top1: images whose class is right under the first of them.
        images: how many were looked at.
    """

    consistency: float
    top1: float
    images: int


@torch.no_grad()
def shift_consistency(
    predict: Predict,
    batches: Batches,
    *,
    max_shift: int = 14,
    wrap: bool = True,
    perturb: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> Consistency:
    """How often two random shifts of an image get the same answer, as the authors measure it.

    Args:
        predict: a normalised batch (B, C, H, W) -> logits (B, classes); the caller puts the model in eval mode.
        batches: pairs of such a batch and its labels (B,).
        max_shift: each component of a shift is drawn from 0 to this, in pixels; a batch shares its two shifts.
        wrap: circular shifts, as published; False fills with zeros, which no model is guaranteed to stand.
        perturb: done to the images first, such as `PERTURBATIONS["crop"](224)`.
        seed: of the shifts.

    Raises:
        DataError: there are no images.
    """
    generator = torch.Generator().manual_seed(seed)
    same = right = count = 0
    for images, labels in batches:
        images = images if perturb is None else perturb(images)
        moves = torch.randint(max_shift + 1, (2, 2), generator=generator).tolist()
        first, second = (predict(shift(images, *move, wrap)).argmax(-1) for move in moves)
        same += int((first == second).sum())
        right += int((first == labels.to(first.device)).sum())
        count += len(images)
    _some(count)
    return Consistency(same / count, right / count, count)


@torch.no_grad()
def worst_shift_top1(predict: Predict, batches: Batches, *, reach: int = 2, wrap: bool = True) -> float:
    """The share of images whose class is right under every shift by up to `reach` pixels each way (0 to 1).

    Raises:
        DataError: there are no images.
    """
    steps = range(-reach, reach + 1)
    held = count = 0
    for images, labels in batches:
        right = torch.ones(len(images), dtype=torch.bool)
        for down in steps:
            for across in steps:
                right &= predict(shift(images, down, across, wrap)).argmax(-1).cpu() == labels.cpu()
        held += int(right.sum())
        count += len(images)
    _some(count)
    return held / count


@torch.no_grad()
def logit_variance(predict: Predict, batches: Batches, *, steps: range = range(-5, 5), wrap: bool = True) -> float:
    """Variance of the true class's logit over shifts along the diagonal, the mean of all images.

    Raises:
        DataError: there are no images.
    """
    total, count = 0.0, 0
    for images, labels in batches:
        moved = torch.stack([predict(shift(images, step, step, wrap)).cpu() for step in steps])  # (steps, B, classes)
        true = moved.gather(2, labels.cpu().expand(len(steps), -1).unsqueeze(2))
        total += float(true.double().var(0, correction=0).sum())
        count += len(images)
    _some(count)
    return total / count


def _some(count: int) -> None:
    if not count:
        raise DataError("Shifts are measured on labelled images, but there are none.")
