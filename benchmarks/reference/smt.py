"""SMT as a plain eager model under the authors' parameter names: what ours is timed against.

"Scale-Aware Modulation Meet Transformer", Lin et al., ICCV 2023, arXiv 2307.08579. Classification only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DepthwiseConv(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        batch, _, dim = x.shape
        x = x.transpose(1, 2).reshape(batch, dim, height, width)
        return self.dwconv(x).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = self.fc1(x)
        x = F.gelu(x + self.dwconv(x, height, width))
        return self.fc2(x)


class Modulation(nn.Module):
    def __init__(self, dim: int, num_heads: int = 4, expand: int = 2) -> None:
        super().__init__()
        self.num_heads = num_heads
        groups = dim // num_heads
        self.v = nn.Linear(dim, dim)
        self.s = nn.Linear(dim, dim)
        for i in range(1, num_heads + 1):
            setattr(self, f"local_conv_{i}", nn.Conv2d(groups, groups, 2 * i + 1, 1, i, groups=groups))
        self.proj0 = nn.Conv2d(dim, expand * dim, 1, groups=groups)
        self.bn = nn.BatchNorm2d(expand * dim)
        self.proj1 = nn.Conv2d(expand * dim, dim, 1)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        batch, count, dim = x.shape
        v = self.v(x)
        s = self.s(x).transpose(1, 2).reshape(batch, self.num_heads, dim // self.num_heads, height, width)
        heads = [getattr(self, f"local_conv_{i + 1}")(s[:, i]) for i in range(self.num_heads)]
        s = torch.stack(heads, dim=2).reshape(batch, dim, height, width)
        s = self.proj1(F.gelu(self.bn(self.proj0(s))))
        s = s.reshape(batch, dim, count).transpose(1, 2)
        return self.proj(s * v)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.local_conv = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        batch, count, dim = x.shape
        q = self.q(x).reshape(batch, count, self.num_heads, -1).permute(0, 2, 1, 3)
        kv = self.kv(x).reshape(batch, count, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        k, v = kv[0], kv[1]
        attn = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
        image = v.transpose(1, 2).reshape(batch, count, dim).transpose(1, 2).reshape(batch, dim, height, width)
        local = self.local_conv(image).flatten(2).transpose(1, 2)
        x = (attn @ v).transpose(1, 2).reshape(batch, count, dim) + local
        return self.proj(x)


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, modulate: bool, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Modulation(dim) if modulate else Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x + self.attn(self.norm1(x), height, width)
        return x + self.mlp(self.norm2(x), height, width)


class Stem(nn.Module):
    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(3, dim, kernel, 2, kernel // 2, bias=False),
            nn.BatchNorm2d(dim),
            nn.ReLU(),
            nn.Conv2d(dim, dim, 2, 2),
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        x = self.conv(x)
        return self.norm(x.flatten(2).transpose(1, 2)), *x.shape[-2:]


class PatchEmbed(nn.Module):
    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 3, 2, 1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), *x.shape[-2:]


class SMT(nn.Module):
    def __init__(
        self,
        dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (2, 2, 8, 1),
        heads: tuple[int, ...] = (1, 1, 8, 16),
        ratios: tuple[float, ...] = (4, 4, 4, 2),
        kernel: int = 3,
    ) -> None:
        super().__init__()
        for i, dim in enumerate(dims):
            embed = PatchEmbed(dims[i - 1], dim) if i else Stem(dim, kernel)
            modulate = [i < 2 or (i == 2 and j % 2 == 0) for j in range(depths[i])]
            setattr(self, f"patch_embed{i + 1}", embed)
            setattr(self, f"block{i + 1}", nn.ModuleList(Block(dim, heads[i], m, ratios[i]) for m in modulate))
            setattr(self, f"norm{i + 1}", nn.LayerNorm(dim, eps=1e-6))
        self.head = nn.Linear(dims[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, 5):
            x, height, width = getattr(self, f"patch_embed{i}")(x)
            for block in getattr(self, f"block{i}"):
                x = block(x, height, width)
            x = getattr(self, f"norm{i}")(x)
            if i < 4:
                x = x.transpose(1, 2).reshape(x.shape[0], -1, height, width)
        return self.head(x.mean(1))


MODELS = {"smt_tiny": SMT, "smt_small": lambda: SMT(depths=(3, 4, 18, 2))}
