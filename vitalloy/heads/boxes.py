"""Anchors, the code between boxes and deltas, and non-maximum suppression, by mmdetection's rules.

Boxes are (x1, y1, x2, y2) in pixels of the network's input.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor
from torchvision.ops import box_iou

OCTAVES = tuple(4 * 2 ** (k / 3) for k in range(3))  # sides of a square anchor, in strides
RATIOS = (0.5, 1.0, 2.0)  # height to width
LARGEST = math.log(1000 / 16)  # a delta grows or shrinks a side by no more than its exponential


def base_anchors(stride: float, scales: Sequence[float] = OCTAVES, ratios: Sequence[float] = RATIOS) -> Tensor:
    """The anchors of one position, centred on the origin: (ratios * scales, 4) float64, ratio by ratio."""
    scale = torch.tensor(scales, dtype=torch.float64)
    root = torch.tensor(ratios, dtype=torch.float64).sqrt().unsqueeze(1)
    width, height = (stride * scale / root).flatten(), (stride * scale * root).flatten()
    return torch.stack([-width, -height, width, height], dim=1) / 2


def grid_anchors(base: Tensor, stride: float, grid: tuple[int, int]) -> Tensor:
    """`base` (A, 4) at every position of a map of (rows, columns) -> (rows * columns * A, 4), row-major.

    A position's centre is (column * stride, row * stride), without half a pixel more.
    """
    rows, columns = (torch.arange(n, device=base.device, dtype=base.dtype) * stride for n in grid)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    shift = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
    return (shift + base).flatten(0, 1)


def encode(anchors: Tensor, boxes: Tensor) -> Tensor:
    """The deltas (dx, dy, dw, dh) that turn `anchors` (N, 4) into `boxes` (N, 4)."""
    (x, y, w, h), (bx, by, bw, bh) = _centred(anchors), _centred(boxes)
    return torch.stack([(bx - x) / w, (by - y) / h, (bw / w).log(), (bh / h).log()], dim=1)


def decode(anchors: Tensor, deltas: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Apply deltas (N, 4) to anchors (N, 4); boxes are cut to an image of `size` (height, width) if it is given."""
    x, y, w, h = _centred(anchors)
    dx, dy, dw, dh = deltas.unbind(1)
    x, y = x + dx * w, y + dy * h
    w, h = w * dw.clamp(-LARGEST, LARGEST).exp(), h * dh.clamp(-LARGEST, LARGEST).exp()
    boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=1)
    if size is None:
        return boxes
    height, width = size
    return torch.stack([side.clamp(0, end) for side, end in zip(boxes.unbind(1), (width, height) * 2, strict=True)], 1)


def _centred(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Corners (N, 4) -> centre x, centre y, width, height."""
    x1, y1, x2, y2 = boxes.unbind(1)
    return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1


def nms(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float = 0.5, limit: int = 100) -> Tensor:
    """Non-maximum suppression inside each class.

    Args:
        boxes, scores, labels: (N, 4), (N,), (N,).
        threshold: a box goes when it overlaps a better one of its class by a larger IoU.
        limit: how many boxes stay at most.

    Returns:
        The indices of the boxes that stay, best first.
    """
    if boxes.shape[0] and _compiled(boxes.device.type):
        return torchvision.ops.batched_nms(boxes.float(), scores.float(), labels, threshold)[:limit]
    return plain_nms(boxes, scores, labels, threshold, limit)


def plain_nms(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float = 0.5, limit: int = 100) -> Tensor:
    """`nms` without compiled code: one vectorised step for each box that stays."""
    order = scores.argsort(descending=True, stable=True)
    boxes, labels = boxes[order], labels[order]
    alive = torch.ones_like(labels, dtype=torch.bool)
    kept: list[int] = []
    while len(kept) < limit and alive.any():
        best = int(alive.to(torch.uint8).argmax())  # the first that is alive
        kept.append(best)
        alive &= (labels != labels[best]) | ~(box_iou(boxes[best : best + 1], boxes)[0] > threshold)
        alive[best] = False  # a box without area has no IoU, not even with itself
    return order[kept]


@functools.cache
def _compiled(device: str) -> bool:
    """Whether torchvision's compiled suppression runs here; it does not beside a PyTorch it was not built for."""
    try:
        torchvision.ops.nms(torch.zeros(1, 4, device=device), torch.zeros(1, device=device), 0.5)
    except RuntimeError:
        return False
    return True
