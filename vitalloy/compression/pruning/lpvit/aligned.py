"""Blocks made of whole groups of channels, so that what is left are smaller dense products.

Hidden units may be numbered in any order, and so may the channels inside a head. They are ranked by the same score as
blocks, |weight * gradient|, and a block is the next `step` of them along that ranking, in every head of a group. Its
damage is that of the columns that read the units (of queries: of the rows that make them).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitalloy.compression.pruning.lpvit.allocation import priced_allocation
from vitalloy.compression.pruning.lpvit.costs import CostTable, Counted, counted_layers, measure_costs
from vitalloy.compression.pruning.lpvit.curves import distortion_curve, power_weight
from vitalloy.compression.pruning.lpvit.cutting import IN, OUT, Group, Part, cut, kept_channels, query_scales, removed
from vitalloy.compression.pruning.lpvit.masks import Block, Ranking
from vitalloy.compression.trunk import macs as count_macs
from vitalloy.errors import CompressionError

TRIES = 6


@dataclass
class Ranked:
    """A group's units from best to worst, per part (heads, width), and its blocks."""

    group: Group
    units: list[Tensor]
    blocks: Ranking

    def gone(self, blocks: int) -> list[Tensor]:
        """The units that go with the worst blocks: for each part (heads, n)."""
        return [units[:, self.group.kept(blocks) :] for units in self.units]


def parameters_of(model: nn.Module, groups: Sequence[Group]) -> dict[str, nn.Parameter]:
    """The weights, and biases of queries, whose gradients say what the groups' units are worth."""
    found = {}
    for part in (part for group in groups for part in group.parts):
        for member in part.scored:
            layer = model.get_submodule(member.layer)
            found[f"{member.layer}.weight"] = layer.weight
            if member.side == OUT and layer.bias is not None:
                found[f"{member.layer}.bias"] = layer.bias
    return found


def rank(model: nn.Module, group: Group, gradients: Mapping[str, Tensor]) -> Ranked:
    """Order a group's units, and sum up its blocks. Raises CompressionError for scores that are not finite."""
    units, totals = [], []
    for part in group.parts:
        score, sums = _unit_sums(model, part, gradients)
        if not score.isfinite().all():
            raise CompressionError(f"the scores of {group.name}'s channels are not finite: its gradients are not.")
        order = score.argsort(dim=1, descending=True, stable=True)
        units.append(order)
        totals.append(torch.stack([s.gather(1, order).sum(0) for s in sums]))  # over heads: (sums, width)
    total = torch.stack(totals).sum(0)
    first = group.kept(group.blocks - 1)  # the best block takes the units that fill no block of their own
    pieces = [first] + [group.step] * (group.blocks - 1)
    return Ranked(group, units, Ranking(*(torch.stack([p.sum() for p in row.split(pieces)]) for row in total)))


def _unit_sums(model: nn.Module, part: Part, gradients: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Scores (heads, width), and the sums of `Ranking` for every unit."""
    found = None
    for member in part.scored:
        weight = model.get_submodule(member.layer).weight.detach().double()
        gradient = gradients[f"{member.layer}.weight"].double().view_as(weight)
        if member.side == IN:
            weight, gradient = weight.transpose(0, 1), gradient.transpose(0, 1)
        weight, gradient = weight.flatten(1), gradient.flatten(1)
        if f"{member.layer}.bias" in gradients and member.side == OUT:
            bias = model.get_submodule(member.layer).bias.detach().double()
            weight = torch.cat([weight, bias.unsqueeze(1)], 1)
            gradient = torch.cat([gradient, gradients[f"{member.layer}.bias"].double().unsqueeze(1)], 1)
        product, table = weight * gradient, member.table.to(weight.device)
        sums = [-product, product.square(), -weight, torch.ones_like(weight), product.abs()]
        sums = [s.sum(1)[table].cpu() for s in sums]
        found = sums if found is None else [a + b for a, b in zip(found, sums, strict=True)]
    return found[4] / found[3], found[:4]


def allocate_groups(
    model: nn.Module,
    image: Tensor,
    ranked: Sequence[Ranked],
    *,
    share: float,
    cost: str = "flops",
    batch: Tensor | None = None,
    block: Block = (16, 16),
    second_order: bool = True,
    power: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[int], float]:
    """How many blocks each group loses, and the share of the cost that stays.

    Args:
        share: of the model's cost that stays: multiply-adds for one image, measured time, or power.
        batch: images that time is measured with.

    Raises:
        CompressionError: the budget cannot be reached; says what can.
    """
    groups = [r.group for r in ranked]
    layers = counted_layers(model, image)
    counted = Counted.of(model, layers, groups, count_macs(model, image))
    watts = Counted.power(model, layers, groups, block)
    timed: CostTable | None = None
    if cost == "latency":
        timed = measure_costs(model, image if batch is None else batch, groups, progress=progress)
        total, tables = timed.total, timed.tables(groups)
    else:
        total, tables = (watts.total, watts.tables()) if cost == "energy" else (counted.total, counted.tables())

    def remaining(gone: Sequence[int]) -> float:
        if timed is not None:
            return 1 + sum(float(t[n]) for t, n in zip(tables, gone, strict=True)) / total
        of = watts if cost == "energy" else counted
        return 1 - of.saved({g.name: n for g, n in zip(groups, gone, strict=True)}) / total

    least = remaining([g.blocks - 1 for g in groups])
    if share < least:
        raise CompressionError(
            f"a share of {share:g} of the {cost} is out of reach with whole channels: the least is {least:.3f}. "
            "Ask for more, or remove smaller blocks."
        )
    damages = [damage_of(r, second_order) for r in ranked]
    if power:
        powers = watts.tables()
        weight = power * power_weight(damages, powers)
        damages = [d + weight * p for d, p in zip(damages, powers, strict=True)]
    asked = share
    for _ in range(TRIES):  # a table takes the other groups as whole, so that what two of them share counts twice
        chosen, _ = priced_allocation(damages, tables, (asked - 1) * total, [g.blocks - 1 for g in groups])
        over = remaining(chosen) - share
        if over <= 0.002:
            break
        asked -= over
    return chosen, remaining(chosen)


def damage_of(ranked: Ranked, second_order: bool = True) -> Tensor:
    """The estimated damage with 0, 1, ... blocks gone, (blocks,); it does not fall."""
    curve = distortion_curve(ranked.blocks, ranked.group.blocks, second_order=second_order, corrected=True)
    return curve[:-1].cummax(0).values


def remove(model: nn.Module, ranked: Sequence[Ranked], gone: Sequence[int]) -> dict[str, dict[str, int]]:
    """Take the worst blocks of each group out, in place; returns the channel counts of the layers that lost some."""
    pairs, scales = [], {}
    for r, blocks in zip(ranked, gone, strict=True):
        if blocks:
            units = r.gone(blocks)
            pairs += removed(r.group, units)
            scales |= query_scales(r.group, units)
    kept = kept_channels(model, pairs)
    cut(model, kept, scales)
    return {name: {side: len(index) for side, index in sides.items()} for name, sides in kept.items()}
