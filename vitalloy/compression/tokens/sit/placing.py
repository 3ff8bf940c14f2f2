"""Where to slim, and to how many tokens: the published pattern in shares of a model's work, fitted to a budget."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitalloy.compression.tokens.sit.slimmed import Slim, inserted
from vitalloy.compression.trunk import Grid, Point, evaluating, hooked, macs, nearest, points
from vitalloy.errors import CompressionError
from vitalloy.layers.fusion import fuse

MOST_PLACES = 1024  # beyond, a mixture of all of them costs more than it saves
_SHARES = (9 / 16, 12 / 16, 14 / 16)  # of the depth: where SiT-S slims
_LATEST = 0.95  # share of the work behind which nothing is won
_STEM = 0.1  # share of the work within which a part of a stage is a part of the embedding
_LEAST_KEEP, _MOST_KEEP, _STEP = 0.15, 0.95, 0.05
_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError, CompressionError)


def smaller(grid: Grid, keep: float) -> Grid:
    """The grid of about the share `keep` of a grid's cells and about its proportions, one cell fewer at least."""
    count = math.prod(grid)
    fitting = [
        (rows, columns) for rows in range(1, grid[0] + 1) for columns in range(1, grid[1] + 1) if rows * columns < count
    ]

    def misfit(new: Grid) -> float:
        stretch = abs(math.log(new[0] * grid[1] / (new[1] * grid[0])))
        return abs(math.prod(new) / count - keep) + 0.1 * stretch

    return min(fitting, key=misfit)


def _grid_of(point: Point, output: object) -> Grid:
    """The grid of the patches that a point has now; a single row where they form none."""
    patches, _, grid = point.read(output)
    return tuple(grid) if grid is not None else (1, patches.shape[1])


@torch.no_grad()
def slims_at(model: nn.Module, image: Tensor, chosen: Sequence[Point], keep: float) -> list[Slim]:
    """What slimming behind each point to the share `keep` means for the grids, each behind those before it."""
    done: list[Slim] = []
    for point in chosen:
        seen: list[object] = []
        with inserted(model, done), evaluating(model), hooked(model, {point.name: lambda out, s=seen: s.append(out)}):
            model(image)
        before = _grid_of(point, seen[0])
        if done and point.grid == done[-1].point.grid and math.prod(before) == math.prod(done[-1].after):
            before = done[-1].after  # a count alone does not tell the sides
        if math.prod(before) < 2:
            break
        done.append(Slim(point, before, smaller(before, keep)))
    return done


def blocks_and_stages(model: nn.Module, image: Tensor) -> list[Point]:
    """The points behind blocks, stages and embeddings, in order; of those with the same work done, the last."""
    found: list[Point] = []
    every = points(model, image)
    grids = {point.name: point.grid for point in every}
    for point in every:
        parents = [grids[name] for name in _above(point.name) if name in grids]
        inside = parents and (point.macs < _STEM or any(grid != point.grid for grid in parents))
        if inside or not any(True for _ in model.get_submodule(point.name).children()):  # layers are swapped by others
            continue
        if found and abs(found[-1].macs - point.macs) < 1e-3:
            found.pop()
        found.append(point)
    return found


def _above(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def candidates(model: nn.Module, image: Tensor, found: Sequence[Point]) -> list[Point]:
    """Of the points, those behind which a smaller state runs to logits, and whose modules are still there folded."""
    folded = {name: type(module) for name, module in fuse(copy.deepcopy(model)).named_modules()}
    modules = {point.name: model.get_submodule(point.name) for point in found}
    return [
        point
        for point in found
        if point.macs < _LATEST
        and not hasattr(modules[point.name], "slim")
        and folded.get(point.name) is type(modules[point.name])
        and _runs(model, image, point)
    ]


@torch.no_grad()
def _runs(model: nn.Module, image: Tensor, point: Point) -> bool:
    try:
        slims = slims_at(model, image, [point], 0.5)
        if not slims or math.prod(slims[0].before) > MOST_PLACES:
            return False
        with inserted(model, slims), evaluating(model):
            return bool(model(image.expand(2, -1, -1, -1)).isfinite().all())
    except _REFUSALS:
        return False


def pattern(usable: Sequence[Point], start: int) -> list[Point]:
    """Where to slim if the first time is at `usable[start]`.

    A plain model's tokens are slimmed three times, spread over the work that is left as in SiT-S; a stage-wise model's,
    which lose places between stages anyway, once.
    """
    first = usable[start].macs
    if len({point.grid for point in usable}) > 1:
        return [usable[start]]
    wanted = [first + (1 - first) * (share - _SHARES[0]) / (1 - _SHARES[0]) for share in _SHARES]
    chosen: list[Point] = []
    for share in wanted:
        left = [p for p in usable[start:] if not chosen or p.macs > chosen[-1].macs]
        if left:
            chosen.append(min(left, key=lambda p: abs(p.macs - share)))
    return chosen


def place(
    model: nn.Module, image: Tensor, usable: Sequence[Point], wanted: float | None, keep: float, fixed: bool = False
) -> list[Slim]:
    """Where to slim, and to how many tokens.

    Args:
        usable: where it can be done, in order.
        wanted: share of the multiply-accumulates that may stay. The first slimming is as deep as keeping the share
            `keep` at each allows (its square, where there is one alone); then they keep as many tokens as the budget
            allows. None: as in SiT-S, at `keep`.
        fixed: slim behind all of `usable`.

    Raises:
        CompressionError: the budget is out of reach.
    """
    patterns = [list(usable)] if fixed else [pattern(usable, start) for start in range(len(usable))]
    if wanted is None:
        chosen = min(patterns, key=lambda p: abs(p[0].macs - _SHARES[0]))
        return slims_at(model, image, chosen, keep)
    total = macs(model, image)

    tried: dict[float, list[Slim]] = {}

    def reaches(chosen: Sequence[Point], keep: float) -> bool:
        """Notes what slimming there costs, and whether that is within the budget; where it cannot run, it is not."""
        try:
            slims = slims_at(model, image, chosen, keep)
            with inserted(model, slims):
                share = macs(model, image) / total
        except _REFUSALS:
            return False
        tried[share] = slims
        return share <= wanted

    chosen = next((p for p in reversed(patterns) if reaches(p, keep ** (1 + (len(p) == 1)))), patterns[0])
    low, high = 0, round((_MOST_KEEP - _LEAST_KEEP) / _STEP)  # steps above the least share of tokens
    if not reaches(chosen, _LEAST_KEEP):
        if not tried:
            raise CompressionError(f"{type(model).__name__} does not run with few tokens behind {chosen[0].name}.")
        raise nearest(wanted, list(tried), "macs")
    while high - low > 0:
        middle = (low + high + 1) // 2
        if reaches(chosen, _LEAST_KEEP + middle * _STEP):
            low = middle
        else:
            high = middle - 1
    return tried[max(share for share in tried if share <= wanted)]
