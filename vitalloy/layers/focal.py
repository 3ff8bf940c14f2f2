"""Focal (aggregated) attention: every token sees its neighbours at full resolution and the whole image pooled.

From "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", Shi, CVPR 2024, arXiv 2311.17132.

What the queries of one grid see is a `View`; `Views` keeps that of the usual grid and makes others anew. `PositionBias`
turns a view into attention logits, and `FocalAttend` is the softmax itself: the part that methods may swap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from vitalloy.layers.streaming import ROWS, may_stream

Pair = tuple[int, int]


class View(NamedTuple):
    """What N queries on a grid see: L neighbours each (none where there is no window), and M pooled keys.

    All tensors hold whole numbers or booleans, so that no change of precision harms them.

    Attributes:
        grid, pooled: (height, width) of the queries and of the pooled keys.
        down, right: twice the distances between queries and centres of keys that occur along each axis, ascending.
        index: (N * M,) which pair of `down` and `right`, row-major, belongs to each query and key, query by query.
        count: (N,) how many keys each query sees.
        outside: (N, L) neighbours beyond the edge of the grid; None without a window.
        table: (queries, keys) grids that `index` is made for, where the bias is to be resized; None otherwise.
    """

    grid: Pair
    pooled: Pair
    down: Tensor
    right: Tensor
    index: Tensor
    count: Tensor
    outside: Tensor | None = None
    table: tuple[Pair, Pair] | None = None


def make_view(grid: Pair, pooled: Pair, window: int = 0, device: torch.device | None = None) -> View:
    """The view of a grid whose keys are its average over `pooled` cells, and `window` x `window` neighbours."""
    down, row = _distances(grid[0], pooled[0], device)
    right, column = _distances(grid[1], pooled[1], device)
    index = row[:, None, :, None] * right.shape[0] + column[None, :, None, :]  # (H, W, h, w)
    count = torch.full((grid[0] * grid[1],), pooled[0] * pooled[1], device=device)
    outside = None
    if window:
        (y, x), offset = (torch.arange(n, device=device) for n in grid), torch.arange(window, device=device)
        y, x = (at[:, None] + offset - window // 2 for at in (y, x))
        rows, columns = (y >= 0) & (y < grid[0]), (x >= 0) & (x < grid[1])
        inside = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)  # (N, L)
        outside, count = ~inside, count + inside.sum(-1)
    return View(grid, pooled, down, right, index.flatten(), count, outside)


def _distances(size: int, cells: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """Along one axis: twice the distances from positions to centres of pooled cells that occur, and (size, cells)
    which of them it is. A cell is the mean of positions i * size // cells up to ceil((i + 1) * size / cells)."""
    centres = [i * size // cells + -(-(i + 1) * size // cells) - 1 for i in range(cells)]  # twice
    first, last = -centres[-1], 2 * (size - 1) - centres[0]
    step = 2 if len({centre % 2 for centre in centres}) == 1 else 1
    apart = 2 * torch.arange(size, device=device)[:, None] - torch.tensor(centres, device=device)
    return torch.arange(first, last + 1, step, device=device), (apart - first) // step


def coordinates(view: View, pretrain: Pair, dtype: torch.dtype) -> Tensor:
    """The logarithmic (down, right) distances that occur in a view, (U, 2), for `view.index` to pick from.

    Args:
        pretrain: the grid of the size that was trained on, by which distances are measured.
    """
    axes = []
    for steps, side in zip((view.down, view.right), pretrain, strict=True):
        far = steps.to(dtype) * (4 / max(side - 1, 1))  # 8 is the whole grid; steps are doubled
        axes.append(far.sign() * (1 + far.abs()).log2() / 3)
    down, right = axes
    shape = (down.shape[0], right.shape[0])
    return torch.stack([down[:, None].expand(shape), right.expand(shape)], -1).flatten(0, 1)


class Views(nn.Module):
    """Makes the `View` of a grid; that of the grid given here is kept, others are made at each call.

    Args:
        grid: the usual (H, W).
        reduction: pooled cells have this side; rows and columns that are left over make some cells longer.
        window: side of the neighbourhood, odd; 0 for none.
        pool_size: pool to this many cells a side whatever the grid, but never to more than there are.
        interpolate: a bias for another grid is to be resized from the usual one.
    """

    def __init__(
        self,
        grid: Pair,
        reduction: int = 1,
        window: int = 0,
        pool_size: int | None = None,
        interpolate: bool = False,
    ) -> None:
        super().__init__()
        if window and window % 2 == 0:
            raise ValueError(f"a window of {window} has no middle; it must be odd")
        self.grid, self.reduction, self.window = grid, reduction, window
        self.pool_size, self.interpolate = pool_size, interpolate
        self.pooled = self.pooled_grid(grid)
        view = make_view(grid, self.pooled, window)
        for name in ("down", "right", "index", "count", "outside"):
            self.register_buffer(name, getattr(view, name), persistent=False)

    def forward(self, grid: Pair) -> View:
        grid = (int(grid[0]), int(grid[1]))
        usual = View(self.grid, self.pooled, self.down, self.right, self.index, self.count, self.outside)
        if grid == self.grid:
            return usual
        view = make_view(grid, self.pooled_grid(grid), self.window, self.index.device)
        if not self.interpolate:
            return view
        return usual._replace(
            grid=grid,
            pooled=view.pooled,
            count=view.count,
            outside=view.outside,
            table=(self.grid, self.pooled),
        )

    def pooled_grid(self, grid: Pair) -> Pair:
        if self.pool_size is not None:
            return (min(self.pool_size, grid[0]), min(self.pool_size, grid[1]))
        return (max(grid[0] // self.reduction, 1), max(grid[1] // self.reduction, 1))


class PositionBias(nn.Module):
    """Attention logits from positions: a perceptron of logarithmic distances, and a table for the neighbours.

    `fuse()` keeps the bias of the usual grid, which depends on weights only.

    Args:
        views: shared by the blocks of a stage.
        pretrain: the grid of the size that was trained on.
        hidden: width of the perceptron.
    """

    def __init__(self, num_heads: int, views: Views, pretrain: Pair, hidden: int = 512) -> None:
        super().__init__()
        self.views, self.pretrain = views, pretrain
        self.fc1 = nn.Linear(2, hidden)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(hidden, num_heads)
        self.local = None
        if views.window:
            self.local = nn.Parameter(trunc_normal_(torch.empty(num_heads, views.window**2), std=4e-4))
        self.register_buffer("kept", None, persistent=False)

    def forward(self, view: View) -> Tensor:
        """(heads, N, L + M), neighbours first; minus infinity for those outside the grid."""
        if self.kept is not None and view.grid == self.views.grid:
            return self.kept
        rows = self.rows(coordinates(view, self.pretrain, self.fc1.weight.dtype))
        queries, keys = view.table or (view.grid, view.pooled)
        bias = rows.t().index_select(1, view.index).unflatten(1, (*queries, *keys))
        if view.table is not None:
            bias = _resize(bias.flatten(1, 2), view.pooled).unflatten(1, queries)
            bias = _resize(bias.flatten(3).permute(0, 3, 1, 2), view.grid).permute(0, 2, 3, 1)
        bias = bias.flatten(3).flatten(1, 2)
        if self.local is None:
            return bias
        return torch.cat([self.local.unsqueeze(1).masked_fill(view.outside, -math.inf), bias], -1)

    def rows(self, distances: Tensor) -> Tensor:
        """(U, 2) -> (U, heads); in pieces where nothing needs the wide map between the layers."""
        if not may_stream(distances, self.fc1, self.act, self.fc2):
            return self.fc2(self.act(self.fc1(distances)))
        out = distances.new_empty(len(distances), self.fc2.out_features)
        buffer = distances.new_empty(ROWS, self.fc1.out_features)
        for piece, result in zip(distances.split(ROWS), out.split(ROWS), strict=True):
            wide = torch.addmm(self.fc1.bias, piece, self.fc1.weight.t(), out=buffer[: len(piece)])
            torch.addmm(self.fc2.bias, wide.relu_(), self.fc2.weight.t(), out=result)
        return out

    @torch.no_grad()
    def fuse(self) -> None:
        if self.kept is None:
            self.kept = self(self.views(self.views.grid))


def _resize(x: Tensor, size: Pair) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class FocalAttend(nn.Module):
    """One softmax over neighbours and pooled keys, and for the neighbours weights besides that depend on no key.

    Args:
        window: side of the neighbourhood, odd.
        dropout: probability of dropping an attention weight in training.
    """

    def __init__(self, window: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.window = window
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pooled_k: Tensor,
        pooled_v: Tensor,
        bias: Tensor,
        extra: Tensor,
        grid: Pair,
    ) -> Tensor:
        """q, k, v (B, N, heads, d) on a grid of N cells; pooled_k, pooled_v (B, M, heads, d) -> (B, N, heads * d).

        Logits are q kᵀ + bias, unscaled. `bias` (heads, N, L + M) has L = window ** 2 neighbours first, row-major, and
        minus infinity where they lie outside; `extra` (B, N, heads, L) is added to the neighbours' weights.
        """
        near = self.window**2
        at = q.unflatten(1, grid)
        local = torch.stack([(at * shifted).sum(-1) for shifted in self.shifts(k, grid)], -1)  # (B, H, W, heads, L)
        pooled = q.transpose(1, 2) @ pooled_k.permute(0, 2, 3, 1)  # (B, heads, N, M)
        logits = torch.cat([local.flatten(1, 2).transpose(1, 2), pooled], -1).add_(bias)
        weights = self.dropout(logits.softmax(-1))
        far = weights[..., near:] @ pooled_v.transpose(1, 2)  # (B, heads, N, d)
        mix = (weights[..., :near].transpose(1, 2) + extra).unflatten(1, grid)  # (B, H, W, heads, L)
        shifts = self.shifts(v, grid)
        out = mix[..., :1] * next(shifts)
        for i, shifted in enumerate(shifts, 1):
            out = out.addcmul_(mix[..., i : i + 1], shifted)
        return (out.flatten(1, 2) + far.transpose(1, 2)).flatten(2)

    def shifts(self, x: Tensor, grid: Pair) -> Iterator[Tensor]:
        """(B, N, heads, d) -> for each neighbour, row-major, a (B, H, W, heads, d) view of it; zero outside."""
        (height, width), reach = grid, self.window // 2
        x = F.pad(x.unflatten(1, grid), (0, 0, 0, 0, reach, reach, reach, reach))
        for y in range(self.window):
            for column in range(self.window):
                yield x[:, y : y + height, column : column + width]
