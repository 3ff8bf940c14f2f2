"""From an image or a map to a sequence of patch tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitalloy.layers.tokens import to_tokens


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each: (B, C, H, W) -> (B, N, D) and the patch grid."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.proj(x)
        return to_tokens(x), x.shape[-2:]


class OverlapPatchEmbed(nn.Module):
    """Projects and normalizes overlapping patches of side 2 * stride - 1: (B, C, H, W) -> (B, N, D) and their grid."""

    def __init__(self, stride: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, 2 * stride - 1, stride, padding=stride - 1)
        self.norm = nn.LayerNorm(embed_dim)  # eps 1e-5, where the pyramids' blocks have 1e-6

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.proj(x.contiguous(memory_format=torch.channels_last))
        return self.norm(to_tokens(x)), x.shape[-2:]
