"""Self-attention in windows with learned relative positions, and how Swin's family embeds and merges its patches.

Maps are (B, H, W, C) here: window, norm and linear layers all work on their channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from vitalloy.layers.attention import Attend, fitting_heads, merge_heads
from vitalloy.layers.windows import Cut, Pair, relative_index


class WindowAttention(nn.Module):
    """Self-attention in each window, with a learned bias for each relative position.

    Args:
        window: (height, width) that the table of biases is made for.
    """

    def __init__(self, dim: int, num_heads: int, window: Pair, qkv_bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.window = fitting_heads(dim, num_heads), window
        rows = (2 * window[0] - 1) * (2 * window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(trunc_normal_(torch.empty(rows, num_heads), std=0.02))
        self.register_buffer("ready_bias", None, persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attend = Attend(dropout)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cut: Cut) -> Tensor:
        """x (B * windows, N, C) -> the same shape."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B * windows, N, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = cut.masked(self.bias(cut), x.shape[0])  # len(x) would fix the batch of an export
        return self.proj(merge_heads(self.attend(q, k, v, bias=bias)))

    def bias(self, cut: Cut) -> Tensor:
        """What relative positions add to the logits of each window, (1, heads, N, N)."""
        if self.ready_bias is not None and cut.area == self.window[0] * self.window[1]:
            return self.ready_bias
        return cut.relative_bias(self.relative_position_bias_table)

    @torch.no_grad()
    def fuse(self) -> None:
        """Read the table once, for whole windows; those of a grid below the window still need the table."""
        area = self.window[0] * self.window[1]
        index = relative_index(self.window, device=self.relative_position_bias_table.device)
        rows = self.relative_position_bias_table[index].unflatten(0, (area, area))
        self.ready_bias = rows.permute(2, 0, 1).unsqueeze(0).contiguous()


class NormPatchEmbed(nn.Module):
    """Cuts an image into patches, projects and normalizes each: (B, C, H, W) -> (B, H / p, W / p, D)."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(pad_to(x, self.proj.stride, (2, 3)))
        return self.norm(x.permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Four neighbours become one token of twice the channels: (B, H, W, C) -> (B, H / 2, W / 2, 2C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to(x, (2, 2), (1, 2)).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, H/2, 2, W/2, 2, C)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # the neighbour below comes before the one to the right
        return self.reduction(self.norm(x))


def pad_to(x: Tensor, multiple: tuple[int, ...], dims: Pair) -> Tensor:
    """Zeros behind the two dims, up to the next multiple; `x` itself where they fit."""
    extra = [-x.shape[d] % m for d, m in zip(dims, multiple, strict=True)]
    if not any(extra):
        return x
    behind = (0, 0) * (x.ndim - 1 - dims[1])
    return F.pad(x, (*behind, 0, extra[1], 0, extra[0]))
