"""Grids: a value goes in, the nearest value that a few bits can name comes out, in floating point.

A quantizer is a module that sits in a socket of a simulated layer (`vitalloy.compression.simulated`). Rounding passes
gradients straight through, so that what lies before it can be trained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitalloy.errors import CompressionError


def check_bits(low: int, high: int, **bits: int) -> None:
    """CompressionError for a number of bits, given by its name, that is none of low..high."""
    for name, given in bits.items():
        if given not in range(low, high + 1):
            raise CompressionError(f"{name}={given} is out of range: this method takes {low} to {high} bits.")


def round_through(x: Tensor) -> Tensor:
    """round(x), half to even; the gradient passes as if nothing had happened."""
    return x + (x.round() - x).detach() if torch.is_grad_enabled() else x.round()


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


class Log2(nn.Module):
    """Powers of two for values in [0, 1]: 2^-code with code = round(-log2 x); 0 where the code has too many bits."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def codes(self, x: Tensor) -> Tensor:
        """The codes of x, as floats of x's shape; 2^bits and more stand for 0."""
        return round_through(-_above_zero(x).log2()).clamp_min(0)

    def forward(self, x: Tensor) -> Tensor:
        codes = self.codes(x)
        return torch.where(codes < 2**self.bits, 2.0**-codes, 0.0)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class LogSqrt2(nn.Module):
    """Powers of the root of two: scale * 2^(-code / 2), code = round(-2 log2(x / scale)); 0 where the code is too long.

    Args:
        bits: width of a code.
        scale: the largest value, a scalar.
    """

    def __init__(self, bits: int, scale: Tensor | float) -> None:
        super().__init__()
        self.bits = bits
        self.scale = nn.Parameter(torch.as_tensor(scale).detach().clone(), requires_grad=False)

    def codes(self, x: Tensor) -> Tensor:
        """The codes of x, as floats of x's shape; 2^bits and more stand for 0."""
        return round_through(-2 * _above_zero(x / self.scale).log2()).clamp_min(0)

    def forward(self, x: Tensor) -> Tensor:
        codes = self.codes(x)
        return torch.where(codes < 2**self.bits, 2.0 ** (-codes / 2), 0.0) * self.scale

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class TwinSoftmax(nn.Module):
    """Two uniform grids for values in [0, 1]: a fine one below a split, one over the whole interval above it.

    One bit of a code says which grid it names, so each has 2^(bits-1) values. As published, both grids take every
    value, clamped into their parts, and the results are added: about x + split for any x.

    Args:
        bits: width of a code, 2 or more.
        split: where the grids meet, a scalar in (0, 1].
        as_published: add the grids.
    """

    def __init__(self, bits: int, split: Tensor | float, as_published: bool = False) -> None:
        super().__init__()
        self.bits, self.as_published = bits, as_published
        self.split = nn.Parameter(torch.as_tensor(split).detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        top = 2 ** (self.bits - 1) - 1
        step = self.split / top
        coarse = round_through(torch.maximum(x, self.split).clamp_max(1) * top) / top
        fine = round_through(torch.minimum(x.clamp_min(0), self.split) / step) * step
        return coarse + fine if self.as_published else torch.where(x < self.split, fine, coarse)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, as_published={self.as_published}"


class TwinGelu(nn.Module):
    """Two uniform grids for the output of GELU: one below zero, down to its minimum, one above.

    One bit of a code is the sign, so each side has 2^(bits-1) steps.

    Args:
        bits: width of a code, 2 or more.
        scale: the step above zero, a scalar.
    """

    LOWEST = 0.16997124254703522  # minus the minimum of GELU, as published

    def __init__(self, bits: int, scale: Tensor | float) -> None:
        super().__init__()
        self.bits = bits
        self.scale = nn.Parameter(torch.as_tensor(scale).detach().clone(), requires_grad=False)

    @property
    def negative_scale(self) -> float:
        """The step below zero."""
        return self.LOWEST / 2 ** (self.bits - 1)

    def forward(self, x: Tensor) -> Tensor:
        half = 2 ** (self.bits - 1)
        above = round_through(x / self.scale).clamp(0, half - 1) * self.scale
        below = round_through(x / self.negative_scale).clamp(-half, 0) * self.negative_scale
        return above + below

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


def _above_zero(x: Tensor) -> Tensor:
    return x.clamp_min(torch.finfo(x.dtype).tiny)  # so that logarithms and their gradients are numbers


TINY = 1e-8  # a step for values that are all zero
