"""The units of reconstruction: parts of a model that run alone on recorded inputs.

The rule: a model is split into its children, and so is every part that is, or holds, a chain of blocks, which is a list
or sequence with a member of two or more linear layers or convolutions. What is left are blocks, patch embeddings,
downsamplings and the head. A unit must run once in a pass, on tensors with one or more rows (windows, say) for each
image, and return one such; one that does not is split too, and a single layer that does not keeps its calibrated grids.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger("vitalloy")


@dataclass(frozen=True)
class Unit:
    """A part by name, and how it is called.

    Attributes:
        batched: places of the tensors that come with every batch: numbers for positions, else keywords.
        constants: its other arguments, by place.
    """

    name: str
    batched: tuple[int | str, ...]
    constants: dict[int | str, Any]

    def run(self, model: nn.Module, tensors: list[Tensor]) -> Tensor:
        """Call the part on the batched tensors (B, rows, ...), in the order of their places: (B, rows, ...)."""
        given = {**self.constants, **{p: t.flatten(0, 1) for p, t in zip(self.batched, tensors, strict=True)}}
        args = [given[place] for place in sorted(place for place in given if isinstance(place, int))]
        output = model.get_submodule(self.name)(*args, **{k: v for k, v in given.items() if isinstance(k, str)})
        return output.unflatten(0, (len(tensors[0]), -1))


def find_units(model: nn.Module, images: Tensor) -> list[Unit]:
    """The units of a model in the order in which they run.

    Args:
        images: (N, C, H, W), 3 or more; two passes see the first few, to tell what depends on the batch.
    """
    names = {module: name for name, module in model.named_modules() if _weights(module)}
    small, large = ({}, {})
    for calls, count in ((small, 2), (large, 3)):
        with torch.no_grad():
            _calls(model, names, images[:count], calls)
    found: dict[nn.Module, Unit] = {}

    def walk(module: nn.Module) -> None:
        unit = None
        if module is not model and not any(map(_is_chain, module.modules())):
            unit = _unit(names[module], small.get(module, []), large.get(module, []))
        children = [child for child in module.children() if child in names]
        if unit:
            found[module] = unit
        elif children:
            for child in children:
                walk(child)
        else:
            log.info("%s does not run alone on a batch: it keeps its calibrated grids.", names[module])

    walk(model)
    return [found[module] for module in small if module in found]


def _weights(module: nn.Module) -> int:
    return sum(isinstance(part, (nn.Linear, nn.Conv2d)) for part in module.modules())


def _is_chain(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential)) and any(_weights(child) > 1 for child in module)


Call = tuple[dict[int | str, Any], Any]  # arguments by place, output


def _calls(model: nn.Module, modules: dict, images: Tensor, calls: dict[nn.Module, list[Call]]) -> None:
    """What every module is called with; `calls` is in the order in which they begin."""

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls.setdefault(module, [])

    def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[module].append(({**dict(enumerate(args)), **kwargs}, output))

    hooks = [module.register_forward_pre_hook(begin) for module in modules]
    hooks += [module.register_forward_hook(end, with_kwargs=True) for module in modules]
    model(images)
    for hook in hooks:
        hook.remove()


def _unit(name: str, small: list[Call], large: list[Call]) -> Unit | None:
    if len(small) != 1 or len(large) != 1:
        return None
    (few, few_out), (many, many_out) = small[0], large[0]
    if not _grows(few_out, many_out) or few.keys() != many.keys():
        return None
    batched = tuple(place for place in few if _grows(few[place], many[place]))
    constants = {place: few[place] for place in few if place not in batched}
    if not batched or not all(_same(value, many[place]) for place, value in constants.items()):
        return None
    return Unit(name, batched, constants)


def _grows(few: Any, many: Any) -> bool:
    """Whether the value has rows for each image, of two and of three."""
    if not (isinstance(few, Tensor) and isinstance(many, Tensor)) or not few.ndim or not len(few):
        return False
    return few.shape[1:] == many.shape[1:] and 3 * len(few) == 2 * len(many)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return a is b or (isinstance(a, (bool, int, float, str)) and a == b)


class _Stop(Exception):
    pass


def unit_inputs(model: nn.Module, unit: Unit, images: Tensor, batch_size: int) -> list[Tensor]:
    """The batched tensors (N, rows, ...) that reach the unit, for all images; the model runs no further."""
    parts: list[list[Tensor]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [args[place] if isinstance(place, int) else kwargs[place] for place in unit.batched]
        parts.append([tensor.unflatten(0, (len(batch), -1)) for tensor in given])
        raise _Stop

    hook = model.get_submodule(unit.name).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for batch in images.split(batch_size):
            with torch.no_grad(), suppress(_Stop):
                model(batch)
    finally:
        hook.remove()
    return [torch.cat(columns) for columns in zip(*parts, strict=True)]


def in_batches(unit: Unit, model: nn.Module, tensors: list[Tensor], batch_size: int) -> Iterator[Tensor]:
    """The unit's outputs, a batch at a time."""
    with torch.no_grad():
        for batch in zip(*(tensor.split(batch_size) for tensor in tensors), strict=True):
            yield unit.run(model, list(batch))
