"""Learned position tables at another grid size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def resample_positions(
    table: Tensor,
    grid: tuple[int, int],
    *,
    old_grid: tuple[int, int] | None = None,
    prefix: int = 0,
    mode: str = "bicubic",
    antialias: bool = True,
) -> Tensor:
    """Resize a position table to a grid; rows of prefix tokens are kept as they are.

    Args:
        table: (1, prefix + H * W, C), row-major.
        grid: the wanted (H, W).
        old_grid: the table's own (H, W); a square when not given.
        prefix: how many rows at the front belong to class or other tokens.
        mode, antialias: how to interpolate; corners are never aligned.

    Returns:
        (1, prefix + grid[0] * grid[1], C). Half precision is interpolated in float32.

    Raises:
        ValueError: the table's rows do not make the old grid.
    """
    rows = table.shape[1] - prefix
    old_grid = old_grid or (math.isqrt(rows), math.isqrt(rows))
    if old_grid[0] * old_grid[1] != rows:
        raise ValueError(f"a position table of {rows} rows is no {old_grid[0]}x{old_grid[1]} grid")
    if tuple(grid) == tuple(old_grid):
        return table
    kept, cells = table[:, :prefix], table[:, prefix:]
    cells = cells.unflatten(1, old_grid).movedim(-1, 1)  # (1, H*W, C) -> (1, C, H, W)
    wide = cells if cells.dtype == torch.float64 else cells.float()
    cells = F.interpolate(wide, size=tuple(grid), mode=mode, antialias=antialias, align_corners=False)
    return torch.cat([kept, cells.to(table.dtype).flatten(2).transpose(1, 2)], dim=1)
