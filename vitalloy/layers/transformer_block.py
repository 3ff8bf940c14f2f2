"""The block of the plain vision transformer."""

from __future__ import annotations

from timm.layers import DropPath
from torch import Tensor, nn

from vitalloy.layers.attention import SelfAttention
from vitalloy.layers.mlp import Mlp


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and perceptron, each with a residual: (B, N, C) -> the same shape."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, attn_drop: float, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(dim, num_heads, qkv_bias, attn_drop)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))
