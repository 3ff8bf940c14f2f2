"""Making layers smaller: which channels of which layers belong together, and taking some of them out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitalloy.compression.pruning.lpvit.masks import is_prunable
from vitalloy.errors import CompressionError

OUT, IN = "out", "in"
Kept = Mapping[str, Mapping[str, Tensor]]  # layer -> "out" / "in" -> channels that stay


def is_per_channel(module: nn.Module) -> bool:
    """Batch norms and depthwise convolutions: what they do to one channel does not depend on the others."""
    if isinstance(module, nn.Conv2d):
        return module.groups == module.in_channels == module.out_channels
    return isinstance(module, _BatchNorm)


@dataclass
class Member:
    """One side of a layer that takes part: unit (head, place) is the channel `table[head, place]`, (heads, width)."""

    layer: str
    side: str
    table: Tensor


@dataclass
class Part:
    """Channels that go together, unit by unit: an output of one layer and the input of the next that it feeds.

    Attributes:
        members: every layer that has these channels.
        scored: of them, those whose weights say what a unit is worth.
        query: the layer whose weights take over the scale of attention, which follows the width; None where the scale
            is fixed.
    """

    members: list[Member]
    scored: list[Member]
    query: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.members[0].table.shape)


@dataclass
class Group:
    """What is removed together: the same number of units in every head of every part.

    Attributes:
        name: of the layer that makes the units.
        kind: "hidden", "values", "queries" or "heads" (queries, keys and values with one width).
        step: units of a head in one block.
        place: the smallest module around it that is called once, "" for the model.
        pairs: multiply-adds of attention for one image and one unit of every head.
    """

    name: str
    kind: str
    parts: list[Part]
    step: int
    place: str
    pairs: int = 0

    @property
    def width(self) -> int:
        """Units of a head."""
        return self.parts[0].shape[1]

    @property
    def blocks(self) -> int:
        return math.ceil(self.width / self.step)

    def kept(self, blocks_gone: int) -> int:
        """Units of a head that stay."""
        return self.width - self.step * blocks_gone


def removed(group: Group, units: Sequence[Tensor]) -> Iterator[tuple[Member, Tensor]]:
    """The channels (n,) that go from every member. `units`: for each part, (heads, n) units that go."""
    for part, gone in zip(group.parts, units, strict=True):
        for member in part.members:
            yield member, member.table.gather(1, gone).flatten()


def kept_channels(model: nn.Module, gone: Iterable[tuple[Member, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """What stays of every layer that loses channels."""
    stay: dict[tuple[str, str], Tensor] = {}
    for member, channels in gone:
        key = (member.layer, member.side)
        if key not in stay:
            stay[key] = torch.ones(channel_counts(model.get_submodule(member.layer))[member.side], dtype=torch.bool)
        stay[key][channels.cpu()] = False
    found: dict[str, dict[str, Tensor]] = {}
    for (layer, side), mask in stay.items():
        found.setdefault(layer, {})[side] = mask.nonzero()[:, 0]
    return found


def channel_counts(module: nn.Module) -> dict[str, int]:
    """Channels out and in."""
    if isinstance(module, nn.Linear):
        return {OUT: module.out_features, IN: module.in_features}
    if isinstance(module, nn.Conv2d):
        return {OUT: module.out_channels, IN: module.in_channels}
    return {OUT: module.num_features, IN: module.num_features}


@torch.no_grad()
def resize(module: nn.Module, out: Tensor | None = None, into: Tensor | None = None) -> None:
    """Keep these output and input channels of a layer, a norm or a depthwise convolution, in place."""
    per_channel = is_per_channel(module)
    for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        new = value.detach()
        if out is not None and new.ndim:
            new = new.index_select(0, out.to(new.device))
        if into is not None and new.ndim > 1 and not per_channel:
            new = new.index_select(1, into.to(new.device))
        if new.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last):
            new = new.contiguous(memory_format=torch.channels_last)
        if isinstance(value, nn.Parameter):
            module.register_parameter(name, nn.Parameter(new.clone(), requires_grad=value.requires_grad))
        else:
            module._buffers[name] = new.clone()
    counts = {OUT: out, IN: out if per_channel else into}
    for side, names in {OUT: ("out_features", "out_channels"), IN: ("in_features", "in_channels")}.items():
        for name in names:
            if counts[side] is not None and hasattr(module, name):
                setattr(module, name, len(counts[side]))
    if out is not None and per_channel:
        setattr(module, "groups" if isinstance(module, nn.Conv2d) else "num_features", len(out))


def cut(model: nn.Module, kept: Kept, scales: Mapping[str, tuple[float, Tensor]] | None = None) -> nn.Module:
    """Take channels out of a model, in place.

    Args:
        scales: layer -> (factor, output channels before the cut): what the weights of queries are multiplied by.
    """
    for name, (factor, rows) in (scales or {}).items():
        layer = model.get_submodule(name)
        with torch.no_grad():
            for value in (layer.weight, layer.bias):
                if value is not None:
                    value[rows] *= factor
    for name, sides in kept.items():
        resize(model.get_submodule(name), sides.get(OUT), sides.get(IN))
    return model


def query_scales(group: Group, units: Sequence[Tensor]) -> dict[str, tuple[float, Tensor]]:
    """What keeps softmax(q kᵀ / sqrt(d)) as it was where d is read from the narrower queries."""
    found = {}
    for part, gone in zip(group.parts, units, strict=True):
        if part.query is not None:
            rows = part.scored[0].table.flatten()
            found[part.query] = (math.sqrt(1 - gone.shape[1] / part.shape[1]), rows)
    return found


def to_sizes(model: nn.Module, wanted: Mapping[str, Mapping[str, int]]) -> nn.Module:
    """Give layers these channel counts, "out" and "in", in place; which channels stay is then up to the loaded weights.

    Raises:
        CompressionError: the model has no such layer, or it has fewer channels.
    """
    modules = dict(model.named_modules())
    for name, sides in wanted.items():
        module = modules.get(name)
        if module is None or not (is_prunable(module) or is_per_channel(module)):
            raise CompressionError(
                f"{type(model).__name__} has no layer {name!r} to make smaller: is it another model?"
            )
        for side, count in sides.items():
            if not 0 < count <= channel_counts(module)[side]:
                raise CompressionError(
                    f"{name} has {channel_counts(module)[side]} channels {side}, fewer than {count}."
                )
        new = {side: torch.arange(n) for side, n in sides.items() if n < channel_counts(module)[side]}
        if new:
            resize(module, new.get(OUT), new.get(IN))
    return model


@contextmanager
def restored(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Layers changed inside the block are as before after it."""
    saved = []
    for name in names:
        module = model.get_submodule(name)
        tensors = {key: value.detach().clone() for key, value in module._parameters.items() if value is not None}
        saved.append((module, dict(module.__dict__), dict(module._parameters), dict(module._buffers), tensors))
    try:
        yield
    finally:
        for module, attributes, parameters, buffers, tensors in saved:
            module.__dict__.update(attributes)
            module._parameters, module._buffers = parameters, buffers
            with torch.no_grad():
                for key, value in tensors.items():
                    parameters[key].copy_(value)
