"""EasyQuant: the scale of every tensor searched for the least angle between exact and quantized outputs.

Post-training, for integer execution of linear layers, convolutions and both products of attention, with one symmetric
scale a tensor. Wu et al., "EasyQuant: Post-training Quantization via Scale Optimization" (2020, arXiv 2006.16669),
which is about convolutional networks; factors and rounds are those of its use as a baseline for vision transformers.
Softmax, norms and activation functions stay in floating point. Candidates are tried on 256 rows of each product, evenly
spread over at most 32 images; the ranges come from all values of those images.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vitalloy.compression.calibration import some
from vitalloy.compression.observers import in_groups
from vitalloy.compression.quantizers import TINY, Uniform, check_bits
from vitalloy.compression.scale_search import (
    Candidates,
    Product,
    attention_map,
    attention_of,
    cosine,
    product_of_layer,
    products_of_attention,
    search,
)
from vitalloy.compression.simulated import QuantizedAttend, simulate

IMAGES = 32
LOW, HIGH = 0.5, 2.0  # factors of the first scale


def quantize(
    model: nn.Module,
    images: Tensor,
    *,
    weights: int = 8,
    activations: int = 8,
    rounds: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """The model with searched symmetric grids, in place.

    Args:
        images: (N, C, H, W).
        weights, activations: bits, 2 to 8. The factors of both products of attention are activations.
        rounds: how often the two scales of a product are searched in turn.
        progress: is told (layers done, layers).

    Raises:
        CompressionError: bits out of range.
    """
    check_bits(2, 8, weights=weights, activations=activations)
    layers = simulate(model).values()
    grids: dict[tuple[nn.Module, str], Uniform] = {}
    for done, (layer, seen) in enumerate(in_groups(model, layers, some(images, IMAGES))):
        if isinstance(layer, QuantizedAttend):
            q, k, v, *_ = attention_of(seen)
            logits, mixed = products_of_attention(seen)
            bits = (activations, activations)
            pairs = {
                ("query_quantizer", "key_quantizer"): best_grids(logits, *bits, rounds, (q, k)),
                ("map_quantizer", "value_quantizer"): best_grids(mixed, *bits, rounds, (attention_map(seen), v)),
            }
        else:
            found = best_grids(
                product_of_layer(layer, seen), activations, weights, rounds, (seen.inputs[0], layer.weight)
            )
            pairs = {("input_quantizer", "weight_quantizer"): found}
        grids |= {
            (layer, place): grid for places, both in pairs.items() for place, grid in zip(places, both, strict=True)
        }
        if progress:
            progress(done + 1, len(layers))
    for (layer, place), grid in grids.items():
        setattr(layer, place, grid)
    return model


def best_grids(
    product: Product, left_bits: int, right_bits: int, rounds: int = 3, values: tuple[Tensor, Tensor] | None = None
) -> tuple[Uniform, Uniform]:
    """The symmetric grids of a product's two sides that turn its result least, the right side's searched first.

    Args:
        values: what the two sides were taken from, for the first scales; the sides themselves when None.
    """
    sides = zip((left_bits, right_bits), values or (product.left, product.right), strict=True)
    candidates = [_candidates(bits, side) for bits, side in sides]
    scales = search(product, *candidates, cosine, rounds)
    return tuple(side.make(scale) for side, scale in zip(candidates, scales, strict=True))


def _candidates(bits: int, values: Tensor) -> Candidates:
    start = (values.detach().abs().amax() / (2 ** (bits - 1) - 0.5)).clamp_min(TINY)
    return Candidates.around(start[None], LOW, HIGH, lambda scale: Uniform(bits, scale[0], signed=True))
