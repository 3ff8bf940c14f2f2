"""Attention windows on a grid of tokens: cutting, cyclic shift, what may attend to what, relative positions.

The grid is cut by one gather, whatever the shift and the padding, and put together again by another.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.layers.positions import resample_positions

Pair = tuple[int, int]


class Cut(NamedTuple):
    """How one grid is cut into windows of N tokens each.

    Attributes:
        area: N.
        order: (windows * N,) row-major positions of the grid's tokens, window by window; H * W stands for padding.
            None where the grid is one window: there is nothing to move.
        back: (H * W,) where each token of the grid went.
        mask: (windows, 1, N, N) 0 or `Windows.FAR`, to add to attention logits; None without a shift.
        relative: (N * N,) rows of the relative-position table, query by query.
        padded: some windows reach over the edge of the grid.
    """

    area: int
    order: Tensor | None
    back: Tensor | None
    mask: Tensor | None
    relative: Tensor
    padded: bool

    def split(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B * windows, N, C); padding is zero."""
        x = x.flatten(1, 2)
        if self.order is None:
            return x
        if self.padded:
            x = F.pad(x, (0, 0, 0, 1))
        return x.index_select(1, self.order).unflatten(1, (-1, self.area)).flatten(0, 1)

    def join(self, x: Tensor, like: Tensor) -> Tensor:
        """(B * windows, N, C) -> (B, H, W, C), the shape of `like`."""
        if self.order is not None:
            x = x.unflatten(0, (-1, len(self.order) // self.area)).flatten(1, 2).index_select(1, self.back)
        return x.unflatten(1, like.shape[1:3])

    def relative_bias(self, table: Tensor) -> Tensor:
        """What relative positions add to the logits of any window, (1, heads, N, N), of a (rows, heads) table."""
        rows = table.index_select(0, self.relative).unflatten(0, (self.area, self.area))
        return rows.permute(2, 0, 1).unsqueeze(0).contiguous()

    def masked(self, bias: Tensor, batch: int) -> Tensor:
        """`bias` (1, heads, N, N) and the mask: what to add to the logits of `batch` windows."""
        if self.mask is None:
            return bias
        bias = bias + self.mask
        return bias.expand(batch // len(bias), *bias.shape).flatten(0, 1)  # copies only for a batch of images


class Windows(nn.Module):
    """Makes the `Cut` of a grid; that of the grid given here is kept, others are made anew at each call.

    Along each axis the window is no longer than the grid, and a grid of one window is not shifted.

    Args:
        grid: the usual (H, W).
        window: the (height, width) that the relative-position table is made for.
        shifted: cyclically shift by half a window, and keep tokens that are no neighbours apart.
    """

    FAR = -100.0  # the published mask: not minus infinity

    def __init__(self, grid: Pair, window: Pair, shifted: bool = False) -> None:
        super().__init__()
        self.grid, self.window, self.shifted = grid, window, shifted
        cut = self.make(grid)
        self.area, self.padded = cut.area, cut.padded
        for name in ("order", "back", "mask", "relative"):
            self.register_buffer(name, getattr(cut, name), persistent=False)

    def forward(self, like: Tensor) -> Cut:
        """The cut for maps (B, H, W, C) such as `like`."""
        if (like.shape[1], like.shape[2]) == self.grid:
            return Cut(self.area, self.order, self.back, self.mask, self.relative, self.padded)
        cut = self.make((int(like.shape[1]), int(like.shape[2])), like.device)
        return cut if cut.mask is None else cut._replace(mask=cut.mask.to(like.dtype))

    def fuse(self) -> None:
        """A mask less deep: exp(-100) is a denormal number, with which processors are slow; exp(-60) adds nothing."""
        self.FAR = -60.0
        if self.mask is not None:
            self.mask = self.mask.clamp_min(self.FAR)

    def make(self, grid: Pair, device: torch.device | None = None) -> Cut:
        window = (min(self.window[0], grid[0]), min(self.window[1], grid[1]))
        shift = tuple(w // 2 if self.shifted and w < g else 0 for w, g in zip(window, grid, strict=True))
        padded = tuple(math.ceil(g / w) * w for w, g in zip(window, grid, strict=True))
        relative = relative_index(window, self.window, device)
        if window == grid:
            return Cut(grid[0] * grid[1], None, None, None, relative, False)
        cells = grid[0] * grid[1]
        order = torch.arange(cells, device=device).view(grid).roll((-shift[0], -shift[1]), (0, 1))
        order = F.pad(order, (0, padded[1] - grid[1], 0, padded[0] - grid[0]), value=cells)
        order = partition(order, window).flatten()
        mask = None
        if any(shift):
            rows = regions(padded[0], window[0], shift[0], device)
            columns = regions(padded[1], window[1], shift[1], device)
            region = partition(3 * rows[:, None] + columns, window)  # (windows, N)
            apart = region[:, None, :, None] != region[:, None, None, :]
            mask = torch.zeros(apart.shape, device=device).masked_fill(apart, self.FAR)
        return Cut(window[0] * window[1], order, order.argsort()[:cells], mask, relative, padded != grid)


def partition(grid: Tensor, window: Pair) -> Tensor:
    """A (H, W) table -> (windows, N), where the window divides the table."""
    grid = grid.unflatten(1, (-1, window[1])).unflatten(0, (-1, window[0]))  # (rows, h, columns, w)
    return grid.transpose(1, 2).flatten(2).flatten(0, 1)


def regions(size: int, window: int, shift: int, device: torch.device | None = None) -> Tensor:
    """Which of the three parts of a shifted axis each position belongs to: before the last window, in it, wrapped."""
    at = torch.arange(size, device=device)
    return (at >= size - window).long() + (at >= size - shift).long()


def relative_index(window: Pair, table: Pair | None = None, device: torch.device | None = None) -> Tensor:
    """Rows of a relative-position table for each pair of a window's tokens, (N * N,), query by query.

    Args:
        window: (height, width) of the window.
        table: the window that the table is made for, at least as long; `window` when not given. The table has
            (2 height - 1)(2 width - 1) rows for the offsets query - key, row-major, from the most negative one.
    """
    table = table or window
    y, x = (torch.arange(n, device=device) for n in window)
    down = y[:, None] - y + table[0] - 1
    right = x[:, None] - x + table[1] - 1
    return (down[:, None, :, None] * (2 * table[1] - 1) + right[None, :, None, :]).flatten()


def resample_relative(table: Tensor, window: Pair) -> Tensor:
    """A (rows, heads) relative-position table for another window, bicubic as the Swin authors do at fine-tuning.

    A table of another number of rows is taken to be of a square window. Raises ValueError where it cannot be.
    """
    size = (2 * window[0] - 1, 2 * window[1] - 1)
    if len(table) == size[0] * size[1]:
        return table
    return resample_positions(table.unsqueeze(0), size, antialias=False).squeeze(0)
