"""TransNeXt written straight from its description: unfolded neighbourhoods, explicit softmax, the author's names."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def relative_coordinates(queries: int, keys: int, pretrain: int) -> tuple[Tensor, Tensor]:
    """For square grids: the (down, right) pairs that occur, and which of them each query and key has."""
    at = torch.arange(queries, dtype=torch.float32)
    centres = F.adaptive_avg_pool1d(at[None, None], keys).flatten()
    query = torch.stack(torch.meshgrid(at, at, indexing="ij"), -1).flatten(0, 1)
    key = torch.stack(torch.meshgrid(centres, centres, indexing="ij"), -1).flatten(0, 1)
    apart = (query[:, None] - key[None]) / (pretrain - 1) * 8  # (N, M, 2)
    table = apart.sign() * torch.log2(1 + apart.abs()) / math.log2(8)
    return torch.unique(table.flatten(0, 1), dim=0, return_inverse=True)


class ConvGLU(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        hidden = 2 * hidden // 3
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.dwconv = nn.ModuleDict({"dwconv": nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)})
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, side: int) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        gate = gate.transpose(1, 2).unflatten(2, (side, side)).contiguous()
        gate = self.dwconv["dwconv"](gate).flatten(2).transpose(1, 2)
        return self.fc2(F.gelu(gate) * value)


class PositionedAttention(nn.Module):
    def __init__(self, dim: int, heads: int, side: int, keys: int, pretrain: int) -> None:
        super().__init__()
        self.heads, self.side, self.keys = heads, side, keys
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), math.log(math.exp(1 / 0.24) - 1)))
        self.query_embedding = nn.Parameter(torch.randn(heads, 1, dim // heads) * 0.02)
        self.proj = nn.Linear(dim, dim)
        self.cpb_fc1, self.cpb_fc2 = nn.Linear(2, 512), nn.Linear(512, heads)
        table, index = relative_coordinates(side, keys, pretrain)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("index", index.flatten(), persistent=False)

    def position_bias(self) -> Tensor:
        bias = self.cpb_fc2(F.relu(self.cpb_fc1(self.table))).transpose(0, 1)
        return bias[:, self.index].view(self.heads, self.side**2, self.keys**2)


class Attention(PositionedAttention):
    def __init__(self, dim: int, heads: int, side: int, pretrain: int) -> None:
        super().__init__(dim, heads, side, side, pretrain)
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3 * self.heads, c // self.heads).permute(0, 2, 1, 3).chunk(3, dim=1)
        q = (F.normalize(q, dim=-1) + self.query_embedding) * F.softplus(self.temperature) * math.log(n)
        attention = q @ F.normalize(k, dim=-1).transpose(-2, -1) + self.position_bias()
        return self.proj((attention.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, n, c))


class AggregatedAttention(PositionedAttention):
    def __init__(self, dim: int, heads: int, side: int, reduction: int, pretrain: int) -> None:
        super().__init__(dim, heads, side, side // reduction, pretrain)
        width = dim // heads
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.relative_pos_bias_local = nn.Parameter(torch.randn(heads, 9) * 0.0004)
        self.learnable_tokens = nn.Parameter(torch.randn(heads, width, 9) * 0.02)
        self.learnable_bias = nn.Parameter(torch.zeros(heads, 1, 9))
        self.sr, self.norm = nn.Conv2d(dim, dim, 1), nn.LayerNorm(dim)
        inside = F.unfold(torch.ones(1, 1, side, side), 3, padding=1)[0].T  # (N, 9)
        self.register_buffer("padding_mask", inside == 0, persistent=False)
        count = inside.sum(-1, keepdim=True) + self.keys**2
        self.register_buffer("seq_length_scale", torch.log(count), persistent=False)  # (N, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        h, d, side = self.heads, c // self.heads, self.side
        q = F.normalize(self.q(x).reshape(b, n, h, d).permute(0, 2, 1, 3), dim=-1)  # (B, h, N, d)
        scaled = (q + self.query_embedding) * F.softplus(self.temperature) * self.seq_length_scale

        k, v = self.kv(x).chunk(2, dim=-1)
        k = F.normalize(k.reshape(b, n, h, d), dim=-1).reshape(b, n, c)
        kv = torch.cat([k, v], dim=-1).permute(0, 2, 1).reshape(b, 2 * c, side, side)
        k, v = F.unfold(kv, 3, padding=1).reshape(b, 2 * h, d, 9, n).permute(0, 1, 4, 2, 3).chunk(2, dim=1)
        local = (scaled.unsqueeze(-2) @ k).squeeze(-2) + self.relative_pos_bias_local.unsqueeze(1)  # (B, h, N, 9)
        local = local.masked_fill(self.padding_mask, float("-inf"))

        pooled = F.gelu(self.sr(x.permute(0, 2, 1).reshape(b, c, side, side)))
        pooled = F.adaptive_avg_pool2d(pooled, self.keys).reshape(b, c, -1).permute(0, 2, 1)
        kv = self.kv(self.norm(pooled)).reshape(b, -1, 2 * h, d).permute(0, 2, 1, 3)
        pooled_k, pooled_v = kv.chunk(2, dim=1)
        pooled = scaled @ F.normalize(pooled_k, dim=-1).transpose(-2, -1) + self.position_bias()

        attention = torch.cat([local, pooled], dim=-1).softmax(dim=-1)
        local, pooled = attention.split([9, self.keys**2], dim=-1)
        local = local + q @ self.learnable_tokens + self.learnable_bias
        x = (local.unsqueeze(-2) @ v.transpose(-2, -1)).squeeze(-2) + pooled @ pooled_v
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, side: int, reduction: int, pretrain: int, mlp_ratio: int) -> None:
        super().__init__()
        self.side = side
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        if reduction > 1:
            self.attn = AggregatedAttention(dim, heads, side, reduction, pretrain)
        else:
            self.attn = Attention(dim, heads, side, pretrain)
        self.mlp = ConvGLU(dim, dim * mlp_ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x), self.side)


class PatchEmbed(nn.Module):
    def __init__(self, kernel: int, stride: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(in_chans, dim, kernel, stride, kernel // 2), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class TransNeXt(nn.Module):
    def __init__(self, dims: tuple[int, ...], depths: tuple[int, ...], img_size: int = 224) -> None:
        super().__init__()
        self.sides = [img_size // 2 ** (i + 2) for i in range(4)]
        for i, (side, reduction, ratio) in enumerate(zip(self.sides, (8, 4, 2, 1), (8, 8, 4, 4), strict=True)):
            dim = dims[i]
            embed = PatchEmbed(3, 2, dims[i - 1], dim) if i else PatchEmbed(7, 4, 3, dim)
            blocks = [Block(dim, dim // 24, side, reduction, side, ratio) for _ in range(depths[i])]
            setattr(self, f"patch_embed{i + 1}", embed)
            setattr(self, f"block{i + 1}", nn.ModuleList(blocks))
            setattr(self, f"norm{i + 1}", nn.LayerNorm(dim, eps=1e-6))
        self.head = nn.Linear(dims[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        for i, side in enumerate(self.sides):
            x = getattr(self, f"patch_embed{i + 1}")(x)
            for block in getattr(self, f"block{i + 1}"):
                x = block(x)
            x = getattr(self, f"norm{i + 1}")(x)
            if i < 3:
                x = x.transpose(1, 2).reshape(len(x), -1, side, side).contiguous()
        return self.head(x.mean(dim=1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "transnext_micro": lambda: TransNeXt((48, 96, 192, 384), (2, 2, 15, 2)),
    "transnext_tiny": lambda: TransNeXt((72, 144, 288, 576), (2, 2, 15, 2)),
}
