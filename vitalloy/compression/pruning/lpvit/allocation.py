"""How much of every layer goes: the slope, or the price, at which all curves are cut.

Published: one slope for all curves, found by bisection on the share of FLOPs. The corrected form weighs damage against
cost, D + price * cost, with one price for the whole model: it is monotone in the price, so the budget is met, and a
layer that costs nothing is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitalloy.compression.pruning.lpvit.curves import amounts, derivative, distortion_curve, power_curve, power_weight
from vitalloy.compression.pruning.lpvit.layers import Layer
from vitalloy.compression.pruning.lpvit.masks import Block, Ranking, kept_blocks

TOLERANCE = 0.02  # of the budget, at which the published search stops


@dataclass
class Allocation:
    """What was chosen, layer by layer.

    Attributes:
        amounts: share of each layer's blocks that goes.
        densities: share of each layer's weights that stays.
        share: of the dense cost that stays.
        slope: exponent of two of the slope (published), or the price of a unit of cost (corrected).
        least: the share that would stay if every layer lost all it may.
        damage: sum of the estimated damages.
        power_weight: what the power curves were multiplied by; 0 without them.
        distortions, powers: the curves.
    """

    amounts: list[float]
    densities: list[float]
    share: float
    slope: float
    least: float
    damage: float
    power_weight: float = 0.0
    distortions: list[Tensor] = field(default_factory=list, repr=False)
    powers: list[Tensor] = field(default_factory=list, repr=False)


def least_density(macs: float) -> float:
    """The published least share of its blocks that every layer keeps, for a budget."""
    return min(0.05, (1 - macs) / 2)


def at_slope(slopes: Sequence[Tensor], slope: float, shares: Sequence[float], density: float) -> list[float]:
    """The share of each layer that goes: where its curve's slope is nearest to `slope`, at most 1 - density."""
    return [min(1 - density, shares[int((s - slope).abs().argmin())]) for s in slopes]


def search_slope(
    remaining: Callable[[float], float], target: float, low: float = -100.0, high: float = 100.0, steps: int = 40
) -> float:
    """The exponent of the slope at which `remaining(exponent)`, a share of the cost, is the target, as published.

    The bisection takes it for granted that more slope leaves less, and stops within 0.02 of the target. Where that
    does not hold it ends far away: compare `remaining` of the answer with the target.
    """
    for _ in range(steps):
        middle = (low + high) / 2
        left = remaining(middle)
        if abs(left - target) <= TOLERANCE:
            return middle
        low, high = (middle, high) if left > target else (low, middle)
    off = {end: abs(remaining(end) - target) for end in (low, high, middle)}
    if off[low] < off[middle] and off[low] < off[high]:
        return low
    return high if off[high] < off[middle] and off[high] < off[low] else middle


def published_allocation(
    curves: Sequence[Tensor],
    shares: Sequence[float],
    remaining: Callable[[Sequence[float]], float],
    target: float,
    *,
    h: int = 4,
    density: float | None = None,
) -> tuple[list[float], float]:
    """The published choice: the share of each layer that goes, and the exponent of the slope.

    Args:
        curves: of each layer, at `shares`.
        remaining: the share of the cost that stays with these shares removed.
        target: what should stay.
        density: least share that a layer keeps; `least_density(target)` when None.
    """
    density = least_density(target) if density is None else density
    x = torch.tensor(shares, dtype=torch.float64)
    slopes = [derivative(x, curve, h) for curve in curves]
    exponent = search_slope(lambda s: remaining(at_slope(slopes, 2.0**s, shares, density)), target)
    return at_slope(slopes, 2.0**exponent, shares, density), exponent


def priced_allocation(
    curves: Sequence[Tensor], costs: Sequence[Tensor], budget: float, most: Sequence[int]
) -> tuple[list[int], float]:
    """For each layer the point of least damage + price * cost, at the lowest price whose costs stay in the budget.

    Args:
        curves, costs: of each layer at its points, from whole to most pruned.
        budget: what the costs may add up to.
        most: the last point that each layer may take.

    Returns:
        The chosen points and the price.
    """
    offers = [(curve[: n + 1], cost[: n + 1]) for curve, cost, n in zip(curves, costs, most, strict=True)]
    span = max(float(damage.max() - damage.min()) for damage, _ in offers) or 1.0
    smallest = min((spread for _, c in offers if (spread := float(c[0] - c.min())) > 0), default=1.0)

    def choose(price: float) -> list[int]:
        return [int((damage + price * cost).argmin()) for damage, cost in offers]

    def total(points: list[int]) -> float:
        return sum(float(cost[p]) for (_, cost), p in zip(offers, points, strict=True))

    low, high = 0.0, 1e-9 * span / smallest
    while total(choose(high)) > budget * (1 + 1e-9) and high < 1e12 * span / smallest:
        low, high = high, high * 4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if total(choose(middle)) <= budget * (1 + 1e-9) else (middle, high)
    return _spend(offers, choose(high), budget), high


def _spend(offers: list[tuple[Tensor, Tensor]], points: list[int], budget: float) -> list[int]:
    """What one price leaves of the budget goes where a way back saves most damage for its cost."""
    points = list(points)
    left = budget - sum(float(cost[p]) for (_, cost), p in zip(offers, points, strict=True))
    while True:
        best, gain = None, 0.0
        for i, (damage, cost) in enumerate(offers):
            dearer = cost[: points[i]] - cost[points[i]]
            saved = damage[points[i]] - damage[: points[i]]
            ratio = torch.where((dearer <= left) & (saved > 0), saved / dearer.clamp_min(1e-30), 0.0)
            if len(ratio) and float(ratio.max()) > gain:
                best, gain = (i, int(ratio.argmax())), float(ratio.max())
        if best is None:
            return points
        i, point = best
        left -= float(offers[i][1][point] - offers[i][1][points[i]])
        points[i] = point


def allocate(
    layers: Sequence[Layer],
    gradients: Sequence[Tensor],
    *,
    macs: float,
    block: Block = (16, 16),
    points: int = 100,
    second_order: bool = True,
    smooth: float = 0.5,
    h: int = 4,
    min_density: float | None = None,
    power: float = 0.0,
    energy: bool = False,
    corrected: bool = False,
) -> Allocation:
    """Share out the pruning of blocks over layers.

    Args:
        gradients: of the layers' weights.
        macs: share of the FLOPs of the layers that stays.
        points: at how many shares curves are sampled.
        smooth: of the published curves; the corrected choice takes them as they are.
        min_density: least share of its blocks that a layer keeps; `least_density(macs)` when None.
        power: adds the power curves, this many times `power_weight`.
        energy: `macs` is the share of the power of all layers; in the corrected form only.
        corrected: exact second-order increments, surviving blocks as power, true counts of multiply-adds, one price.
    """
    density = least_density(macs) if min_density is None else min_density
    ranked = [Ranking.of(a.module.weight, g, block) for a, g in zip(layers, gradients, strict=True)]
    damages = [
        distortion_curve(
            ranking, points, second_order=second_order, smooth=0.0 if corrected else smooth, corrected=corrected
        )
        for ranking in ranked
    ]
    powers = []
    for layer in layers:
        channels = layer.module.weight.shape[1] if corrected else layer.in_channels
        powers.append(power_curve(layer.module.weight.numel(), block, channels, points, corrected=corrected))
    weight = power * power_weight(damages, powers) if power else 0.0
    if corrected:
        damages = [d.cummax(0).values for d in damages]
    curves = [d + weight * p for d, p in zip(damages, powers, strict=True)]

    def stays(i: int, amount: float) -> float:
        return ranked[i].density(kept_blocks(amount, len(ranked[i])))

    shares = amounts(points)
    if corrected:
        if energy:
            costs = powers
        else:
            costs = [
                torch.tensor([layer.flops(stays(i, a), published=False) for a in shares], dtype=torch.float64)
                for i, layer in enumerate(layers)
            ]
        dense = sum(float(cost[0]) for cost in costs)
        most = [sum(a <= 1 - density + 1e-9 and kept_blocks(a, len(r)) > 0 for a in shares) - 1 for r in ranked]
        chosen, slope = priced_allocation(curves, costs, macs * dense, most)
        taken = [shares[d] for d in chosen]
        share = sum(float(cost[d]) for cost, d in zip(costs, chosen, strict=True)) / dense
        least = sum(float(cost[d]) for cost, d in zip(costs, most, strict=True)) / dense
    else:
        dense = sum(layer.flops() for layer in layers)

        def remaining(removed: Sequence[float]) -> float:
            return sum(layer.flops(stays(i, removed[i])) for i, layer in enumerate(layers)) / dense

        taken, slope = published_allocation(curves, shares, remaining, macs, h=h, density=density)
        share, least = remaining(taken), remaining([1 - density] * len(layers))
    damage = sum(float(d[round(a * points)]) for d, a in zip(damages, taken, strict=True))
    densities = [stays(i, a) for i, a in enumerate(taken)]
    return Allocation(taken, densities, share, slope, least, damage, weight, damages, powers)
