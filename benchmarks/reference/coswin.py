"""A plain reading of CoSwin to time ours against, with the authors' parameter names. Takes 32-pixel images."""

from __future__ import annotations

import torch
from timm.layers import DropPath
from torch import Tensor, nn

INPUT = {"coswin_cifar10": (3, 32, 32)}


def window_partition(x: Tensor, window: int) -> Tensor:
    b, h, w, c = x.shape
    x = x.view(b, h // window, window, w // window, window, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window, window, c)


def window_reverse(windows: Tensor, window: int, h: int, w: int) -> Tensor:
    b = windows.shape[0] // (h * w // window // window)
    x = windows.view(b, h // window, w // window, window, window, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(b, h, w, -1)


class LocalBranch(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = int(dim * 1.1)
        self.conv = nn.Sequential(nn.Conv2d(dim, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, dim, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        side = int(n**0.5)
        x = self.conv(x.transpose(1, 2).reshape(b, c, side, side))
        return x.flatten(2).transpose(1, 2)


class WindowAttention(nn.Module):
    def __init__(self, dim: int, window: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        at = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        offset = at[:, :, None] - at[:, None, :] + window - 1
        self.register_buffer("relative_position_index", offset[0] * (2 * window - 1) + offset[1])
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * self.scale, qkv[1], qkv[2]
        attn = q @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(n, n, -1)
        attn = attn + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            windows = mask.shape[0]
            attn = attn.view(b // windows, windows, self.num_heads, n, n) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.num_heads, n, n)
        x = (attn.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c)
        return self.proj(x)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, side: int, num_heads: int, window: int, shift: int, drop_path: float) -> None:
        super().__init__()
        if side <= window:
            window, shift = side, 0
        self.side, self.window, self.shift = side, window, shift
        self.conv = LocalBranch(dim)
        self.convInfluenceWeight = nn.Parameter(torch.tensor(0.5))
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, num_heads)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 2 * dim)
        mask = None
        if shift:
            regions, count = torch.zeros(1, side, side, 1), 0
            cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
            for rows in cuts:
                for columns in cuts:
                    regions[:, rows, columns] = count
                    count += 1
            regions = window_partition(regions, window).view(-1, window * window)
            apart = regions.unsqueeze(1) - regions.unsqueeze(2)
            mask = torch.zeros_like(apart).masked_fill(apart != 0, -100.0)
        self.register_buffer("attn_mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        local = self.conv(x)
        y = self.norm1(x).view(b, self.side, self.side, c)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = window_partition(y, self.window).view(-1, self.window * self.window, c)
        y = self.attn(y, self.attn_mask).view(-1, self.window, self.window, c)
        y = window_reverse(y, self.window, self.side, self.side)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        x = x + self.drop_path(y.view(b, n, c) + torch.sigmoid(self.convInfluenceWeight) * local)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    def __init__(self, side: int, dim: int) -> None:
        super().__init__()
        self.side = side
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        b, _, c = x.shape
        x = x.view(b, self.side, self.side, c)
        parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.reduction(self.norm(torch.cat(parts, -1).view(b, -1, 4 * c)))


class Stage(nn.Module):
    def __init__(self, dim: int, side: int, depth: int, heads: int, window: int, rates: list[float], last: bool):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(dim, side, heads, window, 0 if i % 2 == 0 else window // 2, rates[i]) for i in range(depth)
        )
        self.downsample = None if last else PatchMerging(side, dim)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class CoSwin(nn.Module):
    def __init__(self, side: int = 32, patch: int = 2, num_classes: int = 1000, dim: int = 96) -> None:
        super().__init__()
        depths, heads, window = (2, 6, 4), (3, 6, 12), 4
        rates = torch.linspace(0, 0.1, sum(depths)).tolist()
        self.patch_embed = PatchEmbed(patch, dim)
        self.layers = nn.ModuleList()
        for i, depth in enumerate(depths):
            first = sum(depths[:i])
            grid, part = side // patch // 2**i, rates[first : first + depth]
            self.layers.append(Stage(dim * 2**i, grid, depth, heads[i], window, part, i == 2))
        self.norm = nn.LayerNorm(dim * 4)
        self.head = nn.Linear(dim * 4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).transpose(1, 2).mean(-1))


MODELS = {"coswin_cifar10": CoSwin}
