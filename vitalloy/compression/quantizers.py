"""Grids: a value goes in, the nearest value that a few bits can name comes out, in floating point.

A quantizer is a module that sits in a socket of a simulated layer (`vitalloy.compression.simulated`). Rounding passes
gradients straight through, so that what lies before it can be trained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def round_through(x: Tensor) -> Tensor:
    """round(x), half to even; the gradient passes as if nothing had happened."""
    return x + (x.round() - x).detach()


class Uniform(nn.Module):
    """Equal steps: (clamp(round(x / scale) + zero_point, low, high) - zero_point) * scale.

    Codes run from 0 to 2^bits - 1, or from -2^(bits-1) to 2^(bits-1) - 1 when signed. The gradient to x is 1 inside the
    range and 0 outside; the gradient to the scale is that of the formula with straight-through rounding (LSQ without
    its factor); the zero point gets none.

    Args:
        bits: width of a code, 1 or more.
        scale: the step; a tensor that broadcasts against x: one value a tensor, channel, head or row.
        zero_point: the code of 0; rounded when used.
        signed: codes on both sides of 0.
    """

    def __init__(
        self, bits: int, scale: Tensor | float, zero_point: Tensor | float = 0.0, signed: bool = False
    ) -> None:
        super().__init__()
        self.bits, self.signed = bits, signed
        scale = torch.as_tensor(scale)
        self.scale = nn.Parameter(scale.detach().clone(), requires_grad=False)
        zero_point = torch.as_tensor(zero_point, dtype=scale.dtype).detach().clone().expand_as(scale).contiguous()
        self.zero_point = nn.Parameter(zero_point, requires_grad=False)

    @property
    def low(self) -> int:
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        return self.low + 2**self.bits - 1

    def codes(self, x: Tensor) -> Tensor:
        """The codes of x, as floats of x's shape."""
        return (round_through(x / self.scale) + self.zero_point.round()).clamp(self.low, self.high)

    def forward(self, x: Tensor) -> Tensor:
        return (self.codes(x) - self.zero_point.round()) * self.scale

    def extra_repr(self) -> str:
        return f"bits={self.bits}, signed={self.signed}, steps={tuple(self.scale.shape)}"


def symmetric(x: Tensor, bits: int, dims: tuple[int, ...] | None = None) -> Uniform:
    """A signed grid that reaches max |x|, over the whole tensor or over `dims` (which are kept as ones)."""
    top = x.abs().amax() if dims is None else x.abs().amax(dims, keepdim=True)
    return Uniform(bits, (top / (2 ** (bits - 1) - 1 if bits > 1 else 1)).clamp_min(TINY), signed=True)


def asymmetric(low: Tensor, high: Tensor, bits: int) -> Uniform:
    """An unsigned grid over [low, high], stretched to contain 0 so that the zero point is one of its codes."""
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = ((high - low) / (2**bits - 1)).clamp_min(TINY)
    return Uniform(bits, scale, (-low / scale).round())


TINY = 1e-8  # a step for values that are all zero
