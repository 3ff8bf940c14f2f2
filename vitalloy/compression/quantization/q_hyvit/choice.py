"""What Q-HyViT chooses from: grids for a range, and the best of them for a layer by its weighted output error.

The error of quantized outputs y_q is the mean over rows of sum (y_q - y)^2 g^2, g the gradient of the loss at y: the
diagonal second-order term of what quantization costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.compression.calibration import Seen
from vitalloy.compression.quantizers import TINY, Uniform, asymmetric

SCHEMES = ("symmetric", "asymmetric")
COMBINATIONS = tuple(product(("layer", "channel"), SCHEMES, SCHEMES))  # of weights, of weights, of activations
LOWEST, HIGHEST = 0.01, 1.2  # factors of the step that the search tries
STRIDE = 8  # it tries every eighth first, then those around the best
ROWS, LEAST_ROWS, COST = 256, 64, 2**25  # rows that the search looks at; fewer where a product costs more than this
ELEMENTS = 2**21  # numbers in a batch of candidates


class Grid(NamedTuple):
    """Steps and zero points that broadcast against a tensor; see `Uniform`."""

    bits: int
    scale: Tensor
    zero_point: Tensor
    signed: bool = False
    remedy: str = ""

    def scaled(self, factor: Tensor) -> Grid:
        return self._replace(scale=self.scale * factor)

    def __call__(self, x: Tensor) -> Tensor:
        low = -(2 ** (self.bits - 1)) if self.signed else 0
        codes = (x / self.scale).round_().add_(self.zero_point).clamp_(low, low + 2**self.bits - 1)
        return codes.sub_(self.zero_point).mul_(self.scale)

    def quantizer(self, *shape: int) -> Uniform:
        """As a module; one step a channel is laid out in `shape`."""
        scale, zero_point = (t if t.numel() == 1 else t.reshape(shape) for t in (self.scale, self.zero_point))
        if scale.numel() == 1:
            scale, zero_point = scale.reshape(()), zero_point.reshape(())
        return Uniform(self.bits, scale, zero_point, self.signed)


def overflows(low: Tensor, high: Tensor, bits: int) -> bool:
    """Whether an unsigned code of `bits` cannot name the zero point of the range [low, high]."""
    zero_point = zero_points(low, high, bits)["unbounded"].zero_point
    return bool(((zero_point < 0) | (zero_point > 2**bits - 1)).any())


def zero_points(low: Tensor, high: Tensor, bits: int) -> dict[str, Grid]:
    """The asymmetric grids of a range, by what is done where it lies on one side of zero.

    "unbounded" keeps a zero point that the codes cannot name (no integer runtime takes it as uint8), "saturated" clamps
    it into the codes, which cuts off one end of the range, "stretched" widens the range to contain zero.
    """
    scale = ((high - low) / (2**bits - 1)).clamp_min(TINY)
    free = -(low / scale).round()
    wide = asymmetric(low, high, bits)
    return {
        "unbounded": Grid(bits, scale, free, remedy="unbounded"),
        "saturated": Grid(bits, scale, free.clamp(0, 2**bits - 1), remedy="saturated"),
        "stretched": Grid(bits, wide.scale.detach(), wide.zero_point.detach(), remedy="stretched"),
    }


def symmetric_grid(low: Tensor, high: Tensor, bits: int) -> Grid:
    scale = (torch.maximum(low.abs(), high.abs()) / max(2 ** (bits - 1) - 1, 1)).clamp_min(TINY)
    return Grid(bits, scale, torch.zeros_like(scale), signed=True)


def grids(low: Tensor, high: Tensor, bits: int, scheme: str, zero_point: str = "stretched") -> list[Grid]:
    """The grids of a scheme over a range: one, or where its zero point overflows those that `zero_point` allows.

    Args:
        zero_point: "choose" (stretched or saturated), "any" (also unbounded), or one of the keys of `zero_points`.
    """
    if scheme == "symmetric":
        return [symmetric_grid(low, high, bits)]
    made = zero_points(low, high, bits)
    if not overflows(low, high, bits):
        return [made["stretched"]._replace(remedy="")]
    allowed = {"choose": ("stretched", "saturated"), "any": tuple(made)}.get(zero_point, (zero_point,))
    return [made[name] for name in allowed]


class Chosen(NamedTuple):
    """Grids of one layer under one combination, and the error that they leave."""

    weight: Grid | None
    inputs: tuple[Grid, ...]
    error: float


@dataclass
class Product:
    """A linear or convolution layer on some rows, as the product that it is.

    Attributes:
        x: (groups, rows, K) inputs; K channels, times pixels of the window.
        inside: 0 where x is padding, which is not quantized; None without padding.
        weight: (groups, out, K).
        y: (groups, rows, out), without bias.
        importance: g^2, of y's shape.
        low, high: of all its inputs.
    """

    x: Tensor
    inside: Tensor | None
    weight: Tensor
    y: Tensor
    importance: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls, layer: nn.Linear | nn.Conv2d, seen: Seen, generator: torch.Generator, rows: int | None = None
    ) -> Product:
        """From what the layer saw; `rows` of its output's positions are drawn, by default as many as are cheap."""
        rows = rows or min(max(COST // layer.weight.numel(), LEAST_ROWS), ROWS)
        x, y, g = seen.inputs[0], seen.output, seen.gradient
        low, high = x.min(), x.max()
        y = y if layer.bias is None else y - layer.bias.view(-1, *[1] * (2 * isinstance(layer, nn.Conv2d)))
        inside, groups = None, 1
        if isinstance(layer, nn.Conv2d):
            groups = layer.groups
            count = max(rows // (y.shape[2] * y.shape[3]), 1) * 4  # positions of one image are alike: draw from several
            x, y, g = (t[:: max(len(t) // count, 1)] for t in (x, y, g))
            x, inside = _windows(layer, x)
            y, g = (t.flatten(2).mT.flatten(0, 1) for t in (y, g))
        else:
            x, y, g = (t.flatten(0, -2) for t in (x, y, g))
        drawn = torch.randperm(len(x), generator=generator)[:rows].sort().values.to(x.device)
        x, y, g = x[drawn], y[drawn], g[drawn]
        inside = None if inside is None else inside[drawn % len(inside)]
        x, y, g = (t.unflatten(-1, (groups, -1)).movedim(1, 0).contiguous() for t in (x, y, g))
        inside = None if inside is None else inside.unflatten(-1, (groups, -1)).movedim(1, 0).contiguous()
        weight = layer.weight.detach().flatten(1).unflatten(0, (groups, -1))
        return cls(x, inside, weight, y, g.square(), low, high)

    def errors(self, x: Tensor, weight: Tensor) -> Tensor:
        """The error of each output for x ([c,] groups, rows, K) or weight ([c,] groups, out, K): (c, groups, out)."""
        y = x @ weight.mT
        y = y if y.ndim == 4 else y[None]
        return (y - self.y).square_().mul_(self.importance).sum(2) / self.y.shape[1]

    def quantized(self, grid: Grid) -> Tensor:
        x = grid(self.x)
        return x if self.inside is None else x * self.inside

    def weight_grid(self, bits: int, granularity: str, scheme: str) -> Grid:
        dims = (-1,) if granularity == "channel" else (0, 1, 2)
        low, high = self.weight.amin(dims, keepdim=True), self.weight.amax(dims, keepdim=True)
        return grids(low, high, bits, scheme)[0]

    def search(self, weight: Grid, x: Grid, steps: int, rounds: int) -> Chosen:
        """Scale the steps of the weight and of the inputs by turns; from min to max with `rounds` 0."""
        at_weight = torch.ones_like(weight.scale)
        at_x = torch.ones_like(x.scale)
        factors = torch.linspace(LOWEST, HIGHEST, max(steps, 2)).to(self.x)
        x_q, weight_q = self.quantized(x), weight(self.weight)
        error = self.errors(x_q, weight_q)[0]
        for _ in range(rounds):
            before = error.sum()
            at_weight, error = best_factor(
                lambda f, x_q=x_q: self.errors(x_q, weight.scaled(f)(self.weight)), factors, at_weight, error, self.size
            )
            weight_q = weight.scaled(at_weight)(self.weight)
            at_x, error = best_factor(
                lambda f, w=weight_q: self.errors(self.quantized(x.scaled(f)), w), factors, at_x, error, self.size
            )
            x_q = self.quantized(x.scaled(at_x))
            if error.sum() >= before:
                break
        return Chosen(weight.scaled(at_weight), (x.scaled(at_x),), float(error.sum()))

    @property
    def size(self) -> int:
        return max(self.x.numel(), self.y.numel(), self.weight.numel())

    def choose(
        self,
        weights: int,
        activations: int,
        combinations: Iterable[tuple[str, str, str]],
        zero_point: str,
        steps: int,
        rounds: int,
    ) -> dict[str, Chosen]:
        """The best grids of each combination, by its name "granularity/weight scheme/activation scheme"."""
        found = {}
        for names in combinations:
            granularity, of_weight, of_x = names
            start = self.weight_grid(weights, granularity, of_weight)
            tried = grids(self.low, self.high, activations, of_x, zero_point)
            searched = [self.search(start, grid, steps, rounds) for grid in tried]
            found["/".join(names)] = min(searched, key=lambda c: c.error)
        return found


def _windows(layer: nn.Conv2d, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the windows of a convolution hold, (B * positions, channels * pixels), and where that is no padding."""
    options = {"kernel_size": layer.kernel_size, "dilation": layer.dilation, "stride": layer.stride}
    pad = tuple(layer._reversed_padding_repeated_twice)
    inside = None
    if any(pad):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        if mode == "constant":
            inside = F.unfold(F.pad(torch.ones_like(x[:1]), pad), **options).mT.flatten(0, 1)
        x = F.pad(x, pad, mode=mode)
    return F.unfold(x, **options).mT.flatten(0, 1), inside


def best_factor(
    errors: Callable[[Tensor], Tensor], factors: Tensor, now: Tensor, least: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """The factors of least error, coarse to fine, and that error; `now` and its error `least` where none is better.

    Args:
        errors: of a batch of factors (c, *now.shape) -> (c, groups, out).
        factors: (steps,) ascending, evenly spaced.
        now: (groups, out, 1) for a factor a channel, else one element.
        size: numbers that one factor costs, which bounds a batch.
    """
    own = now.numel() > 1
    shape = now.shape if own else (1,) * 3

    def tried(places: Tensor) -> Tensor:  # (c, *shape) -> (c, groups, out), summed over all where they share a factor
        parts = [errors(factors[p]) for p in places.split(max(ELEMENTS // size, 1))]
        return torch.cat(parts)

    def least_of(found: Tensor) -> Tensor:  # (1, *shape): which of the batch
        return found.argmin(0, keepdim=True)[..., None] if own else found.sum((1, 2)).argmin().view(1, 1, 1, 1)

    stride = STRIDE if len(factors) > 2 * STRIDE else 1
    coarse = torch.arange(len(factors) - 1, -1, -stride, device=now.device)
    coarse = coarse.view(-1, 1, 1, 1).expand(-1, *shape)
    found = tried(coarse)
    middle = coarse.gather(0, least_of(found))
    around = torch.arange(1 - stride, stride, device=now.device).view(-1, 1, 1, 1)
    fine = (middle + around).clamp(0, len(factors) - 1)
    found = tried(fine)
    at = least_of(found)
    factor = factors[fine.gather(0, at)[0]]
    error = found.gather(0, at[..., 0].expand(1, *found.shape[1:]))[0]
    if own:
        better = error < least
        return torch.where(better[..., None], factor, now), torch.where(better, error, least)
    return (factor.view(now.shape), error) if error.sum() < least.sum() else (now, least)


def scores(x: Tensor, weight: Tensor, gradient: Tensor, bits: int) -> Tensor:
    """The errors of the eight COMBINATIONS for a linear layer with grids from min to max: (8,).

    Args:
        x: (..., in) inputs; weight: (out, in); gradient: (..., out) of the loss at the outputs.
    """
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight)
    layer.weight.data = weight
    seen = Seen([x], {}, F.linear(x, weight), gradient)
    every = Product.of(layer, seen, torch.Generator(), rows=x.numel())
    chosen = every.choose(bits, bits, COMBINATIONS, "stretched", 0, 0)
    return torch.tensor([c.error for c in chosen.values()], dtype=x.dtype)
