"""DuoFormer as one would write it from the description, on torchvision's ResNets: the peer of our own in benchmarks.

Names are the authors', so the weights of one load into the other. 224-pixel images.
"""

from __future__ import annotations

from collections.abc import Callable

import vitalloy  # noqa: F401  (before torchvision, which does not import beside a CPU build of PyTorch otherwise)

# isort: split
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, dim = x.shape
        qkv = self.qkv(x).reshape(batch, count, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, count, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class ScaleBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, regions, tokens, dim = x.shape
        inner = self.attn(self.norm1(x).reshape(batch * regions, tokens, dim))
        x = x + inner.reshape(batch, regions, tokens, dim)
        return x + self.mlp(self.norm2(x))


class PatchBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.attn = Attention(dim, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)


class MultiscaleTransformer(nn.Module):
    def __init__(self, dim: int, num_heads: int, depth: int, tokens: int, num_classes: int) -> None:
        super().__init__()
        self.pos_embed_for_scale = nn.Parameter(0.036 * torch.randn(1, 1, tokens, dim))
        self.cls_token = nn.Parameter(0.036 * torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(0.036 * torch.randn(1, 50, dim))
        self.scaleBlocks = nn.ModuleList(ScaleBlock(dim, num_heads) for _ in range(depth))
        self.blocks = nn.ModuleList(PatchBlock(dim, num_heads) for _ in range(depth))
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_embed_for_scale
        for block in self.scaleBlocks:
            x = block(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x[:, :, 0]], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


class Projection(nn.Module):
    def __init__(self, widths: dict[int, int], dim: int) -> None:
        super().__init__()
        for scale, width in widths.items():
            setattr(self, f"proj_heads{scale}", nn.Conv2d(width, dim, 1))

    def forward(self, scale: int, x: Tensor) -> Tensor:
        return getattr(self, f"proj_heads{scale}")(x)


class Reducer(nn.Module):
    def __init__(self, width: int, convolutions: int) -> None:
        super().__init__()
        self.count = convolutions
        for i in range(convolutions):
            setattr(self, f"conv{i + 1}", nn.Conv2d(width, width, 3, stride=2, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.count):
            x = getattr(self, f"conv{i + 1}")(x)
        return F.max_pool2d(x, 2)


class ConvNormRelu(nn.Module):
    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, dim, 3, padding=1)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class ConvNorms(nn.Module):
    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.nConvs = nn.Sequential(*(ConvNormRelu(dim if i else width, dim) for i in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.nConvs(x)


def region_index(scale: int) -> Tensor:
    """Flat positions of the cells of each of the 49 regions: column by column for scale 2, otherwise row by row."""
    side = 2 ** (3 - scale)
    width = 7 * side
    rows = []
    for row in range(7):
        for column in range(7):
            cells = [(row * side + y) * width + column * side + x for y in range(side) for x in range(side)]
            if scale == 2:
                cells = [cells[i] for i in (0, 2, 1, 3)]
            rows.append(cells)
    return torch.tensor(rows)


class DuoFormer(nn.Module):
    def __init__(
        self,
        resnet: Callable[..., nn.Module],
        widths: tuple[int, ...],
        num_scales: int,
        channel_token: bool,
        dim: int = 768,
        num_heads: int = 12,
        depth: int = 12,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.resnet_projector = nn.Sequential(*list(resnet(weights=None).children())[:-2])
        self.scales = list(range(3, 3 - num_scales, -1))
        self.projection = Projection({scale: widths[scale] for scale in self.scales}, dim)
        if channel_token:
            self.chann_proj1 = Reducer(widths[0], 2)
            self.chann_proj2 = Reducer(widths[1], 1)
            self.chann_proj_all = ConvNorms(sum(widths), dim)
            self.channel_token = None
        else:
            self.channel_token = nn.Parameter(0.036 * torch.randn(1, 1, 1, dim))
        for scale in self.scales:
            self.register_buffer(f"index{scale}", region_index(scale), persistent=False)
        tokens = 1 + sum(4 ** (3 - scale) for scale in self.scales)
        self.vision_transformer = MultiscaleTransformer(dim, num_heads, depth, tokens, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnet_projector[:4](x)
        maps = []
        for stage in self.resnet_projector[4:]:
            x = stage(x)
            maps.append(x)
        if self.channel_token is None:
            reduced = [self.chann_proj1(maps[0]), self.chann_proj2(maps[1]), F.max_pool2d(maps[2], 2), maps[3]]
            token = self.chann_proj_all(torch.cat(reduced, dim=1)).flatten(2).transpose(1, 2).unsqueeze(2)
        else:
            token = self.channel_token.expand(len(x), 49, -1, -1)
        parts = [token]
        for scale in self.scales:
            cells = self.projection(scale, maps[scale]).flatten(2).transpose(1, 2)  # (B, N, D)
            parts.append(cells[:, getattr(self, f"index{scale}")])
        return self.vision_transformer(torch.cat(parts, dim=2))


def _r50(num_scales: int, channel_token: bool) -> DuoFormer:
    return DuoFormer(torchvision.models.resnet50, (256, 512, 1024, 2048), num_scales, channel_token)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "duoformer_r50_s2_channel": lambda: _r50(2, True),
    "duoformer_r18_s4_random": lambda: DuoFormer(torchvision.models.resnet18, (64, 128, 256, 512), 4, False),
}
