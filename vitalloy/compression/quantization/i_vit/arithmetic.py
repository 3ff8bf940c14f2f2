"""The arithmetic of I-ViT: a real value and its scale in, integers out, with the gradients of the authors' training.

Every tensor is a pair of a real value and a positive scale that broadcasts against it; value / scale is a whole
number. The functions take such pairs and give whole numbers as floating-point tensors. Roundings pass gradients
straight through; everything else is differentiated as it is written. What must be exact is computed in float64,
whatever the dtype of the tensors.

"I-ViT: Integer-only Quantization for Efficient Vision Transformer Inference", Li and Gu, ICCV 2023, arXiv 2207.01405.

Departures: in float32 a value is rounded to its whole number wherever it is read. The authors read value / scale as it
comes, which can fall just below a whole number and lose a unit at the next floor. A LayerNorm weight nearer to
zero than 2^-15 of the largest is moved there: the authors divide by it. A channel of scale zero holds zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps  # the smallest scale
WORD = 31  # bits of the numerator of a reciprocal
SHIFTMAX_SHIFT, SHIFTGELU_SHIFT = 15, 23  # bits behind the point of an exponential


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def straight(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function(x), of the shape of x, with the gradient of x itself."""
    return _Straight.apply(x, function)


def limits(bits: int) -> tuple[int, int]:
    """The smallest and largest signed integer of so many bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def symmetric_scale(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """The step of a grid symmetric about zero that reaches from `low` to `high`."""
    return (torch.maximum(-low, high) / limits(bits)[1]).clamp_min(EPS)


def quantize(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The integers nearest to x / scale, half to even, saturated; the gradient is 1 / scale everywhere."""
    return straight(x * (1 / scale), lambda y: y.round().clamp(*limits(bits)))


def integers(x: Tensor, scale: Tensor) -> Tensor:
    """The whole numbers of a pair, in the dtype of x.

    In float64 the quotient is whole where the scale is a float32 number, and left as it comes, as with the authors.
    """
    return x / scale if x.dtype == torch.float64 else straight(x / scale, torch.round).to(x.dtype)


def dyadic(ratio: Tensor) -> tuple[Tensor, Tensor]:
    """(m, e), float64 whole numbers with ratio = m / 2^e to 31 bits; the half rounds away from zero."""
    mantissa, exponent = torch.frexp(ratio.double())
    scaled = mantissa * 2**31
    return scaled.sign() * (scaled.abs() + 0.5).floor(), 31.0 - exponent


@torch.no_grad()
def rescale(x: Tensor, scale: Tensor, target: Tensor) -> Tensor:
    """The integers of (x, scale) on the grid of `target`, unsaturated, float64: round(z m / 2^e), half to even.

    The ratio of the scales is that to `target` as a float32 number, as with the authors.
    """
    x, scale = x.double(), scale.double()
    mantissa, shift = dyadic(scale / target.float().double())
    whole = (x / torch.where(scale == 0, 1.0, scale)).round()
    return (whole * mantissa * torch.exp2(-shift)).round()


@torch.no_grad()
def requantize(
    x: Tensor,
    scale: Tensor,
    target: Tensor,
    bits: int,
    identity: Tensor | None = None,
    identity_scale: Tensor | None = None,
) -> Tensor:
    """The integers of (x, scale), plus those of (identity, identity_scale), on the grid of `target`.

    Each addend is rounded by itself; the sum is saturated to `bits`. float64, no gradient.
    """
    total = rescale(x, scale, target)
    if identity is not None:
        total = total + rescale(identity, identity_scale, target)
    return total.clamp(*limits(bits))


def shift_exp(whole: Tensor, scale: Tensor, shift: int) -> Tensor:
    """exp(whole * scale) as integers of scale about `scale` / 2^shift, by shifts and one division.

    `whole` is meant to be zero or below; it may be above, where the exponent of two then exceeds `shift`.
    """
    floor = torch.floor
    power = whole + straight(whole / 2, floor) - straight(whole / 16, floor)  # times log2(e), nearly
    one = torch.floor(-1 / scale.detach())
    power = torch.maximum(power, shift * one)
    halvings = straight(power / one, floor)
    rest = power - one * halvings  # in (one, 0]
    return straight((rest / 2 - one) * 2 ** (shift - halvings), floor).clamp_min(0)


def shiftmax(
    x: Tensor, scale: Tensor, bits: int = 16, shift: int = SHIFTMAX_SHIFT, word: int = WORD
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over the last dimension of a pair.

    Args:
        word: bits of the numerator that the sum of exponentials divides; a larger sum is saturated. With the authors'
            31 few bits of the quotient are left, so that probabilities are some percent too small, or far too large.

    Returns:
        The exponentials and the probabilities, both as integers in float64, and the scale of the probabilities,
        2^-(bits - 1).
    """
    whole, scale = integers(x, scale).double(), scale.double()
    exponential = shift_exp(whole - whole.max(dim=-1, keepdim=True).values, scale, shift)
    factor = _inverse(exponential.sum(dim=-1, keepdim=True), word)
    out = straight(exponential * factor / 2 ** (word + 1 - bits), torch.floor)
    return exponential, out, scale.new_tensor([2.0 ** (1 - bits)])


def shift_sigmoid(
    whole: Tensor,
    scale: Tensor,
    bits: int = 8,
    shift: int = SHIFTGELU_SHIFT,
    word: int = WORD,
    largest: Tensor | None = None,
) -> Tensor:
    """sigmoid(whole * scale) as integers of scale 2^-(bits - 1), stabilized by the maximum over the last dimension.

    `largest` replaces that maximum; `word` as in `shiftmax`.
    """
    largest = whole.max(dim=-1, keepdim=True).values if largest is None else largest
    exponential = shift_exp(whole - largest, scale, shift)
    total = exponential + shift_exp(-largest, scale, shift)
    return straight(exponential * _inverse(total, word) / 2 ** (word + 1 - bits), torch.floor)


def shift_gelu(
    x: Tensor, scale: Tensor, bits: int = 8, shift: int = SHIFTGELU_SHIFT, word: int = WORD, factor: float = 1.702
) -> tuple[Tensor, Tensor]:
    """x * sigmoid(factor * x) of a pair: its integers in float64, and their scale. factor 1 is SiLU."""
    whole, scale = integers(x, scale).double(), scale.double()
    gate = shift_sigmoid(whole, factor * scale, bits, shift, word)
    return whole * gate, scale / 2 ** (bits - 1)


def _inverse(total: Tensor, word: int) -> Tensor:
    return straight((2**word - 1) / total.clamp_max(2**word - 1), torch.floor)


def integer_sqrt(square: Tensor) -> Tensor:
    """About the square root of whole numbers: ten steps of Newton from 2^16, rounded down each."""
    root = torch.full_like(square, 2.0**16)
    for _ in range(10):
        root = straight((root + straight(square / root, torch.floor)) / 2, torch.floor)
    return root


def normalize(whole: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, float]:
    """Zero mean and unit variance over `dims` of whole numbers in float64: integers and their scale."""
    unit = norm_unit(math.prod(whole.shape[d] for d in dims))
    centred = whole - straight(whole.mean(dims, keepdim=True), torch.round)
    factor = straight((2**WORD - 1) / integer_sqrt(centred.square().sum(dims, keepdim=True)).clamp_min(1), torch.floor)
    return straight(centred * factor / 2, torch.floor), unit


def norm_unit(count: int) -> float:
    """The scale of `count` numbers normalized; its root is a float32, as the authors'."""
    return float(torch.tensor(float(count)).sqrt()) / 2**30


def norm_constants(weight: Tensor, bias: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """The integers that stand for a norm's bias, and the scale of its channels, which alone holds its weight."""
    least = weight.detach().abs().max() * 2**-15
    usable = torch.where(weight.detach().abs() < least, least, weight.double())
    return ((bias.double() / usable).detach() / unit).floor(), usable * unit


def layer_norm(x: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm over the last dimension of a pair.

    Returns:
        Its integers, in float64; those that stand for the bias, (C,); the scale of each channel, (C,), as negative
        as the weight. The bias gets no gradient, as with the authors.
    """
    normal, unit = normalize(integers(x, scale).double(), (-1,))
    shift, channel_scale = norm_constants(weight, bias, unit)
    return normal + shift, shift, channel_scale
