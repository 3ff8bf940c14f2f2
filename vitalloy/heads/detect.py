"""Object detection: RetinaNet over any encoder.

"Focal Loss for Dense Object Detection", Lin et al., ICCV 2017, arXiv 1708.02002; the form of mmdetection that PVT's
authors train on COCO. Loads its checkpoints (`backbone.`, `neck.`, `bbox_head.`). One departure in training: a labelled
box that overlaps no anchor takes none, where mmdetection gives it every anchor it overlaps by its best IoU of 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou, sigmoid_focal_loss

from vitalloy.errors import DataError
from vitalloy.heads.boxes import OCTAVES, RATIOS, base_anchors, decode, encode, grid_anchors, nms
from vitalloy.heads.convert import convert_parts
from vitalloy.heads.encoder import Encoder
from vitalloy.heads.fpn import FPN

BACKGROUND, IGNORED = -1, -2


class LevelOutputs(NamedTuple):
    """RetinaNet at each level: (B, A * classes, H, W) logits and (B, A * 4, H, W) deltas, both anchor by anchor."""

    classes: list[Tensor]
    boxes: list[Tensor]


class Detections(NamedTuple):
    """What was found in one image, best first: corners (n, 4) in pixels of the input, scores (n,), labels (n,)."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class ConvAct(nn.Module):
    """3x3 convolution with bias, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class RetinaHead(nn.Module):
    """Two stacks of convolutions, one for classes and one for boxes, the same at every level.

    Args:
        in_channels: channels of the maps.
        num_classes: classes, without a background.
        channels: width of the stacks.
        depth: convolutions in each stack.
        num_anchors: anchors of a position.
    """

    def __init__(
        self, in_channels: int, num_classes: int, channels: int = 256, depth: int = 4, num_anchors: int = 9
    ) -> None:
        super().__init__()
        widths = [in_channels] + [channels] * depth
        pairs = list(itertools.pairwise(widths))
        self.cls_convs = nn.Sequential(*(ConvAct(i, o) for i, o in pairs))
        self.reg_convs = nn.Sequential(*(ConvAct(i, o) for i, o in pairs))
        self.retina_cls = nn.Conv2d(widths[-1], num_anchors * num_classes, 3, padding=1)
        self.retina_reg = nn.Conv2d(widths[-1], num_anchors * 4, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        nn.init.constant_(self.retina_cls.bias, -math.log(99))  # at first everything is an object with probability 0.01

    def forward(self, maps: Sequence[Tensor]) -> LevelOutputs:
        classes = [self.retina_cls(self.cls_convs(x)) for x in maps]
        return LevelOutputs(classes, [self.retina_reg(self.reg_convs(x)) for x in maps])


class RetinaNet(nn.Module):
    """Encoder, feature pyramid and detection head.

    Args:
        encoder: a name of the registry, or a module that returns maps and has a `feature_info` (see `Encoder`).
        num_classes: classes, without a background.
        neck_channels: width of the feature pyramid.
        channels, depth: width and number of the convolutions in the head.
        start_level: the first of the encoder's maps that is used (1: stride 8 of a pyramid that begins at 4).
        num_levels: maps that the pyramid gives; those beyond the encoder's own are strided convolutions.
        scales, ratios: of the anchors, in strides and as height to width.
        **encoder_args: img_size, in_chans, weights, out_indices, ... of `Encoder`.

    Raises:
        ModelError: an unknown encoder, or arguments that it or the pyramid refuses.
    """

    def __init__(
        self,
        encoder: str | nn.Module,
        num_classes: int,
        neck_channels: int = 256,
        channels: int = 256,
        depth: int = 4,
        start_level: int = 1,
        num_levels: int = 5,
        scales: Sequence[float] = OCTAVES,
        ratios: Sequence[float] = RATIOS,
        **encoder_args: Any,
    ) -> None:
        super().__init__()
        self.num_classes, self.scales, self.ratios = num_classes, tuple(scales), tuple(ratios)
        self.backbone = Encoder(encoder, **encoder_args)
        self.neck = FPN(self.backbone.channels, neck_channels, num_levels, start_level, extra="conv_on_input")
        self.bbox_head = RetinaHead(neck_channels, num_classes, channels, depth, len(self.scales) * len(self.ratios))
        self.strides = list(self.backbone.strides[start_level:])
        while len(self.strides) < num_levels:
            self.strides.append(2 * self.strides[-1])

    def forward(self, images: Tensor) -> LevelOutputs:
        """Images (B, in_chans, H, W) -> class logits and box deltas of each level."""
        return self.bbox_head(self.neck(self.backbone(images)))

    def anchors(self, outputs: LevelOutputs) -> list[Tensor]:
        """The anchors of each level, (positions * A, 4), in the order of the outputs' values."""
        like = outputs.boxes[0]
        dtype = torch.promote_types(like.dtype, torch.float32)  # half precision cannot count pixels
        return [
            grid_anchors(base_anchors(stride, self.scales, self.ratios).to(like.device, dtype), stride, x.shape[-2:])
            for stride, x in zip(self.strides, outputs.boxes, strict=True)
        ]

    def loss(self, outputs: LevelOutputs, targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Focal loss of the classes and L1 loss of the deltas, each a sum over the number of matched anchors.

        Args:
            targets: for each image its `boxes` (n, 4) in pixels and `labels` (n,), n may be 0.

        Returns:
            {"classes": ..., "boxes": ...}; train on their sum.

        Raises:
            DataError: targets that are not one an image, or a box or label that cannot be.
        """
        check_targets(targets, outputs.classes[0].shape[0], self.num_classes)
        anchors = torch.cat(self.anchors(outputs))
        classes = torch.cat([_by_anchor(x, self.num_classes) for x in outputs.classes], 1).to(anchors.dtype)
        deltas = torch.cat([_by_anchor(x, 4) for x in outputs.boxes], 1).to(anchors.dtype)
        matched, class_loss, box_loss = 0, classes.new_zeros(()), classes.new_zeros(())
        for logits, delta, target in zip(classes, deltas, targets, strict=True):
            boxes, labels = target["boxes"].to(anchors), target["labels"].to(anchors.device, torch.long)
            owner = assign(anchors, boxes)
            found = owner >= 0
            truth = torch.zeros_like(logits)
            truth[found, labels[owner[found]]] = 1
            counts = owner != IGNORED
            class_loss = class_loss + sigmoid_focal_loss(logits[counts], truth[counts], 0.25, 2.0, reduction="sum")
            wanted = encode(anchors[found], boxes[owner[found]])
            box_loss = box_loss + F.l1_loss(delta[found], wanted, reduction="sum")
            matched += max(int(found.sum()), 1)
        return {"classes": class_loss / matched, "boxes": box_loss / matched}

    @torch.no_grad()
    def postprocess(
        self,
        outputs: LevelOutputs,
        size: tuple[int, int],
        min_score: float = 0.05,
        per_level: int = 1000,
        max_iou: float = 0.5,
        limit: int = 100,
    ) -> list[Detections]:
        """Outputs -> what was found in each image.

        Args:
            size: (height, width) of the images, to which boxes are cut.
            min_score: a box of a class needs a larger probability.
            per_level: so many of the best (position, class) pairs of a level go on.
            max_iou: of two boxes of a class that overlap more, the better one stays.
            limit: boxes of an image.
        """
        anchors = self.anchors(outputs)
        images = []
        for i in range(outputs.classes[0].shape[0]):
            found: list[Detections] = []
            for anchor, classes, deltas in zip(anchors, outputs.classes, outputs.boxes, strict=True):
                scores = _by_anchor(classes[i : i + 1], self.num_classes)[0].to(anchor.dtype).sigmoid().flatten()
                above = (scores > min_score).nonzero()[:, 0]
                best, at = scores[above].topk(min(per_level, above.numel()))
                place, label = above[at] // self.num_classes, above[at] % self.num_classes
                delta = _by_anchor(deltas[i : i + 1], 4)[0].to(anchor.dtype)[place]
                found.append(Detections(decode(anchor[place], delta, size), best, label))
            every = Detections(*(torch.cat(parts) for parts in zip(*found, strict=True)))
            keep = nms(*every, threshold=max_iou, limit=limit)
            images.append(Detections(*(part[keep] for part in every)))
        return images

    def convert_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An mmdetection state dict under our names, for `vitalloy.load_checkpoint`."""
        return convert_parts(self, state)


def assign(anchors: Tensor, boxes: Tensor, positive: float = 0.5, negative: float = 0.4) -> Tensor:
    """Which labelled box (G, 4) each anchor (N, 4) has to find: its index, BACKGROUND or IGNORED, (N,).

    An anchor takes the box it overlaps most if their IoU reaches `positive`; it is background below `negative`. A box
    also takes the anchors that overlap it best, however little; the last of several boxes has the anchor.
    """
    if not boxes.shape[0]:
        return torch.full((anchors.shape[0],), BACKGROUND, device=anchors.device)
    iou = box_iou(boxes, anchors)  # (G, N)
    best, owner = iou.max(0)
    owner = torch.where(best >= positive, owner, torch.where(best < negative, BACKGROUND, IGNORED))
    top = iou.amax(1, keepdim=True)
    index = torch.arange(boxes.shape[0], device=boxes.device).unsqueeze(1)
    claimed = torch.where((iou == top) & (top > 0), index, BACKGROUND).amax(0)
    return torch.where(claimed >= 0, claimed, owner)


def check_targets(targets: Sequence[Mapping[str, Tensor]], images: int, num_classes: int) -> None:
    """Raise a DataError that names the image and the value if targets cannot belong to `images` images."""
    if len(targets) != images:
        raise DataError(f"{len(targets)} targets for {images} images: one for each is needed, if only with 0 boxes.")
    for i, target in enumerate(targets):
        boxes, labels = target["boxes"], target["labels"]
        if boxes.shape != (len(labels), 4):
            raise DataError(f"target {i}: boxes {tuple(boxes.shape)} for {len(labels)} labels; (n, 4) is needed.")
        flat = (boxes[:, 2:] <= boxes[:, :2]).any(1)
        if flat.any():
            box = boxes[flat][0].tolist()
            raise DataError(f"target {i}: the box {box} has no area; boxes are (x1, y1, x2, y2) with x1 < x2, y1 < y2.")
        wrong = (labels < 0) | (labels >= num_classes)
        if wrong.any():
            raise DataError(f"target {i}: label {int(labels[wrong][0])} is not in 0..{num_classes - 1}.")


def _by_anchor(x: Tensor, values: int) -> Tensor:
    """(B, A * values, H, W) -> (B, H * W * A, values)."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, values)
