"""Layers that compute in floating point on quantized values: what a quantized model answers, not how fast it runs.

`simulate` turns the linear, convolution and attention layers of any model into these, in place: parameters keep their
names, every quantizer starts as an identity, and a method puts its own into the sockets.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.layers import sockets
from vitalloy.layers.attention import Attend

FLOAT = 32


def bits_of(*quantizers: nn.Module) -> int:
    """The widest of some quantizers, in bits; an identity is a float of 32."""
    return max(getattr(quantizer, "bits", FLOAT) for quantizer in quantizers)


class _Weighted:
    """What quantized layers with a weight have in common."""

    weight_quantizer: nn.Module
    input_quantizer: nn.Module

    @property
    def weight_bits(self) -> int:
        return bits_of(self.weight_quantizer)

    @property
    def activation_bits(self) -> int:
        return bits_of(self.input_quantizer)


class QuantizedLinear(_Weighted, nn.Linear):
    """A linear layer on a quantized weight (out, in) and a quantized input (..., in)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


class QuantizedConv2d(_Weighted, nn.Conv2d):
    """A convolution on a quantized weight (out, in / groups, kh, kw) and a quantized input (B, in, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


class QuantizedAttend(Attend):
    """Attention whose two products take quantized factors: q kᵀ, and the softmax map times v."""

    query_quantizer: nn.Module
    key_quantizer: nn.Module
    map_quantizer: nn.Module
    value_quantizer: nn.Module

    @property
    def weight_bits(self) -> int:
        return bits_of(self.key_quantizer, self.value_quantizer)

    @property
    def activation_bits(self) -> int:
        return bits_of(self.query_quantizer, self.map_quantizer)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None
    ) -> Tensor:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        logits = self.query_quantizer(q) @ self.key_quantizer(k).mT * scale
        weights = self.map_quantizer((logits if bias is None else logits + bias).softmax(-1))
        return F.dropout(weights, self.dropout, self.training) @ self.value_quantizer(v)


_SIMULATED = {
    nn.Linear: (QuantizedLinear, ("input_quantizer", "weight_quantizer")),
    nn.Conv2d: (QuantizedConv2d, ("input_quantizer", "weight_quantizer")),
    Attend: (QuantizedAttend, ("query_quantizer", "key_quantizer", "map_quantizer", "value_quantizer")),
}
QUANTIZED = (QuantizedLinear, QuantizedConv2d, QuantizedAttend)


def simulate(model: nn.Module) -> dict[str, nn.Module]:
    """Turn every plain linear, convolution and attention layer into its quantized sibling, in place.

    Returns the layers by name, in the order of the model's modules; a layer under several names once. Subclasses with a
    computation of their own are left alone.
    """
    for layer in model.modules():
        if type(layer) in _SIMULATED:
            kind, places = _SIMULATED[type(layer)]
            layer.__class__ = kind  # same parameters, buffers and hooks; only the forward pass differs
            for place in places:
                setattr(layer, place, nn.Identity())
    return quantized_layers(model)


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The simulated layers of a model by name, a layer under several names once."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QUANTIZED)}


def float_modules(model: nn.Module) -> list[str]:
    """Names of modules that hold matrices of their own outside any quantized layer, and so compute in float."""
    known = (*QUANTIZED, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    quantized = {id(p) for layer in sockets.find(model, known).values() for p in layer.parameters()}
    quantized |= {id(p) for m in model.modules() if hasattr(m, "weight_bits") for p in m.parameters()}
    return [
        name or type(module).__name__
        for name, module in model.named_modules()
        if any(p.ndim >= 2 and id(p) not in quantized for p in module.parameters(recurse=False))
    ]
