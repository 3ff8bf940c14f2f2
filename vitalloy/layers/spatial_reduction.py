"""Attention with fewer keys and values than queries: the spatial reduction of the Pyramid Vision Transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitalloy.layers.attention import Attend, fitting_heads, merge_heads, split_heads
from vitalloy.layers.tokens import to_map, to_tokens


class SpatialReductionAttention(nn.Module):
    """Multi-head attention whose keys and values come from a shrunken token map.

    Args:
        dim: channels in and out.
        num_heads: heads, each a contiguous group of channels.
        reduction: side of the patches that one key stands for; 1 keeps every token. Rows and columns of the grid
            behind the last whole patch have no key, as published.
        linear: average the map to 7x7 cells whatever its size instead (`reduction` is then of no account), so that
            the cost grows with the number of tokens and not with its square.
        qkv_bias: biases of the query, key and value projections.
        dropout: probability of dropping an attention weight in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        reduction: int = 1,
        linear: bool = False,
        qkv_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = fitting_heads(dim, num_heads)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.attend = Attend(dropout)
        self.proj = nn.Linear(dim, dim)
        self.pool, self.sr, self.norm, self.act = None, None, None, nn.Identity()
        if linear:
            self.pool, self.sr, self.act = nn.AdaptiveAvgPool2d(7), nn.Conv2d(dim, dim, 1), nn.GELU()
        elif reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, reduction)
        if self.sr is not None:
            self.norm = nn.LayerNorm(dim)  # eps 1e-5, where the blocks' own norms have 1e-6

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x (B, N, C) on a grid of N cells (more tokens may precede them where nothing is reduced) -> (B, N, C)."""
        q = split_heads(self.q(x), self.num_heads)
        kv = self.kv(self.reduce(x, grid)).unflatten(-1, (2, self.num_heads, -1))  # (B, M, 2, heads, d)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(merge_heads(self.attend(q, k, v)))

    def reduce(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The tokens (B, M, C) that keys and values are made of."""
        if self.sr is None:
            return x
        x = to_map(x, grid)
        if self.pool is not None:
            x = self.pool(x)
        return self.act(self.norm(to_tokens(self.sr(x))))


def fuse_keys_values(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join the separate `.k.` and `.v.` projections of other ports to `.kv.`, keys first."""
    fused = {}
    for name, value in state.items():
        if ".attn.k." in name:
            fused[name.replace(".attn.k.", ".attn.kv.")] = torch.cat([value, state[name.replace(".k.", ".v.")]])
        elif ".attn.v." not in name:
            fused[name] = value
    return fused
