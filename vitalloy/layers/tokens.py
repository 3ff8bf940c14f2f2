"""Between token sequences and maps. A contiguous sequence and a channels-last map share memory: neither way copies."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def to_map(tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W), channels last in memory; (B, T*H*W, C) -> (B, C, T, H, W) for clips."""
    # in this order even a batch of one has channels-last strides, without which convolutions copy
    return tokens.unflatten(1, tuple(grid)).movedim(-1, 1)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C), row-major; (B, C, T, H, W) -> (B, T*H*W, C)."""
    return x.movedim(1, -1).flatten(1, -2)
