"""FQ-ViT: every operation on integers, with power-of-two factors before layer norms and log2 attention maps.

Post-training, for integer hardware. Weights have a symmetric grid for each output channel, activations one unsigned
grid a tensor, both over all values. The channels of a layer norm's input take steps of 1, 2, 4 or 8 times the least,
and the norm computes on integers; so does softmax, whose map is stored as powers of two. Lin et al., "FQ-ViT:
Post-Training Quantization for Fully Quantized Vision Transformer" (IJCAI 2022, arXiv 2111.13824), after its released
code. It is simulated: integers are held as floats.

Departures: layers are found in any model, through its sockets. Norms that are no layer norms over the last axis,
activation functions, and the sums of residual branches between two norms compute in floating point, on quantized inputs
where a quantized layer takes their result. q, k and v have a grid each. A bias of the attention logits is rounded to
their step, so that masks keep masking. Ranges contain 0; as published, zero points are clamped to the codes instead,
which clips a range that leaves 0 out (`as_published=True`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.compression.calibration import Seen, some
from vitalloy.compression.observers import in_groups, power_of_two_grid, range_grid
from vitalloy.compression.quantizers import TINY, Uniform, check_bits
from vitalloy.compression.scale_search import attention_map, attention_of
from vitalloy.compression.simulated import QuantizedAttend, simulate

IMAGES = 128
SHIFTS = 30  # powers of two that the integer exponential reaches down
POLYNOMIAL = (0.35815147, 0.96963238, 1.0)  # exp on (-log 2, 0]
MULTIPLIER = 7  # bits of a norm's multiplier, without the sign


def quantize(
    model: nn.Module,
    images: Tensor,
    *,
    weights: int = 8,
    activations: int = 8,
    attention: int = 4,
    integer_softmax: bool = True,
    as_published: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """The model with all its linear maps, attention and layer norms on integer grids, in place.

    Args:
        images: (N, C, H, W).
        weights, activations: bits, 2 to 8. The factors of both products of attention are activations.
        attention: bits of the softmax map, 2 to 8.
        integer_softmax: integer exponentials and a log2 map; False: softmax in floating point and a uniform map.
        as_published: clamp zero points to the codes.
        progress: is told (layers done, layers).

    Raises:
        CompressionError: bits out of range.
    """
    check_bits(2, 8, weights=weights, activations=activations, attention=attention)
    layers = [*simulate(model).values(), *(m for m in model.modules() if isinstance(m, nn.LayerNorm))]
    grids: dict[tuple[nn.Module, str], nn.Module] = {}
    for done, (layer, seen) in enumerate(in_groups(model, layers, some(images, IMAGES))):
        x = seen.inputs[0]
        if isinstance(layer, QuantizedAttend):
            q, k, v, scale, _ = attention_of(seen)
            for place, value in {"query": q, "key": k, "value": v, "logits": q @ k.mT * scale}.items():
                grids[layer, f"{place}_quantizer"] = range_grid(value, activations, as_published)
            grids[layer, "map_quantizer"] = (
                LogSoftmax(attention) if integer_softmax else range_grid(attention_map(seen), attention, as_published)
            )
        elif isinstance(layer, nn.LayerNorm):
            if _is_plain(layer, seen):
                grids[layer, "input_quantizer"] = power_of_two_grid(x, activations, as_published)
                grids[layer, "output_quantizer"] = range_grid(seen.output, activations, as_published)
        else:
            grids[layer, "input_quantizer"] = range_grid(x, activations, as_published)
            grids[layer, "weight_quantizer"] = weight_grid(layer.weight.detach(), weights)
        if progress:
            progress(done + 1, len(layers))
    for (layer, place), grid in grids.items():
        if isinstance(layer, (QuantizedAttend, nn.LayerNorm)):
            layer.__class__ = IntegerAttend if isinstance(layer, QuantizedAttend) else IntegerLayerNorm
        setattr(layer, place, grid)
    return model


def weight_grid(weight: Tensor, bits: int) -> Uniform:
    """The symmetric grid over each output channel of a weight (out, ...)."""
    tops = weight.flatten(1).abs().amax(1).view(-1, *[1] * (weight.ndim - 1))
    return Uniform(bits, (tops / (2**bits - 1) * 2).clamp_min(TINY), signed=True)


def _is_plain(norm: nn.LayerNorm, seen: Seen) -> bool:
    """Whether a norm has a weight and normalizes the last axis."""
    x, shape = seen.inputs[0], norm.normalized_shape
    if norm.weight is None or len(shape) != 1 or x.shape[-1:] != shape:
        return False
    return torch.allclose(F.layer_norm(x, shape, norm.weight, norm.bias, norm.eps), seen.output, atol=1e-4)


class IntegerLayerNorm(nn.LayerNorm):
    """A layer norm on the codes of its input: integer sums, an 8-bit multiplier and a shift for each value.

    `input_quantizer` has a scale for each channel, powers of two apart; the output is a multiple of the scale of
    `output_quantizer`, whose range is not enforced.
    """

    input_quantizer: Uniform
    output_quantizer: Uniform

    def forward(self, x: Tensor) -> Tensor:
        return self.on_grid(self.input_quantizer(x))

    def on_grid(self, x: Tensor) -> Tensor:
        """The norm of x (..., C), whose channels lie on the grid of the input quantizer."""
        scale, step = self.input_quantizer.scale.double(), self.output_quantizer.scale.double()
        least, channels = scale.min(), x.shape[-1]
        codes = (x.double() / scale).round() * (scale / least).round()
        total = codes.sum(-1, keepdim=True)
        variance = (channels * codes.square().sum(-1, keepdim=True) - total.square()).clamp_min(1)
        mean, deviation = least * total / channels, least / channels * variance.sqrt()
        slope = least / deviation * self.weight / step
        shift = (MULTIPLIER - slope.abs().clamp_min(2.0**-40).log2().floor()).clamp(0, 31)
        multiplier = (slope.abs() * 2**shift).floor().clamp(0, 2 ** (MULTIPLIER + 1) - 1)
        bias = 0 if self.bias is None else self.bias
        offset = ((bias - mean / deviation * self.weight) / step * 2**shift).round()
        return (((slope.sign() * multiplier * codes + offset) / 2**shift).round() * step).to(x.dtype)


class LogSoftmax(nn.Module):
    """Softmax on integers, its map on powers of two: code = log2(sum / exponential), rounded; 0 where it is too long.

    Args:
        bits: of a code.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    @staticmethod
    def exponentials(x: Tensor, scale: Tensor) -> Tensor:
        """exp(x - max x) along the last axis as integers, for x on a grid of step `scale`."""
        a, b, c = POLYNOMIAL
        codes = x / scale  # integers up to the rounding of floats, as published
        unit = (-0.6931 / scale).floor()  # -log 2, as published
        codes = torch.maximum(codes - codes.amax(-1, keepdim=True), SHIFTS * unit)
        halvings = (codes / unit).floor()
        rest = codes - unit * halvings
        value = rest * (rest + (b / a / scale).floor()) + (c / a / scale**2).floor()
        return (value * 2 ** (SHIFTS - halvings)).floor().clamp_min(0)

    def codes(self, x: Tensor, scale: Tensor) -> Tensor:
        """The codes of the map; 2^bits and more stand for 0."""
        parts = self.exponentials(x, scale)
        ratio = (parts.sum(-1, keepdim=True) / parts).round()
        floor = ratio.log2().floor()
        return floor + (ratio - 2**floor >= 2 ** (floor - 1))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        codes = self.codes(x, scale)
        return torch.where(codes < 2**self.bits, 2.0**-codes, 0.0)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class IntegerAttend(QuantizedAttend):
    """Attention whose logits are quantized too, and whose softmax may be that of integers."""

    logits_quantizer: Uniform

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None
    ) -> Tensor:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        step = self.logits_quantizer.scale
        logits = self.logits_quantizer(self.query_quantizer(q) @ self.key_quantizer(k).mT * scale)
        if bias is not None:
            logits = logits + (bias / step).round() * step
        if isinstance(self.map_quantizer, LogSoftmax):
            weights = self.map_quantizer(logits, step)
        else:
            weights = self.map_quantizer(logits.softmax(-1))
        return F.dropout(weights, self.dropout, self.training) @ self.value_quantizer(v)
