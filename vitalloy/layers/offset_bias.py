"""Attention bias by the distance between two cells of a grid, without its sign, as in LeViT and EfficientFormer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[int, int]


class OffsetBias(nn.Module):
    """A learned number for each head and each offset (|dy|, |dx|) between a query's cell and a key's.

    The authors number offsets in the order in which a loop over queries and keys meets them. The first query meets
    all of them row by row, so the table is a (heads, H, W) map of offsets: another grid takes a resampled map.

    Args:
        grid: (H, W) of the keys that the table is made for.
        stride: queries stand on every stride-th row and column of the keys' grid.
    """

    def __init__(self, num_heads: int, grid: Pair, stride: int = 1) -> None:
        super().__init__()
        self.grid, self.stride = tuple(grid), stride
        self.table = nn.Parameter(torch.zeros(num_heads, grid[0] * grid[1]))
        self.register_buffer("index", offset_index(self.grid, stride), persistent=False)
        self.register_buffer("kept", None, persistent=False)

    def forward(self, like: Tensor) -> Tensor:
        """The bias (heads, queries, keys) for keys on the grid of a map such as `like` (B, C, H, W)."""
        grid = (int(like.shape[-2]), int(like.shape[-1]))
        if grid != self.grid:
            table, index = resample_offsets(self.table, self.grid, grid), offset_index(grid, self.stride, like.device)
        elif self.kept is not None:
            return self.kept
        else:
            table, index = self.table, self.index
        return table.index_select(1, index).unflatten(1, (-1, grid[0] * grid[1]))

    def fuse(self) -> None:
        """Keep the bias of the usual grid."""
        if self.kept is None:
            with torch.no_grad():
                self.kept = self.table[:, self.index].unflatten(1, (-1, self.table.shape[1]))


def offset_index(grid: Pair, stride: int = 1, device: torch.device | None = None) -> Tensor:
    """Columns of the table for each pair of query and key, (queries * keys,), query by query."""
    y, x = (torch.arange(n, device=device) for n in grid)
    down, right = (y[::stride, None] - y).abs(), (x[::stride, None] - x).abs()
    return (down[:, None, :, None] * grid[1] + right[None, :, None, :]).flatten()


def resample_offsets(table: Tensor, old: Pair, new: Pair) -> Tensor:
    """A table (heads, H * W) for another grid; offset 0 and the largest one keep their values, bilinear between."""
    wide = table if table.dtype == torch.float64 else table.float()
    wide = wide.unflatten(1, old).unsqueeze(0)  # (1, heads, H, W)
    return F.interpolate(wide, new, mode="bilinear", align_corners=True)[0].flatten(1).to(table.dtype)


def offset_biases(model: nn.Module) -> Iterator[tuple[str, OffsetBias]]:
    """The tables of a model: (name of the parameter, module that has it)."""
    for name, module in model.named_modules():
        if isinstance(module, OffsetBias):
            yield f"{name}.table", module


def fit_offsets(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Resample the tables of a state dict, made for square grids, to those of the model."""
    for name, bias in offset_biases(model):
        table = state.get(name)
        if table is not None and table.shape[1] != bias.table.shape[1]:
            side = round(table.shape[1] ** 0.5)
            if side * side != table.shape[1]:
                raise ValueError(f"{name} has {table.shape[1]} offsets, which are those of no square grid")
            state[name] = resample_offsets(table, (side, side), bias.grid)
    return state
