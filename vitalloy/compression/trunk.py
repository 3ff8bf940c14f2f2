"""Where a model can be cut: places through which everything flows, whatever the backbone.

A method that slims tokens, ends early or exports a model in pieces needs to know after which module the whole state of
the computation is one tensor. `points` finds these places by experiment: a module's output is one when, put into the
pass of another image, it makes that pass give the first image's logits.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitalloy.errors import CompressionError
from vitalloy.layers.tokens import to_map, to_tokens

Grid = tuple[int, int]
TOKENS, MAP, MAP_LAST, PAIR = "tokens", "map", "map_last", "pair"
_SAME = 1e-4  # of the difference between two images' logits; rounding stays below 1e-5
_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError)


class Tokens(NamedTuple):
    """The state at a point: patch tokens (B, N, C), class tokens (B, P, C) or None, and the patches' grid or None."""

    patches: Tensor
    prefix: Tensor | None = None
    grid: Grid | None = None


@dataclass(frozen=True)
class Point:
    """The output of a module through which everything flows.

    Attributes:
        name: the dotted name of the module.
        layout: "tokens" (B, P + N, C), "map" (B, C, H, W), "map_last" (B, H, W, C) or "pair" (tokens, grid).
        channels: C.
        grid: (height, width) of the patches for the image size that was looked at; None where they form no grid.
        prefix: how many class tokens stand in front of the patches.
        macs: share of the model's multiply-accumulates that are done when it is reached.
    """

    name: str
    layout: str
    channels: int
    grid: Grid | None
    prefix: int
    macs: float

    def read(self, output: Any) -> Tokens:
        """What the module returned, as tokens."""
        if self.layout == MAP:
            return Tokens(to_tokens(output), None, tuple(output.shape[-2:]))
        if self.layout == MAP_LAST:
            return Tokens(output.flatten(1, 2), None, tuple(output.shape[1:3]))
        tokens, grid = output if self.layout == PAIR else (output, None)
        if grid is None and self.grid is not None and tokens.shape[1] - self.prefix == math.prod(self.grid):
            grid = self.grid
        return Tokens(tokens[:, self.prefix :], tokens[:, : self.prefix] if self.prefix else None, grid)

    def write(self, output: Any, patches: Tensor, grid: Grid | None = None, prefix: Tensor | None = None) -> Any:
        """Other patch tokens (B, N, C) in the form that the module returned.

        Args:
            output: what the module returned; gives the class tokens, and the grid where `grid` is None.
            grid: of the new patches.
            prefix: other class tokens, such as those of the images that are left.
        """
        if self.layout == MAP:
            return to_map(patches, grid or output.shape[-2:])
        if self.layout == MAP_LAST:
            return patches.unflatten(1, grid or output.shape[1:3])
        tokens, old = output if self.layout == PAIR else (output, None)
        if self.prefix:
            patches = torch.cat([tokens[:, : self.prefix] if prefix is None else prefix, patches], dim=1)
        return patches if self.layout == TOKENS else (patches, grid or old)

    def empty(self, like: Tensor) -> Any:
        """Zeros in the form that the module returns, for as many images as `like` (B, ...) has; needs a grid."""
        count = self.prefix + math.prod(self.grid)
        sizes = {MAP: (self.channels, *self.grid), MAP_LAST: (*self.grid, self.channels)}
        zeros = like.new_zeros(like.shape[0], *sizes.get(self.layout, (count, self.channels)))
        return (zeros, self.grid) if self.layout == PAIR else zeros

    def images(self, output: Any, chosen: Tensor) -> Any:
        """The same state of some of the images: `chosen` are their numbers, or a mask (B,)."""
        if self.layout == PAIR:
            return output[0][chosen], output[1]
        return output[chosen]


@torch.no_grad()
def points(model: nn.Module, image: Tensor) -> list[Point]:
    """The places of a model through which everything flows, in order of execution.

    Looked at are the outputs of numbered modules (blocks, stages) and of the model's direct children, where the
    state still has a place for every patch. Of modules that return the same tensor, the last called counts.

    Args:
        model: a classifier; run in evaluation mode, left as it was.
        image: one image (1, C, H, W); its values do not matter.
    """
    candidates = {
        name: module
        for name, module in model.named_modules()
        if name and (re.search(r"(^|\.)\d+$", name) or "." not in name or re.fullmatch(r"\w+\.\w+", name))
    }
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(image.shape, generator=generator).to(image) for _ in "ab")
    with evaluating(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        seen: dict[str, tuple[Any, Any, int]] = {}
        calls: dict[str, int] = {}

        def look(name: str, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            seen[name] = (output, _copied(output), counter.get_total_flops())  # blocks may go on in place

        with _watching(candidates, look):
            wanted = model(first)
        total = counter.get_total_flops() or 1
    prefix, last = int(getattr(model, "num_prefix_tokens", 0) or 0), {}
    for name, (output, _, done) in seen.items():
        point = _describe(name, output, prefix, image.shape, done / total) if done and calls[name] == 1 else None
        if point is not None:
            last.pop(key := (_tensor(output).untyped_storage().data_ptr(), done), None)
            last[key] = point
    found = []
    with evaluating(model), sdpa_kernel(SDPBackend.MATH):
        limit = _SAME * (model(second) - wanted).abs().max().item()
        for point in last.values():
            if _carries_all(model, candidates[point.name], seen[point.name][1], second, wanted, limit):
                found.append(point)
    return found


@torch.no_grad()
def macs(model: nn.Module, image: Tensor) -> int:
    """Multiply-accumulates for a batch, both products of attention included; the model's own mode is kept."""
    with evaluating(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() // 2


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode; every module's own mode afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def hooked(model: nn.Module, hooks: Mapping[str, Callable[[Any], Any]]) -> Iterator[None]:
    """Inside the block each function gets the output of the module of its name, and may return another in its place."""
    with ExitStack() as stack:
        for name, function in hooks.items():
            handle = model.get_submodule(name).register_forward_hook(lambda _m, _a, out, f=function: f(out))
            stack.callback(handle.remove)
        yield


class Segment(nn.Module):
    """A piece of a model, from one point to another, as a module: for exporting a model in pieces.

    The model runs on an empty image; the given state stands in for the module of `start`, the one at `end` is taken.
    Nothing of what lies outside reaches the result, so that an exported graph holds the piece alone.

    Args:
        start: where the given state belongs; None takes images.
        end: whose state is returned; None returns logits.
        image_shape: (C, H, W) of the images.
        known: all points of the model, in order. Those outside the piece then need not be computed, which makes
            tracing faster; zeros stand in for them.
    """

    def __init__(
        self,
        model: nn.Module,
        start: Point | None,
        end: Point | None,
        image_shape: Sequence[int],
        known: Sequence[Point] = (),
    ) -> None:
        super().__init__()
        self.model, self.start, self.end, self.image_shape = model, start, end, tuple(image_shape)
        names = [point.name for point in known]
        first = names.index(start.name) if start is not None and start.name in names else -1
        last = names.index(end.name) if end is not None and end.name in names else len(names)
        inside = names[first + 1 : last + 1]
        self.outside = [
            point
            for place, point in enumerate(known)
            if point.grid and not first < place <= last and not any(n.startswith(f"{point.name}.") for n in inside)
        ]

    def forward(self, state: Tensor) -> Tensor:
        """Images (B, C, H, W), or the tensor at `start` -> the tensor at `end`, or logits."""
        image, given, hooks, taken = state, {p.name: p.empty(state) for p in self.outside}, {}, []
        if self.start is not None:
            image = state.new_zeros(state.shape[0], *self.image_shape)
            given[self.start.name] = (state, self.start.grid) if self.start.layout == PAIR else state
        if self.end is not None:
            hooks[self.end.name] = lambda out: taken.append(out[0] if self.end.layout == PAIR else out)
        with _standing_in(self.model, given), hooked(self.model, hooks):
            logits = self.model(image)
        return taken[0] if self.end is not None else logits


@contextmanager
def _standing_in(model: nn.Module, outputs: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block modules return what is given for them: nothing is computed, and none of their hooks runs."""
    modules = {name: model.get_submodule(name) for name in outputs}
    hooks = {name: (module._forward_pre_hooks, module._forward_hooks) for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
            module.forward = lambda *_args, out=outputs[name], **_options: out
        yield
    finally:
        for name, module in modules.items():
            del module.forward
            module._forward_pre_hooks, module._forward_hooks = hooks[name]


def _watching(modules: Mapping[str, nn.Module], look: Callable[[str, Any], None]) -> ExitStack:
    stack = ExitStack()
    for name, module in modules.items():
        handle = module.register_forward_hook(lambda _m, _a, out, n=name: look(n, out))
        stack.callback(handle.remove)
    return stack


def _carries_all(model: nn.Module, module: nn.Module, output: Any, image: Tensor, wanted: Tensor, limit: float) -> bool:
    """Whether the output, put into the pass of another image, brings its own logits with it."""
    handle = module.register_forward_hook(lambda *_: _copied(output))
    try:
        return bool((model(image) - wanted).abs().max() <= limit)
    except _REFUSALS:
        return False
    finally:
        handle.remove()


def _copied(output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(map(_copied, output))
    return output.clone() if isinstance(output, Tensor) else output


def _tensor(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and output else output


def _describe(name: str, output: Any, prefix: int, image: Sequence[int], share: float) -> Point | None:
    """The point that an output would be; None where it has no place for each patch."""
    sides, tensor = tuple(image[-2:]), _tensor(output)
    if not isinstance(tensor, Tensor) or tensor.ndim not in (3, 4):
        return None
    if isinstance(output, tuple):
        if len(output) != 2 or not _is_grid(output[1]) or tensor.ndim != 3:
            return None
        grid = tuple(int(side) for side in output[1])
        extra = output[0].shape[1] - math.prod(grid)
        return Point(name, PAIR, output[0].shape[2], grid, extra, share) if extra in (0, prefix) else None
    if output.ndim == 3:
        count = output.shape[1]
        for extra in dict.fromkeys((prefix, 0)):
            if grid := _grid_of(count - extra, sides):
                return Point(name, TOKENS, output.shape[2], grid, extra, share)
        return Point(name, TOKENS, output.shape[2], None, prefix, share) if count - prefix > 1 else None
    first, last = tuple(output.shape[2:]), tuple(output.shape[1:3])
    if _like(first, sides) and not (_like(last, sides) and output.shape[1] < output.shape[3]):
        return Point(name, MAP, output.shape[1], first, 0, share) if math.prod(first) > 1 else None
    return Point(name, MAP_LAST, output.shape[3], last, 0, share) if _like(last, sides) else None


def _is_grid(value: Any) -> bool:
    return isinstance(value, (tuple, list, torch.Size)) and len(value) == 2 and all(isinstance(s, int) for s in value)


def _like(grid: Sequence[int], sides: Sequence[int]) -> bool:
    """Whether a map's sides are those of the image, both divided by about the same number."""
    return all(0 < g <= s for g, s in zip(grid, sides, strict=True)) and (
        abs(grid[0] * sides[1] - grid[1] * sides[0]) < max(sides)
    )


def _grid_of(count: int, sides: Sequence[int]) -> Grid | None:
    """The sides of `count` patches with the proportions of the image."""
    if count < 2:
        return None
    height = round(math.sqrt(count * sides[0] / sides[1]))
    return (
        (height, count // height)
        if height and count % height == 0 and _like((height, count // height), sides)
        else None
    )


def nearest(wanted: float, reachable: Sequence[float], what: str) -> CompressionError:
    """The error for a budget out of reach, which names the nearest that is not."""
    best = min(reachable, key=lambda share: abs(share - wanted))
    return CompressionError(f"{what}={wanted:g} is out of reach: the nearest is {best:.3g}.")
