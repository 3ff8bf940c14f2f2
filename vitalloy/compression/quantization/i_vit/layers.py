"""The layers of I-ViT as a simulation that trains: pairs (real value, scale) in, a pair out.

A scale broadcasts against its value: one number, or one for each channel in the channel's place. Values stay in the
dtype of the model, scales are float64. In a float64 model every whole number is exact; in a float32 model those beyond
2^24 lose their last digits, and now and then a rounding falls the other way. `integer.py` makes the runtime of each
layer.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.compression.quantization.i_vit import arithmetic
from vitalloy.compression.quantization.i_vit.arithmetic import integers, straight

Pair = tuple[Tensor, Tensor]


class QuantAct(nn.Module):
    """Puts a value on a grid of `bits`: quantizes a plain tensor, requantizes a pair or the sum of two.

    While `running`, the grid follows the extremes of what passes (of the sum, for two); then it stays. The scale is
    stored with the model, and loading one ends the following, so that a loaded model computes what the saved one did.

    Args:
        momentum: what remains of the old extremes at each call.
    """

    def __init__(self, bits: int = 8, momentum: float = 0.95) -> None:
        super().__init__()
        self.bits, self.momentum, self.running = bits, momentum, True
        self.register_buffer("scale", torch.zeros(1))
        self.register_buffer("extremes", torch.zeros(2))  # smallest and largest; equal before the first call

    def forward(self, x: Tensor | Pair, identity: Pair | None = None) -> Pair:
        """x: a plain tensor, or a pair; identity: a pair to add."""
        value, scale = (x, None) if isinstance(x, Tensor) else x
        total = value if identity is None else value + identity[0]
        if self.running:
            self.follow(total)
        return self.place(total, value, scale, *(identity or (None, None))), self.scale.double()

    def place(self, total: Tensor, value: Tensor, scale: Tensor | None, *identity: Tensor | None) -> Tensor:
        if scale is None:
            return (arithmetic.quantize(value, self.scale.double(), self.bits) * self.scale).to(value.dtype)
        whole = arithmetic.requantize(value, scale, self.scale, self.bits, *identity)
        return straight(total, lambda y: (whole * self.scale).to(y.dtype))

    @torch.no_grad()
    def follow(self, *values: Tensor) -> None:
        now = torch.stack([min(v.amin() for v in values), max(v.amax() for v in values)]).to(self.extremes)
        if self.extremes[0] != self.extremes[1]:
            now = self.momentum * self.extremes + (1 - self.momentum) * now
        # a new tensor: the old one may be part of an earlier result
        self.extremes, self.scale = now, arithmetic.symmetric_scale(now[:1], now[1:], self.bits)

    def set_scale(self, scale: float) -> None:
        """Use this scale from now on, as a float32 number: then whole numbers are exact in float64."""
        self.scale = torch.full_like(self.scale, float(torch.tensor(scale, dtype=torch.float32)))
        self.running = False

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.running = self.running and f"{prefix}scale" not in state_dict

    def extra_repr(self) -> str:
        return f"bits={self.bits}, scale={self.scale.item():.4g}"


class Together(QuantAct):
    """Puts several pairs on one grid."""

    def forward(self, *pairs: Pair) -> tuple[Tensor, ...]:
        """Returns the values, then the scale that they share."""
        if self.running:
            self.follow(*(value for value, _ in pairs))
        return *(self.place(value, value, scale) for value, scale in pairs), self.scale.double()


class _Weighted(nn.Module):
    """A linear map of 8-bit integers with 8-bit weights, a scale for each output channel, and a 32-bit bias."""

    weight_bits = activation_bits = 8

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def weight_scale(self) -> Tensor:
        """(out,), from the weight as it is now."""
        rows = self.weight.detach().double().flatten(1)
        return arithmetic.symmetric_scale(rows.amin(1), rows.amax(1), 8)

    def constants(self, scale: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The integers of weight and bias for inputs of a scale, and the scale of the outputs, (out,)."""
        steps = self.weight_scale()
        weight = arithmetic.quantize(self.weight, steps.view(-1, *[1] * (self.weight.ndim - 1)), 8)
        steps = steps * scale
        bias = None if self.bias is None else arithmetic.quantize(self.bias, steps, 32).to(self.bias.dtype)
        return weight.to(self.weight.dtype), bias, steps


class QuantLinear(_Weighted):
    """A fully connected layer."""

    def forward(self, x: Pair) -> Pair:
        weight, bias, scale = self.constants(x[1])
        return (F.linear(integers(*x), weight, bias) * scale).to(x[0].dtype), scale


class QuantConv(_Weighted):
    """A convolution in one, two or three dimensions."""

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
    ) -> None:
        super().__init__(weight, bias)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    def forward(self, x: Pair) -> Pair:
        weight, bias, scale = self.constants(x[1])
        convolve = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
        out = convolve(integers(*x), weight, bias, self.stride, self.padding, self.dilation, self.groups)
        scale = scale.view(1, -1, *[1] * (weight.ndim - 2))
        return (out * scale).to(x[0].dtype), scale


class QuantMatMul(nn.Module):
    """The product of two integer matrices."""

    def forward(self, a: Pair, b: Pair) -> Pair:
        scale = a[1] * b[1]
        return (integers(*a) @ integers(*b) * scale).to(a[0].dtype), scale


LONG = 46  # bits of a numerator that loses nothing and leaves float64 exact


class Shiftmax(nn.Module):
    """Softmax over the last dimension by shifts, of `bits` bits.

    Args:
        word: bits of the numerator, see `arithmetic.shiftmax`; the authors' is 31.
    """

    def __init__(self, bits: int = 16, word: int = LONG) -> None:
        super().__init__()
        self.bits, self.word = bits, word

    def forward(self, x: Pair) -> Pair:
        _, out, scale = arithmetic.shiftmax(*x, self.bits, word=self.word)
        return (out * scale).to(x[0].dtype), scale


class ShiftGate(nn.Module):
    """sigmoid(factor * x), or x times that, by shifts: GELU (factor 1.702), SiLU and sigmoid (1) of 8-bit integers.

    Args:
        keep: multiply by x.
        bits: of the sigmoid.
        word: bits of the numerator, see `arithmetic.shiftmax`; the authors' is 31.
    """

    def __init__(self, factor: float = 1.702, keep: bool = True, bits: int = 8, word: int = LONG) -> None:
        super().__init__()
        self.factor, self.keep, self.bits, self.word = factor, keep, bits, word

    def forward(self, x: Pair) -> Pair:
        value, scale = x
        if self.keep:
            whole, out = arithmetic.shift_gelu(value, scale, self.bits, word=self.word, factor=self.factor)
        else:
            whole = integers(value, scale).double()
            whole = arithmetic.shift_sigmoid(whole, self.factor * scale.double(), self.bits, word=self.word)
            out = scale.new_tensor([2.0 ** (1 - self.bits)])
        return (whole * out).to(value.dtype), out


class QuantNorm(nn.Module):
    """LayerNorm over the last dimension, or group norm of one group, by an integer square root.

    Args:
        weight, bias: (C,), or None.
        channels_first: one group over all but the first dimension, with channels in dimension 1.
    """

    def __init__(self, weight: nn.Parameter | None, bias: nn.Parameter | None, channels_first: bool = False) -> None:
        super().__init__()
        self.weight, self.bias, self.channels_first = weight, bias, channels_first

    def dims(self, ndim: int) -> tuple[int, ...]:
        return tuple(range(1, ndim)) if self.channels_first else (-1,)

    def constants(self, unit: float, ndim: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The integers that stand for the bias, and the scale of the channels."""
        if self.weight is None:
            return torch.zeros_like(like, dtype=torch.float64), torch.full_like(like, unit, dtype=torch.float64)
        bias = torch.zeros_like(self.weight) if self.bias is None else self.bias
        found = arithmetic.norm_constants(self.weight, bias, unit)
        if not self.channels_first:
            return found
        return tuple(t.view(1, -1, *[1] * (ndim - 2)) for t in found)

    def forward(self, x: Pair) -> Pair:
        value, scale = x
        whole = integers(value, scale).double()
        normal, unit = arithmetic.normalize(whole, self.dims(value.ndim))
        shift, channel_scale = self.constants(unit, value.ndim, scale)
        return ((normal + shift) * channel_scale).to(value.dtype), channel_scale


class Scale(nn.Module):
    """A value times a constant, which goes into the scale: the integers stay."""

    def forward(self, x: Pair, constant: Tensor | float) -> Pair:
        return x[0] * constant, x[1] * constant


class Product(nn.Module):
    """The product of two values, element by element."""

    def forward(self, a: Pair, b: Pair) -> Pair:
        return a[0] * b[0], a[1] * b[1]


class Rectify(nn.Module):
    """ReLU."""

    def forward(self, x: Pair) -> Pair:
        return x[0].relu(), x[1]


class Sum(nn.Module):
    """The sum or mean over some dimensions of values of one scale.

    Args:
        mean: divide by the count, in the scale.
        rounded: the authors' mean, whose integers are rounded to the scale of what they are the mean of.
    """

    def __init__(self, dims: list[int], keepdim: bool, mean: bool, rounded: bool = False) -> None:
        super().__init__()
        self.dims, self.keepdim, self.mean, self.rounded = dims, keepdim, mean, rounded

    def forward(self, x: Pair) -> Pair:
        value, scale = x
        count = math.prod(value.shape[d] for d in self.dims) if self.mean else 1
        total = value.sum(self.dims, self.keepdim) / count
        if self.mean and self.rounded:
            return (integers(total, scale) * scale).to(value.dtype), scale
        return total, scale / count


class Pool(nn.Module):
    """Average pooling in two dimensions of values of one scale: the counts go into the scale.

    Args:
        count_padding: whether zeros around the map count.
    """

    def __init__(
        self, size: list[int], stride: list[int], padding: list[int], count_padding: bool, divisor: int | None
    ) -> None:
        super().__init__()
        self.size, self.stride, self.padding = size, stride, padding
        self.count_padding, self.divisor = count_padding, divisor

    def counts(self, like: Tensor) -> Tensor:
        """How many entries each output is the mean of, for maps such as `like`; a number where it is one."""
        if self.divisor or self.count_padding or not any(self.padding):
            return like.new_tensor([float(self.divisor or math.prod(self.size))])
        ones = torch.ones_like(like[:1, :1])
        return F.avg_pool2d(ones, self.size, self.stride, self.padding, divisor_override=1)

    def forward(self, x: Pair) -> Pair:
        value, scale = x
        total = F.avg_pool2d(value, self.size, self.stride, self.padding, divisor_override=1)
        counts = self.counts(value)
        return total / counts, scale / counts


class Adopt(nn.Module):
    """A constant on the grid of a value that it is joined with; it is rounded, never saturated."""

    def forward(self, constant: Tensor, like: Pair) -> Tensor:
        return (straight(constant / like[1], torch.round) * like[1]).to(like[0].dtype)


class Mask(nn.Module):
    """A fixed mask on the grid of the attention logits that it is added to, no lower than -2^20 of its steps.

    The authors add it to the real value, which then is on no grid. Shiftmax gives the same where the mask is far
    enough below the logits (steps below 0.18 for a mask of -60).
    """

    LEAST = -(2**20)

    def forward(self, mask: Tensor, like: Pair) -> Tensor:
        if mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, -torch.inf)
        return ((mask.double() / like[1].double()).round().clamp_min(self.LEAST) * like[1]).to(like[0].dtype)


class Leave(nn.Module):
    """Gives up the grid: the real value, for an operation that runs in floating point."""

    def forward(self, x: Pair) -> Tensor:
        return x[0]
