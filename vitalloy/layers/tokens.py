"""Between token sequences and maps. A contiguous sequence and a channels-last map share memory: neither way copies."""

from __future__ import annotations

from torch import Tensor


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W), channels last in memory."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C), row-major."""
    return x.flatten(2).transpose(1, 2)
