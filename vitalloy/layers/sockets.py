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

    `make` may return the module it was given to leave that place alone. The model itself is never replaced, nor what
    lies inside a module that was. `make` sees a module with several names once, and all of them get its answer.
    """
    made: dict[nn.Module, nn.Module] = {}
    done: list[str] = []
    for name, old in find(model, kind).items():
        if not name or any(name.startswith(f"{above}.") for above in done):
            continue
        if old not in made:  # a module under several names stays one module
            made[old] = make(name, old)
        if made[old] is not old:
            model.set_submodule(name, made[old].train(old.training))
            done.append(name)
    return sum(new is not old for old, new in made.items())


@contextmanager
def swapped(
    model: nn.Module, kind: Kind, make: Callable[[str, nn.Module], nn.Module]
) -> Iterator[dict[str, nn.Module]]:
    """Inside the block every module of a kind is replaced; yields the replacements by name; then all is as before."""
    originals = find(model, kind)
    try:
        replace(model, kind, make)
        now = dict(model.named_modules(remove_duplicate=False))
        yield {name: now[name] for name in originals if name and name in now}
    finally:
        for name, module in originals.items():
            if name:
                model.set_submodule(name, module)
