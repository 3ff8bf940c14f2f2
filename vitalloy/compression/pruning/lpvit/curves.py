"""Rate-distortion curves: the damage and the power of a layer at every share of its blocks that is removed.

The published second-order term adds the last step where the exact increment of the quadratic form subtracts it, and
adds its damping to the product instead of multiplying the step by it. `corrected=True` is the exact form: increments
that add up to half the square of the accumulated first-order change. The published power counts the removed blocks;
the corrected one the surviving ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitalloy.compression.pruning.lpvit.masks import Ranking, kept_blocks

DAMPING = 1e-7
TILE = 8192


def hessian_times(change: Tensor, gradient: Tensor) -> Tensor:
    """H change for H = g gᵀ, as a column (n, 1); the damping is added where `change` is not zero, as published."""
    change, gradient = change.flatten(), gradient.flatten()
    return (gradient * (gradient @ change) + DAMPING * (change != 0)).unsqueeze(1)


def second_order_increment(change: Tensor, step: Tensor, gradient: Tensor, corrected: bool = False) -> Tensor:
    """What `step`, the last part of `change`, adds to the second-order damage; a scalar."""
    change, step, gradient = (t.flatten() for t in (change, step, gradient))
    if corrected:
        last = gradient @ step
        return 0.5 * (2 * (gradient @ change) - last) * last
    return 0.5 * (step + 2 * change) @ hessian_times(step, gradient)[:, 0]


def quadratic_form(change: Tensor, gradient: Tensor, tile: int = TILE) -> Tensor:
    """½ changeᵀ (H + damping) change over the lower triangle of tiles, without the n x n matrix; a scalar.

    Tiles on the diagonal weigh ½ and those below it 1, which includes the upper ones' share. Here the damping is where
    it belongs, on the diagonal of H.
    """
    change, gradient = change.flatten(), gradient.flatten()
    inner = torch.stack([c @ g for c, g in zip(change.split(tile), gradient.split(tile), strict=True)])
    return inner.cumsum(0) @ inner - 0.5 * inner.square().sum() + 0.5 * DAMPING * (change @ change)


def smooth_curve(curve: Tensor, smooth: float) -> Tensor:
    """Exponential moving average along the curve, without the bias of its start; `smooth` 0 changes nothing."""
    last, out = torch.zeros_like(curve[0]), []
    for k, value in enumerate(curve, start=1):
        last = smooth * last + (1 - smooth) * value
        out.append(last / (1 - smooth**k))
    return torch.stack(out)


def derivative(x: Tensor, y: Tensor, h: int = 4) -> Tensor:
    """The slope of a curve of n points at its first n - 1, by differences over up to `h` points on either side."""
    n, slopes = len(y), []
    for i in range(n - 1):
        reach = min(h, i, n - i - 1)
        if reach < 2 and i < 2:
            slopes.append((y[i + 1] - y[i]) / (x[i + 1] - x[i]))
        elif reach < 2 and n - i < 3:
            slopes.append((y[i + 1] - y[i - 1]) / (x[i + 1] - x[i - 1]))
        else:
            near = reach // 2
            rise = -y[i + reach] + 8 * y[i + near] - 8 * y[i - near] + y[i - reach]
            slopes.append(rise / (6 * (x[i + reach] - x[i])))
    return torch.stack(slopes)


def amounts(points: int) -> list[float]:
    """The shares 0, 1 / points, ..., 1 that curves are sampled at."""
    return [d / points for d in range(points + 1)]


def distortion_curve(
    ranking: Ranking,
    points: int = 100,
    *,
    second_order: bool = True,
    smooth: float = 0.0,
    corrected: bool = False,
) -> Tensor:
    """Estimated damage of removing the worst blocks, at `amounts(points)`: (points + 1,) in float64."""
    kept = torch.tensor([kept_blocks(a, len(ranking)) for a in amounts(points)])

    def removed(sums: Tensor) -> Tensor:
        return torch.cat([sums.new_zeros(1), sums.flip(0).cumsum(0)])[len(ranking) - kept]

    curve = removed(ranking.square) / ranking.numel
    if second_order:
        total, moved = removed(ranking.first), removed(ranking.change)
        step, last = total.diff(prepend=total[:1]), moved.diff(prepend=moved[:1])
        if corrected:
            increments = 0.5 * (2 * total - step) * step
        else:  # where the step is not zero the change so far is the step: the damping meets three times it
            increments = 0.5 * ((step + 2 * total) * step + DAMPING * 3 * last)
        curve = curve + increments.cumsum(0)
    return smooth_curve(curve, smooth) if smooth else curve


def power_curve(
    numel: int, block: Sequence[int], in_channels: int, points: int = 100, *, corrected: bool = False
) -> Tensor:
    """Power of a layer at `amounts(points)`: blocks x (input channels / 16); removed ones as published, or surviving.

    Args:
        in_channels: the last axis of a linear layer's input. For a convolution the published code takes the height of
            its input; the corrected form its input channels.
    """
    share = torch.tensor(amounts(points), dtype=torch.float64)
    share = 1 - share if corrected else share
    return share * numel / (block[0] * block[1]) * int(in_channels / 16)


def power_weight(distortions: Sequence[Tensor], powers: Sequence[Tensor], h: int = 10) -> float:
    """The weight that brings both kinds of curve to one height: the ratio of their mean steepest slopes."""

    def steepest(curves: Sequence[Tensor]) -> float:
        x = torch.tensor(amounts(len(curves[0]) - 1), dtype=torch.float64)
        return sum(float(derivative(x, c, h).max()) for c in curves) / len(curves)

    falling = float(powers[0][0]) > float(powers[0][-1])
    height = steepest([-p for p in powers] if falling else powers)
    return steepest(distortions) / height if height else 0.0
