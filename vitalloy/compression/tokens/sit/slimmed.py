"""Slimming modules in any model: behind any point through which everything flows, whatever lies behind it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitalloy.compression.trunk import Grid, Point
from vitalloy.errors import CompressionError
from vitalloy.layers.backbone import init_weights
from vitalloy.layers.slimming import TokenSlimming

_WIDTH = 0.3  # of the weights that a mixture starts with, as a share of the distance between mixtures
_FARTHEST = 16.0  # below no score: exp(-90) is a denormal number, with which processors compute ten times as slowly


@dataclass(frozen=True)
class Slim:
    """Where tokens are slimmed: behind `point`, from a grid to a smaller one."""

    point: Point
    before: Grid
    after: Grid

    def as_dict(self) -> dict[str, Any]:
        return {"point": asdict(self.point), "before": list(self.before), "after": list(self.after)}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Slim:
        point = dict(row["point"])
        point["grid"] = tuple(point["grid"]) if point["grid"] else None
        return cls(Point(**point), tuple(row["before"]), tuple(row["after"]))


class GridSlimming(TokenSlimming):
    """Token slimming whose mixtures lie on a smaller grid, so that what lies behind sees a smaller map.

    A learned term of position in the scores, for which the published module has nothing, starts every mixture at the
    patches around its own place: the untrained model pools, where the published one gives the same mean M times.

    Args:
        dim: channels.
        before, after: the grids (height, width) of the tokens and of the mixtures.
    """

    def __init__(self, dim: int, before: Grid, after: Grid) -> None:
        super().__init__(dim, math.prod(after))
        self.before, self.after = tuple(before), tuple(after)
        self.apply(init_weights)
        self.position = nn.Parameter(local_scores(before, after))

    def scores(self, patches: Tensor) -> Tensor:
        if patches.shape[1] != math.prod(self.before):
            raise CompressionError(
                f"a model slimmed for maps of {'x'.join(map(str, self.before))} got one of {patches.shape[1]} places: "
                "give images of the size that it was slimmed for."
            )
        return super().scores(patches) + self.position


def local_scores(before: Grid, after: Grid) -> Tensor:
    """Scores (M, N) whose softmax is a small bell around each mixture's place."""
    places, slots = centres(before), centres(after)
    steps = torch.tensor([max(b, a) / a for b, a in zip(before, after, strict=True)])  # between mixtures, in places
    offsets = (slots[:, None] - places[None]) * torch.tensor(before)
    return -((offsets / (_WIDTH * steps)) ** 2).sum(-1).div(2).clamp_max(_FARTHEST)


def centres(grid: Grid) -> Tensor:
    """The centres of a grid's cells (cells, 2) in the unit square, row by row."""
    rows, columns = ((torch.arange(side) + 0.5) / side for side in grid)
    return torch.cartesian_prod(rows, columns)


class SlimmedOutput(nn.Module):
    """Slims what a module returns, in the form in which it returns it; `slim` of the module that it belongs to."""

    def __init__(self, slim: Slim) -> None:
        super().__init__()
        self.point = slim.point
        self.slimming = GridSlimming(slim.point.channels, slim.before, slim.after)

    def forward(self, output: Any) -> Any:
        patches = self.slimming(self.point.read(output).patches)
        return self.point.write(output, patches, self.slimming.after)


def slim_output(module: nn.Module, _: Any, output: Any) -> Any:
    """The forward hook of a module whose output is slimmed."""
    return module.slim(output)


def insert(model: nn.Module, slims: Iterable[Slim]) -> None:
    """Slim the outputs of modules, in place; draws nothing from the global generator."""
    like = next(model.parameters())
    for number, slim in enumerate(slims):
        module = model.get_submodule(slim.point.name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            module.slim = SlimmedOutput(slim).to(like).train(module.training)
        module.register_forward_hook(slim_output)


def remove(model: nn.Module, slims: Iterable[Slim]) -> None:
    """The opposite of `insert`."""
    for slim in slims:
        module = model.get_submodule(slim.point.name)
        for key in [key for key, hook in module._forward_hooks.items() if hook is slim_output]:
            del module._forward_hooks[key]
        del module.slim


@contextmanager
def inserted(model: nn.Module, slims: Sequence[Slim]) -> Iterator[nn.Module]:
    """The slimmed model inside the block, the model as it was afterwards."""
    insert(model, slims)
    try:
        yield model
    finally:
        remove(model, slims)
