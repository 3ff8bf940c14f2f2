"""DHVT as a plain eager model under the authors' parameter names: what ours is timed against.

"Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small Datasets", Lu et al., NeurIPS
2022, arXiv 2210.05958. Patches of 16 pixels, classification only.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Affine(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.alpha + self.beta


def conv3x3(in_chans: int, out_chans: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_chans, out_chans, 3, 2, 1, bias=False), nn.BatchNorm2d(out_chans))


class PatchEmbed(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pre_affine = Affine(3)
        self.proj = nn.Sequential(
            conv3x3(3, dim // 8),
            nn.GELU(),
            conv3x3(dim // 8, dim // 4),
            nn.GELU(),
            conv3x3(dim // 4, dim // 2),
            nn.GELU(),
            conv3x3(dim // 2, dim),
        )
        self.post_affine = Affine(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.post_affine(self.proj(self.pre_affine(x)))
        return x.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.ht_proj = nn.Linear(self.head_dim, dim)
        self.ht_norm = nn.LayerNorm(self.head_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_heads, dim))

    def forward(self, x: Tensor) -> Tensor:
        batch, count, dim = x.shape
        heads = x.reshape(batch, count, self.num_heads, self.head_dim).permute(0, 2, 1, 3).mean(dim=2)
        heads = self.ht_proj(heads).reshape(batch, -1, self.num_heads, self.head_dim)
        heads = F.gelu(self.ht_norm(heads)).flatten(2) + self.pos_embed
        x = torch.cat([x, heads], dim=1)
        qkv = self.qkv(x).reshape(batch, -1, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
        x = self.proj((attn @ v).transpose(1, 2).reshape(batch, -1, dim))
        cls, patches, heads = torch.split(x, [1, count - 1, self.num_heads], dim=1)
        return torch.cat([cls + heads.mean(dim=1, keepdim=True), patches], dim=1)


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, hidden, 1)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)
        self.conv3 = nn.Conv2d(hidden, dim, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.bn3 = nn.BatchNorm2d(dim)
        self.compress = nn.Linear(dim, dim // 4)
        self.excitation = nn.Linear(dim // 4, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, dim = x.shape
        cls, patches = torch.split(x, [1, count - 1], dim=1)
        side = math.isqrt(count - 1)
        patches = patches.reshape(batch, side, side, dim).permute(0, 3, 1, 2)
        patches = F.gelu(self.bn1(self.conv1(patches)))
        patches = patches + F.gelu(self.bn2(self.conv2(patches)))
        patches = self.bn3(self.conv3(patches))
        weight = self.excitation(F.gelu(self.compress(patches.mean(dim=(2, 3)).unsqueeze(1))))
        return torch.cat([cls * weight, patches.flatten(2).transpose(1, 2)], dim=1)


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = FeedForward(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DHVT(nn.Module):
    def __init__(self, dim: int = 192, num_heads: int = 3) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(12))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


MODELS = {"dhvt_tiny": DHVT, "dhvt_small": lambda: DHVT(384, 6)}
