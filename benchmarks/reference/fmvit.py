"""FMViT in its training form, as plain modules: what our `fmvit_*` models are measured against.

A reading of the same reconstruction (the authors published no code): every branch is a convolution and a batch norm of
its own and attention is scaled dot-product attention on token sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def round32(width: float) -> int:
    rounded = max(32, int(width + 16) // 32 * 32)
    if rounded < 0.9 * width:
        rounded += 32
    return rounded


class ConvBN(nn.Module):
    def __init__(self, cin: int, cout: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(cout)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class ConvBNReLU(ConvBN):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Embed(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.active = stride == 2 or cin != cout
        if self.active:
            self.conv = nn.Conv2d(cin, cout, 1, bias=False)
            self.norm = nn.BatchNorm2d(cout)

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return x
        if self.stride == 2:
            x = F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
        return self.norm(self.conv(x))


class GroupLayer(nn.Module):
    """1x1 convolutions of 1, 2 and 4 groups side by side, and the normed input."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList([ConvBN(cin, cout, groups=groups) for groups in (1, 2, 4)])
        if cin == cout:
            self.branches.append(nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in self.branches)


class GroupMLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = GroupLayer(dim, hidden)
        self.fc2 = GroupLayer(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


class DepthwiseBranches(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [ConvBN(dim, dim, 3, groups=dim), ConvBN(dim, dim, 1, groups=dim), nn.BatchNorm2d(dim)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return sum(branch(x) for branch in self.branches)


class Mixer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.local = nn.Sequential(DepthwiseBranches(dim), nn.ReLU())
        self.projection = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.local(x))


class Attention(nn.Module):
    def __init__(self, dim: int, reduction: int) -> None:
        super().__init__()
        self.heads, self.reduction = dim // 32, reduction
        self.q, self.k, self.v, self.proj = (GroupLayer(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        small = x
        if self.reduction > 1:
            small = F.avg_pool2d(x, self.reduction, ceil_mode=True, count_include_pad=False)
        q, k, v = (
            t.flatten(2).reshape(batch, self.heads, 32, -1).transpose(2, 3)
            for t in (self.q(x), self.k(small), self.v(small))
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(2, 3).reshape(batch, channels, height, width))


class CFB(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.patch_embed = Embed(cin, cout, stride)
        self.mixer = Mixer(cout)
        self.norm = nn.BatchNorm2d(cout)
        self.mlp = GroupMLP(cout, round32(3 * cout))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = x + self.mixer(x)
        return x + self.mlp(self.norm(x))


class FMB(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int, reduction: int) -> None:
        super().__init__()
        low = round32(int(0.75 * cout))
        self.patch_embed = Embed(cin, low, stride)
        self.norm1 = nn.BatchNorm2d(low)
        self.attn = Attention(low, reduction)
        self.embed_low = Embed(low, cout - low, 1)
        self.mixer = Mixer(cout - low)
        self.norm2 = nn.BatchNorm2d(cout)
        self.mlp = GroupMLP(cout, round32(2 * cout))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        low = x + self.attn(self.norm1(x))
        high = self.embed_low(low)
        high = high + self.mixer(high)
        z = torch.cat([low, high], dim=1)
        return z + self.mlp(self.norm2(z))


class FMViT(nn.Module):
    def __init__(self, depths: tuple[int, ...], dims: tuple[int, ...], mixing_dims: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            ConvBNReLU(3, 64, 3, 2), ConvBNReLU(64, 32, 3), ConvBNReLU(32, 64, 3), ConvBNReLU(64, 64, 3, 2)
        )
        blocks, width = [], 64
        for stage, depth in enumerate(depths):
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                every = 5 if stage == 2 else depth
                if stage > 0 and (index + 1) % every == 0:
                    cout = mixing_dims[stage - 1]
                    blocks.append(FMB(width, cout, stride, (8, 4, 2, 1)[stage]))
                else:
                    cout = dims[stage]
                    blocks.append(CFB(width, cout, stride))
                width = cout
        self.features = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.features(self.stem(x)))
        return self.head(x.mean((2, 3)))


def fmvit_tiny() -> nn.Module:
    return FMViT((2, 2, 5, 2), (64, 96, 192, 384), (128, 256, 512))


def fmvit_base() -> nn.Module:
    return FMViT((3, 4, 10, 3), (96, 192, 384, 768), (256, 512, 1024))


MODELS = {"fmvit_tiny": fmvit_tiny, "fmvit_base": fmvit_base}
