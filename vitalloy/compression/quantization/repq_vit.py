"""RepQ-ViT: calibrated with a grid for each channel, folded into one; attention maps on powers of the root of two.

Post-training, for low bits without training. Where a norm's output goes to linear layers alone, its channels get ranges
of their own, which the norm and those layers then absorb (`norm_folding`); softmax maps take a log-sqrt-2 grid; all
other ranges are the pair of percentiles with the least squared error. Weights have a grid for each output channel,
activations one a tensor, all with zero points. Li et al., "RepQ-ViT: Scale Reparameterization for Post-Training
Quantization of Vision Transformers" (ICCV 2023, arXiv 2212.08254), after its released code.

Departures: the norms that can be folded are found in any model, not by the names of ViT and Swin, so the last norm and
the classifier behind it count too; the common zero point is rounded and kept among the codes (it is free: the biases
make up for it). At most 32 images are looked at, as published.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vitalloy.compression.calibration import some
from vitalloy.compression.norm_folding import fold, norms_and_layers
from vitalloy.compression.observers import in_groups, percentile_grid, percentile_log_sqrt2
from vitalloy.compression.quantizers import Uniform, check_bits
from vitalloy.compression.scale_search import attention_map, attention_of
from vitalloy.compression.simulated import QuantizedAttend, simulate

IMAGES = 32


def quantize(
    model: nn.Module,
    images: Tensor,
    *,
    weights: int = 8,
    activations: int = 8,
    reparameterize: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """The model with percentile and log-sqrt-2 grids, its norms folded, in place.

    Args:
        images: (N, C, H, W).
        weights, activations: bits, 2 to 8. The factors of both products of attention are activations.
        reparameterize: fold channel scales into the norms; False leaves one range a tensor, for comparison.
        progress: is told (layers done, layers).

    Raises:
        CompressionError: bits out of range.
    """
    check_bits(2, 8, weights=weights, activations=activations)
    layers = simulate(model).values()
    images = some(images, IMAGES)
    grids: dict[tuple[nn.Module, str], nn.Module] = {}
    if reparameterize:
        grids |= _fold_norms(model, images, activations)
    for done, (layer, seen) in enumerate(in_groups(model, layers, images)):
        if isinstance(layer, QuantizedAttend):
            for place, x in zip(("query", "key", "value"), attention_of(seen), strict=False):
                grids[layer, f"{place}_quantizer"] = percentile_grid(x, activations)
            grids[layer, "map_quantizer"] = percentile_log_sqrt2(attention_map(seen), activations)
        else:
            grids[layer, "weight_quantizer"] = percentile_grid(layer.weight.detach(), weights, 0)
            if (layer, "input_quantizer") not in grids:
                grids[layer, "input_quantizer"] = percentile_grid(seen.inputs[0], activations)
        if progress:
            progress(done + 1, len(layers))
    for (layer, place), grid in grids.items():
        setattr(layer, place, grid)
    return model


def _fold_norms(model: nn.Module, images: Tensor, bits: int) -> dict[tuple[nn.Module, str], Uniform]:
    """Fold the scales of channels into norms; the one grid that each layer behind them then takes its input on."""
    pairs = norms_and_layers(model, images)
    firsts = {layers[0]: (norm, layers) for norm, layers in pairs}  # the layers behind a norm see the same channels
    channels = {}
    for layer, seen in in_groups(model, firsts, images):
        channels[layer] = percentile_grid(seen.inputs[0], bits, 1 if isinstance(layer, nn.Conv2d) else -1)
    grids = {}
    for first, (norm, layers) in firsts.items():
        scale, zero_point = channels[first].scale.flatten(), channels[first].zero_point.flatten()
        common = zero_point.mean().round().clamp(0, 2**bits - 1)
        step, zero = fold(norm, layers, scale, zero_point, common)
        grids |= {(layer, "input_quantizer"): Uniform(bits, step, zero) for layer in layers}
    return grids
