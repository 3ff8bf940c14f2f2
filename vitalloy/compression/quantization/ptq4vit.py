"""PTQ4ViT: two grids behind softmax and GELU, and scales searched by the error that matters for the answer.

Post-training. The softmax map and the output of GELU get a grid each for their two parts (twin uniform quantization);
the scales of all products are searched for the least squared error of their output, weighted by the squared gradient of
the loss. Yuan et al., "PTQ4ViT: Post-Training Quantization for Vision Transformers with Twin Uniform Quantization"
(ECCV 2022, arXiv 2111.12293), after its released code: symmetric scales, one a tensor; a weight that makes q, k and v
has one for each; a convolution's weight one a channel. What the image enters takes it as it is; softmax and norms stay
in floating point.

Departures:
- the gradient is that of labels drawn from the model's own answer (Fisher information). The published gradient, of the
  divergence between the model's answer and itself, is zero up to rounding noise; `as_published=True` takes it;
- the grids behind softmax divide the values between them. The released code adds both, which gives about x + split;
  `as_published=True` does so too;
- layers are found by what they compute, in any model: what takes the output of a GELU has the twin grid, a linear layer
  that makes n arguments of an attention has n scales;
- candidates are tried on 256 rows of each product, evenly spread over at most 32 images; the ranges come from all
  values of those images.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.compression.calibration import Seen, fisher_loss, some
from vitalloy.compression.observers import in_groups
from vitalloy.compression.quantizers import TINY, TwinGelu, TwinSoftmax, Uniform, check_bits
from vitalloy.compression.scale_search import (
    Candidates,
    Product,
    attention_of,
    curvature,
    product_of_layer,
    products_of_attention,
    search,
)
from vitalloy.compression.simulated import QuantizedAttend, QuantizedConv2d, QuantizedLinear, simulate
from vitalloy.compression.wiring import makers
from vitalloy.layers.activations import QuickGELU

IMAGES = 32
LOW, HIGH = 0.01, 1.2  # factors of the first scale
FLOOR = 1e-6  # of the mean squared gradient
SPLITS = 20  # 1, 1/2, 1/4, ... where the grids behind softmax may meet


def quantize(
    model: nn.Module,
    images: Tensor,
    *,
    weights: int = 8,
    activations: int = 8,
    rounds: int = 3,
    as_published: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """The model with twin and searched symmetric grids, in place.

    Args:
        images: (N, C, H, W).
        weights, activations: bits, 2 to 8. The factors of both products of attention are activations.
        rounds: how often the two scales of a product are searched in turn.
        as_published: see the top of this file.
        seed: of the drawn labels.
        progress: is told (layers done, layers).

    Raises:
        CompressionError: bits out of range.
    """
    check_bits(2, 8, weights=weights, activations=activations)
    layers = simulate(model).values()
    images = some(images, IMAGES)
    behind_gelu, row_groups = _wiring(model, images[:2])

    def loss(logits: Tensor) -> Tensor:
        if as_published:
            return F.kl_div(logits.log_softmax(-1), logits.detach().softmax(-1), reduction="batchmean")
        return fisher_loss(logits, torch.Generator().manual_seed(seed))

    grids: dict[tuple[nn.Module, str], nn.Module] = {}
    for done, (layer, seen) in enumerate(in_groups(model, layers, images, loss)):
        if isinstance(layer, QuantizedAttend):
            found = _attention(seen, activations, rounds, as_published)
        else:
            exact = seen.inputs[0].shape == images.shape and torch.equal(seen.inputs[0], images)
            bits = None if exact else activations
            groups = layer.out_channels if isinstance(layer, QuantizedConv2d) else row_groups.get(layer, 1)
            found = _layer(layer, seen, weights, bits, groups, rounds, layer in behind_gelu)
        grids |= {(layer, place): grid for place, grid in found.items()}
        if progress:
            progress(done + 1, len(layers))
    for (layer, place), grid in grids.items():
        setattr(layer, place, grid)
    return model


def _wiring(model: nn.Module, images: Tensor) -> tuple[set[nn.Module], dict[nn.Module, int]]:
    """The layers that take only what GELUs give; how many arguments of an attention each linear layer makes."""
    weighted, gelu = (QuantizedLinear, QuantizedConv2d), (nn.GELU, QuickGELU)
    taken = makers(model, images, lambda m: isinstance(m, gelu), lambda m: isinstance(m, weighted))
    behind = {layer for layer, (found, *_) in taken.items() if None not in found}
    taken = makers(model, images, lambda m: isinstance(m, QuantizedLinear), lambda m: isinstance(m, QuantizedAttend))
    counts: dict[nn.Module, int] = {}
    for arguments in taken.values():
        made = [next(iter(found)) for found in arguments[:3] if len(found) == 1]
        counts |= {layer: made.count(layer) for layer in made if layer is not None}
    return behind, {layer: n for layer, n in counts.items() if layer.out_features % n == 0}


def _layer(
    layer: QuantizedLinear | QuantizedConv2d,
    seen: Seen,
    weights: int,
    activations: int | None,
    groups: int,
    rounds: int,
    twin: bool,
) -> dict[str, nn.Module]:
    x, product = seen.inputs[0], _weighted(product_of_layer(layer, seen))
    tops = layer.weight.detach().reshape(groups, -1).abs().amax(1)
    shape = (*product.right.shape[:2], 1)

    def weight_grid(shape: tuple[int, ...], scales: Tensor) -> Uniform:
        return Uniform(weights, scales.repeat_interleave(len(layer.weight) // len(scales)).view(shape), signed=True)

    right = _around(tops, weights, partial(weight_grid, shape))
    left = None
    if activations is not None:
        top = x.amax() if twin else x.abs().amax()
        left = _around(top[None], activations, partial(_twin_gelu if twin else _symmetric, activations))
    scale, scales = search(product, left, right, curvature, rounds)
    own = (-1, *[1] * (layer.weight.ndim - 1))
    found: dict[str, nn.Module] = {"weight_quantizer": weight_grid(own, scales)}
    if left is not None:
        found["input_quantizer"] = left.make(scale)
    return found


def _attention(seen: Seen, bits: int, rounds: int, as_published: bool) -> dict[str, nn.Module]:
    q, k, v, *_ = attention_of(seen)
    query, key, value = (_around(x.abs().amax()[None], bits, partial(_symmetric, bits)) for x in (q, k, v))
    splits = 2.0 ** -torch.arange(SPLITS, dtype=q.dtype, device=q.device)[:, None]
    twin = Candidates(lambda split: TwinSoftmax(bits, split[0], as_published), splits[0], splits)
    logits, mixed = (_weighted(product) for product in products_of_attention(seen))
    query_scale, key_scale = search(logits, query, key, curvature, rounds, left_first=True)
    split, value_scale = search(mixed, twin, value, curvature, rounds, left_first=True)
    return {
        "query_quantizer": query.make(query_scale),
        "key_quantizer": key.make(key_scale),
        "map_quantizer": twin.make(split),
        "value_quantizer": value.make(value_scale),
    }


def _around(tops: Tensor, bits: int, make: Callable[[Tensor], nn.Module]) -> Candidates:
    return Candidates.around((tops / (2 ** (bits - 1) - 0.5)).clamp_min(TINY), LOW, HIGH, make)


def _symmetric(bits: int, scale: Tensor) -> Uniform:
    return Uniform(bits, scale[0], signed=True)


def _twin_gelu(bits: int, scale: Tensor) -> TwinGelu:
    return TwinGelu(bits, scale[0])


def _weighted(product: Product) -> Product:
    """The product, its gradients in units of their root mean square, with a floor: what has none is weighted evenly."""
    gradient = product.gradient.double()
    size = gradient.square().mean().sqrt()
    relative = gradient / size if size > 0 else torch.ones_like(gradient)
    product.gradient = (relative.square() + FLOOR).sqrt().to(product.left)
    return product
