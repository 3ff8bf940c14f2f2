"""UniFormer read plainly from its published description, under the authors' parameter names: what ours is timed beside.

Image classifiers only: `UniFormer` and the light form with token slimming.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        batch, count, dim = x.shape
        qkv = self.qkv(x).reshape(batch, count, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)
        x = (weights @ v).transpose(1, 2).reshape(batch, count, dim)
        return self.proj(x), weights[:, :, 0].mean(1)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, linear: Callable[[int, int], nn.Module]):
        super().__init__()
        self.fc1 = linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def pointwise(dim: int, out: int) -> nn.Module:
    return nn.Conv2d(dim, out, 1)


class LocalBlock(nn.Module):
    def __init__(self, dim: int, mlp_ratio: float):
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.BatchNorm2d(dim)
        self.conv1 = nn.Conv2d(dim, dim, 1)
        self.conv2 = nn.Conv2d(dim, dim, 1)
        self.attn = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), pointwise)

    def forward(self, x):
        x = x + self.pos_embed(x)
        x = x + self.conv2(self.attn(self.conv1(self.norm1(x))))
        return x + self.mlp(self.norm2(x))


class GlobalBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), nn.Linear)

    def forward(self, x):
        x = x + self.pos_embed(x)
        batch, dim, height, width = x.shape
        x = x.flatten(2).transpose(1, 2)
        x = x + self.attn(self.norm1(x))[0]
        x = x + self.mlp(self.norm2(x))
        return x.transpose(1, 2).reshape(batch, dim, height, width)


class SlimmingBlock(GlobalBlock):
    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, keep: float, trade_off: float):
        super().__init__(dim, num_heads, mlp_ratio)
        self.keep, self.trade_off = keep, trade_off

    def forward(self, cls, x, scores):
        x = x + self.pos_embed(x)
        batch, dim, height, width = x.shape
        x = x.flatten(2).transpose(1, 2)
        if self.keep == 1:
            x = torch.cat([cls, x], dim=1)
            attended, fresh = self.attn(self.norm1(x))
            x = x + attended
            x = x + self.mlp(self.norm2(x))
            cls, x, fresh = x[:, :1], x[:, 1:], fresh[:, 1:]
            scores = fresh if scores is None else (1 - self.trade_off) * scores + self.trade_off * fresh
            return cls, x.transpose(1, 2).reshape(batch, dim, height, width), scores

        kept = int(x.shape[1] * self.keep)
        order = scores.argsort(dim=1, descending=True)
        x = x.gather(1, order.unsqueeze(-1).expand(-1, -1, dim))
        scores = scores.gather(1, order)
        informative, others, weights = x[:, :kept], x[:, kept:], scores[:, kept:]
        weights = weights / weights.sum(dim=1, keepdim=True)
        merged = (weights.unsqueeze(-1) * others).sum(dim=1, keepdim=True)

        x = torch.cat([cls, informative, merged], dim=1)
        attended, fresh = self.attn(self.norm1(x))
        x = x + attended
        hidden = self.mlp(self.norm2(x))
        x = x + hidden
        others = others + attended[:, -1:] + hidden[:, -1:]
        renewed = (1 - self.trade_off) * scores[:, :kept] + self.trade_off * fresh[:, 1:-1]
        scores = torch.cat([renewed, scores[:, kept:]], dim=1)

        cls, x = x[:, :1], torch.cat([x[:, 1:-1], others], dim=1)
        back = order.argsort(dim=1)
        x = x.gather(1, back.unsqueeze(-1).expand(-1, -1, dim))
        return cls, x.transpose(1, 2).reshape(batch, dim, height, width), scores.gather(1, back)


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, in_chans: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch, patch)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        x = self.proj(x)
        batch, dim, height, width = x.shape
        x = self.norm(x.flatten(2).transpose(1, 2))
        return x.reshape(batch, height, width, dim).permute(0, 3, 1, 2).contiguous()


class ConvStem(nn.Module):
    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, 2, 1),
            nn.BatchNorm2d(dim // 2),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 3, 2, 1),
            nn.BatchNorm2d(dim),
        )

    def forward(self, x):
        return self.proj(x)


class UniFormer(nn.Module):
    def __init__(self, depths=(3, 4, 8, 3), dims=(64, 128, 320, 512), head_dim=64, mlp_ratio=4, num_classes=1000):
        super().__init__()
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            embed = PatchEmbed(2, dims[i - 1], dim) if i else self.stem(dim)
            setattr(self, f"patch_embed{i + 1}", embed)
            blocks = [self.block(i, j, dim, dim // head_dim, mlp_ratio) for j in range(depth)]
            setattr(self, f"blocks{i + 1}", nn.ModuleList(blocks))
        self.norm = nn.BatchNorm2d(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes)

    def stem(self, dim):
        return PatchEmbed(4, 3, dim)

    def block(self, stage, index, dim, num_heads, mlp_ratio):
        return LocalBlock(dim, mlp_ratio) if stage < 2 else GlobalBlock(dim, num_heads, mlp_ratio)

    def forward(self, x):
        for i in range(4):
            x = getattr(self, f"patch_embed{i + 1}")(x)
            for block in getattr(self, f"blocks{i + 1}"):
                x = block(x)
        return self.head(self.norm(x).flatten(2).mean(-1))


class UniFormerLight(UniFormer):
    def __init__(self, depths=(2, 5, 8, 2), dims=(56, 112, 224, 448), head_dim=28, mlp_ratio=3, num_classes=1000):
        super().__init__(depths, dims, head_dim, mlp_ratio, num_classes)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dims[2]))
        self.cls_upsample = nn.Linear(dims[2], dims[3])
        self.pool = nn.AvgPool2d(2)
        self.norm_cls = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head_cls = nn.Linear(dims[-1], num_classes)

    def stem(self, dim):
        return ConvStem(3, dim)

    def block(self, stage, index, dim, num_heads, mlp_ratio):
        if stage < 2:
            return LocalBlock(dim, mlp_ratio)
        first = stage == 2 and index == 0
        return SlimmingBlock(dim, num_heads, mlp_ratio, 1 if first else 0.5, 1 if first else 0.5)

    def forward(self, x):
        for i in range(2):
            x = getattr(self, f"patch_embed{i + 1}")(x)
            for block in getattr(self, f"blocks{i + 1}"):
                x = block(x)
        x = self.patch_embed3(x)
        cls, scores = self.cls_token.expand(x.shape[0], -1, -1), None
        for block in self.blocks3:
            cls, x, scores = block(cls, x, scores)
        total = scores.sum(dim=1, keepdim=True)
        scores = self.pool(scores.reshape(-1, 1, *x.shape[2:])).flatten(1)
        scores = scores * total / scores.sum(dim=1, keepdim=True)
        cls, x = self.cls_upsample(cls), self.patch_embed4(x)
        for block in self.blocks4:
            cls, x, scores = block(cls, x, scores)
        logits = self.head(self.norm(x).flatten(2).mean(-1))
        return (logits, self.head_cls(self.norm_cls(cls[:, 0]))) if self.training else logits


MODELS = {"uniformer_small": UniFormer, "uniformer_xxs_224": UniFormerLight}
