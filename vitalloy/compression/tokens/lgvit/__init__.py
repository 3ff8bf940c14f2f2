"""LGViT: exits behind the blocks of a classifier, so that easy images cost less.

"LGViT: Dynamic Early Exiting for Accelerating Vision Transformer", Xu et al., ACM MM 2023, arXiv 2308.00255; after the
released code, whose checkpoints load. Shallow exits classify by convolutions, deep ones by attention among a few
tokens. Both are trained with the classifier first and then, with the classifier as their teacher, alone.

For whoever pays for the mean time of an answer and not for the longest: how deep an image goes depends on the image.

Departures:
- The released code decides for a whole batch and so serves one image at a time. Here every image of a batch decides for
  itself, and the batch shrinks to those that stay.
- Exits go into any model that has places through which everything flows, such as pyramids and hybrids. Without class
  tokens a head has the form that the authors use for Swin. Grids too small for a head's window or step get a smaller
  one. Channels that 8 heads cannot share have fewer.
- The teacher of stage 2 keeps the final norm that its classifier was trained with; the released code skips it
  (`as_published=True`). For ViT the patches start behind its one class token; the released code cuts two off.
- Losses between features of unlike shape, as between the levels of a pyramid, are left out.
- "auto" puts exits from about a sixth of the work on, the authors from a third. Calibration leaves out those that do
  not pay, and their heads are not computed.
- Heads learn faster than the classifier, which comes trained; the released code uses one rate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitalloy.compression.tokens.lgvit.calibration import Curve, Row, calibrate, within_macs
from vitalloy.compression.tokens.lgvit.heads import ExitHead, fitting, published_heads
from vitalloy.compression.tokens.lgvit.losses import (
    ALPHA,
    BETA,
    GAMMA,
    TEMPERATURE,
    heterogeneous_losses,
    homogeneous_losses,
    prediction_loss,
    weighted_loss,
)
from vitalloy.compression.tokens.lgvit.model import Answers, EarlyExit, depth_of
from vitalloy.compression.tokens.lgvit.placement import chosen, exit_points, head_macs
from vitalloy.compression.tokens.lgvit.policies import Policy, confidence, entropy, policy_of
from vitalloy.compression.tokens.lgvit.training import stage1_loss, stage2_loss, train_exits
from vitalloy.compression.trunk import Point
from vitalloy.errors import CompressionError

__all__ = [
    "Answers",
    "Curve",
    "EarlyExit",
    "ExitHead",
    "Policy",
    "Row",
    "calibrate",
    "compress",
    "confidence",
    "depth_of",
    "entropy",
    "exit_points",
    "heterogeneous_losses",
    "homogeneous_losses",
    "prediction_loss",
    "published",
    "rebuild",
    "stage1_loss",
    "stage2_loss",
    "weighted_loss",
]


def compress(
    model: nn.Module,
    images: Tensor,
    *,
    exits: str | Sequence[int | str] = "auto",
    heads: str | Sequence[str] = "lgvit",
    policy: str = "confidence",
    threshold: float | Sequence[float] | None = None,
    macs: float | None = None,
    train: Iterable[tuple[Tensor, Tensor]] | None = None,
    epochs: int | tuple[int, int] = (2, 2),
    lr: float = 3e-3,
    backbone_lr: float = 3e-4,
    strategy: str = "alternating_weighted",
    alpha: float = ALPHA,
    beta: float = BETA,
    gamma: float = GAMMA,
    temperature: float = TEMPERATURE,
    as_published: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> EarlyExit:
    """The model with trained exits. `calibrate` then finds thresholds for a wanted accuracy, time or work.

    Args:
        model: a float classifier; trained on in place.
        images: (N, C, H, W).
        exits: "auto", or numbers or names of the places that `exit_points` finds.
        heads: "lgvit", one kind for all exits, or a kind for each; see `heads.py`.
        policy: "confidence", "entropy", "patience" or "patient_and_confident"; see `policies.py`.
        threshold: for all exits or for each; the published one when None.
        macs: instead of a threshold, the share of the model's multiply-accumulates that `images` may take on average.
        train: batches (images, labels); None trains on `images` with the model's own answers in the place of labels.
        epochs: of stage 1 and of stage 2, or of each. Without stage 1 the classifier stays as it is.
        lr, backbone_lr: of the heads, and of the classifier in stage 1.
        strategy: of stage 1: "alternating_weighted", "alternating", "weighted" or "normal".
        alpha, beta, gamma, temperature, as_published: of stage 2, see `stage2_loss`.
        seed: of the heads' start and of the order of `images`.
        progress: is told (epochs done, epochs).

    Raises:
        CompressionError: a model without places for exits, an unknown option, or a budget out of reach.
    """
    stages = (epochs, epochs) if isinstance(epochs, int) else tuple(epochs)
    if len(stages) != 2 or min(stages) < 0:
        raise CompressionError(f"epochs={epochs!r}: give a number, or two: of stage 1 and of stage 2.")
    if macs is not None and threshold is not None:
        raise CompressionError("give a threshold or a share of macs, which finds one, not both.")
    candidates, last = exit_points(model, images[:1])
    places = chosen(candidates, exits)
    kinds = _kinds(heads, places)
    own = rebuild(
        model,
        exits=places,
        heads=kinds,
        last=last,
        policy=policy,
        thresholds=threshold,
        num_classes=model(images[:1]).shape[-1],
        seed=seed,
    )
    own.head_macs = tuple(head_macs(model, places, own.heads, images[:1]))
    train_exits(
        own,
        train,
        images,
        epochs=stages,
        lr=lr,
        backbone_lr=backbone_lr,
        strategy=strategy,
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        temperature=temperature,
        as_published=as_published,
        seed=seed,
        progress=progress,
    )
    if macs is not None:
        own.policy = within_macs(own, images, macs)
    return own.eval()


def rebuild(
    model: nn.Module,
    *,
    exits: Sequence[Point | Mapping[str, Any]],
    heads: Sequence[str],
    last: Point | Mapping[str, Any],
    num_classes: int,
    policy: str = "confidence",
    thresholds: float | Sequence[float] | None = None,
    head_macs: Sequence[float] = (),
    seed: int = 0,
) -> EarlyExit:
    """A plain model with untrained exits, from the `settings` of a trained one.

    Raises:
        CompressionError: the model has no such modules, an unknown kind of head, or thresholds that do not fit.
    """
    places, last = [_point(model, exit) for exit in exits], _point(model, last)
    rule = policy_of(policy, thresholds, len(places))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EarlyExit(model, places, heads, last, rule, num_classes, head_macs)


def published(
    model: nn.Module, image: Tensor, *, heads: str | Sequence[str] = "lgvit", eps: float = 1e-12, **options: Any
) -> EarlyExit:
    """A ViT or DeiT with exits as in the released code, untrained: `load_checkpoint` then takes the authors' weights.

    Exits are behind the upper two thirds of the blocks, the last left out.

    Args:
        model: a plain ViT or DeiT; changed in place.
        image: (1, C, H, W); its values do not matter.
        eps: of the layer norms.
        options: of `rebuild`: `policy`, `thresholds` and `seed`.

    Raises:
        CompressionError: a model without a list of blocks.
    """
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    candidates, last = exit_points(model, image)
    blocks = [point for point in candidates if re.fullmatch(r"blocks\.\d+", point.name)]
    if not blocks or len(blocks) < 2:
        raise CompressionError(f"{type(model).__name__} has no list of blocks as ViT and DeiT have.")
    places = blocks[(len(blocks) + 1) // 3 - 1 :]
    classes = model(image).shape[-1]
    own = rebuild(model, exits=places, heads=_kinds(heads, places), last=last, num_classes=classes, **options)
    own.head_macs = tuple(head_macs(model, places, own.heads, image))
    return own


def _kinds(heads: str | Sequence[str], places: Sequence[Point]) -> list[str]:
    """The kind of each head."""
    if heads == "lgvit":
        return [fitting(kind, p.grid) for kind, p in zip(published_heads(len(places)), places, strict=True)]
    kinds = [heads] * len(places) if isinstance(heads, str) else list(heads)
    if len(kinds) != len(places):
        raise CompressionError(f"{len(kinds)} heads for {len(places)} exits: give one kind, or one an exit.")
    return [fitting(kind, point.grid) for kind, point in zip(kinds, places, strict=True)]


def _point(model: nn.Module, point: Point | Mapping[str, Any]) -> Point:
    if not isinstance(point, Point):
        point = Point(**{**point, "grid": tuple(point["grid"]) if point["grid"] else None})
    try:
        model.get_submodule(point.name)
    except AttributeError as error:
        raise CompressionError(f"{type(model).__name__} has no module {point.name!r} for an exit.") from error
    return point
