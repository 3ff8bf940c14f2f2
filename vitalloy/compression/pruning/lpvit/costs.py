"""What a group of channels costs at every width: multiply-adds, power, or time measured on this machine."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitalloy.compression.pruning.lpvit.curves import power_curve
from vitalloy.compression.pruning.lpvit.cutting import (
    IN,
    OUT,
    Group,
    channel_counts,
    cut,
    is_per_channel,
    kept_channels,
    removed,
)
from vitalloy.compression.pruning.lpvit.groups import inputs_of
from vitalloy.compression.pruning.lpvit.layers import Layer, layers_of
from vitalloy.compression.pruning.lpvit.masks import Block, is_prunable
from vitalloy.errors import CompressionError

COSTS = ("flops", "latency", "energy")
SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)  # of the blocks; the first always stays
ROUNDS = 5


@dataclass
class Counted:
    """Multiply-adds and power of a model whose groups have lost blocks, from the layers' shapes.

    Attributes:
        total: of the whole model.
        energy: power instead of multiply-adds: blocks x (input channels / 16) of every layer, the corrected form.
    """

    model: nn.Module
    layers: Sequence[Layer]
    groups: Sequence[Group]
    total: float
    energy: bool = False
    block: Block = (16, 16)

    @classmethod
    def of(cls, model: nn.Module, layers: Sequence[Layer], groups: Sequence[Group], macs: float) -> Counted:
        """Multiply-adds; `macs` are those of the whole model for one image."""
        return cls(model, layers, groups, macs)

    @classmethod
    def power(cls, model: nn.Module, layers: Sequence[Layer], groups: Sequence[Group], block: Block) -> Counted:
        """The power of all layers."""
        counted = cls(model, layers, groups, 0.0, True, block)
        counted.total = sum(counted._layer(layer, {}) for layer in layers)
        return counted

    def saved(self, gone: Mapping[str, int]) -> float:
        """What is saved by removing so many blocks of each group, by the group's name."""
        lost: dict[tuple[str, str], int] = {}
        saved = 0.0
        for group in self.groups:
            units = group.width - group.kept(gone.get(group.name, 0))
            saved += 0 if self.energy else group.pairs * units
            for part in group.parts:
                for member in part.members:
                    key = (member.layer, member.side)
                    lost[key] = lost.get(key, 0) + part.shape[0] * units
        touched = {layer for layer, _ in lost}
        return saved + sum(self._layer(a, {}) - self._layer(a, lost) for a in self.layers if a.name in touched)

    def _layer(self, layer: Layer, lost: Mapping[tuple[str, str], int]) -> float:
        counts = channel_counts(layer.module)
        out, into = (counts[side] - lost.get((layer.name, side), 0) for side in (OUT, IN))
        numel = layer.module.weight.numel() * out * into / (counts[OUT] * counts[IN])
        if self.energy:
            return float(power_curve(numel, self.block, into, 1, corrected=True)[0])
        return numel * layer.positions

    def tables(self) -> list[Tensor]:
        """For each group what it adds when 0, 1, ... of its blocks are gone, the other groups whole; from 0 down."""
        return [
            torch.tensor([-self.saved({g.name: n}) for n in range(g.blocks)], dtype=torch.float64) for g in self.groups
        ]


@dataclass(frozen=True)
class CostTable:
    """Measured time of the place around each group of channels.

    Attributes:
        seconds: group -> median seconds with 0, 1, ... blocks gone; between measured widths interpolated.
        total: of the whole model.
        batch: images in a call.
        threads: that PyTorch used.
    """

    seconds: Mapping[str, Tensor]
    total: float
    batch: int
    threads: int

    def tables(self, groups: Sequence[Group]) -> list[Tensor]:
        """For each group the time it adds, compared with the whole; from 0 down, never rising."""
        return [(self.seconds[g.name] - self.seconds[g.name][0]).clamp_max(0).cummin(0).values for g in groups]


@torch.no_grad()
def measure_costs(
    model: nn.Module,
    images: Tensor,
    groups: Sequence[Group],
    *,
    rounds: int = ROUNDS,
    progress: Callable[[int, int], None] | None = None,
) -> CostTable:
    """Time the modules around groups of channels at several widths, on this machine; one measurement for each shape.

    Args:
        model: in evaluation mode; not changed.
        images: (B, C, H, W), one batch as it will be run.
        groups: from `find_groups`.
    """
    inputs = inputs_of(model, images, {group.place for group in groups})
    known: dict[Any, Tensor] = {}
    seconds = {}
    for done, group in enumerate(groups, start=1):
        args, kwargs = inputs[group.place]
        key = _shape(model, group, args)
        if key not in known:
            known[key] = _measured(model, group, args, kwargs, rounds)
        seconds[group.name] = known[key]
        if progress:
            progress(done, len(groups))
    total = medians([lambda: model(images)], rounds)[0]
    return CostTable(seconds, total, len(images), torch.get_num_threads())


def _shape(model: nn.Module, group: Group, args: tuple) -> Any:
    tensors = tuple(tuple(a.shape) for a in args if isinstance(a, Tensor))
    place = model.get_submodule(group.place)
    weights = tuple((n, tuple(p.shape)) for n, p in place.named_parameters())
    own = tuple(
        (m.layer.removeprefix(group.place), m.side, tuple(m.table.shape)) for p in group.parts for m in p.members
    )
    return group.kind, type(place), tensors, weights, own


def _measured(model: nn.Module, group: Group, args: tuple, kwargs: dict[str, Any], rounds: int) -> Tensor:
    gone = sorted({round((group.blocks - 1) * (1 - share)) for share in SHARES})
    calls = []
    for count in gone:
        place = _narrow(model, group, count)
        calls.append(lambda place=place: place(*args, **kwargs))
    times = torch.tensor(medians(calls, rounds), dtype=torch.float64)
    table = torch.empty(group.blocks, dtype=torch.float64)
    for i in range(len(gone)):  # straight lines between the measured widths
        end = min(i + 1, len(gone) - 1)
        span = range(gone[i], gone[end] + 1)
        for n in span:
            part = (n - gone[i]) / max(gone[end] - gone[i], 1)
            table[n] = times[i] + part * (times[end] - times[i])
    return table


def _narrow(model: nn.Module, group: Group, blocks_gone: int) -> nn.Module:
    """A copy of the place around a group, without the last units."""
    place = copy.deepcopy(model.get_submodule(group.place)).eval()
    units = [torch.arange(group.kept(blocks_gone), group.width).expand(part.shape[0], -1) for part in group.parts]
    kept = kept_channels(model, removed(group, units))
    prefix = f"{group.place}." if group.place else ""
    return cut(place, {name.removeprefix(prefix): sides for name, sides in kept.items()})


def medians(calls: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of each call; they take turns, so that a slow moment meets all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:  # the first turn warms up
                own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


def counted_layers(model: nn.Module, image: Tensor) -> list[Layer]:
    """Prunable layers and depthwise convolutions with their work; see `layers_of`."""
    return layers_of(model, image, lambda m: is_prunable(m) or (isinstance(m, nn.Conv2d) and is_per_channel(m)))


def checked(cost: str) -> str:
    """`cost`, if it is one of COSTS."""
    if cost not in COSTS:
        raise CompressionError(f"cost={cost!r}: use {', '.join(COSTS)}.")
    return cost
