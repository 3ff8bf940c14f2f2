"""Between token sequences and maps. A contiguous sequence and a channels-last map share memory: neither way copies."""

from __future__ import annotations

from torch import Tensor


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W), channels last in memory."""
    # in this order even a batch of one has channels-last strides, without which convolutions copy
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C), row-major."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)
