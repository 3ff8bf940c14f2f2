"""A plain reading of ConvShareViT to time ours against. Nothing is published; names are ours. Takes 32-pixel images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

INPUT = {"convshare_vit_small": (3, 32, 32), "convshare_vit_base": (3, 32, 32)}


class SharedConv(nn.Module):
    def __init__(self, side: int, in_maps: int, out_maps: int, kernel: int) -> None:
        super().__init__()
        self.side, self.in_maps = side, in_maps
        kernels = out_maps * side * side // (side - kernel + 1) ** 2
        self.conv = nn.Conv2d(in_maps, kernels, kernel)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        x = self.conv(x.reshape(b * t, self.in_maps, self.side, self.side))
        return x.reshape(b, t, -1)


class Attention(nn.Module):
    def __init__(self, side: int, kernel: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (side * side // num_heads) ** -0.5
        self.qkv = SharedConv(side, 1, 3, kernel)
        self.proj = SharedConv(side, 1, 1, kernel)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(b, t, c))


class Mlp(nn.Module):
    def __init__(self, side: int, kernel: int, ratio: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = SharedConv(side, 1, ratio, kernel), nn.GELU(), SharedConv(side, ratio, 1, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, side: int, kernel: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(side * side), Attention(side, kernel, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(side * side), Mlp(side, kernel, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class ConvShareViT(nn.Module):
    def __init__(self, side: int, kernel: int, depth: int, num_heads: int, num_classes: int = 1000) -> None:
        super().__init__()
        dim = side * side
        self.patch_embed = PatchEmbed(4, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 65, dim))
        self.blocks = nn.ModuleList(Block(side, kernel, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


MODELS = {
    "convshare_vit_small": lambda: ConvShareViT(8, 5, 6, 4),
    "convshare_vit_base": lambda: ConvShareViT(16, 9, 8, 8),
}
