"""Find and swap the parts that backbones expose: attention, normalisation, activation, linear, convolution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

Kind = type[nn.Module] | tuple[type[nn.Module], ...]


def find(model: nn.Module, kind: Kind) -> dict[str, nn.Module]:
    """Every module of a kind, by its dotted name. A module used under several names appears under each."""
    return {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, kind)}


def replace(model: nn.Module, kind: Kind, make: Callable[[str, nn.Module], nn.Module]) -> int:
    """Put `make(name, module)` in the place of every module of a kind; returns how many were replaced.

    `make` may return the module it was given to leave that place alone. The model itself is never replaced.
    """
    places = find(model, kind)
    count = 0
    for name, old in places.items():
        new = make(name, old)
        if name and new is not old:
            new.train(old.training)
            model.set_submodule(name, new)
            count += 1
    return count


@contextmanager
def swapped(
    model: nn.Module, kind: Kind, make: Callable[[str, nn.Module], nn.Module]
) -> Iterator[dict[str, nn.Module]]:
    """Inside the block every module of a kind is replaced; yields the replacements by name; then all is as before."""
    originals = find(model, kind)
    try:
        replace(model, kind, make)
        yield {name: model.get_submodule(name) for name in originals if name}
    finally:
        for name, module in originals.items():
            if name:
                model.set_submodule(name, module)
