"""Number formats by name, and fake quantization to them: INT2..INT8, small floats ExMy, BF16 and float.

INTb: symmetric codes -2^(b-1)..2^(b-1)-1; the largest magnitude of the tensor falls on 2^(b-1)-1.
ExMy: sign, x exponent bits (bias 2^(x-1)-1), y mantissa bits, subnormals kept. Every code is finite, except in E4M3
(the "fn" kind of accelerators: the last code is NaN, largest value 448) and E5M2 (as IEEE: the top exponent is
reserved, largest value 57344). The largest magnitude falls on the largest value, and larger ones saturate.
BF16 and float take no scale. Only the integer rule has public code; the floats follow their standard definitions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vitalloy.errors import CompressionError, suggest

TINY = 1e-8  # a tensor of zeros is scaled as if this were its largest magnitude
KNOWN = (
    *(f"INT{bits}" for bits in range(2, 9)),
    *("E2M1", "E3M0", "E2M2", "E2M3", "E3M2", "E3M3", "E4M3", "E5M2", "BF16", "float"),
)

#: Search spaces of the paper: S mixes 4, 8 and 16 bits, L every width from 4 to 8 bits and BF16.
SPACES: dict[str, tuple[str, ...]] = {
    "fliqs-s-int": ("INT4", "INT8", "BF16"),
    "fliqs-s-float": ("E2M1", "E4M3", "BF16"),
    "fliqs-l-int": ("INT4", "INT5", "INT6", "INT7", "INT8", "BF16"),
    "fliqs-l-float": ("E2M1", "E2M2", "E2M3", "E3M3", "E4M3", "BF16"),
}


@dataclass(frozen=True)
class Format:
    """A number format.

    Attributes:
        bits: width of one value, by which costs are counted.
        largest: the value on which the largest magnitude of a tensor falls; infinite: no scale.
        exponent: number of exponent bits; 0 for integers.
        mantissa: number of mantissa bits of a float.
    """

    name: str
    bits: int
    largest: float = float("inf")
    exponent: int = 0
    mantissa: int = 0

    def round(self, x: Tensor) -> Tensor:
        """The nearest values of the format, half to even; what lies beyond its ends is clipped to them."""
        if self.name == "float":
            return x
        if self.name == "BF16":
            return x.to(torch.bfloat16).to(x.dtype)
        if not self.exponent:
            return x.round().clamp(-self.largest - 1, self.largest)
        lowest = 2 - 2 ** (self.exponent - 1)  # exponent of the smallest normal number and of the subnormals
        step = (x.abs().log2().floor().clamp_min(lowest) - self.mantissa).exp2()
        return ((x / step).round() * step).clamp(-self.largest, self.largest)


@cache
def parse(name: str) -> Format:
    """A format by name in any case: "int4", "E2M1", "bf16", "float".

    Raises:
        CompressionError: there is no such format.
    """
    upper = str(name).upper()
    if upper == "FLOAT":
        return Format("float", 32)
    if upper == "BF16":
        return Format("BF16", 16)
    if found := re.fullmatch(r"INT(\d+)", upper):
        bits = int(found[1])
        if 2 <= bits <= 16:
            return Format(f"INT{bits}", bits, 2 ** (bits - 1) - 1)
    if found := re.fullmatch(r"E(\d)M(\d)", upper):
        exponent, mantissa = int(found[1]), int(found[2])
        if exponent and 2 <= exponent + mantissa <= 7:
            return Format(upper, 1 + exponent + mantissa, _largest(exponent, mantissa), exponent, mantissa)
    raise CompressionError(
        f"{name!r} is no number format.{suggest(upper, KNOWN)} Formats are {', '.join(KNOWN)}, and "
        "other ExMy of 3 to 8 bits."
    )


def _largest(exponent: int, mantissa: int) -> float:
    if (exponent, mantissa) == (4, 3):
        return 448.0
    top = 2**exponent - 1 - (2 ** (exponent - 1) - 1)
    return (2 - 2.0**-mantissa) * 2.0 ** (top - 1 if (exponent, mantissa) == (5, 2) else top)


def parse_pair(name: str) -> tuple[Format, Format]:
    """The formats of weights and activations: "INT4" is both, "INT4/INT8" gives them one by one."""
    weight, _, activation = str(name).partition("/")
    return parse(weight), parse(activation or weight)


def pair_name(weight: Format, activation: Format) -> str:
    """What `parse_pair` reads."""
    return weight.name if weight == activation else f"{weight.name}/{activation.name}"


def options(formats: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """The options of a search: a preset of `SPACES` by name, or a list of formats or pairs, in canonical spelling.

    Raises:
        CompressionError: an unknown preset or format, an empty list, or a repeated format.
    """
    if isinstance(formats, str):
        if formats.lower() not in SPACES:
            raise CompressionError(
                f"{formats!r} is no search space.{suggest(formats.lower(), SPACES)} "
                f"Name one of {', '.join(SPACES)}, or list formats, such as ['INT4', 'INT8']."
            )
        formats = SPACES[formats.lower()]
    names = tuple(pair_name(*parse_pair(name)) for name in formats)
    if not names or len(set(names)) < len(names):
        raise CompressionError(f"A search space lists each format once, at least one; got {list(formats)}.")
    return names


def fake_quantize(
    x: Tensor, number_format: Format | str, dim: int | None = None, factor: float = 1.0, absmax: Tensor | None = None
) -> Tensor:
    """x rounded to a format, in x's own type and shape; the gradient passes as if nothing had been rounded.

    Args:
        x: any shape.
        dim: the scale is the largest magnitude along this dimension; None: of the whole tensor.
        factor: multiplies the largest magnitude (the published code calls it a percentile); below 1 it clips.
        absmax: a fixed largest magnitude that broadcasts against x, instead of x's own.
    """
    number_format = parse(number_format) if isinstance(number_format, str) else number_format
    if number_format.name == "float":
        return x
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))  # the scale of half precision would underflow
    if number_format.name == "BF16":
        rounded = number_format.round(wide)
    else:
        if absmax is None:
            absmax = wide.abs().amax() if dim is None else wide.abs().amax(dim, keepdim=True)
        scale = (absmax * factor).clamp_min(TINY) / number_format.largest
        rounded = number_format.round(wide / scale if number_format.exponent else (1 / scale) * wide) * scale
    rounded = rounded.to(x.dtype)
    return _StraightThrough.apply(x, rounded) if x.requires_grad and torch.is_grad_enabled() else rounded


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
