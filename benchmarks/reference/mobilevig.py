"""MobileViG as its paper and the authors' parameter names describe it: the peer of ours where none can be installed.

"MobileViG: Graph-Based Sparse Attention for Mobile Vision Applications", Munir et al., CVPR Workshops 2023,
arXiv 2307.00395.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Stem(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, dim // 2, 3, stride=2, padding=1),
            nn.BatchNorm2d(dim // 2),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
            nn.BatchNorm2d(dim),
            nn.GELU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x)


class Downsample(nn.Module):
    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(dim, out_dim, 3, stride=2, padding=1), nn.BatchNorm2d(out_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.norm1 = nn.Conv2d(dim, hidden, 1), nn.BatchNorm2d(hidden)
        self.mid, self.mid_norm = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden), nn.BatchNorm2d(hidden)
        self.fc2, self.norm2 = nn.Conv2d(hidden, dim, 1), nn.BatchNorm2d(dim)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.fc1(x)))
        x = self.act(self.mid_norm(self.mid(x)))
        return self.norm2(self.fc2(x))


class InvertedResidual(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = Mlp(dim, 4 * dim)
        self.layer_scale_2 = nn.Parameter(1e-5 * torch.ones(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale_2 * self.mlp(x)


class GraphConv(nn.Module):
    def __init__(self, dim: int, hop: int) -> None:
        super().__init__()
        self.hop = hop
        self.nn = nn.Sequential(nn.Conv2d(2 * dim, 2 * dim, 1), nn.BatchNorm2d(2 * dim), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        relative = torch.zeros_like(x)
        for axis in (2, 3):
            for shift in range(self.hop, x.shape[axis], self.hop):
                relative = torch.maximum(relative, x - torch.roll(x, shift, axis))
        return self.nn(torch.cat([x, relative], dim=1))


class Grapher(nn.Module):
    def __init__(self, dim: int, hop: int) -> None:
        super().__init__()
        self.fc1 = nn.Sequential(nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim))
        self.graph_conv = GraphConv(dim, hop)
        self.fc2 = nn.Sequential(nn.Conv2d(2 * dim, dim, 1), nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.graph_conv(self.fc1(x)))


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Sequential(nn.Conv2d(dim, 4 * dim, 1), nn.BatchNorm2d(4 * dim))
        self.act = nn.GELU()
        self.fc2 = nn.Sequential(nn.Conv2d(4 * dim, dim, 1), nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(x)))


class MobileViG(nn.Module):
    def __init__(
        self, widths: tuple[int, ...], depths: tuple[int, ...], graph_width: int, graph_depth: int, features: int
    ) -> None:
        super().__init__()
        self.stem = Stem(widths[0])
        local: list[nn.Module] = []
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if i:
                local.append(Downsample(widths[i - 1], width))
            local += [InvertedResidual(width) for _ in range(depth)]
        self.local_backbone = nn.ModuleList([*local, Downsample(widths[-1], graph_width)])
        self.backbone = nn.ModuleList(
            nn.Sequential(Grapher(graph_width, hop=2), FeedForward(graph_width)) for _ in range(graph_depth)
        )
        self.prediction = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(graph_width, features, 1),
            nn.BatchNorm2d(features),
            nn.GELU(),
            nn.Dropout(0.0),
        )
        self.head = nn.Conv2d(features, 1000, 1)
        self.dist_head = nn.Conv2d(features, 1000, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.local_backbone:
            x = block(x)
        for block in self.backbone:
            x = block(x)
        x = self.prediction(x)
        by_class, by_teacher = self.head(x).flatten(1), self.dist_head(x).flatten(1)
        return (by_class + by_teacher) / 2


MODELS = {
    "mobilevig_ti": lambda: MobileViG((42, 84, 168), (2, 2, 6), 256, 2, 512),
    "mobilevig_m": lambda: MobileViG((42, 84, 224), (3, 3, 9), 400, 3, 768),
}
