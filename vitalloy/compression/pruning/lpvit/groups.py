"""Finding channels that can be removed together in any backbone, by experiment.

Two kinds of place are tried: a layer and the next one, with norms, activations and depthwise convolutions between
(perceptrons, inverted bottlenecks, feed-forward convolutions, gated units); and attention around an `Attend`, whose
heads lose the same number of queries and keys, and of values. Which channels of which layer arrive in which head is
read from a pass in which every layer returns the numbers of its channels. Whether a place is one is decided by trying:
cut to half its width it must give what the whole gives with those channels silenced, in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from vitalloy.compression.pruning.lpvit.cutting import (
    IN,
    OUT,
    Group,
    Member,
    Part,
    cut,
    is_per_channel,
    kept_channels,
    query_scales,
    removed,
    restored,
)
from vitalloy.compression.pruning.lpvit.masks import is_prunable
from vitalloy.layers.attention import Attend

_SAME = 1e-7  # of the output's spread, in float64
_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError)
_MIXES = (nn.LayerNorm, nn.GroupNorm)


@dataclass
class Calls:
    """What ran, in order."""

    order: list[str] = field(default_factory=list)
    count: dict[str, int] = field(default_factory=dict)


@torch.no_grad()
def find_groups(
    model: nn.Module, image: Tensor, step: int = 16, progress: Callable[[int, int], None] | None = None
) -> list[Group]:
    """The places where channels can be taken out.

    Args:
        model: a classifier; not changed.
        image: (1, C, H, W).
        step: hidden channels in a block; a head loses half as many at a time, fewer where it is narrow.
    """
    probe = copy.deepcopy(model).eval().double()
    image = image[:1].double()
    calls = _calls(probe, image)
    proposals = [*_attention(probe, image, calls, step), *_hidden(probe, calls, step)]
    inputs = inputs_of(probe, image, {g.place for options in proposals for g in options})
    found: list[Group] = []
    taken: set[tuple[str, str]] = set()
    for done, options in enumerate(proposals, start=1):
        for group in options:
            sides = {(m.layer, m.side, tuple(m.table.flatten().tolist())) for p in group.parts for m in p.members}
            if not sides & taken and _holds(probe, group, *inputs[group.place]):
                found.append(group)
                taken |= sides
        if progress:
            progress(done, len(proposals))
    order = {name: i for i, name in enumerate(calls.order)}
    return sorted(found, key=lambda g: order[g.name])


def _calls(model: nn.Module, image: Tensor) -> Calls:
    calls, names = Calls(), {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        name = names[module]
        calls.count[name] = calls.count.get(name, 0) + 1
        if is_prunable(module) or is_per_channel(module) or isinstance(module, (*_MIXES, Attend)):
            calls.order.append(name)

    _run(model, image, [module.register_forward_pre_hook(enter) for module in names])
    return calls


def _run(model: nn.Module, image: Tensor, hooks: list) -> None:
    try:
        model(image)
    finally:
        for hook in hooks:
            hook.remove()


def _around(names: list[str], calls: Calls) -> str:
    """The smallest module around all of them that is called once."""
    common = names[0].split(".")[:-1]
    for name in names[1:]:
        parts = name.split(".")
        common = [a for i, a in enumerate(common) if parts[: i + 1] == common[: i + 1]]
    while common and calls.count.get(".".join(common)) != 1:
        common.pop()
    return ".".join(common)


def _hidden(model: nn.Module, calls: Calls, step: int) -> Iterator[list[Group]]:
    """A layer and the next: as many outputs as inputs, or twice as many where one half gates the other."""
    modules = dict(model.named_modules())
    order = [name for name in calls.order if calls.count[name] == 1]
    layers = [i for i, name in enumerate(order) if is_prunable(modules[name])]
    for i, (first, second) in enumerate(pairwise(layers)):
        maker, taker = modules[order[first]], modules[order[second]]
        between = order[first + 1 : second]
        made, width = maker.weight.shape[0], taker.weight.shape[1]
        mixed = any(isinstance(modules[n], (*_MIXES, Attend)) for n in between)
        if mixed or made not in (width, 2 * width) or width < 2 * min(step, 8):
            continue
        members = [Member(order[second], IN, torch.arange(width).unsqueeze(0))]
        for name in (order[first], *(n for n in between if is_per_channel(modules[n]))):
            for half in range(len(modules[name].weight) // width):
                members.append(Member(name, OUT, members[0].table + half * width))
        options = [_group("hidden", [Part(members, members[:1])], step, calls)]
        earlier = order[layers[i - 1]] if i else ""
        if i and modules[earlier].weight.shape == maker.weight.shape and made == width:  # gate and value, apart
            before = [
                Member(n, OUT, members[0].table) for n in order[layers[i - 1] : first] if _makes(modules[n], width)
            ]
            options.append(_group("hidden", [Part([*members, *before], members[:1])], step, calls))
        yield options


def _makes(module: nn.Module, width: int) -> bool:
    return (is_prunable(module) or is_per_channel(module)) and len(module.weight) == width


def _attention(model: nn.Module, image: Tensor, calls: Calls, step: int) -> Iterator[list[Group]]:
    modules = dict(model.named_modules())
    codes = _Codes(modules, calls)
    codes.read(model, image)
    for name, (q, k, v, scaled, pairs) in codes.attends.items():
        query, key, value = (codes.source(table) for table in (q, k, v))
        taker = codes.taker(name)
        parts: dict[str, Part] = {}
        if query and key and query.table.shape == key.table.shape:
            behind = [*codes.followers(query), *codes.followers(key)]
            if scaled or not behind:
                part = Part([query, key, *behind], [query], None if scaled else query.layer)
                parts["queries"] = part
        if value and taker and taker.table.shape == value.table.shape:
            parts["values"] = Part([taker, value, *codes.followers(value)], [taker])
        for part in parts.values():
            part.members = [m for m in part.members if m]
        yield [_group(kind, [part], step, calls, pairs) for kind, part in parts.items() if part.shape[1] >= 8]
        if len(parts) == 2 and parts["queries"].shape == parts["values"].shape and parts["queries"].shape[1] >= 8:
            yield [_group("heads", [parts["queries"], parts["values"]], step, calls, pairs)]


def _group(kind: str, parts: list[Part], step: int, calls: Calls, pairs: int = 0) -> Group:
    heads, width = parts[0].shape
    own = (step if width >= 4 * step else 8) if heads == 1 and kind == "hidden" else step // 2
    maker = next(m.layer for m in parts[0].members if m.side == OUT)
    place = _around([m.layer for p in parts for m in p.members], calls)
    return Group(maker, kind, parts, max(min(own, width // 4), 1), place, len(parts) * pairs)


class _Codes:
    """A pass in which every layer returns the numbers of its channels, so that one sees where they arrive."""

    def __init__(self, modules: dict[str, nn.Module], calls: Calls) -> None:
        self.modules, self.calls = modules, calls
        self.bases: dict[str, int] = {}
        self.entered: dict[str, Tensor | None] = {}
        self.attends: dict[str, tuple[Tensor | None, Tensor | None, Tensor | None, bool, int]] = {}
        self.shapes: dict[str, tuple[int, int]] = {}
        self.total = 1

    def read(self, model: nn.Module, image: Tensor) -> None:
        hooks = []
        for name in self.calls.count:
            module = self.modules[name]
            if self.calls.count[name] != 1:
                continue
            if isinstance(module, Attend):
                hooks.append(module.register_forward_hook(self._attend(name), with_kwargs=True))
            elif is_prunable(module):
                hooks.append(module.register_forward_hook(self._layer(name)))
            elif is_per_channel(module):
                hooks.append(module.register_forward_hook(self._pass_on(name)))
        _run(model, image, hooks)

    def _base(self, name: str, count: int) -> int:
        self.bases[name], self.total = self.total, self.total + count
        return self.bases[name]

    def _layer(self, name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            axis = -1 if isinstance(module, nn.Linear) else 1
            self.entered[name] = _constant(args[0].movedim(axis, -1))
            codes = torch.arange(output.shape[axis]).to(output) + self._base(name, output.shape[axis])
            return codes.expand(output.movedim(axis, -1).shape).movedim(-1, axis).clone()

        return hook

    def _pass_on(self, name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            x = args[0]
            self.entered[name] = _constant(x.movedim(1, -1) if x.ndim > 2 else x)
            return x.clone() if x.shape == output.shape else output

        return hook

    def _attend(self, name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
            given = [args[i] if i < len(args) else kwargs.get(n) for i, n in enumerate(("q", "k", "v", "scale"))]
            tables = [
                _constant(t.movedim(1, -2), 2) if isinstance(t, Tensor) and t.ndim == 4 else None for t in given[:3]
            ]
            products = given[0].shape[:3].numel() * given[1].shape[-2]
            self.attends[name] = (*tables, given[3] is not None, products)
            if output.ndim != 4:
                return output
            heads, width = output.shape[1], output.shape[3]
            self.shapes[name] = (heads, width)
            codes = torch.arange(heads * width).to(output) + self._base(name, heads * width)
            return codes.view(heads, 1, width).expand_as(output).clone()

        return hook

    def source(self, table: Tensor | None) -> Member | None:
        """The layer that all these numbers (heads, width) come from."""
        if table is None:
            return None
        low, high = int(table.min()), int(table.max())
        for name, base in self.bases.items():
            module = self.modules[name]
            if is_prunable(module) and base <= low and high < base + module.weight.shape[0]:
                return Member(name, OUT, (table - base).long())
        return None

    def followers(self, maker: Member) -> list[Member]:
        """Norms and depthwise convolutions that take all outputs of the same layer."""
        base, count = self.bases[maker.layer], self.modules[maker.layer].weight.shape[0]
        codes = torch.arange(base, base + count)
        found = []
        for name, entered in self.entered.items():
            same = entered is not None and entered.shape == codes.shape and torch.equal(entered.long(), codes)
            if same and is_per_channel(self.modules[name]):
                found.append(Member(name, OUT, maker.table))
        return found

    def taker(self, attend: str) -> Member | None:
        """The layer that takes what attention returns; where more is done to that first, the next layer that fits."""
        if attend not in self.shapes:
            return None
        heads, width = self.shapes[attend]
        codes = torch.arange(heads * width) + self.bases[attend]
        for name, entered in self.entered.items():
            fits = is_prunable(self.modules[name]) and entered is not None and entered.shape == codes.shape
            if fits and torch.equal(entered.long().sort().values, codes):
                return Member(name, IN, entered.long().argsort().view(heads, width))
        order = self.calls.order
        for name in order[order.index(attend) + 1 :]:
            if is_prunable(self.modules[name]):
                fits = self.modules[name].weight.shape[1] == heads * width
                return Member(name, IN, torch.arange(heads * width).view(heads, width)) if fits else None
        return None


def _constant(x: Tensor, axes: int = 1) -> Tensor | None:
    """The last axes, if all positions of the others hold the same whole numbers."""
    flat = x.flatten(0, -1 - axes)
    first = flat[0]
    first, flat = first.cpu(), flat.cpu()
    return first if torch.equal(flat, first.expand_as(flat)) and torch.equal(first, first.round()) else None


@torch.no_grad()
def inputs_of(model: nn.Module, images: Tensor, places: set[str]) -> dict[str, tuple[tuple, dict[str, Any]]]:
    """What these modules are called with."""
    found: dict[str, tuple[tuple, dict[str, Any]]] = {}

    def keep(place: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            found[place] = (_copied(args), _copied(kwargs))

        return hook

    hooks = [model.get_submodule(p).register_forward_pre_hook(keep(p), with_kwargs=True) for p in places]
    _run(model, images, hooks)
    return found


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return type(value)(_copied(v) for v in value) if type(value) in (list, tuple) else value


def _holds(model: nn.Module, group: Group, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether cutting half of the units changes no more than silencing them does."""
    generator = torch.Generator().manual_seed(0)
    place = model.get_submodule(group.place)
    gone = max(group.width // 2, 1)
    units = []
    for part in group.parts:
        heads, width = part.shape
        units.append(torch.stack([torch.randperm(width, generator=generator)[:gone] for _ in range(heads)]))
    pairs = list(removed(group, units))
    names = {member.layer for member, _ in pairs}
    try:
        with restored(model, names):  # first, as most places that are none fail here at once
            cut(model, kept_channels(model, pairs), query_scales(group, units))
            given = _tensors(place(*_copied(args), **_copied(kwargs)))
        with restored(model, names):
            for part, some in zip(group.parts, units, strict=True):
                silence(model, part, some)
            wanted = _tensors(place(*_copied(args), **_copied(kwargs)))
    except _REFUSALS:
        return False
    return len(wanted) == len(given) and all(
        a.shape == b.shape and bool((a - b).abs().max() <= _SAME * a.std().clamp_min(1e-12))
        for a, b in zip(wanted, given, strict=True)
    )


@torch.no_grad()
def silence(model: nn.Module, part: Part, units: Tensor) -> None:
    """Zero what these units (heads, n) say: the columns that read them, or queries and keys."""
    readers = [m for m in part.members if m.side == IN]
    for member in readers or part.members:
        layer, channels = model.get_submodule(member.layer), member.table.gather(1, units).flatten()
        if member.side == IN:
            layer.weight[:, channels] = 0
        else:
            for value in (layer.weight, layer.bias):
                if value is not None:
                    value[channels] = 0


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []
