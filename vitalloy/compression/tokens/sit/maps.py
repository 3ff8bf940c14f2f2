"""Where the tokens of a slimmed model came from, and what is known of them at the places of the image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.compression.tokens.sit.slimmed import GridSlimming
from vitalloy.compression.trunk import Grid, evaluating
from vitalloy.errors import CompressionError
from vitalloy.layers.slimming import TokenSlimming


@torch.no_grad()
def origins(model: nn.Module, images: Tensor) -> list[Tensor]:
    """For each slimming, which patches its mixtures came from: (B, M, N) with rows that sum to one.

    N are the patches that the first slimming sees. Where a model has gone to a coarser map between two slimmings, a
    place of it stands for those it covers.

    Args:
        model: what `compress` returned, or a model that was published slimmed, such as `sit_tiny`.
        images: (B, C, H, W).

    Raises:
        CompressionError: no slimming module in the model.
    """
    return [shares for _, shares in _slimmings(model, images)]


@torch.no_grad()
def to_patches(model: nn.Module, values: Tensor, images: Tensor) -> Tensor:
    """Values of the surviving tokens at the places of the image they came from, (B, h, w); the sum stays the same.

    Args:
        values: (B, M), one a mixture of the last slimming, such as saliency; or (B, h', w') on a map behind it.

    Raises:
        CompressionError: another number of values than of mixtures, or no slimming module in the model.
    """
    found = _slimmings(model, images)
    slimming, shares = found[-1]
    if values.ndim == 3:
        grid = _grid_after(slimming, shares.shape[1])
        total = values.sum((1, 2))
        spread = values.flatten(1) @ _cover(grid, tuple(values.shape[-2:])).to(values)
        values = spread * (total / spread.sum(1).where(spread.sum(1) != 0, 1)).unsqueeze(1)
    if values.shape != shares.shape[:2]:
        raise CompressionError(f"there are {shares.shape[1]} mixtures an image, but values of {tuple(values.shape)}.")
    first, shape = found[0][0], shares.shape[-1]
    before = first.before if isinstance(first, GridSlimming) else _sides(shape, getattr(model, "grid", None))
    return (values.unsqueeze(1) @ shares.to(values)).squeeze(1).unflatten(1, before)


def _slimmings(model: nn.Module, images: Tensor) -> list[tuple[TokenSlimming, Tensor]]:
    """Each slimming module in the order of the pass, and its shares of the first one's patches."""
    found: list[tuple[TokenSlimming, Tensor]] = []

    def look(slimming: TokenSlimming, args: tuple[Tensor]) -> None:
        shares = slimming.mixing(args[0][:, slimming.prefix :])
        if found:
            last, before = found[-1]
            if isinstance(slimming, GridSlimming) and slimming.before != _grid_after(last, before.shape[1]):
                before = _cover(_grid_after(last, before.shape[1]), slimming.before).to(before) @ before
            shares = shares @ before
        found.append((slimming, shares))

    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, TokenSlimming)]
    if not hooks:
        raise CompressionError(f"{type(model).__name__} has no slimming module: compress it with sit first.")
    try:
        with evaluating(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _grid_after(slimming: TokenSlimming, count: int) -> Grid:
    return slimming.after if isinstance(slimming, GridSlimming) else _sides(count)


def _sides(count: int, known: Grid | None = None) -> Grid:
    """The known sides if they fit the count, else a square, else a row."""
    if known is not None and math.prod(known) == count:
        return tuple(known)
    side = math.isqrt(count)
    return (side, side) if side * side == count else (1, count)


def _cover(fine: Grid, coarse: Grid) -> Tensor:
    """How much of each cell of the coarse grid each cell of the fine one is, (coarse cells, fine cells)."""
    cells = torch.eye(math.prod(fine)).unflatten(1, fine)
    return F.adaptive_avg_pool2d(cells, coarse).flatten(1).mT
