"""Semantic segmentation: Semantic FPN over any encoder.

"Panoptic Feature Pyramid Networks", Kirillov et al., CVPR 2019, arXiv 1901.02446; the form that PVT's authors train on
ADE20K. Loads mmsegmentation checkpoints (`backbone.`, `neck.`, `decode_head.`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitalloy.errors import DataError
from vitalloy.heads.convert import convert_parts
from vitalloy.heads.encoder import Encoder
from vitalloy.heads.fpn import FPN

IGNORE = 255  # the label of pixels that nobody named


class ConvNormAct(nn.Module):
    """3x3 convolution, batch normalisation, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU(inplace=True)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class SemanticFPNHead(nn.Module):
    """Brings every level to the finest one's size, a convolution before each doubling, and adds them up.

    Args:
        in_channels: channels of the maps, the same in all.
        strides: their strides, from fine to coarse.
        num_classes: channels of the answer.
        channels: width of the head.
        dropout: rate at which whole channels are dropped before the classifier.
    """

    def __init__(
        self, in_channels: int, strides: Sequence[float], num_classes: int, channels: int = 128, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.scale_heads = nn.ModuleList()
        for stride in strides:
            doublings = round(math.log2(stride / strides[0]))
            layers: list[nn.Module] = []
            for i in range(max(doublings, 1)):
                layers.append(ConvNormAct(channels if i else in_channels, channels))
                if doublings > 0:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.scale_heads.append(nn.Sequential(*layers))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, in_channels, H_i, W_i) -> logits (B, num_classes, H_0, W_0)."""
        first, *others = (head(x) for head, x in zip(self.scale_heads, maps, strict=True))
        for x in others:
            first = first + resize(x, first.shape[-2:])
        return self.conv_seg(self.dropout(first))


class SemanticFPN(nn.Module):
    """Encoder, feature pyramid and segmentation head.

    Args:
        encoder: a name of the registry, or a module that returns maps and has a `feature_info` (see `Encoder`).
        num_classes: classes of a pixel.
        neck_channels: width of the feature pyramid.
        channels: width of the head.
        dropout: rate at which the head's channels are dropped in training.
        **encoder_args: img_size, in_chans, weights, out_indices, ... of `Encoder`.

    Raises:
        ModelError: an unknown encoder, or arguments that it refuses.
    """

    def __init__(
        self,
        encoder: str | nn.Module,
        num_classes: int,
        neck_channels: int = 256,
        channels: int = 128,
        dropout: float = 0.1,
        **encoder_args: Any,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = Encoder(encoder, **encoder_args)
        self.neck = FPN(self.backbone.channels, neck_channels)
        self.decode_head = SemanticFPNHead(neck_channels, self.backbone.strides, num_classes, channels, dropout)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> logits (B, num_classes, H, W)."""
        logits = self.decode_head(self.neck(self.backbone(images)))
        return resize(logits, images.shape[-2:])

    def loss(self, logits: Tensor, target: Tensor, ignore: int = IGNORE) -> Tensor:
        """Mean cross entropy over the labelled pixels; see `segmentation_loss`."""
        return segmentation_loss(logits, target, ignore)

    def convert_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An mmsegmentation state dict under our names, for `vitalloy.load_checkpoint`."""
        return convert_parts(self, state)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, corners not aligned; nothing is done where the size is right."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def segmentation_loss(logits: Tensor, target: Tensor, ignore: int = IGNORE) -> Tensor:
    """Mean cross entropy over the pixels that have a label; 0 where none has.

    Args:
        logits: (B, classes, H, W).
        target: class of each pixel, (B, H, W) integers.
        ignore: the label of pixels that do not count.

    Raises:
        DataError: the label image has another size, or (on the CPU) a label is no class.
    """
    if target.shape != (logits.shape[0], *logits.shape[2:]):
        raise DataError(
            f"labels of shape {tuple(target.shape)} do not belong to logits of shape {tuple(logits.shape)}: "
            "(B, H, W) of the same batch and size is needed."
        )
    try:
        total = F.cross_entropy(logits, target.long(), ignore_index=ignore, reduction="sum")
    except IndexError as error:
        wrong = sorted(set(torch.unique(target).tolist()) - {*range(logits.shape[1]), ignore})
        raise DataError(f"labels {wrong} are neither one of {logits.shape[1]} classes nor {ignore}.") from error
    return total / (target != ignore).sum().clamp(min=1)
