"""Binary layers for training: signs computed in floating point, with gradients that pass the sign where |x| < 1.

Forward values and gradients are those of the authors' layers. The sign of an exact zero is an option: the authors keep
0, which one bit cannot hold; -1 is what packed inference computes (`vitalloy.compression.quantization.bivit.packed`).
Zeros are no rare case: the values that an attention map of zeros and ones sums up are integers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.layers.attention import Attend

SHARE = 0.25  # of the largest weight of a row; what is below becomes 0
SCALES = ("learned", "mean")


def through(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value`, to the last bit, with the gradient of `surrogate`."""
    return value + (surrogate - surrogate.detach()) if surrogate.requires_grad else value


def clipped(x: Tensor) -> Tensor:
    """A stand-in whose gradient is 1 where -1 < x < 1 and 0 elsewhere."""
    return torch.where(x.abs() < 1, x, torch.zeros_like(x)) if x.requires_grad else x


def sign(x: Tensor, zero: int = 0) -> Tensor:
    """-1, `zero` or 1 by the sign of x; clipped straight-through gradient.

    Args:
        zero: the sign of an exact 0: 0 as published, or -1, so that one bit is enough.
    """
    return through(x.detach().sign() if zero == 0 else torch.where(x > 0, 1.0, -1.0).to(x), clipped(x))


def zero_one(x: Tensor, scaled: bool = False) -> Tensor:
    """1 where x > 0, else 0; clipped straight-through gradient.

    Args:
        scaled: the mean of all positive entries in place of 1, as a constant; the gradient stays the same.
    """
    positive = x > 0
    level = x.detach().clamp_min(0).sum() / positive.sum().clamp_min(1) if scaled else 1.0
    return through(positive.to(x) * level, clipped(x))


def softmax_aware(logits: Tensor) -> Tensor:
    """The attention map as zeros and ones: 1 where the softmax reaches a quarter of its row's largest weight.

    softmax >= max / 4 is logits >= max - ln 4, which needs no softmax. The gradient is that of the softmax.
    """
    ones = logits >= logits.amax(-1, keepdim=True) - math.log(1 / SHARE)
    return through(ones.to(logits), logits.softmax(-1) if logits.requires_grad else logits)


class Binary:
    """What binary linear layers and convolutions have in common: centred, signed weights, and a scale a channel."""

    weight: nn.Parameter
    scaling_factor: nn.Parameter | None

    def _setup(self, weight_bits: int, activation_bits: int, scale: str, sign_of_zero: int) -> None:
        if scale not in SCALES:
            raise ValueError(f"scale={scale!r} is not one of {SCALES}")
        self.weight_bits, self.activation_bits = weight_bits, activation_bits
        self.scale, self.sign_of_zero = scale, sign_of_zero
        if weight_bits > 1 or scale == "learned":
            nn.init.uniform_(self.weight, -0.015, 0.015)
        learned = weight_bits == 1 and scale == "learned"
        zeros = torch.zeros(len(self.weight), 1) if learned else None  # zeros: to be set from the weight
        self.register_parameter("scaling_factor", None if zeros is None else nn.Parameter(zeros))
        self.unset = learned

    @classmethod
    def _like(cls, layer: nn.Module, *shape: int, **options: object) -> Binary:
        """From a float layer: its parameters themselves, a bias if it had none, and the scales of its weight."""
        with torch.device("meta"):  # no values of its own, and no random numbers used up
            new = cls(*shape, **options)
        new.weight = layer.weight
        new.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight))) if layer.bias is None else layer.bias
        if new.scaling_factor is not None:
            new.scaling_factor = nn.Parameter(new.mean_scale())
        new.unset = False
        return new

    @torch.no_grad()
    def _set_scale(self) -> None:
        """Scales that are all zero become the mean scales; a scale that was trained or loaded stays."""
        if self.scaling_factor is not None and not self.scaling_factor.any():
            self.scaling_factor.copy_(self.mean_scale())
        self.unset = False

    def _load_from_state_dict(self, *args: object) -> None:
        super()._load_from_state_dict(*args)
        self.unset = self.scaling_factor is not None  # to be looked at in the next call

    def mean_scale(self) -> Tensor:
        """The mean of |weight| of each output channel, (out, 1), without gradient."""
        return self.weight.detach().flatten(1).abs().mean(1, keepdim=True)

    def channel_scale(self) -> Tensor:
        """The factor of each output channel, (out, 1)."""
        if self.unset:
            self._set_scale()
        return self.mean_scale() if self.scaling_factor is None else self.scaling_factor

    def signs(self) -> Tensor:
        """Signs of the weight, centred in each output channel, in its shape."""
        rows = self.weight.flatten(1)
        return sign(rows - rows.mean(1, keepdim=True), self.sign_of_zero).view_as(self.weight)

    def binary_input(self, x: Tensor) -> Tensor:
        return sign(x, self.sign_of_zero) if self.activation_bits == 1 else x

    def extra_repr(self) -> str:
        bits = f"weight_bits={self.weight_bits}, activation_bits={self.activation_bits}"
        return f"{super().extra_repr()}, {bits}, scale={self.scale!r}, sign_of_zero={self.sign_of_zero}"


class BinaryLinear(Binary, nn.Linear):
    """scale * (sign(x) or x) · sign(weight - row mean) + bias. Always with a bias, as published.

    Args:
        weight_bits: 1, or 32 for the float weight as it is.
        activation_bits: 1 for the sign of the input, 32 for the input as it is.
        scale: "learned", the parameter `scaling_factor` (out, 1), or "mean", the mean of |weight| of each row. A
            learned scale of only zeros (a new layer, or a checkpoint without it) is set to the mean scale in the first
            call.
        sign_of_zero: 0 or -1, see `sign`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        weight_bits: int = 1,
        activation_bits: int = 1,
        scale: str = "learned",
        sign_of_zero: int = 0,
    ) -> None:
        super().__init__(in_features, out_features)
        self._setup(weight_bits, activation_bits, scale, sign_of_zero)

    @classmethod
    def of(cls, linear: nn.Linear, **options: object) -> BinaryLinear:
        """From a float layer; the parameters are shared with it."""
        return cls._like(linear, linear.in_features, linear.out_features, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = self.binary_input(x)
        if self.weight_bits > 1:
            return F.linear(x, self.weight, self.bias)
        # scaling the sums and not the weight leaves the sums of signs integers, as a packed layer counts them
        return F.linear(x, self.signs()) * self.channel_scale().mT + self.bias


class BinaryConv2d(Binary, nn.Conv2d):
    """A dense 1x1 convolution as the linear layer of each pixel that it is: the same rule and options."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: tuple[int, int] = (1, 1),
        activation_bits: int = 1,
        scale: str = "learned",
        sign_of_zero: int = 0,
    ) -> None:
        super().__init__(in_channels, out_channels, 1, stride)
        self._setup(1, activation_bits, scale, sign_of_zero)

    @classmethod
    def of(cls, conv: nn.Conv2d, **options: object) -> BinaryConv2d:
        """From a float 1x1 convolution without groups or padding; the parameters are shared with it."""
        return cls._like(conv, conv.in_channels, conv.out_channels, stride=conv.stride, **options)

    def forward(self, x: Tensor) -> Tensor:
        sums = F.conv2d(self.binary_input(x), self.signs(), None, self.stride)
        return sums * self.channel_scale().unsqueeze(-1) + self.bias.view(-1, 1, 1)


def attention_map(
    products: Tensor, width: int, bias: Tensor | None = None, softmax: bool = True, dropout: float = 0.0
) -> Tensor:
    """From q kᵀ of signs (B, heads, N, M), whole numbers in [-width, width], to zeros and ones."""
    logits = products * width**-0.5
    logits = F.dropout(logits if bias is None else logits + bias, dropout)
    return softmax_aware(logits) if softmax else zero_one(logits)


class BinaryAttend(Attend):
    """Attention of the signs of q, k and v; the map is zeros and ones, and its rows are not normalised.

    Logits are q kᵀ / sqrt(d) + bias whatever scale the backbone passes: that one is made for the magnitudes of its
    float queries and keys, and signs have none.

    Args:
        softmax: the softmax-aware map; without it the published baseline, 1 where the logit is positive.
        dropout: of the logits in training, as published.
    """

    weight_bits, activation_bits = 1, 1

    def __init__(self, dropout: float = 0.0, *, softmax: bool = True, sign_of_zero: int = 0) -> None:
        super().__init__(dropout)
        self.softmax, self.sign_of_zero = softmax, sign_of_zero

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None
    ) -> Tensor:
        q, k, v = (sign(part, self.sign_of_zero) for part in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        return attention_map(q @ k.mT, q.shape[-1], bias, self.softmax, dropout) @ v

    def extra_repr(self) -> str:
        return f"softmax={self.softmax}, sign_of_zero={self.sign_of_zero}"
