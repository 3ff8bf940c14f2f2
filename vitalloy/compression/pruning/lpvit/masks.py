"""Rectangular blocks of a weight: their scores, which of them stay, and what removing them does to the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.errors import CompressionError

Block = tuple[int, int]  # rows, columns
Score = Literal["taylor", "l1"]


def is_prunable(module: nn.Module) -> bool:
    """Linear layers, and convolutions over all channels; depthwise and grouped ones stay dense."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def block_sums(values: Tensor, block: Block) -> Tensor:
    """Sums over the blocks of a weight (out, in, ...), seen as a matrix: (block rows, block columns)."""
    matrix = values.flatten(1)
    rows, columns = matrix.shape
    padded = F.pad(matrix, (0, -columns % block[1], 0, -rows % block[0]))
    return padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).sum((1, 3))


def block_scores(weight: Tensor, gradient: Tensor | None, block: Block, score: Score = "taylor") -> Tensor:
    """Mean of |weight * gradient| ("taylor") or |weight| ("l1") over each block's existing elements.

    Raises:
        CompressionError: a gradient is not finite, or there is none to score by.
    """
    if score == "taylor" and gradient is None:
        raise CompressionError("taylor scores need the gradient of the weight: give it, or score by 'l1'.")
    element = weight if score == "l1" else weight * gradient
    sums = block_sums(element.abs(), block)
    if not sums.isfinite().all():
        raise CompressionError("the scores of a weight's blocks are not finite: its weights or gradients are not.")
    return sums / block_sums(torch.ones_like(weight), block)


def kept_blocks(amount: float, count: int) -> int:
    """How many of `count` blocks stay when the share `amount` of them is to go."""
    return count if amount <= 0 else int((1 - amount) * count)


def block_mask(
    weight: Tensor, gradient: Tensor | None, amount: float, block: Block = (16, 16), score: Score = "taylor"
) -> Tensor:
    """Ones where the best blocks are and zeros elsewhere, of the weight's shape and dtype.

    Args:
        weight, gradient: (out, in) or (out, in, kh, kw), which counts as (out, in * kh * kw).
        amount: share of the blocks that go, 0 to 1.
    """
    scores = block_scores(weight, gradient, block, score)
    best = scores.flatten().argsort(descending=True, stable=True)[: kept_blocks(amount, scores.numel())]
    grid = torch.zeros_like(scores).flatten().index_fill_(0, best, 1.0).view_as(scores)
    matrix = grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return matrix[: weight.shape[0], : weight.shape[1:].numel()].reshape(weight.shape)


@dataclass
class Ranking:
    """Blocks from the best to the worst, and what each holds; all (blocks,) in float64.

    Attributes:
        first: sum over the block of -weight * gradient, the first-order change of the loss when it goes.
        square: sum of (weight * gradient) ** 2.
        change: sum of -weight.
        size: elements.
    """

    first: Tensor
    square: Tensor
    change: Tensor
    size: Tensor

    @property
    def numel(self) -> int:
        return int(self.size.sum())

    def density(self, kept: int) -> float:
        """Share of the elements in the best `kept` blocks."""
        return float(self.size[:kept].sum() / self.size.sum())

    @classmethod
    def of(cls, weight: Tensor, gradient: Tensor, block: Block = (16, 16), score: Score = "taylor") -> Ranking:
        """The blocks of a weight."""
        weight, gradient = weight.detach().double(), gradient.double()
        order = block_scores(weight, gradient, block, score).flatten().argsort(descending=True, stable=True)
        product = weight * gradient
        parts = (-product, product.square(), -weight, torch.ones_like(weight))
        return cls(*(block_sums(values, block).flatten()[order].cpu() for values in parts))

    def __len__(self) -> int:
        return len(self.first)
