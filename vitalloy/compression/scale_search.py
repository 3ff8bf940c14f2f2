"""Alternating search for the scales of the two factors of a product, by what the product becomes.

Linear layers, convolutions and both products of attention are the same here: left rightᵀ + bias, with what flows on the
left and the weight, the keys or the values on the right. Thousands of candidates are tried, so a product keeps only
some of its rows, evenly spread; ranges are taken from all values before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.compression.calibration import Seen
from vitalloy.compression.quantizers import TINY

ROWS = 256  # of a product that candidates are tried on


@dataclass
class Product:
    """left (..., n, d) times the transpose of right (..., m, d), plus bias (..., 1, m); gradient as the result."""

    left: Tensor
    right: Tensor
    bias: Tensor | None = None
    gradient: Tensor | None = None

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        plain = left.ndim == 3 and len(left) == 1  # a matrix product is faster than a batch of one
        y = (left[0] @ right[0].mT)[None] if plain else left @ right.mT
        return y if self.bias is None else y.add_(self.bias)


@dataclass
class Candidates:
    """The grids to choose from for one side of a product.

    Attributes:
        make: grid for one value a group, (groups,).
        start: (groups,) values before the search.
        values: (candidates, groups); groups are equal parts of the right side's rows, the left side has one.
    """

    make: Callable[[Tensor], nn.Module]
    start: Tensor
    values: Tensor

    @classmethod
    def around(
        cls, start: Tensor, low: float, high: float, make: Callable[[Tensor], nn.Module], steps: int = 100
    ) -> Candidates:
        """steps + 1 multiples of `start` (groups,), evenly between two factors."""
        factors = torch.arange(steps + 1, dtype=start.dtype, device=start.device) / steps * (high - low) + low
        return cls(make, start, factors[:, None] * start)


Objective = Callable[[Product, Tensor, Tensor, int], Tensor]


def cosine(product: Product, exact: Tensor, y: Tensor, groups: int) -> Tensor:
    """The cosine between exact and quantized outputs as two vectors, up to a factor, (1,)."""
    return (exact.flatten() @ y.flatten() / y.norm().clamp_min(TINY))[None]  # the exact output's length does not matter


def curvature(product: Product, exact: Tensor, y: Tensor, groups: int) -> Tensor:
    """Minus the squared error weighted by squared gradients, over equal parts of the output's columns, (groups,)."""
    errors = (y - exact).mul_(product.gradient)
    if groups == 1:
        return -(errors.flatten() @ errors.flatten())[None]
    return -errors.square_().sum(-2).view(groups, -1).sum(1)


@torch.no_grad()
def search(
    product: Product,
    left: Candidates | None,
    right: Candidates,
    objective: Objective,
    rounds: int = 3,
    left_first: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """The best values for the left and the right side, each searched in turn while the other is held.

    A left side of None stays exact. Of equally good candidates the first is taken.
    """
    sides = {"left": left, "right": right} if left_first else {"right": right, "left": left}
    exact = product(product.left, product.right)
    factors = {"left": product.left, "right": product.right}
    chosen = {name: None if side is None else side.start for name, side in sides.items()}
    grid = {
        name: factors[name] if side is None else side.make(side.start)(factors[name]) for name, side in sides.items()
    }
    for _ in range(rounds):
        before = dict(chosen)
        for name, side in sides.items():
            if side is None:
                continue
            best = torch.full_like(side.start, -torch.inf)
            for values in side.values:
                now = grid | {name: side.make(values)(factors[name])}
                score = objective(product, exact, product(now["left"], now["right"]), len(values))
                chosen[name] = torch.where(score > best, values, chosen[name])
                best = torch.maximum(best, score)
            grid[name] = side.make(chosen[name])(factors[name])
        if all(before[name] is chosen[name] or torch.equal(before[name], chosen[name]) for name in chosen):
            break  # another round would find the same
    return chosen["left"], chosen["right"]


def product_of_layer(layer: nn.Linear | nn.Conv2d, seen: Seen) -> Product:
    """A linear layer or convolution on some of the rows or positions it saw: (groups, n, d) times (groups, m, d)."""
    (x, *_), gradient, groups = seen.inputs, seen.gradient, getattr(layer, "groups", 1)
    right = layer.weight.detach().flatten(1).unflatten(0, (groups, -1))
    bias = None if layer.bias is None else layer.bias.detach().view(groups, 1, -1)
    if isinstance(layer, nn.Conv2d):
        left, gradient = _patches(layer, x, gradient)
    else:
        rows = _spread(x[..., 0].numel(), ROWS, x.device)
        left = x.flatten(0, -2)[rows][None]
        gradient = None if gradient is None else gradient.flatten(0, -2)[rows][None]
    return Product(left, right, bias, gradient)


def _patches(layer: nn.Conv2d, x: Tensor, gradient: Tensor | None) -> tuple[Tensor, Tensor | None]:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    places, left = None, []
    for image in F.pad(x, layer._reversed_padding_repeated_twice, mode=mode).split(1):
        patches = F.unfold(image, layer.kernel_size, layer.dilation, 0, layer.stride)[0]  # (C kh kw, positions)
        if places is None:
            places = _spread(patches.shape[1], -(-ROWS // len(x)), x.device)
        left.append(patches[:, places].unflatten(0, (layer.groups, -1)).mT)
    if gradient is not None:
        gradient = gradient.flatten(2)[..., places].unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    return torch.cat(left, 1), gradient


def attention_of(seen: Seen) -> tuple[Tensor, Tensor, Tensor, float, Tensor | None]:
    """q, k, v, scale and bias of an attention as it was called."""
    names = ("q", "k", "v", "scale", "bias")
    q, k, v, *others = seen.inputs
    given = {names[int(key[3:])] if key.startswith("arg") else key: value for key, value in seen.options.items()}
    scale = given.get("scale")
    return q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, others[0] if others else given.get("bias")


def attention_map(seen: Seen) -> Tensor:
    """The softmax map of an attention, (B, heads, N, M)."""
    q, k, _, scale, bias = attention_of(seen)
    logits = q @ k.mT * scale
    return (logits if bias is None else logits + bias).softmax(-1)


def products_of_attention(seen: Seen) -> tuple[Product, Product]:
    """q kᵀ (before its scale) and the softmax map times v, on some of the queries that an attention saw."""
    q, k, v, scale, bias = attention_of(seen)
    batch, queries = len(q), q.shape[-2]
    if bias is not None:
        bias = bias.expand(batch, *q.shape[1:-1], k.shape[-2])
    entries = _spread(batch, max(ROWS // queries, 1), q.device)
    rows = _spread(queries, ROWS, q.device)
    q, k, v = q[entries][..., rows, :], k[entries], v[entries].mT
    logits = q @ k.mT * scale
    weights = (logits if bias is None else logits + bias[entries][..., rows, :]).softmax(-1)
    behind = before = None
    if seen.gradient is not None:
        behind = seen.gradient[entries][..., rows, :]
        slope = behind @ v
        before = weights * (slope - (weights * slope).sum(-1, keepdim=True)) * scale
    return Product(q, k, gradient=before), Product(weights, v, gradient=behind)


def _spread(total: int, count: int, device: torch.device) -> Tensor:
    """At most `count` of `total` places, evenly spread."""
    return torch.linspace(0, total - 1, min(count, total), device=device).round().long()
